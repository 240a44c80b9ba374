#include "encode_gather.h"

#include "moe/gather.h"

#include <algorithm>

namespace metal_moe {

void encode_gather(CommandStream& stream, MoeEngine& engine, const TensorView& weights, const TensorView& ids,
                   const TensorView& out) {
  size_t bytes = weights.item_size;
  for (uint32_t i = 1; i < weights.rank; ++i)
    bytes *= static_cast<size_t>(weights.shape[i]);
  GatherArgs args{};
  args.count = size_argument("number of expert_ids", ids.shape[0]);
  args.experts = size_argument("experts of weights", weights.shape[0]);
  if (args.count == 0 || bytes == 0)
    return;
  args.id_stride = stride_argument("stride of expert_ids", ids, 0);
  args.id_words = ids.dtype == Dtype::Int64 ? 2 : 1;
  // The largest power of two up to a vector that divides all three.
  const size_t common = bytes | weights.address | out.address | VECTOR_BYTES;
  args.unit_bytes = static_cast<uint32_t>(common & (~common + 1));
  args.bytes_per_expert_low = static_cast<uint32_t>(bytes);
  args.bytes_per_expert_high = static_cast<uint32_t>(uint64_t(bytes) >> 32);

  const Pipeline& pipeline = engine.pipeline(GATHER_KERNEL);
  stream.use(pipeline);
  stream.bind(0, weights ? weights.view() : ids.view()); // no experts: every row is zeros
  stream.bind(1, ids.view());
  stream.bind(2, out.view());
  stream.bind_value(3, args);
  stream.dispatch(MTL::Size((bytes + GATHER_BLOCK_BYTES - 1) / GATHER_BLOCK_BYTES, args.count, 1),
                  simdgroups(GATHER_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width, 2 * bytes * args.count);
}

} // namespace metal_moe
