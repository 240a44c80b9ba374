// dequantize_trellis: whole matrices of trellis weights.
//
//   out[m] = diag(svh) H (H What) diag(suh), W[row, column] with rows being outputs
//
// What holds the tiles' values, H is the Hadamard transform of blocks of 128. Layouts: see dequantize_trellis.h and
// docs/formats.md. A block of 128 x 128 is made in place, in device memory, as it is larger than threadgroup memory:
//
// 1. tiles: each thread decodes runs of 8 weights and writes them where they belong;
// 2. rows: each simdgroup transforms rows, times suh;
// 3. columns: each thread transforms a column (a one-thread threadgroup all of them side by side), times svh.
//
// The roundings are those of python/metal_moe/formats/trellis.py, in the same order.
//
// Bytes: half_bits / 16 read and 4 written per weight; the block stays in a cache meanwhile.
#include "dequantize_trellis.h"

constexpr constant uint SIMDGROUPS = simdgroups(DEQUANTIZE_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint THREADS = SIMDGROUPS * SIMD_WIDTH;
constexpr constant uint BLOCK_TILES = HADAMARD_BLOCK / TRELLIS_TILE;

/// Step 1, for one rate and codebook.
struct DecodeBlock {
  device const uint* tiles; // the block's first
  device float* block;
  uint row_stride; // of tiles, words
  uint columns;
  uint thread_index;

  template <uint HALF_BITS>
  device const uint* words(uint tile) thread const {
    return tiles + ulong(tile / BLOCK_TILES) * row_stride + tile % BLOCK_TILES * (trellis_tile_bytes(HALF_BITS) / 4);
  }

  /// Weight i of a run.
  void store(uint tile, uint run, uint i, float value) thread const {
    const uint row = tile % BLOCK_TILES * TRELLIS_TILE + trellis_output(run, i);
    block[ulong(row) * columns + tile / BLOCK_TILES * TRELLIS_TILE + trellis_input(run, i)] = value;
  }

  template <uint HALF_BITS, uint CODEBOOK>
  void run() thread const {
#if SIMD_WIDTH == 1
    for (uint tile = 0; tile < BLOCK_TILES * BLOCK_TILES; ++tile) {
      float value[TRELLIS_RUNS * TRELLIS_RUN];
      trellis_decode_tile<HALF_BITS, CODEBOOK>(words<HALF_BITS>(tile), value);
      for (uint t = 0; t < TRELLIS_RUNS * TRELLIS_RUN; ++t)
        store(tile, t / TRELLIS_RUN, t % TRELLIS_RUN, value[t]);
    }
#else
    for (uint task = thread_index; task < BLOCK_TILES * BLOCK_TILES * TRELLIS_RUNS; task += THREADS) {
      const uint run = task % TRELLIS_RUNS, tile = task / TRELLIS_RUNS;
      float value[TRELLIS_RUN];
      trellis_decode<HALF_BITS, CODEBOOK>(words<HALF_BITS>(tile), run, value);
      UNROLL
      for (uint i = 0; i < TRELLIS_RUN; ++i)
        store(tile, run, i, value[i]);
    }
#endif
  }
};

inline void transform_rows(device float* block, device const half* suh, uint columns, uint simdgroup, uint lane) {
  const uint first = lane * HADAMARD_LANE_VALUES;
  for (uint row = simdgroup; row < HADAMARD_BLOCK; row += SIMDGROUPS) {
    device float* to = block + ulong(row) * columns + first;
    float value[HADAMARD_LANE_VALUES];
    UNROLL
    for (uint i = 0; i < HADAMARD_LANE_VALUES; ++i)
      value[i] = to[i];
    hadamard_sums(value, lane);
    UNROLL
    for (uint i = 0; i < HADAMARD_LANE_VALUES; ++i)
      to[i] = value[i] * HADAMARD_NORM * float(suh[first + i]);
  }
}

/// Every thread changes columns of its own: between the stages there is nothing to wait for.
inline void transform_columns(device float* block, device const half* svh, uint columns, uint thread_index) {
  for (uint width = 1; width < HADAMARD_BLOCK; width *= 2)
    for (uint pair = 0; pair < HADAMARD_BLOCK / 2; ++pair) {
      const uint row = pair / width * 2 * width + pair % width;
      device float* low_row = block + ulong(row) * columns;
      device float* high_row = low_row + ulong(width) * columns;
      for (uint column = thread_index; column < HADAMARD_BLOCK; column += THREADS) {
        const float low = low_row[column], high = high_row[column];
        low_row[column] = low + high;
        high_row[column] = low - high;
      }
    }
  for (uint row = 0; row < HADAMARD_BLOCK; ++row) {
    const float scale = float(svh[row]);
    for (uint column = thread_index; column < HADAMARD_BLOCK; column += THREADS)
      block[ulong(row) * columns + column] = block[ulong(row) * columns + column] * HADAMARD_NORM * scale;
  }
}

[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void dequantize_trellis(device const uint* codes [[buffer(0)]], device const half* suh [[buffer(1)]],
                        device const half* svh [[buffer(2)]], device float* out [[buffer(3)]],
                        constant DequantizeTrellisArgs& args [[buffer(4)]],
                        uint3 threadgroup_position [[threadgroup_position_in_grid]],
                        uint thread_index [[thread_index_in_threadgroup]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint column = threadgroup_position.x * HADAMARD_BLOCK, row = threadgroup_position.y * HADAMARD_BLOCK;
  const ulong matrix = threadgroup_position.z;
  DecodeBlock decode;
  decode.tiles = codes + matrix * args.codes_stride + ulong(column / TRELLIS_TILE) * args.row_stride +
                 row / TRELLIS_TILE * (trellis_tile_bytes(args.half_bits) / 4);
  decode.block = out + (matrix * args.rows + row) * args.columns + column;
  decode.row_stride = args.row_stride;
  decode.columns = args.columns;
  decode.thread_index = thread_index;
  with_trellis_code(args.half_bits, args.codebook, decode);
  threadgroup_barrier(mem_flags::mem_device);
  transform_rows(decode.block, suh + matrix * args.suh_stride + column, args.columns, simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_device);
  transform_columns(decode.block, svh + matrix * args.svh_stride + row, args.columns, thread_index);
}
