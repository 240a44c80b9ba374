// Encodes `matmul`: small matrix products.
#pragma once

#include "../moe/engine.h"

namespace metal_moe {

/// How a product is computed; see kernels/linear/matmul.metal.
enum class MatmulKernel : uint8_t { BySize, Gemv, Tile };

/// out [B, M, N] contiguous = a [B, M, K] b, where b is [B, K, N] with its rows along N, or, `transposed`, [B, N, K]
/// with its rows along K. Rows have stride 1 within and any stride between them; a or b may be one matrix for all. One
/// dispatch; none where out is empty. K may not be 0. std::invalid_argument naming a size that does not fit 32 bits.
void encode_matmul(CommandStream& stream, MoeEngine& engine, const TensorView& a, const TensorView& b, bool transposed,
                   MatmulKernel kernel, const TensorView& out);

/// Whether `rows` rows of one matrix are multiplied in simdgroup matrices, where nothing else is asked for.
bool use_product_tile(const MoeEngine& engine, uint32_t rows);

/// Threadgroup memory of a kernel made of product_tile.h, on elements of `item_size` bytes.
uint32_t product_tile_bytes(const MoeEngine& engine, uint32_t item_size);

/// Whether rows of `length` elements are whole vectors wherever they start: `address`, then steps of each stride
/// (elements).
bool whole_vectors(const TensorView& tensor, uint32_t length, std::initializer_list<uint64_t> strides);

} // namespace metal_moe
