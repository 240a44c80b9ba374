// Words that the host side of an MoE layer shares: element types and tensors in buffers.
#pragma once

#include "../core/command_stream.h"
#include "moe/route.h"

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace metal_moe {

/// Element type of a tensor. The first three are ScalarType's, in its order.
enum class Dtype : uint8_t { Fp32 = SCALAR_FP32, Fp16 = SCALAR_FP16, Bf16 = SCALAR_BF16, Int32, Int64, Other };

/// A tensor in a buffer. Without a buffer: absent, or without elements.
struct TensorView {
  static constexpr uint32_t MAX_RANK = 8;

  NS::SharedPtr<MTL::Buffer> buffer;
  size_t offset = 0;     // bytes
  uintptr_t address = 0; // of the first element, as far as alignment goes
  Dtype dtype = Dtype::Other;
  uint32_t item_size = 0; // bytes
  uint32_t rank = 0;
  std::array<int64_t, MAX_RANK> shape{};
  std::array<int64_t, MAX_RANK> strides{}; // elements

  explicit operator bool() const { return static_cast<bool>(buffer); }
  BufferView view() const { return {buffer.get(), offset}; }
};

/// A tensor [tokens, slots] of ids or weights, as kernels take it: any strides.
struct SlotsView {
  BufferView view;
  uint32_t token_stride = 0; // elements
  uint32_t slot_stride = 0;
  uint32_t type = 0; // ids: 32-bit words of an element; weights: ScalarType
};

/// `value` as kernels take sizes. std::invalid_argument naming `what` where it does not fit 32 bits.
inline uint32_t size_argument(const char* what, int64_t value) {
  if (value < 0 || value > int64_t(UINT32_MAX))
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(value) + ": must fit 32 bits unsigned");
  return static_cast<uint32_t>(value);
}

/// Stride of a dimension; 0 where the dimension has one element, whose stride says nothing.
inline uint32_t stride_argument(const char* what, const TensorView& tensor, uint32_t dimension) {
  return tensor.shape[dimension] > 1 ? size_argument(what, tensor.strides[dimension]) : 0;
}

constexpr uint32_t ceil_div(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

} // namespace metal_moe
