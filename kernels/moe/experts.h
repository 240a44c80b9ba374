// Arguments and tiles of the expert kernels: gate_up (x -> h = act(gate) * up) and down (h -> y), in every family.
#pragma once
#include "../tiles/simd.h"

/// Elementwise function between the two matrix products.
enum Activation : uint {
  ACTIVATION_SILU = 0,
  ACTIVATION_GELU = 1, // erf
  ACTIVATION_GELU_TANH = 2,
  ACTIVATION_RELU2 = 3,       // max(x, 0)^2, no gate: kernels named `up_...`
  ACTIVATION_SWIGLU_CLAMP = 4 // gpt-oss: g = min(g, limit), u = clamp(u, -limit, limit), g * sigmoid(alpha g) * (u + 1)
};

// decode and prefill4: output columns of a tile. A one-thread simdgroup computes the tile. On a GPU the tile is divided
// among several small threadgroups: with one token there are few tiles, and the time is that of the busiest core.
SHARED_CONSTANT uint GEMV_TILE_N = 64;
/// Simdgroups of a threadgroup on a GPU, each with columns of its own: gate_up, and prefill4's down.
SHARED_CONSTANT uint GEMV_SIMDGROUPS = 4;
/// Columns of such a simdgroup. gate_up reads two weight rows for each. Fewer leave too few loads under way, more need
/// registers for the sums of four rows (H200, 16 tokens of Qwen3: gate_up 130 us with 2 and 137 with 4 columns, down
/// 80, 72 and 67 with 2, 4 and 8).
SHARED_CONSTANT uint GATE_UP_COLUMNS = 2;
/// Cores of a large GPU (H200), for which numbers of threadgroups are chosen.
SHARED_CONSTANT uint LARGE_GPU_CORES = 132;
/// Threadgroups of gate_up for one token that it runs at a time. Only where there are no more does `down` start early:
/// beside ones that are still to come it would be in their way.
SHARED_CONSTANT uint GATE_UP_RESIDENT_THREADGROUPS = 6 * LARGE_GPU_CORES;
SHARED_CONSTANT uint DOWN_PREFILL4_COLUMNS = 8;
/// decode's down on a GPU: columns of a threadgroup, and the simdgroups that share K of all slots of a token (H200, one
/// token of Qwen3: 9.3 us; 8 columns and 8 simdgroups 10.8, 4 and 16 15.1).
SHARED_CONSTANT uint DOWN_DECODE_COLUMNS = 4;
SHARED_CONSTANT uint DOWN_DECODE_SIMDGROUPS = 4;
/// Columns of a simdgroup on quantised weights, of gate_up and down alike, on a GPU.
SHARED_CONSTANT uint QUANTIZED_COLUMNS = 4;
/// Output columns of a threadgroup, where `wanted` is the number on a GPU.
constexpr uint gemv_threadgroup_columns(uint wanted, uint simd_width) { return simd_width == 1 ? GEMV_TILE_N : wanted; }
/// Rows of a prefill4 tile. On a GPU one register block: more tiles, more threadgroups. With one-thread simdgroups a
/// tile takes all rows that an expert is likely to have, and reads its weights once.
SHARED_CONSTANT uint PREFILL4_ROW_TILE = 4;
SHARED_CONSTANT uint PREFILL4_ROW_TILE_ONE_LANE = 64;

// Matrix families: rows of one expert x weight rows (columns of down; of gate_up half of them gate, half up) per
// threadgroup.
SHARED_CONSTANT uint BASE_ROW_TILE = 8;
SHARED_CONSTANT uint BASE_TILE_N = 64;
SHARED_CONSTANT uint LARGE_BATCH_TILE_N = 128;
SHARED_CONSTANT uint SIMD_TILE_N = 64;
SHARED_CONSTANT uint GEMM_SIMDGROUPS = 4;

/// Up to as many assignments, a lane and a bit of a word each, need no table of row tiles: see tile_rows.h.
SHARED_CONSTANT uint TILES_FROM_IDS_ASSIGNMENTS = 32; // 32: the simdgroups of all GPUs
/// Kernels of larger row tiles do without that: they run where few experts have many rows.
SHARED_CONSTANT uint TILES_FROM_IDS_ROWS = 16;

/// Tiles of K in threadgroup memory at a time, at most: one that is multiplied, the others on their way.
SHARED_CONSTANT uint GEMM_MAX_STAGES = 3;
/// One 8x8 fp32 fragment of gate and of up per simdgroup, beside the stages.
SHARED_CONSTANT uint GEMM_FRAGMENT_BYTES = GEMM_SIMDGROUPS * 2 * 64 * 4;

/// How a matrix family's threadgroup uses its memory.
struct GemmStages {
  uint k_bytes;     // of K in a stage
  uint stage_bytes; // of all rows of a stage
  uint stages;
};

/// Within `limit` bytes. `weight_rows`: those staged, tile_n; 0 for `simd`, which stages activations only. `pad_bytes`
/// follow each row. A stage takes the largest power of two of K with which it fits, up to 128 bytes with weights, 512
/// without.
constexpr GemmStages gemm_stages(uint row_tile, uint weight_rows, uint pad_bytes, uint limit) {
  const uint rows = row_tile + weight_rows, room = limit - GEMM_FRAGMENT_BYTES;
  uint k_bytes = weight_rows ? 128 : 512;
  while (rows * (k_bytes + pad_bytes) > room)
    k_bytes /= 2;
  const uint stage_bytes = rows * (k_bytes + pad_bytes);
  const uint stages = room / stage_bytes;
  return {k_bytes, stage_bytes, stages < GEMM_MAX_STAGES ? stages : GEMM_MAX_STAGES};
}
constexpr uint gemm_threadgroup_bytes(uint row_tile, uint weight_rows, uint pad_bytes, uint limit) {
  const GemmStages staging = gemm_stages(row_tile, weight_rows, pad_bytes, limit);
  return staging.stages * staging.stage_bytes + GEMM_FRAGMENT_BYTES;
}

/// Threadgroup memory of decode's down: a sum per simdgroup and column.
SHARED_CONSTANT uint DOWN_DECODE_MEMORY_BYTES = DOWN_DECODE_SIMDGROUPS * DOWN_DECODE_COLUMNS * 4;

// Packed products (packed_product.h). Rows of more columns keep all simdgroups of a threadgroup busy along K; of fewer
// they take longer to begin and to end than to multiply. Kernels are compiled for the one or the other, gate_up of one
// token for whole rows (packed_gate_up) or not.
SHARED_CONSTANT uint PACKED_SHORT_COLUMNS = 2048;
/// Row tiles of few columns stand in the second dimension of their grid, of which one launch of CUDA's has 65535: with
/// more assignments they are computed as those of many, still in one launch.
SHARED_CONSTANT uint PACKED_SHORT_ASSIGNMENTS = 1u << 18;
// For one token: weight rows of a threadgroup (gate_up: of each matrix), columns that a simdgroup takes at a time, and
// the slabs, of so many columns, that it has in threadgroup memory. Simdgroups share K.
SHARED_CONSTANT uint PACKED_DECODE_COLUMNS = 16;
SHARED_CONSTANT uint PACKED_DECODE_SLAB = 256;
SHARED_CONSTANT uint PACKED_DECODE_STAGES = 2;
/// Threadgroup memory of a slab of x: four bytes an element, and a quarter of that.
SHARED_CONSTANT uint PACKED_DIGITS_BYTES = 5 * PACKED_DECODE_SLAB;
/// As GATE_UP_RESIDENT_THREADGROUPS.
SHARED_CONSTANT uint PACKED_RESIDENT_THREADGROUPS = 4 * LARGE_GPU_CORES;
/// Slots of a token that `down` takes at a time.
SHARED_CONSTANT uint PACKED_SLOTS = 32; // 32: entries of a table
SHARED_CONSTANT uint PACKED_SLOT_BYTES = 64;
// For tiles of rows, likewise. Scales and biases are fetched for so many slabs of each simdgroup at once.
SHARED_CONSTANT uint PACKED_TILE_SLAB = 128;
SHARED_CONSTANT uint PACKED_TILE_STAGES = 2;
SHARED_CONSTANT uint PACKED_CHUNK_STEPS = 2;
/// Rows of x that a tile has at most.
SHARED_CONSTANT uint PACKED_ROW_TILE = 16;
/// Mean rows per expert up to which such tiles stand in for larger ones, whose weights are decoded to threadgroup
/// memory and take 5 times as long (H200, 64 tokens of Mixtral) and 3 times (128).
SHARED_CONSTANT uint PACKED_MEAN_ROWS = 64;
/// Simdgroups of a tile that share K; others have weight rows of their own.
constexpr uint packed_k_simdgroups(bool short_rows) { return short_rows ? 2 : 4; }
/// Threadgroup memory: slabs for each simdgroup with rows of x for those that share K, scales and biases of `group`
/// columns each.
constexpr uint packed_tile_bytes(uint weight_rows, uint x_rows, uint group, bool short_rows) {
  const uint scale_bytes = weight_rows * (PACKED_TILE_SLAB / group) * 4;
  return packed_k_simdgroups(short_rows) * PACKED_TILE_STAGES * x_rows * PACKED_TILE_SLAB * 2 +
         GEMM_SIMDGROUPS *
             (PACKED_TILE_STAGES * weight_rows * PACKED_TILE_SLAB / 2 + 2 * PACKED_CHUNK_STEPS * scale_bytes);
}

/// Tiles of `x_rows` rows where a threadgroup may have `limit` bytes.
struct PackedTile {
  uint simdgroup_n;   // weight rows of a simdgroup (gate_up: of both matrices)
  uint threadgroup_n; // of a threadgroup
  uint bytes;         // of threadgroup memory
  bool fits;
};
constexpr PackedTile packed_tile(uint x_rows, uint group, bool short_rows, uint limit) {
  // More weight rows share what is done for many rows of x, but leave room for fewer threadgroups.
  const bool wide = x_rows > BASE_ROW_TILE && !short_rows && packed_tile_bytes(128, x_rows, group, short_rows) <= limit;
  const uint rows = wide ? 128 : 64, bytes = packed_tile_bytes(rows, x_rows, group, short_rows);
  return {rows, rows * (GEMM_SIMDGROUPS / packed_k_simdgroups(short_rows)), bytes,
          x_rows <= PACKED_ROW_TILE && bytes <= limit};
}

/// `gate_up` of one token.
struct PackedGateUp {
  uint simdgroups; // of a threadgroup
  uint columns;    // its weight rows, of each matrix
  uint bytes;      // of threadgroup memory
};
/// `whole_rows`: a slab for each simdgroup is a row, and as many weight rows as make a threadgroup for each core of a
/// layer that takes little more time than kernels need to begin and end: none has more to do than others, and `down`
/// finds room beside it.
constexpr PackedGateUp packed_gate_up(uint group, uint matrices, bool whole_rows) {
  const uint slab = matrices * PACKED_DECODE_COLUMNS * (PACKED_DECODE_SLAB / 2 + PACKED_DECODE_SLAB / group * 4);
  if (whole_rows)
    return {PACKED_SHORT_COLUMNS / PACKED_DECODE_SLAB, 3 * PACKED_DECODE_COLUMNS,
            PACKED_SHORT_COLUMNS / PACKED_DECODE_SLAB * (3 * slab + PACKED_DIGITS_BYTES)};
  return {GEMV_SIMDGROUPS, PACKED_DECODE_COLUMNS,
          GEMV_SIMDGROUPS * PACKED_DECODE_STAGES * (slab + PACKED_DIGITS_BYTES)};
}

/// `down` of one token where a threadgroup may have `limit` bytes, or twice as many if one on a core is enough.
struct PackedDown {
  uint simdgroups; // of a threadgroup
  uint columns;    // its weight rows
  uint bytes;      // of threadgroup memory
};
constexpr uint packed_down_bytes(uint simdgroups, uint columns, uint group) {
  const uint slab = columns * (PACKED_DECODE_SLAB / 2 + PACKED_DECODE_SLAB / group * 4);
  return simdgroups * (PACKED_DECODE_STAGES * slab + PACKED_DIGITS_BYTES) + PACKED_SLOTS * PACKED_SLOT_BYTES;
}
constexpr PackedDown packed_down(uint group, bool short_rows, uint limit) {
  // Few enough registers and little enough memory to be there beside gate_up, for layers that take little more time
  // than kernels need to begin and end.
  if (short_rows && packed_down_bytes(12, 16, group) <= limit)
    return {12, 16, packed_down_bytes(12, 16, group)};
  // More weight rows share what is done for x.
  if (!short_rows && packed_down_bytes(16, 32, group) <= 2 * limit) // 32: weight rows
    return {16, 32, packed_down_bytes(16, 32, group)};              // 32: likewise
  return {8, 16, packed_down_bytes(8, 16, group)};
}

// `simd` and vectorised loads need rows that start at multiples of this many bytes.
SHARED_CONSTANT uint VECTOR_BYTES = 16;

struct ExpertsArgs {
  uint tokens;              // T
  uint hidden;              // H
  uint intermediate;        // I of the routed experts
  uint shared_intermediate; // I of the shared experts, 0 where there are none
  uint experts;             // E
  uint shared;              // shared experts: slots top_k, top_k + 1, ... of every token
  uint top_k;
  uint x_row_stride;     // elements between rows of hidden_states
  uint h_row_stride;     // elements between rows of the intermediate: max of both I, rounded up to 8
  uint out_row_stride;   // elements between rows of the output (decode) or of y (grouped: H)
  uint ids_token_stride; // elements of the id type; ids: decode, and with tiles_from_ids
  uint ids_slot_stride;
  uint id_words;             // 32-bit words of an id: 1 int32, 2 int64
  uint weights_token_stride; // routing weights (decode's down only), elements
  uint weights_slot_stride;
  uint weights_type; // ScalarType
  uint has_shared_weights;
  uint shared_token_stride;
  uint shared_slot_stride;
  uint shared_type;
  uint interleaved; // w1 rows: 0 = gate rows then up rows, 1 = gate 0, up 0, gate 1, up 1, ...
  uint has_bias;    // biases of the routed experts: [E, 2I] or [E, I] for gate_up, [E, H] for down
  uint activation;  // Activation
  float alpha;
  float limit;
  uint vectorized;     // 1: every row read starts at a multiple of VECTOR_BYTES and K is a multiple of 8
  uint tiles_from_ids; // grouped: 1: no sorted_rows and tiles; at most TILES_FROM_IDS_ASSIGNMENTS, see tile_rows.h
};

// Buffers.
//  gate_up, decode : 0 x, 1 w1, 2 shared_w1, 3 bias1, 4 ids, 5 h out [T * slots, h_row_stride], 6 ExpertsArgs.
//                    Grid (ceil(max I / columns of a threadgroup), slots, T), slots = top_k + shared.
//  down, decode    : 0 h, 1 w2, 2 shared_w2, 3 bias2, 4 ids, 5 topk_weights, 6 shared_weights, 7 out [T, H], 8
//                    ExpertsArgs; threadgroup 0: DOWN_DECODE_MEMORY_BYTES. Grid (ceil(H / columns), T).
//  gate_up, grouped: 0 x, 1 w1, 2 shared_w1, 3 bias1, 4 ids, 5 sorted_rows, 6 tiles, 7 h out [S, h_row_stride], 8
//                    ExpertsArgs; threadgroup 0: gemm_threadgroup_bytes. Grid (tiles, ceil(max I / columns of a
//                    threadgroup)).
//  down, grouped   : 0 h, 1 w2, 2 shared_w2, 3 bias2, 4 ids, 5 tiles, 6 y out fp32 [S, H], 7 ExpertsArgs; threadgroup
//                    0. Grid (tiles, ceil(H / tile_n)).
// Grouped, rows of h and y are in sorted order, with tiles_from_ids in order of assignments. Grids of packed row tiles
// of few columns are the other way round (tile_and_block).
// On quantised weights (kernels named `..._quantized_...`) the codes, scales, biases and table of a part stand in place
// of each of w1 (gate, then up), shared_w1, w2 and shared_w2; without a gate the four of up are any others.
//  gate_up, decode : 0 x, 1-4 gate, 5-8 up, 9-12 shared gate, 13-16 shared up, 17 bias1, 18 ids, 19 h, 20 ExpertsArgs.
//  down, decode    : 0 h, 1-4 down, 5-8 shared down, 9 bias2, 10 ids, 11 topk_weights, 12 shared_weights, 13 out,
//                    14 ExpertsArgs; threadgroup 0.
//  gate_up, grouped: 0 x, 1-4 gate, 5-8 up, 9-12 shared gate, 13-16 shared up, 17 bias1, 18 ids, 19 sorted_rows,
//                    20 tiles, 21 h, 22 ExpertsArgs; threadgroup 0.
//  down, grouped   : 0 h, 1-4 down, 5-8 shared down, 9 bias2, 10 ids, 11 tiles, 12 y, 13 ExpertsArgs; threadgroup 0.
// Buffers that a call has no use for (biases, shared experts and their weights, ids or tables of tiles) are bound to
// any other one.
