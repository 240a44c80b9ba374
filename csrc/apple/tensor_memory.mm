// Where an MPS tensor lies: its storage's pointer is the MTLBuffer, and its first element is storage_offset elements
// in. PyTorch's headers first: they cannot be read where kernels/ has already named a type ScalarType.
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include "../bindings/tensors.h"

namespace py = pybind11;

namespace metal_moe::bindings {

void locate(Context&, py::handle tensor, const char* name, size_t bytes, TensorView& view) {
  if (!THPVariable_Check(tensor.ptr()))
    throw py::type_error(std::string(name) + " must be a torch.Tensor");
  const at::Tensor& value = THPVariable_Unpack(tensor.ptr());
  if (!value.is_mps())
    throw py::value_error(std::string(name) + " is on device " + value.device().str() + "; it must be on mps");
  auto* buffer = static_cast<MTL::Buffer*>(const_cast<void*>(value.storage().data()));
  if (!buffer)
    throw py::value_error(std::string(name) + " has no memory to compute with");
  view.offset = static_cast<size_t>(value.storage_offset()) * value.itemsize();
  if (view.offset + bytes > buffer->length())
    throw py::value_error(std::string(name) + " needs " + std::to_string(view.offset + bytes) +
                          " bytes of its storage, which has " + std::to_string(buffer->length()));
  view.buffer = NS::RetainPtr(buffer);
  view.address = view.offset; // Metal aligns the beginning of a buffer to more than any access needs
}

} // namespace metal_moe::bindings
