// The products of csrc/sim/msl/cuda_packed.h and cuda_packed_row.h on a processor: a thread for each lane, and tensor
// cores, copies and barriers as NVIDIA documents them, in words of this file.
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
struct float2 {
  float x, y;
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
float __shfl_xor_sync(uint32_t mask, float value, uint other) { return __shfl_sync(mask, value, own_lane ^ other); }
uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  Warp& warp = *block->warps[own_warp];
  warp.a[own_lane][0] = value;
  warp.barrier.arrive_and_wait();
  for (const auto& word : warp.a)
    value = max(value, word[0]);
  warp.barrier.arrive_and_wait();
  return value;
}
uint32_t __vmaxu2(uint32_t a, uint32_t b) { return max(a & 0xFFFFu, b & 0xFFFFu) | max(a >> 16, b >> 16) << 16; }
int __float2int_rn(float value) { return int(std::lrint(value)); }
uint4 __ldcg(const uint4* from) { return *from; }

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

/// Lane 4g + t holds of the first factor rows g and g + 8 at two words of k, of the second those k of column g, of the
/// sum rows g and g + 8 of columns 2t, 2t + 1. add(sum, word of a, word of b) for each word of k.
template <typename Sum, typename Add>
void multiply_add_words(Sum (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Add& add) {
  Warp& warp = *block->warps[own_warp];
  std::copy(std::begin(a), std::end(a), warp.a[own_lane]);
  warp.b[own_lane][0] = b0, warp.b[own_lane][1] = b1;
  warp.barrier.arrive_and_wait();
  for (uint e = 0; e < 4; ++e) {
    const uint row = own_lane / 4 + e / 2 * 8, column = own_lane % 4 * 2 + e % 2;
    for (uint t = 0; t < 4; ++t)
      for (uint upper = 0; upper < 2; ++upper)
        add(sum[e], warp.a[row % 8 * 4 + t][upper * 2 + row / 8], warp.b[column * 4 + t][upper]);
  }
  warp.barrier.arrive_and_wait();
}

/// mma.m16n8k16: words of k = 2t, 2t + 1 and 2t + 8, 2t + 9.
template <typename T>
void multiply_add_fragments(T, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add_words(sum, a, b0, b1, [](float& to, uint32_t x, uint32_t y) {
    for (uint i = 0; i < 2; ++i)
      to += element<T>(x, i) * element<T>(y, i);
  });
}
template <typename T>
void multiply_fragments(T type, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  std::fill(std::begin(sum), std::end(sum), 0.0f);
  multiply_add_fragments(type, sum, a, b0, b1);
}

/// mma.m16n8k32 of bytes: words of k = 4t to 4t + 3 and 16 + 4t to 16 + 4t + 3.
void multiply_add_signed_bytes(uint32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add_words(sum, a, b0, b1, [](uint32_t& to, uint32_t x, uint32_t y) {
    for (uint i = 0; i < 4; ++i)
      to += int(x >> 8 * i & 255) * int(int8_t(y >> 8 * i));
  });
}
void multiply_signed_bytes(uint32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, uint32_t base) {
  std::fill(std::begin(sum), std::end(sum), base);
  multiply_add_signed_bytes(sum, a, b0, b1);
}

/// mma.m16n8k8 of tf32, whose operands lose the low 13 bits: lane 4g + t holds of the first factor rows g and g + 8 at
/// k = t and again at t + 4, of the second column g at both.
void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[2], uint32_t b, uint32_t c) {
  multiply_add_words(sum, {a[0], a[1], a[0], a[1]}, b, c, [](float& to, uint32_t x, uint32_t y) {
    const auto tf32 = [](uint32_t word) { return std::bit_cast<float>(word & 0xFFFFE000u); };
    to += tf32(x) * tf32(y);
  });
}

uint32_t multiply_bfloats(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint i = 0; i < 2; ++i) // exact where one is a power of two
    product |= std::bit_cast<uint32_t>(element<bfloat>(a, i) * element<bfloat>(b, i)) >> 16 << 16 * i;
  return product;
}

} // namespace metal_sim

#include "sim/msl/cuda_packed.h"
#include "sim/msl/cuda_packed_row.h"

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

/// Random weights and `count` rows of x.
template <typename T, uint GROUP, typename Scale, uint MATRICES>
struct Inputs {
  uint rows, K, count;
  Matrix stored[MATRICES];
  PackedMatrix matrices[MATRICES];
  std::vector<uint4> x;

  Inputs(uint rows, uint K, uint count) : rows(rows), K(K), count(count), x(size_t(count) * K / 8) {
    std::mt19937 random(K + rows);
    std::normal_distribution<float> normal;
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
    for (size_t i = 0; i < size_t(count) * K; ++i)
      x_row(0)[i] = truncated<T>(normal(random));
  }

  T* x_row(uint row) { return reinterpret_cast<T*>(x.data()) + size_t(row) * K; }

  /// The largest error of sums, [count][MATRICES][columns] from weight row first_row on, relative to the sum of their
  /// terms' magnitudes.
  double error_of(const std::vector<float>& sums, uint columns, uint first_row) {
    double largest = 0;
    for (uint e = 0; e < sums.size(); ++e) {
      const uint m = e / columns % MATRICES, row = first_row + e % columns;
      if (row >= rows)
        continue;
      double sum = 0, magnitude = 0;
      for (uint k = 0; k < K; ++k) {
        const size_t group = size_t(row) * (K / GROUP) + k / GROUP;
        const uint code = matrices[m].codes[size_t(row) * K / 2 + k / 2] >> k % 2 * 4 & 15;
        const double weight =
            double(float(Scale{stored[m].scales[group]})) * code + float(Scale{stored[m].biases[group]});
        const double term = weight * float(x_row(e / (MATRICES * columns))[k]);
        sum += term;
        magnitude += std::fabs(term);
      }
      const double error = std::fabs(sums[e] - sum) / magnitude;
      largest = error <= largest ? largest : error; // NaN is the largest
    }
    return largest;
  }
};

/// run(memory, warp, lane, thread) in each thread of WARPS warps, of which K_WARPS share K. memory: BYTES, NaNs.
template <uint BYTES, uint WARPS, uint K_WARPS, typename Run>
void run_threads(const Run& run) {
  std::vector<uint4> shared(BYTES / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u}); // NaN
  auto* memory = reinterpret_cast<uchar*>(shared.data());
  Block threads(WARPS);
  for (uint i = 0; i <= K_WARPS; ++i)
    threads.named.push_back(std::make_unique<std::barrier<>>(WARPS / K_WARPS * SIMD_WIDTH));
  std::vector<std::thread> lanes;
  for (uint i = 0; i < WARPS * SIMD_WIDTH; ++i)
    lanes.emplace_back([&, i] {
      block = &threads, own_warp = i / SIMD_WIDTH, own_lane = i % SIMD_WIDTH;
      run(memory, own_warp, own_lane, i);
    });
  for (std::thread& lane : lanes)
    lane.join();
}

/// The largest error of tiles of rows.
template <typename T, uint GROUP, typename Scale, uint MATRICES, uint WEIGHT_ROWS, uint X_ROWS, uint K_WARPS = 4>
double error_of(uint rows, uint K, uint count, uint first_row) {
  constexpr uint WARPS = 4, COLUMNS = WEIGHT_ROWS * WARPS / K_WARPS;
  using Product =
      PackedProduct<T, GROUP, std::is_same_v<Scale, half>, MATRICES, WEIGHT_ROWS, X_ROWS, 128, WARPS, K_WARPS, 2, 2>;
  Inputs<T, GROUP, Scale, MATRICES> inputs(rows, K, count);
  std::vector<float> sums(count * MATRICES * COLUMNS);
  run_threads<Product::BYTES, WARPS, K_WARPS>([&](uchar* memory, uint warp, uint lane, uint thread) {
    Product product;
    product.clear();
    const auto x_row = [&](uint row) { return inputs.x_row(row); };
    product.template multiply_add_all<(MATRICES == 1)>(memory, inputs.matrices, first_row, rows - 1, x_row, count, K,
                                                       warp, lane, [] {});
    product.gather(memory, count, warp, lane);
    for (uint e = 2 * thread; e < sums.size(); e += 2 * WARPS * SIMD_WIDTH) {
      const float2 pair = Product::pair_at(memory, e / (MATRICES * COLUMNS), e / COLUMNS % MATRICES, e % COLUMNS);
      sums[e] = pair.x, sums[e + 1] = pair.y;
    }
  });
  return inputs.error_of(sums, COLUMNS, first_row);
}

/// The sums of one row of x.
template <uint WEIGHT_ROWS, uint WARPS, uint X_STAGES, typename T, uint GROUP, typename Scale, uint MATRICES>
std::vector<float> row_sums(Inputs<T, GROUP, Scale, MATRICES>& inputs, uint first_row) {
  using Product =
      PackedRow<T, GROUP, std::is_same_v<Scale, half>, MATRICES, WEIGHT_ROWS, 256, WARPS, 2, X_STAGES, false>;
  std::vector<float> sums(MATRICES * WEIGHT_ROWS);
  const uint K = inputs.K;
  run_threads<Product::BYTES, WARPS, 1>([&](uchar* memory, uint warp, uint lane, uint thread) {
    Product product;
    product.clear();
    const auto first_of = [&](uint step) { return (warp + step * WARPS) * 256; };
    uint waits = 0;
    product.template multiply_add_all<(X_STAGES > 1)>(
        memory, Product::steps((K + 255) / 256, warp), warp, lane,
        [&](uchar* slab, uint step) {
          Product::copy_weights(slab, inputs.matrices, first_row, inputs.rows - 1, first_of(step), K, lane);
        },
        [&] { ++waits; },
        [&](uint step) {
          EXPECT_EQ(waits, X_STAGES > 1 ? 0u : 1u);
          return Product::load_elements(inputs.x_row(0), 1.0f, first_of(step), K, lane);
        });
    product.gather(memory, warp, lane);
    if (thread < sums.size())
      sums[thread] = Product::at(memory, thread / WEIGHT_ROWS, thread % WEIGHT_ROWS);
  });
  return sums;
}

/// The same where a warp's slab is all that it has of K, for PARTS times as many weight rows: their largest error.
template <typename T, uint GROUP, uint MATRICES, uint PARTS>
double error_of_whole_rows(uint rows, uint K, uint first_row) {
  constexpr uint WARPS = 8, WEIGHT_ROWS = 16;
  using Product = PackedRow<T, GROUP, false, MATRICES, WEIGHT_ROWS, 256, WARPS, PARTS, 1, true>;
  Inputs<T, GROUP, bfloat, MATRICES> inputs(rows, K, 1);
  std::vector<float> sums(MATRICES * PARTS * WEIGHT_ROWS);
  run_threads<Product::BYTES, WARPS, 1>([&](uchar* memory, uint warp, uint lane, uint thread) {
    Product product[PARTS];
    for (Product& part : product)
      part.clear();
    const auto elements = Product::load_elements(inputs.x_row(0), 1.0f, warp * 256, K, lane);
    Product::start_whole(memory, inputs.matrices, first_row, rows - 1, warp * 256, K, warp, lane);
    Product::multiply_add_whole(product, memory, elements, warp, lane);
    __syncthreads();
    for (uint i = 0; i < PARTS; ++i)
      product[i].put(memory + i * Product::SUM_BYTES, warp, lane);
    __syncthreads();
    if (thread < sums.size()) {
      const uint row = thread % (PARTS * WEIGHT_ROWS);
      sums[thread] = Product::at(memory + row / WEIGHT_ROWS * Product::SUM_BYTES, thread / (PARTS * WEIGHT_ROWS),
                                 row % WEIGHT_ROWS);
    }
  });
  return inputs.error_of(sums, PARTS * WEIGHT_ROWS, first_row);
}

/// Their largest error.
template <typename T, uint GROUP, typename Scale, uint MATRICES, uint WEIGHT_ROWS, uint WARPS, uint X_STAGES = 2>
double error_of_row(uint rows, uint K, uint first_row) {
  Inputs<T, GROUP, Scale, MATRICES> inputs(rows, K, 1);
  return inputs.error_of(row_sums<WEIGHT_ROWS, WARPS, X_STAGES>(inputs, first_row), WEIGHT_ROWS, first_row);
}

constexpr double ROUNDING = 2e-6; // of fp32 sums of OFFSET + code

TEST(PackedRow, IsExactToRounding) {
  EXPECT_LT((error_of_row<bfloat, 64, bfloat, 2, 16, 4>(40, 512, 32)), ROUNDING);
  EXPECT_LT((error_of_row<half, 64, half, 2, 16, 4>(40, 2304, 0)), ROUNDING);
  EXPECT_LT((error_of_row<bfloat, 32, bfloat, 1, 16, 4>(16, 544, 0)), ROUNDING);
  EXPECT_LT((error_of_row<half, 128, bfloat, 1, 16, 4>(48, 384, 32)), ROUNDING);
  EXPECT_LT((error_of_row<bfloat, 64, bfloat, 1, 16, 12, 1>(40, 9216, 16)), ROUNDING);
  EXPECT_LT((error_of_row<bfloat, 64, bfloat, 1, 32, 16, 1>(64, 9216, 32)), ROUNDING);
  EXPECT_LT((error_of_row<bfloat, 64, bfloat, 2, 16, 4>(40, 1344, 16)), ROUNDING) << "the last slab is shorter";
}

TEST(PackedRow, WholeRows) {
  EXPECT_LT((error_of_whole_rows<bfloat, 64, 2, 3>(64, 2048, 16)), ROUNDING);
  EXPECT_LT((error_of_whole_rows<half, 32, 1, 3>(40, 1056, 0)), ROUNDING) << "too few columns and rows";
}

TEST(PackedRow, ElementsFarApart) {
  Inputs<bfloat, 64, bfloat, 1> inputs(16, 768, 1);
  const auto error = [&] { return inputs.error_of(row_sums<16, 4, 2>(inputs, 0), 16, 0); };
  bfloat* x = inputs.x_row(0);
  x[7] = truncated<bfloat>(3e38f), x[8] = truncated<bfloat>(-3e38f);
  EXPECT_LT(error(), ROUNDING);
  for (uint k = 0; k < 768; ++k)
    x[k] = truncated<bfloat>(float(x[k]) * (k < 256 ? 1e-38f : k < 512 ? 1e-30f : 0.0f));
  EXPECT_LT(error(), ROUNDING);
  for (uint k = 256; k < 768; ++k)
    x[k] = {0};
  x[7] = x[8] = {1};
  EXPECT_LT(error(), 1e-5) << "sums with fewer bits of their own";
  x[300] = {0x7F80}; // infinity
  for (const float sum : row_sums<16, 4, 2>(inputs, 0))
    EXPECT_TRUE(std::isnan(sum));
}

TEST(PackedProduct, SlabsThatEndBeyondKAndScalesThatAreNotAligned) {
  EXPECT_LT((error_of<bfloat, 64, half, 2, 32, 8>(70, 320, 5, 64)), ROUNDING);
  EXPECT_LT((error_of<half, 32, half, 2, 32, 16>(64, 96, 16, 0)), ROUNDING);
}

TEST(PackedProduct, TilesOfRows) {
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 32, 8>(64, 640, 8, 0)), ROUNDING);
  EXPECT_LT((error_of<half, 64, bfloat, 1, 64, 16>(70, 640, 13, 0)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 128, bfloat, 2, 32, 8>(64, 256, 3, 32)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 64, 16>(96, 2176, 11, 0)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 64, 16>(64, 1152, 8, 0)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, bfloat, 1, 128, 16>(128, 2240, 12, 0)), ROUNDING);
  EXPECT_LT((error_of<half, 64, half, 2, 64, 16>(64, 1216, 14, 0)), ROUNDING);
  EXPECT_LT((error_of<bfloat, 64, bfloat, 2, 32, 8, 2>(96, 768, 7, 0)), ROUNDING);
  EXPECT_LT((error_of<half, 32, half, 1, 64, 16, 2>(80, 1056, 16, 0)), ROUNDING);
}

} // namespace
