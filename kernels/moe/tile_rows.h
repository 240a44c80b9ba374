// The rows of one expert that a threadgroup of a grouped family takes, and where they stand.
//
// `group` has sorted the assignments and written a table of row tiles: rows of h and y are in sorted order. Where every
// assignment has a lane (ExpertsArgs::tiles_from_ids), each simdgroup finds its tile in the ids instead, a dispatch
// less: lane a reads the id of assignment a, the lanes that hold the same expert are its rows, and tile t begins at the
// t-th lane before which a multiple of the row tile of its expert's rows stand. h and y are in order of assignments
// then. Either way a tile has rows of one expert in order of assignments.
#pragma once
#include "assignment.h"
#include "experts.h"
#include "group.h"

template <uint ROW_TILE>
struct TileRows {
  /// Whether the kernel can find its tiles in the ids.
  static constexpr constant bool READS_IDS = SIMD_WIDTH > 1 && ROW_TILE <= TILES_FROM_IDS_ROWS;
  static_assert(SIMD_WIDTH == 1 || TILES_FROM_IDS_ASSIGNMENTS <= SIMD_WIDTH, "a lane for each assignment");

  constant ExpertsArgs& args;
  uint expert; // 0..E-1 routed, E..E+shared-1 shared
  uint count;  // at most ROW_TILE (one-thread simdgroups: any); 0: an unused tile
  uint first;  // row of h and y from which on `offset` counts
  uint lanes;  // with tiles_from_ids: the assignments that are its rows, as bits; else not looked at

  bool from_ids() thread const { return READS_IDS && args.tiles_from_ids; }
  /// Row `row` of the tile is row first + offset(row) of h and of y.
  uint offset(uint row) thread const { return from_ids() ? nth_lane(lanes, row) : row; }
};

/// Tile `tile`, from `tiles` or from `ids`. All lanes of a simdgroup take part.
template <uint ROW_TILE>
inline TileRows<ROW_TILE> tile_rows(device const int* ids, device const RowTile* tiles, constant ExpertsArgs& args,
                                    uint tile, uint lane) {
  if (!TileRows<ROW_TILE>::READS_IDS || !args.tiles_from_ids) {
    const RowTile row_tile = tiles[tile];
    return {args, row_tile.expert, row_tile.rows, row_tile.first_row, ~0u};
  }
  const uint slots = args.top_k + args.shared;
  uint expert = NO_EXPERT;
  if (lane < args.tokens * slots)
    expert = slot_expert(ids, args, lane / slots, lane % slots);
  const uint rank = uint(popcount(lanes_of_expert(expert, args.experts + args.shared) & lanes_before(lane)));
  const bool begins = expert != NO_EXPERT && rank % ROW_TILE == 0;
  const uint tiles_before = uint(popcount(lanes_where(begins) & lanes_before(lane)));
  const ulong first = lanes_where(begins && tiles_before == tile);
  if (first == 0)
    return {args, 0, 0, 0, 0};
  const uint first_lane = uint(ctz(first));
  const uint tile_expert = simd_shuffle(expert, ushort(first_lane));
  const uint first_rank = simd_shuffle(rank, ushort(first_lane));
  const uint rows = uint(lanes_where(expert == tile_expert && rank - first_rank < ROW_TILE));
  return {args, tile_expert, uint(popcount(rows)), 0, rows};
}
