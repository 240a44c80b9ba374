// The operations of the product, on a stream or run to the end.
#pragma once

#include "encode_experts.h"
#include "encode_gather.h"
#include "encode_group.h"
#include "encode_route.h"

#include "../core/observer.h"
#include "../core/trace.h"

namespace metal_moe {

/// [tokens, slots] ids (int32 or int64) of a tensor.
SlotsView ids_view(const TensorView& ids);
/// [tokens, slots] weights (fp32, fp16 or bf16) of a tensor.
SlotsView weights_view(const TensorView& weights);

/// pack_experts of a layer whose routes encode_fused_moe computes.
ExpertsPacking pack_routed_experts(const MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                                   uint32_t top_k);

/// Route and experts in one command buffer: out [T, H] from x [T, H] and logits [T, E]. Ids and weights stay in
/// scratch. `packing`: the layer's, where the caller has it.
void encode_fused_moe(CommandStream& stream, MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                      const TensorView& logits, const TensorView& bias, uint32_t top_k, const RoutingOptions& options,
                      const TensorView& out, const ExpertsPacking* packing = nullptr);

/// Starts the calling thread's record of last_dispatch(). `operation` must have static storage. Keep what it returns to
/// the operation's end, which observers are told of.
[[nodiscard]] inline ObservedOperation begin_operation(MoeEngine& engine, const char* operation) {
  DispatchTrace& trace = last_dispatch();
  trace = DispatchTrace{};
  trace.operation = operation;
  trace.engine = engine.context().engine().c_str();
  count(Counter::Operations);
  return {};
}

/// Encodes with `encode(stream)`, commits once and waits. Starts the calling thread's record of last_dispatch().
/// `operation` must have static storage. ExecutionError naming the kernels where the device failed.
template <class Encode>
void run_operation(MoeEngine& engine, const char* operation, const Encode& encode) {
  const ObservedOperation observed = begin_operation(engine, operation);
  StreamLease stream(engine.context());
  encode(*stream);
  stream->synchronize();
}

} // namespace metal_moe
