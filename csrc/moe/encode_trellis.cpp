#include "encode_trellis.h"

#include "../core/engine_controls.h"
#include "formats/dequantize_trellis.h"
#include "quantize/viterbi.h"

#include <algorithm>

namespace metal_moe {

namespace {

constexpr uint32_t MIN_HALF_BITS = 2, MAX_HALF_BITS = 16;
constexpr int64_t TRELLIS_TILE_WEIGHTS = TRELLIS_TILE * TRELLIS_TILE, TRELLIS_STATES = 1 << 16;

/// Costs that are kept for all threadgroups of a search. A GPU of 132 cores with two threadgroups of 512 threads each
/// wants this much at 4 bits; at fewer bits it has less to run side by side.
constexpr size_t VITERBI_HISTORY_BYTES = size_t(1) << 30;

void check_rate(const char* op, uint32_t half_bits) {
  if (half_bits < MIN_HALF_BITS || half_bits > MAX_HALF_BITS)
    throw std::invalid_argument(std::string(op) + ": half_bits is " + std::to_string(half_bits) + ": must be 2 to 16");
}

/// Kernels believe what they are given: std::invalid_argument where a tensor is not of `item_size` bytes an element and
/// of `shape`, -1 being any size.
void check_tensor(const std::string& name, const TensorView& tensor, uint32_t item_size,
                  std::initializer_list<int64_t> shape) {
  bool fits = tensor.item_size == item_size && tensor.rank == shape.size();
  for (uint32_t d = 0; fits && d < tensor.rank; ++d)
    fits = shape.begin()[d] == -1 || shape.begin()[d] == tensor.shape[d];
  if (fits)
    return;
  std::string is, must;
  for (uint32_t d = 0; d < tensor.rank; ++d)
    is += (d ? ", " : "") + std::to_string(tensor.shape[d]);
  for (const int64_t size : shape)
    must += (must.empty() ? "" : ", ") + (size == -1 ? "any" : std::to_string(size));
  throw std::invalid_argument(name + " is [" + is + "] of " + std::to_string(tensor.item_size) +
                              " bytes an element: must be [" + must + "] of " + std::to_string(item_size));
}

} // namespace

void encode_dequantize_trellis(CommandStream& stream, MoeEngine& engine, const TensorView& codes, const TensorView& suh,
                               const TensorView& svh, uint32_t half_bits, uint32_t codebook, const TensorView& out) {
  check_rate("dequantize_trellis", half_bits);
  DequantizeTrellisArgs args{};
  const uint32_t matrices = size_argument("matrices of out", out.shape[0]);
  args.rows = size_argument("rows of out", out.shape[1]);
  args.columns = size_argument("columns of out", out.shape[2]);
  if (matrices == 0 || args.rows == 0 || args.columns == 0)
    return;
  check_tensor("dequantize_trellis: out", out, sizeof(float), {-1, out.shape[1], out.shape[2]});
  check_tensor("dequantize_trellis: suh", suh, sizeof(uint16_t), {out.shape[0], out.shape[2]});
  check_tensor("dequantize_trellis: svh", svh, sizeof(uint16_t), {out.shape[0], out.shape[1]});
  check_tensor("dequantize_trellis: codes", codes, sizeof(uint32_t),
               {out.shape[0], out.shape[2] / int64_t(TRELLIS_TILE), -1});
  args.half_bits = half_bits;
  args.codebook = codebook;
  args.codes_stride = stride_argument("words from a matrix of codes to the next", codes, 0);
  args.row_stride = stride_argument("words from a row of tiles to the next", codes, 1);
  args.suh_stride = stride_argument("stride of suh", suh, 0);
  args.svh_stride = stride_argument("stride of svh", svh, 0);

  const Pipeline& pipeline = engine.pipeline(DEQUANTIZE_TRELLIS_KERNEL);
  stream.use(pipeline);
  stream.bind(0, codes.view());
  stream.bind(1, suh.view());
  stream.bind(2, svh.view());
  stream.bind(3, out.view());
  stream.bind_value(4, args);
  const size_t weights = size_t(matrices) * args.rows * args.columns;
  stream.dispatch(MTL::Size(args.columns / HADAMARD_BLOCK, args.rows / HADAMARD_BLOCK, matrices),
                  simdgroups(DEQUANTIZE_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width,
                  weights * sizeof(float) + weights * half_bits / 16);
}

void encode_viterbi(CommandStream& stream, MoeEngine& engine, const TensorView& values, const TensorView& table,
                    uint32_t half_bits, const TensorView& states) {
  check_rate("viterbi", half_bits);
  const ViterbiArgs args{size_argument("tiles of values", values.shape[0]), half_bits};
  if (args.tiles == 0)
    return;
  check_tensor("viterbi: values", values, sizeof(float), {-1, TRELLIS_TILE_WEIGHTS});
  check_tensor("viterbi: table", table, sizeof(float), {TRELLIS_STATES});
  check_tensor("viterbi: states", states, sizeof(uint32_t), {values.shape[0], TRELLIS_TILE_WEIGHTS});
  const Pipeline& pipeline = engine.pipeline(VITERBI_KERNEL);
  const size_t bytes = size_t(viterbi_history(half_bits)) * sizeof(float);
  const size_t side_by_side =
      pipeline.simd_width == 1 ? num_threads() : std::max<size_t>(1, VITERBI_HISTORY_BYTES / bytes);
  const uint32_t threadgroups = std::min(args.tiles, static_cast<uint32_t>(side_by_side));
  stream.use(pipeline);
  stream.bind(0, values.view());
  stream.bind(1, table.view());
  stream.bind(2, states.view());
  stream.bind(3, stream.scratch(threadgroups * bytes));
  stream.bind_value(4, args);
  stream.threadgroup_memory(0, VITERBI_MEMORY_BYTES);
  stream.dispatch(MTL::Size(threadgroups, 1, 1),
                  simdgroups(VITERBI_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width, 2 * bytes * args.tiles);
}

} // namespace metal_moe
