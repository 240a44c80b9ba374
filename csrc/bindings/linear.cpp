// metal_moe._core: small matrix products and LoRA.
#include "../linear/encode_lora.h"
#include "run.h"
#include "tensors.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

namespace py = pybind11;
using namespace py::literals;

namespace metal_moe::bindings {
namespace {

MatmulKernel read_kernel(const std::optional<std::string>& name) {
  if (!name)
    return MatmulKernel::BySize;
  if (*name == "gemv")
    return MatmulKernel::Gemv;
  if (*name == "tile")
    return MatmulKernel::Tile;
  throw py::value_error("kernel is '" + *name + "': must be 'gemv', 'tile' or None");
}

/// A matrix as a batch of one.
void add_batch(TensorView& view) {
  if (view.rank == 3)
    return;
  view.shape = {1, view.shape[0], view.shape[1]};
  view.strides = {0, view.strides[0], view.strides[1]};
  view.rank = 3;
}

/// Whether each row's elements are neighbours.
bool has_rows(const TensorView& view) { return view.shape[2] == 1 || view.strides[2] == 1; }

TensorView transpose(TensorView view) {
  std::swap(view.shape[1], view.shape[2]);
  std::swap(view.strides[1], view.strides[2]);
  return view;
}

TensorView read_matrices(Context& context, py::handle tensor, const char* name) {
  TensorView view = read_tensor(context, tensor, name, 0);
  if (view.rank != 2 && view.rank != 3)
    throw py::value_error(std::string(name) + " has " + std::to_string(view.rank) + " dimensions: must have 2 or 3");
  add_batch(view);
  return view;
}

/// False, and nothing done, where the kernels do not take the matrices as they lie.
bool matmul(std::string_view engine_name, py::handle a, py::handle b, py::handle out,
            const std::optional<std::string>& kernel) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  Context& context = engine.context();
  const MatmulKernel by = read_kernel(kernel);
  const TensorView a_view = read_matrices(context, a, "a"), b_view = read_matrices(context, b, "b");
  const TensorView turned = transpose(b_view);
  // One column is a row of the transpose: dot products along K.
  const bool transposed = has_rows(turned) && (!has_rows(b_view) || b_view.shape[2] == 1);
  if (!has_rows(a_view) || !(transposed || has_rows(b_view)))
    return false;
  const TensorView out_view = read_matrices(context, out, "out");
  run(engine, "matmul", keeping(a, b, out), [&](CommandStream& stream) {
    encode_matmul(stream, engine, a_view, transposed ? turned : b_view, transposed, by, out_view);
  });
  return true;
}

/// The record of an operation that PyTorch computes, now: what it reads must be there.
void matmul_by_torch(std::string_view engine_name) {
  settle_batch();
  const ObservedOperation observed = begin_operation(MoeEngine::get(engine_name), "matmul");
  last_dispatch().family = "torch";
  count(Fallback::TorchMatmul);
}

void lora(std::string_view engine_name, py::handle x, py::handle a, py::handle b, float scale, py::handle base,
          py::handle adapter_ids, py::handle scales, py::handle out, const std::optional<std::string>& kernel) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  Context& context = engine.context();
  LoraLayer layer;
  const TensorView x_view = read_tensor(context, x, "x", 2);
  layer.a = read_matrices(context, a, "A");
  layer.b = read_matrices(context, b, "B");
  layer.base = read_tensor(context, base, "base", 2, true);
  layer.adapter_ids = read_tensor(context, adapter_ids, "adapter_ids", 1, true);
  layer.scales = read_tensor(context, scales, "scale", 1, true);
  layer.scale = scale;
  const TensorView out_view = read_tensor(context, out, "out", 2);
  const MatmulKernel by = read_kernel(kernel);
  run(engine, "lora", keeping(x, a, b, base, adapter_ids, scales, out),
      [&](CommandStream& stream) { encode_lora(stream, engine, x_view, layer, by, out_view); });
}

} // namespace

void define_linear(py::module_& m) {
  m.def("matmul", &matmul, "engine"_a, "a"_a, "b"_a, "out"_a, "kernel"_a = py::none(),
        "out [M, N] or [B, M, N] contiguous = a b, K not 0; False where a or b do not lie in rows.");
  m.def("matmul_by_torch", &matmul_by_torch, "engine"_a, "Records that PyTorch computes a product.");
  m.def("lora", &lora, "engine"_a, "x"_a, "A"_a, "B"_a, "scale"_a, "base"_a, "adapter_ids"_a, "scales"_a, "out"_a,
        "kernel"_a = py::none(), "out [T, outputs] = base + scale * (x [T, inputs] A^T) B^T.");
}

} // namespace metal_moe::bindings
