// Arguments and tiles of LoRA: out = base + scale * (x A^T) B^T, see lora.metal.
#pragma once
#include "../moe/experts.h"
#include "matmul.h"

/// Simdgroups of a threadgroup on a GPU: in `lora_shrink` they share K, as there are few rows of A; in `lora_expand`
/// each has columns of its own.
SHARED_CONSTANT uint LORA_SIMDGROUPS = GEMV_SIMDGROUPS;
/// Rows of A of a `lora_shrink` threadgroup on a GPU: with rank 16 four threadgroups, and 16 sums with four tokens.
SHARED_CONSTANT uint LORA_SHRINK_ROWS = 4;
/// Tokens of a threadgroup, up to four of one adapter at a time.
SHARED_CONSTANT uint LORA_TOKENS = 4;
SHARED_CONSTANT uint LORA_TOKENS_ONE_LANE = 64;
SHARED_CONSTANT uint LORA_MAX_RANK = 256;

constexpr uint lora_shrink_rows(uint simd_width) { return gemv_threadgroup_columns(LORA_SHRINK_ROWS, simd_width); }
/// Columns of a `lora_expand` threadgroup: one of every lane.
constexpr uint lora_expand_columns(uint simd_width) {
  return gemv_threadgroup_columns(LORA_SIMDGROUPS * simd_width, simd_width);
}
constexpr uint lora_tokens(uint simd_width) { return simd_width == 1 ? LORA_TOKENS_ONE_LANE : LORA_TOKENS; }
/// Threadgroup memory of `lora_shrink`: the sums of every simdgroup.
SHARED_CONSTANT uint LORA_SHRINK_MEMORY_BYTES = LORA_SIMDGROUPS * LORA_SHRINK_ROWS * 4 * 4;

struct LoraArgs {
  uint tokens;       // T
  uint inputs;       // of x and A
  uint outputs;      // of B, base and out
  uint rank;         // r
  uint adapters;     // L
  uint x_row_stride; // elements, as all strides
  uint base_row_stride;
  uint a_adapter_stride;
  uint a_row_stride;
  uint b_adapter_stride;
  uint b_row_stride;
  uint s_row_stride;
  uint id_stride; // of the id type
  uint id_words;  // 1 int32, 2 int64; 0: every token has adapter 0
  uint has_base;
  uint has_scales; // one for each adapter, instead of `scale`
  float scale;
  uint a_vectorized; // 1: rows of x and A start at multiples of VECTOR_BYTES and have a multiple of 8 elements
  uint b_vectorized; // the same of B
};

// Buffers.
//  lora_shrink: 0 x [T, inputs], 1 A [L, r, inputs], 2 adapter ids [T], 3 s fp32 [T, s_row_stride], 4 LoraArgs;
//               threadgroup 0: LORA_SHRINK_MEMORY_BYTES. Grid (ceil(r / lora_shrink_rows), ceil(T / lora_tokens)).
//  lora_expand: 0 s, 1 B [L, outputs, r], 2 adapter ids, 3 scales fp32 [L], 4 base [T, outputs], 5 out [T, outputs], 6
//               LoraArgs. Grid (ceil(outputs / lora_expand_columns), ceil(T / lora_tokens)).
//  lora_shrink_tile, lora_expand_tile: the same buffers without ids, of one adapter; threadgroup 0:
//               gemm_threadgroup_bytes of MATMUL_ROW_TILE rows and MATMUL_TILE_N columns. Grid (ceil(T /
//               MATMUL_ROW_TILE), ceil(r or outputs / MATMUL_TILE_N)).
// Buffers that a call has no use for are bound to any other one.
