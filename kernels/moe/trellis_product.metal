// trellis_product_m4, _m8, _m16, _m64: rows times the tiles of trellis weights, without rotations.
//
//   out[p, a, n] = sum over k of What_p[expert(a)][k, n] * x[p, a, k],  p = first, second matrix
//
// Layouts: see trellis_product.h, and trellis.h for tiles. A threadgroup takes a row tile, up to
// 4, 8, 16 or 64 rows of one expert, which share decoded weights. Bits and codebook are those of the expert's
// record, found once for a threadgroup, so that a layer may mix them.
//
// On a GPU a threadgroup makes the 16 outputs of one column of tiles; its simdgroups take rows of tiles in turn. A lane
// decodes one run of a tile, 8 weights of 4 inputs and 2 outputs; four lanes share those outputs and add up at the end.
// With one-thread simdgroups the threadgroup walks eight columns of tiles, and sums by place in the tile. On NVIDIA
// GPUs it makes eight columns of tiles on tensor cores, two of them a simdgroup (csrc/sim/msl/cuda_trellis_rows.h).
//
// Inputs are divided into slices where threadgroups are few; the kernel that follows adds their sums.
//
// Bytes: half_bits / 16 per weight of the experts in use, read once per row tile.
#include "../formats/expert_matrix.h"
#include "../formats/specialized.h"
#include "../tiles/scalar.h"
#include "group.h"
#include "rotated_row.h"
#include "trellis_product.h"
#include "trellis_slices.h"

constexpr constant uint SIMDGROUPS = simdgroups(TRELLIS_PRODUCT_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint THREADS = SIMDGROUPS * SIMD_WIDTH;
/// What threads' registers are to suffice for: three threadgroups at a time on an NVIDIA GPU; two of 64 rows.
constexpr constant uint REGISTER_THREADS = 3 * THREADS;
constexpr constant uint MANY_ROWS_REGISTER_THREADS = 2 * THREADS;
#ifdef METAL_SIM_CUDA
/// For the compiler, as packed_least_threadgroups: all registers that REGISTER_THREADS leave. Tiles of four rows take
/// 6% less time with them; of more, 3% less with four bits and 3% more with three.
template <uint R>
constexpr uint trellis_rows_least_threadgroups = 1;
constexpr uint trellis_product_m64_least_threadgroups = 1;
constexpr constant bool MATRIX = true;
#else
constexpr constant bool MATRIX = false;
#endif
constexpr constant uint TILES = trellis_product_tiles(SIMD_WIDTH, MATRIX);
constexpr constant uint BLOCK_TILES = HADAMARD_BLOCK / TRELLIS_TILE;

#ifdef METAL_SIM_CUDA
/// R rows with one expert.
template <uint R>
struct TrellisProduct {
  static constexpr constant uint OWN_TILES = TILES / SIMDGROUPS; // of a simdgroup
  using Rows = metal_sim::CudaTrellisRows<R, SIMDGROUPS, OWN_TILES>;
  static_assert(Rows::BYTES == trellis_product_memory(R, MATRIX), "what the host gives");

  device const uint* codes; // the first tile
  uint row_stride;          // of tiles, words
  uint blocks;              // of the slice
  uint outputs;
  device const float* x; // the slice's first block
  uint x_stride;
  uint x_factor;             // from there to its factor
  device const uint* places; // of rows, in x and out
  device float* out;         // of the first column
  uint count;
  threadgroup float* memory;
  uint simdgroup;
  uint lane;

  template <uint HALF_BITS, uint CODEBOOK>
  void run() thread const {
    float sum[OWN_TILES][R / 4][2];
    const auto row = [this](uint r) { return x + ulong(places[r]) * x_stride; };
    Rows(memory).template multiply<HALF_BITS, CODEBOOK>(codes, row_stride, blocks, row, x_factor, count, simdgroup,
                                                        lane, sum);
    UNROLL
    for (uint f = 0; f < R / 4; ++f) {
      const uint r = 4 * f + lane % 4;
      if (r >= count)
        continue;
      device float* to = out + ulong(places[r]) * outputs + simdgroup * OWN_TILES * TRELLIS_TILE + lane / 4;
      UNROLL
      for (uint i = 0; i < OWN_TILES; ++i) {
        to[i * TRELLIS_TILE] = sum[i][f][0];
        to[i * TRELLIS_TILE + TRELLIS_TILE / 2] = sum[i][f][1];
      }
    }
  }
};
#else
/// R rows with one expert.
template <uint R>
struct TrellisProduct {
  device const uint* codes; // the first tile
  uint row_stride;          // of tiles, words
  uint blocks;              // of the slice
  device const float* x[R];
  device float* out[R]; // of the first column; beyond `count` rows nothing is stored
  uint count;
  threadgroup float* partial;
  uint thread_index;
  uint simdgroup;
  uint lane;

#if SIMD_WIDTH == 1
  template <uint HALF_BITS, uint CODEBOOK>
  void run() thread const {
    float sum[TILES][R][TRELLIS_SUMS];
    for (uint tile = 0; tile < TILES; ++tile)
      for (uint r = 0; r < R; ++r)
        for (uint t = 0; t < TRELLIS_SUMS; ++t)
          sum[tile][r][t] = 0.0f;
    for (uint k = 0; k < blocks * HADAMARD_BLOCK; k += TRELLIS_TILE) {
      float ordered[R][TRELLIS_ROUND];
      for (uint r = 0; r < count; ++r)
        for (uint t = 0; t < TRELLIS_ROUND; ++t)
          ordered[r][t] = x[r][k + trellis_input(t / TRELLIS_RUN, t % TRELLIS_RUN)];
      device const uint* row = codes + ulong(k / TRELLIS_TILE) * row_stride;
      for (uint tile = 0; tile < TILES; ++tile)
        trellis_add_tile<HALF_BITS, CODEBOOK>(row + tile * (trellis_tile_bytes(HALF_BITS) / 4), row_stride, ordered,
                                              count, sum[tile]);
    }
    for (uint tile = 0; tile < TILES; ++tile)
      for (uint r = 0; r < count; ++r)
        for (uint n = 0; n < TRELLIS_TILE; ++n)
          out[r][tile * TRELLIS_TILE + n] = trellis_sum(sum[tile][r], n);
  }
#else
  template <uint HALF_BITS, uint CODEBOOK>
  void run() thread const {
    float sum[R][2];
    UNROLL
    for (uint r = 0; r < R; ++r)
      sum[r][0] = sum[r][1] = 0.0f;
    const uint tiles = blocks * BLOCK_TILES;
    const uint first_input = trellis_input(lane, 0);
    // The next tile's words are on their way while this one is decoded.
    TrellisRun<HALF_BITS> words;
    uint tile = simdgroup;
    if (tile < tiles)
      words.load(codes + ulong(tile) * row_stride, lane);
    while (tile < tiles) {
      TrellisRun<HALF_BITS> next = words;
      if (tile + SIMDGROUPS < tiles)
        next.load(codes + ulong(tile + SIMDGROUPS) * row_stride, lane);
      float weight[TRELLIS_RUN];
      UNROLL
      for (uint i = 0; i < TRELLIS_RUN; ++i)
        weight[i] = trellis_value<CODEBOOK>(words.state(i));
      UNROLL
      for (uint r = 0; r < R; ++r) {
        device const float* from = x[r] + tile * TRELLIS_TILE + first_input;
        const float2 low = *reinterpret_cast<device const float2*>(from);
        const float2 high = *reinterpret_cast<device const float2*>(from + 8);
        UNROLL
        for (uint half_tile = 0; half_tile < 2; ++half_tile) {
          float part = sum[r][half_tile];
          part = fma(weight[4 * half_tile], low.x, part);
          part = fma(weight[4 * half_tile + 1], low.y, part);
          part = fma(weight[4 * half_tile + 2], high.x, part);
          sum[r][half_tile] = fma(weight[4 * half_tile + 3], high.y, part);
        }
      }
      words = next;
      tile += SIMDGROUPS;
    }
    UNROLL
    for (uint r = 0; r < R; ++r) {
      UNROLL
      for (uint half_tile = 0; half_tile < 2; ++half_tile) {
        float total = sum[r][half_tile];
        total += simd_shuffle_xor(total, ushort(1));
        total += simd_shuffle_xor(total, ushort(2));
        if (lane % 4 == 0)
          partial[(simdgroup * R + r) * TRELLIS_TILE + trellis_output(lane, 4 * half_tile)] = total;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_index; i < count * TRELLIS_TILE; i += THREADS) {
      float total = 0.0f;
      UNROLL
      for (uint s = 0; s < SIMDGROUPS; ++s)
        total += partial[s * R * TRELLIS_TILE + i];
      // Not out[i / TRELLIS_TILE]: a place chosen at run time takes the array out of registers.
      UNROLL
      for (uint r = 0; r < R; ++r)
        if (r == i / TRELLIS_TILE)
          out[r][i % TRELLIS_TILE] = total;
    }
  }
#endif
};
#endif

template <uint R>
METAL_FUNC void trellis_product(device const uchar* codes, device const ExpertMatrix* table, uint code, uint expert,
                                uint block, uint column, thread TrellisProduct<R>& product) {
  const ExpertMatrix record = table[expert];
  const uint half_bits = code ? code_half_bits(code) : record.half_bits;
  product.row_stride = record.codes_stride / 4;
  product.codes = reinterpret_cast<device const uint*>(codes + record.codes) +
                  ulong(block * BLOCK_TILES) * product.row_stride +
                  column / TRELLIS_TILE * (trellis_tile_bytes(half_bits) / 4);
  with_trellis_code(half_bits, code ? code_codebook(code) : record.codebook, product);
}

/// A row tile's share of a threadgroup.
template <uint R>
METAL_FUNC void trellis_row_tile(device const float* x, device const uchar* first_codes,
                                 device const ExpertMatrix* first_table, device const uchar* second_codes,
                                 device const ExpertMatrix* second_table, device const uint* sorted_rows,
                                 thread const RowTile& tile, device float* out, constant TrellisProductArgs& args,
                                 threadgroup float* partial, uint3 threadgroup_position, uint thread_index,
                                 uint simdgroup, uint lane) {
  const uint matrix = threadgroup_position.z % args.matrices, slice = threadgroup_position.z / args.matrices;
  const uint column = threadgroup_position.x * TILES * TRELLIS_TILE;
  const uint blocks = args.inputs / HADAMARD_BLOCK, x_stride = rotated_stride(blocks);
  const uint first_block = trellis_slice(slice, blocks, args.slices);
  x += ulong(matrix) * args.rows * x_stride + first_block * HADAMARD_BLOCK;
  out += ulong(threadgroup_position.z) * args.rows * args.outputs + column;
  TrellisProduct<R> product;
  product.blocks = trellis_slice(slice + 1, blocks, args.slices) - first_block;
#ifdef METAL_SIM_CUDA
  (void)thread_index;
  product.outputs = args.outputs;
  product.x = x;
  product.x_stride = x_stride;
  product.x_factor = (blocks - first_block) * HADAMARD_BLOCK + first_block;
  product.places = sorted_rows + tile.first_row;
  product.out = out;
  product.memory = partial;
#else
  UNROLL
  for (uint r = 0; r < R; ++r) {
    // Beyond the tile's rows its last again.
    const ulong place = sorted_rows[tile.first_row + min(r, tile.rows - 1)];
    product.x[r] = x + place * x_stride;
    product.out[r] = out + place * args.outputs;
  }
  product.partial = partial;
  product.thread_index = thread_index;
#endif
  product.count = tile.rows;
  product.simdgroup = simdgroup;
  product.lane = lane;
  device const uchar* codes = matrix == 0 ? first_codes : second_codes;
  device const ExpertMatrix* table = matrix == 0 ? first_table : second_table;
  // Not a choice between codes: each call's is a constant where the kernel is compiled for it.
  if (matrix == 0 || FIRST_MATRIX == SECOND_MATRIX)
    trellis_product(codes, table, FIRST_MATRIX, tile.expert, first_block, column, product);
  else
    trellis_product(codes, table, SECOND_MATRIX, tile.expert, first_block, column, product);
}

template <uint R>
[[kernel, max_total_threads_per_threadgroup(REGISTER_THREADS)]]
void trellis_rows(device const float* x [[buffer(0)]], device const uchar* first_codes [[buffer(1)]],
                  device const ExpertMatrix* first_table [[buffer(2)]], device const uchar* second_codes [[buffer(3)]],
                  device const ExpertMatrix* second_table [[buffer(4)]], device const uint* sorted_rows [[buffer(5)]],
                  device const RowTile* tiles [[buffer(6)]], device float* out [[buffer(7)]],
                  constant TrellisProductArgs& args [[buffer(8)]], threadgroup float* partial [[threadgroup(0)]],
                  uint3 threadgroup_position [[threadgroup_position_in_grid]],
                  uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                  uint lane [[thread_index_in_simdgroup]]) {
  const RowTile tile = tiles[threadgroup_position.y];
  if (tile.rows > 0)
    trellis_row_tile<R>(x, first_codes, first_table, second_codes, second_table, sorted_rows, tile, out, args, partial,
                        threadgroup_position, thread_index, simdgroup, lane);
}

template [[host_name("trellis_product_m4")]] [[kernel]] decltype(trellis_rows<4>) trellis_rows<4>;
template [[host_name("trellis_product_m8")]] [[kernel]] decltype(trellis_rows<8>) trellis_rows<8>;
template [[host_name("trellis_product_m16")]] [[kernel]] decltype(trellis_rows<16>) trellis_rows<16>;

/// Without matrix instructions 64 rows have more sums than there are registers: 16 at a time.
[[kernel, max_total_threads_per_threadgroup(MANY_ROWS_REGISTER_THREADS)]]
void trellis_product_m64(device const float* x [[buffer(0)]], device const uchar* first_codes [[buffer(1)]],
                         device const ExpertMatrix* first_table [[buffer(2)]],
                         device const uchar* second_codes [[buffer(3)]],
                         device const ExpertMatrix* second_table [[buffer(4)]],
                         device const uint* sorted_rows [[buffer(5)]], device const RowTile* tiles [[buffer(6)]],
                         device float* out [[buffer(7)]], constant TrellisProductArgs& args [[buffer(8)]],
                         threadgroup float* partial [[threadgroup(0)]],
                         uint3 threadgroup_position [[threadgroup_position_in_grid]],
                         uint thread_index [[thread_index_in_threadgroup]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint R = MATRIX ? TRELLIS_PRODUCT_MOST_ROWS : 16;
  const RowTile tile = tiles[threadgroup_position.y];
  for (uint first = 0; first < tile.rows; first += R) {
    const RowTile piece{tile.expert, tile.first_row + first, min(tile.rows - first, R), 0};
    trellis_row_tile<R>(x, first_codes, first_table, second_codes, second_table, sorted_rows, piece, out, args, partial,
                        threadgroup_position, thread_index, simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
