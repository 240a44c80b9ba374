// What the tests of the core share: engines on the compiled library, tensors in vectors, and the smallest dispatch.
#pragma once

#include "moe/fused_moe.h" // csrc/
#include "moe/gather.h"    // kernels/

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <numeric>
#include <vector>

namespace metal_moe::testing {

inline MoeEngine& engine(const char* name) {
  MoeEngine::set_library_path(METAL_MOE_TEST_LIBRARY);
  return MoeEngine::get(name);
}

/// On the clock of command buffers.
inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class T>
constexpr Dtype dtype_of() {
  if constexpr (std::is_same_v<T, float>)
    return Dtype::Fp32;
  else if constexpr (std::is_same_v<T, int32_t>)
    return Dtype::Int32;
  else
    return Dtype::Other;
}

/// `values` as a contiguous tensor, in place.
template <class T>
TensorView tensor(Context& context, const std::vector<T>& values, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.dtype = dtype_of<T>();
  view.item_size = sizeof(T);
  view.rank = static_cast<uint32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  int64_t stride = 1;
  for (uint32_t i = view.rank; i-- > 0; stride *= view.shape[i])
    view.strides[i] = stride;
  if (!values.empty()) {
    view.buffer = context.wrap(values.data(), values.size() * sizeof(T));
    view.address = reinterpret_cast<uintptr_t>(values.data());
  }
  return view;
}

/// A copy of `bytes` from one buffer to another as one dispatch; stands for any kernel. `claimed_bytes` beyond the
/// buffers make it read and write outside of them.
inline void encode_copy(CommandStream& stream, MoeEngine& engine, BufferView from, BufferView to,
                        uint32_t claimed_bytes, size_t policy_bytes = 0) {
  const int32_t id = 0;
  GatherArgs args{};
  args.count = 1;
  args.experts = 1;
  args.id_words = 1;
  args.unit_bytes = 1;
  args.bytes_per_expert_low = claimed_bytes;
  const Pipeline& pipeline = engine.pipeline(GATHER_KERNEL);
  stream.use(pipeline);
  stream.bind(0, from);
  stream.bind_value(1, id);
  stream.bind(2, to);
  stream.bind_value(3, args);
  stream.dispatch(MTL::Size(ceil_div(claimed_bytes, GATHER_BLOCK_BYTES), 1, 1),
                  simdgroups(GATHER_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width, policy_bytes);
}

/// An engine, and 256 integers to copy from one vector to another.
struct Copying {
  explicit Copying(const char* name) : device(engine(name)) {
    std::iota(from.begin(), from.end(), 1000);
    source = tensor(context, from, {256});
    destination = tensor(context, to, {256});
  }
  void copy(CommandStream& stream, size_t policy_bytes = 0) {
    encode_copy(stream, device, source.view(), destination.view(), 1024, policy_bytes);
  }

  MoeEngine& device;
  Context& context = device.context();
  std::vector<int32_t> from = std::vector<int32_t>(256), to = std::vector<int32_t>(256, -1);
  TensorView source, destination;
};

} // namespace metal_moe::testing
