#include "encode_matmul.h"

#include "../core/trace.h"
#include "linear/matmul.h"

#include <algorithm>

namespace metal_moe {

bool use_product_tile(const MoeEngine& engine, uint32_t rows) { return rows > engine.tuning().product_gemv_rows; }

uint32_t product_tile_bytes(const MoeEngine& engine, uint32_t item_size) {
  const Tuning& tuning = engine.tuning();
  return gemm_threadgroup_bytes(MATMUL_ROW_TILE, MATMUL_TILE_N,
                                item_size == 4 ? ROW_PAD_BYTES : tuning.threadgroup_pad_bytes,
                                tuning.threadgroup_bytes);
}

bool whole_vectors(const TensorView& tensor, uint32_t length, std::initializer_list<uint64_t> strides) {
  return tensor.address % VECTOR_BYTES == 0 && length % 8 == 0 &&
         std::all_of(strides.begin(), strides.end(),
                     [&](uint64_t stride) { return stride * tensor.item_size % VECTOR_BYTES == 0; });
}

void encode_matmul(CommandStream& stream, MoeEngine& engine, const TensorView& a, const TensorView& b, bool transposed,
                   MatmulKernel kernel, const TensorView& out) {
  if (!out)
    return;
  const uint32_t batch = size_argument("matrices of out", out.shape[0]);
  MatmulArgs args{};
  args.rows = size_argument("rows of a", a.shape[1]);
  args.depth = size_argument("columns of a", a.shape[2]);
  args.columns = size_argument("columns of b", out.shape[2]);
  args.a_batch_stride = stride_argument("matrix stride of a", a, 0);
  args.b_batch_stride = stride_argument("matrix stride of b", b, 0);
  args.a_row_stride = stride_argument("row stride of a", a, 1);
  args.b_row_stride = stride_argument("row stride of b", b, 1);
  args.a_vectorized = whole_vectors(a, args.depth, {args.a_row_stride, args.a_batch_stride});
  args.b_vectorized =
      whole_vectors(b, transposed ? args.depth : args.columns, {args.b_row_stride, args.b_batch_stride});

  const bool tile = kernel == MatmulKernel::BySize ? use_product_tile(engine, args.rows) : kernel == MatmulKernel::Tile;
  const Pipeline& pipeline = engine.pipeline(matmul_kernel(tile, transposed, out.dtype));
  const uint32_t width = pipeline.simd_width;
  const uint32_t columns = tile ? MATMUL_TILE_N : transposed ? matmul_nt_columns(width) : matmul_nn_columns(width);
  const uint32_t rows = tile ? MATMUL_ROW_TILE : matmul_gemv_rows(width);
  DispatchTrace& trace = last_dispatch();
  trace.family = tile ? "tile" : "gemv";
  trace.row_tile = rows;
  trace.tile_n = columns;
  trace.vectorized = args.a_vectorized && args.b_vectorized;

  stream.use(pipeline);
  stream.bind(0, a.view());
  stream.bind(1, b.view());
  stream.bind(2, out.view());
  stream.bind_value(3, args);
  if (tile)
    stream.threadgroup_memory(0, product_tile_bytes(engine, out.item_size));
  else if (!transposed)
    stream.threadgroup_memory(0, matmul_nn_memory_bytes(width));
  const uint32_t row_blocks = ceil_div(args.rows, rows), column_blocks = ceil_div(args.columns, columns);
  const size_t bytes =
      (size_t(args.rows) * args.depth + size_t(args.depth) * args.columns + size_t(args.rows) * args.columns) *
      out.item_size * batch;
  stream.dispatch(tile ? MTL::Size(row_blocks, column_blocks, batch) : MTL::Size(column_blocks, row_blocks, batch),
                  simdgroups(tile ? GEMM_SIMDGROUPS : MATMUL_SIMDGROUPS, width) * width, bytes);
}

} // namespace metal_moe
