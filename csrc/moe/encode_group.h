// Encodes `group` and `pad_groups`: assignments sorted by expert, and row tiles.
#pragma once

#include "engine.h"

namespace metal_moe {

/// Outputs of `group`, layouts in kernels/moe/group.h. Views of tables without elements may be empty.
struct GroupTables {
  BufferView offsets; // [E + shared + 1]
  BufferView sorted_rows;
  BufferView inverse;
  BufferView tiles;
  uint32_t max_tiles = 0;
};

/// Encodes one dispatch of `group`. `ids` may be empty where there are no tokens.
void encode_group(CommandStream& stream, MoeEngine& engine, const SlotsView& ids, uint32_t tokens, uint32_t top_k,
                  uint32_t experts, uint32_t shared, uint32_t row_tile, const GroupTables& tables);

/// Encodes `pad_groups` of offsets and sorted_rows (any view where there are no rows) to padded [experts, capacity]
/// int32. No dispatch where that is empty.
void encode_pad_groups(CommandStream& stream, MoeEngine& engine, BufferView offsets, BufferView sorted_rows,
                       uint32_t experts, uint32_t capacity, BufferView padded);

} // namespace metal_moe
