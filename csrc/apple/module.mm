// What the Python module has on macOS alone.

// PyTorch's headers first: they cannot be read where kernels/ has already named a type ScalarType.
#include "torch_mps.h"

#include "capture.h"
#include "residency.h"

#include "../bindings/gil.h"
#include "../bindings/tensors.h"
#include "../moe/engine.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace py::literals;

namespace metal_moe::bindings {

namespace {

std::unique_ptr<apple::Residency> keep_resident(std::string_view engine, const std::vector<py::object>& tensors) {
  Context& context = MoeEngine::get(engine).context();
  std::vector<NS::SharedPtr<MTL::Buffer>> kept;
  std::vector<MTL::Buffer*> buffers;
  for (const py::object& tensor : tensors) {
    const TensorView view = read_tensor(context, tensor, "tensor", 0);
    if (!view)
      continue;
    kept.push_back(view.buffer);
    buffers.push_back(view.buffer.get());
  }
  const GilRelease release;
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  auto* queue = apple::metal_object<MTL::CommandQueue>(stream->commandQueue());
  return std::make_unique<apple::Residency>(context.device(), queue, buffers);
}

} // namespace

void define_apple(py::module_& m) {
  py::class_<apple::Residency>(m, "Residency")
      .def("release", &apple::Residency::release)
      .def_property_readonly("supported", &apple::Residency::supported)
      .def_property_readonly("bytes", &apple::Residency::bytes);
  m.def("keep_resident", &keep_resident, "engine"_a, "tensors"_a, "Memory of MPS tensors that stays resident.");
  m.def(
      "start_capture",
      [](std::string_view engine, const std::string& path) {
        apple::start_capture(MoeEngine::get(engine).context().device(), path);
      },
      "engine"_a, "path"_a, "Starts a GPU capture of the device.");
  m.def("stop_capture", &apple::stop_capture, "Ends it.");
}

} // namespace metal_moe::bindings
