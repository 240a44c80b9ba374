#include "encode_trellis.h"

#include "../core/engine_controls.h"
#include "formats/dequantize_trellis.h"
#include "quantize/viterbi.h"

#include <algorithm>

namespace metal_moe {

namespace {

constexpr uint32_t MIN_HALF_BITS = 2, MAX_HALF_BITS = 16;

/// Costs that are kept for all threadgroups of a search. A GPU of 132 cores with two threadgroups of 512 threads each
/// wants this much at 4 bits; at fewer bits it has less to run side by side.
constexpr size_t VITERBI_HISTORY_BYTES = size_t(1) << 30;

void check_rate(const char* op, uint32_t half_bits) {
  if (half_bits < MIN_HALF_BITS || half_bits > MAX_HALF_BITS)
    throw std::invalid_argument(std::string(op) + ": half_bits is " + std::to_string(half_bits) + ": must be 2 to 16");
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
