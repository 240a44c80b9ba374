#include "encode_group.h"

#include "moe/group.h"

namespace metal_moe {

void encode_group(CommandStream& stream, MoeEngine& engine, const SlotsView& ids, uint32_t tokens, uint32_t top_k,
                  uint32_t experts, uint32_t shared, uint32_t row_tile, const GroupTables& tables) {
  GroupArgs args{};
  args.tokens = tokens;
  args.top_k = top_k;
  args.experts = experts;
  args.shared = shared;
  args.ids_token_stride = ids.token_stride;
  args.ids_slot_stride = ids.slot_stride;
  args.id_words = ids.type;
  args.row_tile = row_tile;
  args.max_tiles = tables.max_tiles;

  // Every index must be bound, also where the kernel has nothing to read or write there.
  const auto or_offsets = [&](const BufferView& view) { return view ? view : tables.offsets; };
  const Pipeline& pipeline = engine.pipeline(GROUP_KERNEL);
  stream.use(pipeline);
  stream.bind(0, or_offsets(ids.view));
  stream.bind(1, tables.offsets);
  stream.bind(2, or_offsets(tables.sorted_rows));
  stream.bind(3, or_offsets(tables.inverse));
  stream.bind(4, or_offsets(tables.tiles));
  stream.bind_value(5, args);
  stream.threadgroup_memory(0, GROUP_COUNTERS * sizeof(uint32_t));
  stream.dispatch(MTL::Size(1, 1, 1),
                  simdgroups(group_simdgroups(tokens * top_k), pipeline.simd_width) * pipeline.simd_width,
                  size_t(tokens) * (top_k + shared) * 12 + size_t(tables.max_tiles) * sizeof(RowTile));
}

void encode_pad_groups(CommandStream& stream, MoeEngine& engine, BufferView offsets, BufferView sorted_rows,
                       uint32_t experts, uint32_t capacity, BufferView padded) {
  const PadArgs args{experts, capacity};
  if (experts == 0 || capacity == 0)
    return;
  const Pipeline& pipeline = engine.pipeline(PAD_GROUPS_KERNEL);
  const uint32_t threads = simdgroups(PAD_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width;
  stream.use(pipeline);
  stream.bind(0, offsets);
  stream.bind(1, sorted_rows ? sorted_rows : offsets);
  stream.bind(2, padded);
  stream.bind_value(3, args);
  stream.dispatch(MTL::Size(pipeline.simd_width == 1 ? 1 : ceil_div(capacity, threads), experts, 1), threads,
                  size_t(experts) * capacity * 8);
}

} // namespace metal_moe
