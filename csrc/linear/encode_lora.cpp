#include "encode_lora.h"

#include "../core/trace.h"
#include "linear/lora.h"

namespace metal_moe {

void encode_lora(CommandStream& stream, MoeEngine& engine, const TensorView& x, const LoraLayer& layer,
                 MatmulKernel kernel, const TensorView& out) {
  if (!out)
    return;
  LoraArgs args{};
  args.tokens = size_argument("tokens of x", x.shape[0]);
  args.inputs = size_argument("columns of x", x.shape[1]);
  args.outputs = size_argument("columns of out", out.shape[1]);
  args.adapters = size_argument("adapters of A", layer.a.shape[0]);
  args.rank = size_argument("rank of A", layer.a.shape[1]);
  if (args.rank > LORA_MAX_RANK)
    throw std::invalid_argument("A has rank " + std::to_string(args.rank) + ": must be at most " +
                                std::to_string(LORA_MAX_RANK));
  args.x_row_stride = stride_argument("row stride of x", x, 0);
  args.a_adapter_stride = stride_argument("adapter stride of A", layer.a, 0);
  args.a_row_stride = stride_argument("row stride of A", layer.a, 1);
  args.b_adapter_stride = stride_argument("adapter stride of B", layer.b, 0);
  args.b_row_stride = stride_argument("row stride of B", layer.b, 1);
  args.s_row_stride = ceil_div(args.rank, 4) * 4; // whole vectors
  args.scale = layer.scale;
  args.has_scales = bool(layer.scales);
  if (layer.base) {
    args.has_base = 1;
    args.base_row_stride = stride_argument("row stride of base", layer.base, 0);
  }
  if (layer.adapter_ids) {
    args.id_stride = stride_argument("stride of adapter_ids", layer.adapter_ids, 0);
    args.id_words = layer.adapter_ids.dtype == Dtype::Int64 ? 2 : 1;
  }
  args.a_vectorized = whole_vectors(x, args.inputs, {args.x_row_stride}) &&
                      whole_vectors(layer.a, args.inputs, {args.a_row_stride, args.a_adapter_stride});
  args.b_vectorized = whole_vectors(layer.b, args.rank, {args.b_row_stride, args.b_adapter_stride});

  if (kernel == MatmulKernel::Tile && layer.adapter_ids)
    throw std::invalid_argument("kernel is 'tile', but adapter_ids are given: must be 'gemv' or None");
  const bool tile = kernel == MatmulKernel::BySize ? !layer.adapter_ids && use_product_tile(engine, args.tokens)
                                                   : kernel == MatmulKernel::Tile;
  const Pipeline& shrink = engine.pipeline(lora_shrink_kernel(tile, x.dtype));
  const Pipeline& expand = engine.pipeline(lora_expand_kernel(tile, x.dtype));
  const uint32_t width = shrink.simd_width;
  const uint32_t threads = simdgroups(tile ? GEMM_SIMDGROUPS : LORA_SIMDGROUPS, width) * width;
  DispatchTrace& trace = last_dispatch();
  trace.family = tile ? "tile" : "gemv";
  trace.row_tile = tile ? MATMUL_ROW_TILE : lora_tokens(width);
  trace.tile_n = tile ? MATMUL_TILE_N : lora_expand_columns(width);
  trace.vectorized = args.a_vectorized && (tile || args.b_vectorized);

  const auto grid = [&](uint32_t columns, uint32_t gemv_columns) {
    return tile ? MTL::Size(ceil_div(args.tokens, MATMUL_ROW_TILE), ceil_div(columns, MATMUL_TILE_N), 1)
                : MTL::Size(ceil_div(columns, gemv_columns), ceil_div(args.tokens, lora_tokens(width)), 1);
  };
  const auto or_out = [&](const TensorView& view) { return view ? view.view() : out.view(); };
  const size_t s_bytes = size_t(args.tokens) * args.s_row_stride * sizeof(float);
  const size_t adapter_rows = size_t(layer.adapter_ids ? std::min(args.adapters, args.tokens) : 1) * args.rank;
  const BufferView s = stream.scratch(s_bytes);

  stream.use(shrink);
  stream.bind(0, x.view());
  stream.bind(1, layer.a.view());
  if (!tile)
    stream.bind(2, or_out(layer.adapter_ids));
  stream.bind(3, s);
  stream.bind_value(4, args);
  stream.threadgroup_memory(0, tile ? product_tile_bytes(engine, x.item_size) : LORA_SHRINK_MEMORY_BYTES);
  stream.dispatch(grid(args.rank, lora_shrink_rows(width)), threads,
                  (args.tokens + adapter_rows) * args.inputs * x.item_size + s_bytes);

  stream.use(expand);
  stream.bind(0, s);
  stream.bind(1, layer.b.view());
  if (!tile)
    stream.bind(2, or_out(layer.adapter_ids));
  stream.bind(3, or_out(layer.scales));
  stream.bind(4, or_out(layer.base));
  stream.bind(5, out.view());
  stream.bind_value(6, args);
  if (tile)
    stream.threadgroup_memory(0, product_tile_bytes(engine, sizeof(float)));
  stream.dispatch(grid(args.outputs, lora_expand_columns(width)), threads,
                  s_bytes + (adapter_rows + args.tokens * (1 + args.has_base)) * args.outputs * x.item_size);
}

} // namespace metal_moe
