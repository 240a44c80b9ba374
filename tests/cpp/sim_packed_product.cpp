// The products of csrc/sim/msl/cuda_packed.h on a processor: a thread for each lane, and tensor cores, copies and
// barriers as NVIDIA documents them, in words of this file.
#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#define METAL_SIM_TEST_WARPS
#define METAL_FUNC inline
#define SIMD_WIDTH 32u

namespace {

using uint = uint32_t;
using uchar = unsigned char;
using std::max;
using std::min;
struct uint2 {
  uint x, y;
};
struct uint4 {
  uint x, y, z, w;
};

struct half {
  uint16_t bits;

  explicit operator float() const { // normal numbers and zero, which are all that the test has
    const uint32_t magnitude = bits & 0x7FFFu;
    const uint32_t word = uint32_t(bits & 0x8000u) << 16 | (magnitude ? (magnitude << 13) + (112u << 23) : 0u);
    return std::bit_cast<float>(word);
  }
};
struct bfloat {
  uint16_t bits;

  explicit operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

struct Warp {
  std::barrier<> barrier{SIMD_WIDTH};
  uint32_t a[SIMD_WIDTH][4];
  uint32_t b[SIMD_WIDTH][2];
};
struct Block {
  explicit Block(uint warps) : barrier(warps * SIMD_WIDTH), warps(warps) {
    for (auto& warp : this->warps)
      warp = std::make_unique<Warp>();
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<std::barrier<>>> named;
};
thread_local Block* block;
thread_local uint own_warp;
thread_local uint own_lane;

void __syncwarp() { block->warps[own_warp]->barrier.arrive_and_wait(); }
void __syncthreads() { block->barrier.arrive_and_wait(); }
uint32_t __activemask() { return ~0u; }

float __shfl_sync(uint32_t, float value, uint from) {
  Warp& warp = *block->warps[own_warp];
  warp.a[own_lane][0] = std::bit_cast<uint32_t>(value);
  warp.barrier.arrive_and_wait();
  const uint32_t word = warp.a[from][0];
  warp.barrier.arrive_and_wait();
  return std::bit_cast<float>(word);
}

uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

namespace metal_sim {

void barrier_of(uint32_t index, uint32_t) { block->named[index]->arrive_and_wait(); }
uint32_t unknown(uint32_t value) { return value; }
uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

void copy_async(void* to, const void* from, bool inside) {
  if (inside)
    std::memcpy(to, from, 16);
  else
    std::memset(to, 0, 16);
}
template <uint TO, uint FROM>
void copy_async_at(void* to, const void* from, bool wanted) {
  if (wanted)
    std::memcpy(static_cast<uchar*>(to) + TO, static_cast<const uchar*>(from) + FROM, 16);
}
template <uint BYTES>
void copy_async_part(void* to, const void* from, uint count) {
  std::memset(to, 0, BYTES);
  std::memcpy(to, from, count);
}
void copy_commit() {}
template <uint>
void copy_wait_own() {}

template <typename T>
float element(uint32_t word, uint index) {
  return float(T{uint16_t(word >> 16 * index)});
}

/// mma.m16n8k16: lane 4g + t holds of the first factor rows g and g + 8 at k = 2t, 2t + 1 and 2t + 8, 2t + 9, of the
/// second those k of column g, of the sum rows g and g + 8 of columns 2t, 2t + 1.
template <typename T>
void multiply_add_fragments(T, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Warp& warp = *block->warps[own_warp];
  std::copy(std::begin(a), std::end(a), warp.a[own_lane]);
  warp.b[own_lane][0] = b0, warp.b[own_lane][1] = b1;
  warp.barrier.arrive_and_wait();
  for (uint e = 0; e < 4; ++e) {
    const uint row = own_lane / 4 + e / 2 * 8, column = own_lane % 4 * 2 + e % 2;
    for (uint t = 0; t < 4; ++t)
      for (uint upper = 0; upper < 2; ++upper)
        for (uint i = 0; i < 2; ++i)
          sum[e] += element<T>(warp.a[row % 8 * 4 + t][upper * 2 + row / 8], i) *
                    element<T>(warp.b[column * 4 + t][upper], i);
  }
  warp.barrier.arrive_and_wait();
}
template <typename T>
void multiply_fragments(T type, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  std::fill(std::begin(sum), std::end(sum), 0.0f);
  multiply_add_fragments(type, sum, a, b0, b1);
}

/// mma.m16n8k4 of tf32, whose operands lose the low 13 bits: lane 4g + t holds of the first factor rows g and g + 8 at
/// k = t, of the second column g.
void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[2], uint32_t b) {
  Warp& warp = *block->warps[own_warp];
  std::copy(std::begin(a), std::end(a), warp.a[own_lane]);
  warp.b[own_lane][0] = b;
  warp.barrier.arrive_and_wait();
  const auto tf32 = [](uint32_t word) { return std::bit_cast<float>(word & 0xFFFFE000u); };
  for (uint e = 0; e < 4; ++e) {
    const uint row = own_lane / 4 + e / 2 * 8, column = own_lane % 4 * 2 + e % 2;
    for (uint t = 0; t < 4; ++t)
      sum[e] += tf32(warp.a[row % 8 * 4 + t][row / 8]) * tf32(warp.b[column * 4 + t][0]);
  }
  warp.barrier.arrive_and_wait();
}

} // namespace metal_sim

#include "sim/msl/cuda_packed.h"

using namespace metal_sim;

/// `value` in 16 bits, truncated: any value will do.
template <typename T>
T truncated(float value) {
  const auto word = std::bit_cast<uint32_t>(value);
  if constexpr (std::is_same_v<T, bfloat>)
    return {uint16_t(word >> 16)};
  const uint32_t exponent = word >> 23 & 255;
  if (exponent <= 112)
    return {0};
  return {uint16_t((word >> 16 & 0x8000u) | (((word & 0x7FFFFFFFu) - (112u << 23)) >> 13))};
}

struct Matrix {
  std::vector<uint4> codes; // aligned
  std::vector<uint16_t> scales;
  std::vector<uint16_t> biases;
};

/// The largest error of a sum, relative to the sum of its terms' magnitudes.
template <typename T, uint GROUP, typename Scale, uint MATRICES, uint WEIGHT_ROWS, uint X_ROWS, uint SLAB, uint WARPS,
          uint K_WARPS = WARPS>
double error_of(uint rows, uint K, uint count, uint first_row) {
  using Product = PackedProduct<T, GROUP, std::is_same_v<Scale, half>, MATRICES, WEIGHT_ROWS, X_ROWS, SLAB, WARPS,
                                K_WARPS, 2, X_ROWS == 1 ? 0 : 2>;
  constexpr uint COLUMNS = WEIGHT_ROWS * WARPS / K_WARPS;
  std::mt19937 random(K + rows);
  std::normal_distribution<float> normal;
  Matrix stored[MATRICES];
  PackedMatrix matrices[MATRICES];
  for (uint m = 0; m < MATRICES; ++m) {
    stored[m].codes.resize(size_t(rows) * K / 32);
    for (uint4& four : stored[m].codes)
      four = {uint(random()), uint(random()), uint(random()), uint(random())};
    stored[m].scales.resize(size_t(rows) * K / GROUP);
    stored[m].biases.resize(stored[m].scales.size());
    for (uint16_t& scale : stored[m].scales)
      scale = truncated<Scale>(0.05f * normal(random)).bits;
    for (uint16_t& bias : stored[m].biases)
      bias = truncated<Scale>(0.3f * normal(random)).bits;
    matrices[m] = {reinterpret_cast<const uchar*>(stored[m].codes.data()),
                   reinterpret_cast<const uchar*>(stored[m].scales.data()),
                   reinterpret_cast<const uchar*>(stored[m].biases.data()), K / 2, K / GROUP * 2};
  }
  std::vector<uint4> x(size_t(count) * K / 8);
  const auto x_row = [&](uint row) { return reinterpret_cast<T*>(x.data()) + size_t(row) * K; };
  for (size_t i = 0; i < size_t(count) * K; ++i)
    x_row(0)[i] = truncated<T>(normal(random));

  std::vector<uint4> shared(Product::BYTES / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u}); // NaN
  auto* memory = reinterpret_cast<uchar*>(shared.data());
  Block threads(WARPS);
  for (uint i = 0; i <= K_WARPS; ++i)
    threads.named.push_back(std::make_unique<std::barrier<>>(WARPS / K_WARPS * SIMD_WIDTH));
  std::vector<float> sums(count * MATRICES * COLUMNS);
  std::vector<std::thread> lanes;
  for (uint i = 0; i < WARPS * SIMD_WIDTH; ++i)
    lanes.emplace_back([&, i] {
      block = &threads, own_warp = i / SIMD_WIDTH, own_lane = i % SIMD_WIDTH;
      Product product;
      product.clear();
      product.multiply_add_all(memory, matrices, first_row, rows - 1, x_row, count, K, own_warp, own_lane);
      product.gather(memory, own_warp, own_lane);
      for (uint e = i; e < sums.size(); e += WARPS * SIMD_WIDTH)
        sums[e] = Product::at(memory, e / (MATRICES * COLUMNS), e / COLUMNS % MATRICES, e % COLUMNS);
    });
  for (std::thread& lane : lanes)
    lane.join();

  double largest = 0;
  for (uint e = 0; e < sums.size(); ++e) {
    const uint m = e / COLUMNS % MATRICES, row = first_row + e % COLUMNS;
    if (row >= rows)
      continue;
    double sum = 0, magnitude = 0;
    for (uint k = 0; k < K; ++k) {
      const size_t group = size_t(row) * (K / GROUP) + k / GROUP;
      const uint code = matrices[m].codes[size_t(row) * K / 2 + k / 2] >> k % 2 * 4 & 15;
      const double weight =
          double(float(Scale{stored[m].scales[group]})) * code + float(Scale{stored[m].biases[group]});
      const double term = weight * float(x_row(e / (MATRICES * COLUMNS))[k]);
      sum += term;
      magnitude += std::fabs(term);
    }
    const double error = std::fabs(sums[e] - sum) / magnitude;
    largest = error <= largest ? largest : error; // NaN is the largest
  }
  return largest;
}

constexpr double ROUNDING = 2e-6; // of fp32 sums of OFFSET + code

TEST(PackedProduct, OneRowOfX) {
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 16, 1, 256, 4>(40, 512, 1, 32)), ROUNDING);
  EXPECT_LT((error_of<half, 64, half, 2, 16, 1, 256, 4>(40, 512, 1, 0)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 32, bfloat, 1, 16, 1, 256, 4>(16, 544, 1, 0)), ROUNDING);
  EXPECT_LT((error_of<half, 128, bfloat, 1, 16, 1, 256, 4>(48, 384, 1, 32)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, bfloat, 1, 16, 1, 256, 16>(40, 9216, 1, 16)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, bfloat, 1, 32, 1, 256, 16>(64, 9216, 1, 32)), ROUNDING);
}

TEST(PackedProduct, SlabsThatEndBeyondKAndScalesThatAreNotAligned) {
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 16, 1, 256, 4>(40, 1344, 1, 16)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, half, 2, 32, 8, 128, 4>(70, 320, 5, 64)), ROUNDING);
  EXPECT_LT((error_of<half, 32, half, 2, 32, 16, 128, 4>(64, 96, 16, 0)), ROUNDING);
}

TEST(PackedProduct, TilesOfRows) {
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 32, 8, 128, 4>(64, 640, 8, 0)), ROUNDING);
  EXPECT_LT((error_of<half, 64, bfloat, 1, 64, 16, 128, 4>(70, 640, 13, 0)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 128, bfloat, 2, 32, 8, 128, 4>(64, 256, 3, 32)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 64, 16, 128, 4>(96, 2176, 11, 0)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 64, 16, 128, 4>(64, 1152, 8, 0)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 32, 8, 128, 4, 2>(96, 768, 7, 0)), ROUNDING);
  EXPECT_LT((error_of<half, 32, half, 1, 64, 16, 128, 4, 2>(80, 1056, 16, 0)), ROUNDING);
}

} // namespace
