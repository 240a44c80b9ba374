// trellis_gate_up_decode, trellis_down_decode: one token's experts with trellis weights.
//
//   h[p, a, n] = sum over k of What_p[expert(a)][k, n] * (H (suh_p * x))[k],  p = gate, up
//   y[a, n]    = sum over k of What_down[expert(a)][k, n] * (H (suh_down * act(svh_gate * H h[gate, a] + bias,
//                                                                              svh_up * H h[up, a] + bias)))[k]
//
// Layouts: see trellis_decode.h; trellis.h for tiles. rotate_outputs follows. Inputs are divided into slices, whose
// sums stand apart and are added by the kernel that follows, in their order.
//
// A threadgroup takes a slice of one assignment and trellis_decode_columns outputs. It rotates the slice's blocks of
// 128 into threadgroup memory, a simdgroup a block: done again by the threadgroups of other columns, but each spares a
// dispatch. Then a simdgroup makes the sums of its columns of tiles over the slice (rotated_row.h).
//
// Bytes: half_bits / 16 per weight of the experts in use; h and y, 4 for each of their elements, are little beside
// them.
#include "../formats/specialized.h"
#include "../tiles/early_start.h"
#include "rotate_block.h"
#include "trellis_decode.h"

constexpr constant uint SIMDGROUPS = simdgroups(TRELLIS_DECODE_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint THREADS = SIMDGROUPS * SIMD_WIDTH;
/// What threads' registers are to suffice for: three threadgroups at a time on an NVIDIA GPU.
constexpr constant uint REGISTER_THREADS = 3 * THREADS;
#ifdef METAL_SIM_CUDA
/// For the compiler, as packed_least_threadgroups: all registers that REGISTER_THREADS leave. mul1's codes take 2 to 3%
/// less time with them, although some are spilled; codes of other codebooks would spill many more.
constexpr uint trellis_gate_up_decode_least_threadgroups = code_codebook(FIRST_MATRIX) == TRELLIS_MUL1 ? 1 : 0;
constexpr uint trellis_down_decode_least_threadgroups = trellis_gate_up_decode_least_threadgroups;
#endif
constexpr constant uint TILES = trellis_decode_tiles(SIMD_WIDTH);
constexpr constant uint COLUMNS = trellis_decode_columns(SIMD_WIDTH);
constexpr constant uint BLOCK_TILES = HADAMARD_BLOCK / TRELLIS_TILE;

/// Blocks of a slice.
struct Slice {
  uint first;
  uint count;

  Slice(uint slice, uint inputs, constant TrellisDecodeArgs& args)
      : first(trellis_slice(slice, rotate_blocks(inputs), args.slices)),
        count(trellis_slice(slice + 1, rotate_blocks(inputs), args.slices) - first) {}
};

/// A slice of a matrix times the row in threadgroup memory.
struct TrellisDecode {
  device const uint* codes; // of the slice's first row of tiles, from the threadgroup's first column on
  uint row_stride;          // of tiles, words
  uint half_bits;
  uint codebook;
  uint blocks;
  uint columns; // of the matrix, from the threadgroup's first one on
  RotatedRow row;
  device float* out;
  uint simdgroup;
  uint lane;

  TrellisDecode(device const uchar* buffer, device const ExpertMatrix& record, uint code, thread const Slice& slice,
                uint column, threadgroup float* memory, device float* out, uint simdgroup, uint lane)
      : codes(reinterpret_cast<device const uint*>(buffer + record.codes)), row_stride(record.codes_stride / 4),
        half_bits(code ? code_half_bits(code) : record.half_bits),
        codebook(code ? code_codebook(code) : record.codebook), blocks(slice.count),
        columns(rotate_padded(record.rows) - column), row(memory, slice.count), out(out), simdgroup(simdgroup),
        lane(lane) {
    codes +=
        ulong(slice.first * BLOCK_TILES) * row_stride + column / TRELLIS_TILE * (trellis_tile_bytes(half_bits) / 4);
  }

  void prefetch(uint thread_index) thread const {
    prefetch_codes(codes, row_stride, min(columns, COLUMNS) / TRELLIS_TILE * trellis_tile_bytes(half_bits),
                   min(blocks * BLOCK_TILES, TRELLIS_DECODE_PREFETCH), thread_index);
  }

  /// `code` once more: of what a barrier lies between, the compiler does not know that it is a constant.
  METAL_FUNC void multiply(uint code) thread const {
    with_trellis_code(code ? code_half_bits(code) : half_bits, code ? code_codebook(code) : codebook, *this);
  }

  template <uint HALF_BITS, uint CODEBOOK>
  void run() thread const {
#if SIMD_WIDTH == 1
    float sum[TILES][TRELLIS_TILE];
    const uint count = min(columns / TRELLIS_TILE, TILES);
    row.multiply<HALF_BITS, CODEBOOK, TILES>(codes, row_stride, blocks, count, sum);
    for (uint i = 0; i < count; ++i)
      for (uint n = 0; n < TRELLIS_TILE; ++n)
        out[i * TRELLIS_TILE + n] = sum[i][n];
#else
    const uint first = simdgroup * TILES;
    if (first * TRELLIS_TILE >= columns)
      return;
    float sum[TILES][2];
    row.multiply<HALF_BITS, CODEBOOK, TILES>(codes + first * (trellis_tile_bytes(HALF_BITS) / 4), row_stride, blocks,
                                             lane, sum);
    if (lane % 4 == 0) {
      UNROLL
      for (uint i = 0; i < TILES; ++i) {
        out[(first + i) * TRELLIS_TILE + trellis_output(lane, 0)] = sum[i][0];
        out[(first + i) * TRELLIS_TILE + trellis_output(lane, 4)] = sum[i][1];
      }
    }
#endif
  }
};

[[kernel, max_total_threads_per_threadgroup(REGISTER_THREADS)]]
void trellis_gate_up_decode(device const uchar* x [[buffer(0)]], device const int* ids [[buffer(1)]],
                            device const uchar* gate_codes [[buffer(2)]], device const uchar* gate_scales [[buffer(3)]],
                            device const ExpertMatrix* gate_table [[buffer(4)]],
                            device const uchar* up_codes [[buffer(5)]], device const uchar* up_scales [[buffer(6)]],
                            device const ExpertMatrix* up_table [[buffer(7)]], device float* out [[buffer(8)]],
                            constant TrellisDecodeArgs& args [[buffer(9)]],
                            threadgroup float* memory [[threadgroup(0)]],
                            uint3 threadgroup_position [[threadgroup_position_in_grid]],
                            uint thread_index [[thread_index_in_threadgroup]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  let_next_kernel_start();
  const uint assignment = threadgroup_position.y, matrices = args.rotate.gated ? 2 : 1;
  const uint column = threadgroup_position.x * COLUMNS;
  const bool gate = threadgroup_position.z % matrices == 0;
  const uint expert = expert_of(ids, assignment, args.rotate);
  if (expert == NO_EXPERT)
    return;
  const Slice slice(threadgroup_position.z / matrices, args.rotate.hidden, args);
  device const ExpertMatrix& record = (gate ? gate_table : up_table)[expert];
  const ulong place = ulong(threadgroup_position.z) * args.rotate.rows + assignment;
  const TrellisDecode product(gate ? gate_codes : up_codes, record, gate ? FIRST_MATRIX : SECOND_MATRIX, slice, column,
                              memory, out + place * rotate_padded(args.rotate.intermediate) + column, simdgroup, lane);
  product.prefetch(thread_index);
  for (uint b = simdgroup; b < product.blocks; b += SIMDGROUPS) {
    const uint first = (slice.first + b) * HADAMARD_BLOCK + lane * ROTATE_VALUES;
    device const half* suh = lane_scales(gate ? gate_scales : up_scales, record.scales, first);
    float value[ROTATE_VALUES];
    rotated_input(x, ulong(assignment / args.rotate.top_k) * args.rotate.x_row_stride, suh, first, lane, args.rotate,
                  value);
    product.row.store(b, lane, value);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (gate || FIRST_MATRIX == SECOND_MATRIX)
    product.multiply(FIRST_MATRIX);
  else
    product.multiply(SECOND_MATRIX);
}

[[kernel, max_total_threads_per_threadgroup(REGISTER_THREADS)]]
void trellis_down_decode(device const float* h [[buffer(0)]], device const int* ids [[buffer(1)]],
                         device const uchar* bias [[buffer(2)]], device const uchar* gate_biases [[buffer(3)]],
                         device const ExpertMatrix* gate_table [[buffer(4)]],
                         device const uchar* up_biases [[buffer(5)]], device const ExpertMatrix* up_table [[buffer(6)]],
                         device const uchar* down_codes [[buffer(7)]], device const uchar* down_scales [[buffer(8)]],
                         device const ExpertMatrix* down_table [[buffer(9)]], device float* out [[buffer(10)]],
                         constant TrellisDecodeArgs& args [[buffer(11)]], threadgroup float* memory [[threadgroup(0)]],
                         uint3 threadgroup_position [[threadgroup_position_in_grid]],
                         uint thread_index [[thread_index_in_threadgroup]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint assignment = threadgroup_position.y;
  const uint column = threadgroup_position.x * COLUMNS;
  const uint expert = early_expert_of(ids, assignment, args.rotate);
  if (expert == NO_EXPERT)
    return;
  const Slice slice(threadgroup_position.z, args.rotate.intermediate, args);
  const ulong place = ulong(threadgroup_position.z) * args.rotate.rows + assignment;
  const TrellisDecode product(down_codes, down_table[expert], FIRST_MATRIX, slice, column, memory,
                              out + place * rotate_padded(args.rotate.hidden) + column, simdgroup, lane);
  product.prefetch(thread_index);
  const ActivationBuffers from{{h, bias, gate_biases, gate_table, up_biases, up_table}, down_scales, down_table};
  const uint slice_first = slice.first * HADAMARD_BLOCK + lane * ROTATE_VALUES;
  ActivationScales scales;
  if (simdgroup < product.blocks)
    scales.load(from, expert, slice_first + simdgroup * HADAMARD_BLOCK);
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (uint b = simdgroup; b < product.blocks; b += SIMDGROUPS) {
    const uint first = slice_first + b * HADAMARD_BLOCK;
    if (b != simdgroup)
      scales.load(from, expert, first);
    float value[ROTATE_VALUES];
    rotated_activation(from, scales, assignment, expert, first, lane, args.rotate, value);
    product.row.store(b, lane, value);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  product.multiply(FIRST_MATRIX);
}
