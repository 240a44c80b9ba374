// Arguments of `group` and `pad_groups`: expert ids of every (token, slot) -> rows sorted by expert, and row tiles.
#pragma once
#include "../tiles/simd.h"

/// Position or row that stands for "none": a dropped assignment, a padded place, an unused row.
SHARED_CONSTANT uint GROUP_NONE = 0xFFFFFFFFu;
SHARED_CONSTANT uint GROUP_MAX_ASSIGNMENTS = 1u << 22;
SHARED_CONSTANT uint GROUP_MAX_EXPERTS = 1024; // routed and shared together

SHARED_CONSTANT uint GROUP_MAX_SIMDGROUPS = 32; // 32: the largest threadgroup that Metal allows, 1024 threads
/// Threads of the one threadgroup of `group`, in simdgroups, for `assignments` routed ones: a small threadgroup starts
/// sooner and meets sooner, a large one has less to do one after the other (H200, 128 experts, 8 per token, with 8 / 16
/// / 32 simdgroups: 4 tokens 3.3 / 3.7 / 4.3 us, 128 tokens 6.5 / 5.8 / 6.1, 4096 tokens 157 / 104 / 65).
constexpr uint group_simdgroups(uint assignments) {
  return assignments <= 256 ? 8 : assignments <= 2048 ? 16 : GROUP_MAX_SIMDGROUPS;
}
/// Its counters in threadgroup memory: each simdgroup that takes part has one counter per expert, so fewer take part
/// where there are many experts.
SHARED_CONSTANT uint GROUP_COUNTERS = 7168; // 28 KiB of the 32 KiB that every Apple GPU has

/// At most `rows` (<= row tile) consecutive sorted rows of one expert. An unused tile has rows == 0.
struct RowTile {
  uint expert;    // 0..E-1 routed, E..E+shared-1 shared
  uint first_row; // place in sorted order
  uint rows;
  uint reserved;
};

// `group` buffers: 0 ids, 1 offsets out [E + shared + 1], 2 sorted_rows out [S], 3 inverse out [S], 4 tiles out
// [max_tiles], 5 GroupArgs; threadgroup 0: GROUP_COUNTERS * 4 bytes. S = tokens * (top_k + shared). Assignment a =
// token * (top_k + shared) + slot; slots >= top_k belong to the shared experts E, E + 1, ... and are not in ids.
// sorted_rows[p] = a: stable, by expert; places from offsets[E + shared] on are GROUP_NONE. inverse[a] = p, or
// GROUP_NONE where the id was outside 0..E-1.
struct GroupArgs {
  uint tokens;
  uint top_k;
  uint experts;          // E
  uint shared;           // shared experts: every token is assigned to each of them
  uint ids_token_stride; // elements of the id type
  uint ids_slot_stride;
  uint id_words; // 32-bit words of an id: 1 int32, 2 int64
  uint row_tile;
  uint max_tiles; // elements of the tile table: at least (S + (row_tile - 1) * min(E + shared, S)) / row_tile
};

/// Threads of a threadgroup of `pad_groups`, in simdgroups.
SHARED_CONSTANT uint PAD_SIMDGROUPS = 8;

// `pad_groups` buffers: 0 offsets, 1 sorted_rows, 2 padded out [E, capacity] int32 (assignment, or -1), 3 PadArgs.
// Grid: (ceil(capacity / threads of a threadgroup), E); one-thread simdgroups: (1, E). One-dimensional threadgroups.
// Assignments beyond the capacity of an expert are left out.
struct PadArgs {
  uint experts;
  uint capacity;
};
