// One call of fused_experts or fused_moe: its arguments, what is remembered of calls like it, and how it runs.
#pragma once

#include "tensors.h"

#include "../moe/fused_moe.h"

#include <memory>
#include <span>

namespace metal_moe::bindings {

/// Arguments that Python has checked, or that are like arguments it has checked.
struct ExpertsCall {
  MoeEngine* engine = nullptr;
  TensorView x;
  ExpertsLayer layer; // `family` points into memory of the caller's

  bool routed = false; // fused_moe: routes are computed
  TensorView weights;  // [T, k], where they are given
  TensorView ids;
  TensorView logits; // [T, E], where they are not
  TensorView correction_bias;
  uint32_t top_k = 0;
  RoutingOptions routing;

  const char* operation() const { return routed ? "fused_moe" : "fused_experts"; }
};

/// What the call needs that depends on shapes, strides, dtypes, options and the engine alone, made at the first such
/// call.
///
/// Once made, it also says that Python has accepted arguments like these (find_packing): call it only with arguments
/// that have been checked. At most MAX_PACKINGS are kept. With the interpreter's lock held, as is the next.
std::shared_ptr<const ExpertsPacking> packing_of(const ExpertsCall& call);
constexpr size_t MAX_PACKINGS = 512;

/// The packing that an earlier call like this one made, or null. `call` need not have been checked, nor do its tensors
/// need buffers. The caller compares shapes of quantised weights, which are not part of a packing, and the codes: where
/// they differ, packing_of has the call's own.
std::shared_ptr<const ExpertsPacking> find_packing(const ExpertsCall& call);

/// Packings kept now.
size_t packing_count();

/// Runs the call into the tensor `out` [T, H], which is contiguous. `packing`: the call's. `arguments`: what must live
/// while it runs, its tensors and whatever else.
void run_experts(const ExpertsCall& call, const ExpertsPacking& packing, std::span<PyObject* const> arguments,
                 pybind11::handle out);

} // namespace metal_moe::bindings
