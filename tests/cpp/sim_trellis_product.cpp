// The products of csrc/sim/msl/cuda_trellis.h on a processor: a thread for each lane, and tensor cores and fp16
// arithmetic as NVIDIA documents them, in words of this file.
#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define METAL_SIM_TEST_WARPS
#define METAL_FUNC inline
#define SIMD_WIDTH 32u

namespace {

using uint = uint32_t;
using std::max;
using std::min;
struct uint4 {
  uint x, y, z, w;
};

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, significand = bits & 1023;
  const double magnitude =
      exponent ? std::ldexp(1024 + significand, exponent - 25) : std::ldexp(double(significand), -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}
uint16_t half_nearest(double value) {
  const double magnitude = std::fabs(value);
  const int exponent = magnitude > 0 ? max(std::ilogb(magnitude), -14) : -14;
  const auto significand = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent))); // of ties the even one
  const int bits = significand < 1024 ? significand : ((exponent + 14) << 10) + significand;
  EXPECT_LT(bits, 0x7C00) << value;
  return uint16_t(bits | (std::signbit(value) ? 0x8000 : 0));
}
uint16_t half_of(uint32_t word, uint index) { return uint16_t(word >> 16 * index); }

struct half {
  uint16_t bits = 0;

  half() = default;
  explicit half(float value) : bits(half_nearest(value)) {}
  explicit operator float() const { return float(half_value(bits)); }
};

/// One warp.
struct Warp {
  std::barrier<> barrier{SIMD_WIDTH};
  uint32_t a[SIMD_WIDTH][4];
  uint32_t b[SIMD_WIDTH][2];
};
thread_local Warp* warp;
thread_local uint own_lane;
std::barrier<>* threadgroup;

void __syncthreads() { threadgroup->arrive_and_wait(); }

uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
/// function(lane) of what all lanes have given.
template <typename Function>
auto exchange(uint32_t own, Function function) {
  warp->a[own_lane][0] = own;
  warp->barrier.arrive_and_wait();
  const auto result = function();
  warp->barrier.arrive_and_wait();
  return result;
}
uint32_t __shfl_sync(uint32_t, uint32_t own, uint32_t lane) {
  return exchange(own, [&] { return warp->a[lane][0]; });
}
uint32_t __reduce_max_sync(uint32_t, uint32_t own) {
  return exchange(own, [] {
    uint32_t largest = 0;
    for (const auto& words : warp->a)
      largest = max(largest, words[0]);
    return largest;
  });
}
uint32_t __reduce_or_sync(uint32_t, uint32_t own) {
  return exchange(own, [] {
    uint32_t bits = 0;
    for (const auto& words : warp->a)
      bits |= words[0];
    return bits;
  });
}

namespace metal_sim {

constexpr uint32_t ALL_LANES = ~0u;

void cuda_load_once(const uint* from, uint4* to) { *to = {from[0], from[1], from[2], from[3]}; }
void load_words(const uint* from, uint32_t& first, uint32_t& second) { first = from[0], second = from[1]; }
void load_words(const uint* from, uint32_t& word) { word = *from; }

void copy_async(uint4* to, const float* from, bool) { std::memcpy(to, from, sizeof(uint4)); }
template <uint BYTES>
void copy_async_part(float* to, const float* from, uint) {
  std::memcpy(to, from, BYTES);
}
void copy_commit() {}
template <uint PENDING>
void copy_wait_own() {}

uint32_t add_halves(uint32_t first, uint32_t second) {
  const auto sum = [](uint32_t word) {
    return half_nearest(half_value(half_of(word, 0)) + half_value(half_of(word, 1)));
  };
  return sum(first) | uint32_t(sum(second)) << 16;
}

template <bool TWICE>
uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  const auto result = [&](uint i) {
    return half_nearest(half_value(half_of(a, TWICE ? 0 : i)) * half_value(half_of(b, i)) + half_value(half_of(c, i)));
  };
  return result(0) | uint32_t(result(1)) << 16;
}

/// Element (row, column) of lanes' sums += over k. Of K = 4 * PER_WORD * 2 elements lane 4g + t holds of the first
/// factor rows g and g + 8 at PER_WORD elements from k = PER_WORD * t on, and as many K / 2 further on; of the second
/// factor the same k of column g; of the sum rows g and g + 8 of columns 2t and 2t + 1.
template <uint PER_WORD, typename Sum, typename Product>
void multiply_add_matrices(Sum (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Product product) {
  std::copy(std::begin(a), std::end(a), warp->a[own_lane]);
  warp->b[own_lane][0] = b0, warp->b[own_lane][1] = b1;
  warp->barrier.arrive_and_wait();
  for (uint e = 0; e < 4; ++e) {
    const uint row = own_lane / 4 + e / 2 * 8, column = own_lane % 4 * 2 + e % 2;
    for (uint t = 0; t < 4; ++t)
      for (uint upper = 0; upper < 2; ++upper)
        for (uint i = 0; i < PER_WORD; ++i)
          sum[e] += product(warp->a[row % 8 * 4 + t][upper * 2 + row / 8], warp->b[column * 4 + t][upper], i);
  }
  warp->barrier.arrive_and_wait();
}

void multiply_add_fragments(half, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add_matrices<2>(sum, a, b0, b1, [](uint32_t x, uint32_t y, uint i) {
    return float(half_value(half_of(x, i)) * half_value(half_of(y, i)));
  });
}
void multiply_bytes(uint32_t (&product)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  std::fill(std::begin(product), std::end(product), 0);
  multiply_add_matrices<4>(product, a, b0, b1,
                           [](uint32_t x, uint32_t y, uint i) { return (x >> 8 * i & 255) * (y >> 8 * i & 255); });
}

} // namespace metal_sim

#include "sim/msl/cuda_trellis_rows.h"

using namespace metal_sim;

/// The value of a state, as docs/formats.md's description of EXL3 has it.
double codebook_value(uint codebook, uint32_t state) {
  if (codebook == CUDA_TRELLIS_MUL1) {
    const uint32_t product = state * 0x83DCD12Du;
    uint32_t bytes = 0;
    for (uint i = 0; i < 4; ++i)
      bytes += product >> 8 * i & 255;
    return half_value(half_nearest((1024 + bytes) * (887.0 / 131072) - 10.3828125));
  }
  const uint32_t product = codebook == CUDA_TRELLIS_MCG ? state * 0xCBAC1FEDu : state * 89226354u + 64248484u;
  const uint32_t halves = (product & 0x8FFF8FFFu) ^ 0x3B603B60u;
  return half_value(half_nearest(half_value(half_of(halves, 0)) + half_value(half_of(halves, 1))));
}

/// Weight (input, output) of a tile, bit by bit.
double weight_of(const uint* tile, uint half_bits, uint codebook, uint input, uint output) {
  const uint run = output % 8 * 4 + input % 8 / 2, t = run * 8 + output / 8 * 4 + input / 8 * 2 + input % 2;
  const uint ring = 128 * half_bits, end = (t + 1) * half_bits / 2;
  uint32_t state = 0;
  for (uint i = 0; i < 16; ++i) {
    const uint bit = (ring + end - 16 + i) % ring;
    state = state << 1 | (tile[bit / 32] >> (31 - bit % 32) & 1);
  }
  return codebook_value(codebook, state);
}

constexpr uint BLOCKS = 3, TILES = 2, K = BLOCKS * 128;

/// `columns` columns of tiles, and `rows` rows of x.
template <uint HALF_BITS, uint CODEBOOK>
struct Case {
  static constexpr uint TILE_WORDS = 4 * HALF_BITS;
  uint columns, rows, row_stride;
  std::vector<uint4> stored;
  std::vector<uint4> x;
  std::vector<float> sums;

  Case(uint columns, uint rows, float scale)
      : columns(columns), rows(rows), row_stride((columns + 1) * TILE_WORDS), stored(K / 16 * row_stride / 4),
        x(rows * K / 4), sums(rows * columns * 16, NAN) {
    std::mt19937 random(HALF_BITS * 4 + CODEBOOK + rows);
    std::normal_distribution<float> normal;
    for (uint4& four : stored)
      four = {uint(random()), uint(random()), uint(random()), uint(random())};
    for (uint i = 0; i < rows * K; ++i)
      row(0)[i] = scale * normal(random);
  }

  const uint* codes() const { return reinterpret_cast<const uint*>(stored.data()); }
  float* row(uint r) { return reinterpret_cast<float*>(x.data()) + r * K; }

  /// The largest error of a sum, relative to the sum of its terms' magnitudes.
  double error() {
    double largest = 0;
    for (uint n = 0; n < columns * 16; ++n) {
      std::vector<double> weight(K);
      for (uint k = 0; k < K; ++k)
        weight[k] = weight_of(codes() + k / 16 * row_stride + n / 16 * TILE_WORDS, HALF_BITS, CODEBOOK, k % 16, n % 16);
      for (uint r = 0; r < rows; ++r) {
        double sum = 0, magnitude = 0;
        for (uint k = 0; k < K; ++k) {
          sum += weight[k] * row(r)[k];
          magnitude += std::fabs(weight[k] * row(r)[k]);
        }
        const double error = std::fabs(sums[r * columns * 16 + n] - sum) / magnitude;
        largest = error <= largest ? largest : error; // NaN is the largest
      }
    }
    return largest;
  }
};

/// run(warp, lane) in a thread for each lane.
template <typename Run>
void run_warps(uint count, Run run) {
  std::vector<Warp> warps(count);
  std::barrier<> all(count * SIMD_WIDTH);
  threadgroup = &all;
  std::vector<std::thread> threads;
  for (uint i = 0; i < count * SIMD_WIDTH; ++i)
    threads.emplace_back([&, i] {
      warp = &warps[i / SIMD_WIDTH], own_lane = i % SIMD_WIDTH;
      run(i / SIMD_WIDTH, own_lane);
    });
  for (std::thread& thread : threads)
    thread.join();
}

constexpr uint ROTATED_WORDS = BLOCKS * 129 * 4 / 16 + 1; // of 16 bytes

void store_row(const CudaRotatedRow& to, const float* row, uint lane) {
  for (uint block = 0; block < BLOCKS; ++block) {
    const float* from = row + block * 128 + lane * 4;
    const float value[4] = {from[0], from[1], from[2], from[3]};
    to.store(block, lane, value);
  }
}

template <uint HALF_BITS, uint CODEBOOK>
double error_of(float scale) {
  Case<HALF_BITS, CODEBOOK> one(TILES, 1, scale);

  std::vector<uint4> memory(ROTATED_WORDS, uint4{~0u, ~0u, ~0u, ~0u});
  run_warps(1, [&](uint, uint lane) {
    const CudaRotatedRow row(reinterpret_cast<float*>(memory.data()), BLOCKS);
    store_row(row, one.row(0), lane);
    __syncthreads();
    float sum[TILES][2];
    row.multiply<HALF_BITS, CODEBOOK, TILES>(one.codes(), one.row_stride, BLOCKS, lane, sum);
    if (lane % 4 == 0)
      for (uint tile = 0; tile < TILES; ++tile)
        for (uint h = 0; h < 2; ++h)
          one.sums[tile * 16 + lane / 4 + 8 * h] = sum[tile][h];
  });
  return one.error();
}

/// `count` of ROWS rows; the first block is a slice of its own.
template <uint HALF_BITS, uint CODEBOOK, uint ROWS>
double error_of_rows(uint count) {
  constexpr uint WARPS = 4;
  using Product = CudaTrellisRows<ROWS, WARPS, TILES>;
  Case<HALF_BITS, CODEBOOK> one(WARPS * TILES, count, 1);
  std::vector<uint4> memory(Product::BYTES / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});
  std::vector<uint4> rotated(count * ROTATED_WORDS);
  const auto row = [&](uint r) { return reinterpret_cast<float*>(rotated.data() + r * ROTATED_WORDS); };
  run_warps(1, [&](uint, uint lane) {
    for (uint r = 0; r < count; ++r)
      store_row(CudaRotatedRow(row(r), BLOCKS), one.row(r), lane);
  });
  std::ranges::fill(one.sums, 0.0f);
  for (const auto& [first, blocks] : {std::pair{0u, 1u}, std::pair{1u, BLOCKS - 1}})
    run_warps(WARPS, [&](uint warp, uint lane) {
      const Product product(reinterpret_cast<float*>(memory.data()));
      float sum[TILES][ROWS / 4][2];
      product.template multiply<HALF_BITS, CODEBOOK>(
          one.codes() + first * 8 * one.row_stride, one.row_stride, blocks,
          [&](uint r) { return row(r) + first * 128; }, (BLOCKS - first) * 128 + first, count, warp, lane, sum);
      for (uint i = 0; i < TILES; ++i)
        for (uint f = 0; f < ROWS / 4; ++f)
          for (uint h = 0; h < 2; ++h)
            if (const uint r = 4 * f + lane % 4; r < count)
              one.sums[(r * WARPS * TILES + warp * TILES + i) * 16 + lane / 4 + 8 * h] += sum[i][f][h];
    });
  return one.error();
}

constexpr double ROUNDING = 5e-7; // of fp32 sums, and of 22 bits of x

TEST(TrellisProduct, EveryRate) {
  const double errors[] = {
      error_of<2, CUDA_TRELLIS_MUL1>(1),  error_of<3, CUDA_TRELLIS_MUL1>(1),  error_of<4, CUDA_TRELLIS_MUL1>(1),
      error_of<5, CUDA_TRELLIS_MUL1>(1),  error_of<6, CUDA_TRELLIS_MUL1>(1),  error_of<7, CUDA_TRELLIS_MUL1>(1),
      error_of<8, CUDA_TRELLIS_MUL1>(1),  error_of<9, CUDA_TRELLIS_MUL1>(1),  error_of<10, CUDA_TRELLIS_MUL1>(1),
      error_of<11, CUDA_TRELLIS_MUL1>(1), error_of<12, CUDA_TRELLIS_MUL1>(1), error_of<13, CUDA_TRELLIS_MUL1>(1),
      error_of<14, CUDA_TRELLIS_MUL1>(1), error_of<15, CUDA_TRELLIS_MUL1>(1), error_of<16, CUDA_TRELLIS_MUL1>(1)};
  for (uint i = 0; i < std::size(errors); ++i)
    EXPECT_LT(errors[i], ROUNDING) << "half_bits " << i + 2;
}

TEST(TrellisProduct, EveryCodebook) {
  EXPECT_LT((error_of<6, CUDA_TRELLIS_3INST>(1)), ROUNDING);
  EXPECT_LT((error_of<8, CUDA_TRELLIS_3INST>(1)), ROUNDING);
  EXPECT_LT((error_of<6, CUDA_TRELLIS_MCG>(1)), ROUNDING);
  EXPECT_LT((error_of<8, CUDA_TRELLIS_MCG>(1)), ROUNDING);
  EXPECT_LT((error_of<14, CUDA_TRELLIS_MCG>(1)), ROUNDING);
}

TEST(TrellisProduct, SmallAndLargeInputs) {
  EXPECT_LT((error_of<8, CUDA_TRELLIS_MUL1>(1e-20f)), ROUNDING);
  EXPECT_LT((error_of<8, CUDA_TRELLIS_MUL1>(1e20f)), ROUNDING);
}

TEST(TrellisProduct, TilesOfRows) {
  EXPECT_LT((error_of_rows<8, CUDA_TRELLIS_MUL1, 4>(4)), ROUNDING);
  EXPECT_LT((error_of_rows<6, CUDA_TRELLIS_MUL1, 4>(3)), ROUNDING);
  EXPECT_LT((error_of_rows<6, CUDA_TRELLIS_MCG, 8>(8)), ROUNDING);
  EXPECT_LT((error_of_rows<7, CUDA_TRELLIS_MUL1, 8>(5)), ROUNDING);
  EXPECT_LT((error_of_rows<8, CUDA_TRELLIS_3INST, 16>(16)), ROUNDING);
  EXPECT_LT((error_of_rows<9, CUDA_TRELLIS_MUL1, 16>(9)), ROUNDING);
  EXPECT_LT((error_of_rows<8, CUDA_TRELLIS_MUL1, 64>(64)), ROUNDING);
  EXPECT_LT((error_of_rows<6, CUDA_TRELLIS_MCG, 64>(19)), ROUNDING);
}

/// Every state: a warp decodes 256 of them at a time.
template <uint CODEBOOK>
uint wrong_values() {
  constexpr uint WORDS = 1 << 16;
  std::vector<uint16_t> values(WORDS);
  run_warps(1, [&](uint, uint lane) {
    const TrellisValues<CODEBOOK> decoder(lane);
    for (uint first = lane * 8; first < WORDS; first += SIMD_WIDTH * 8) {
      uint32_t state[8], value[4];
      for (uint i = 0; i < 8; ++i)
        state[i] = (first + i) * 0x10001u;
      decoder(state, value);
      for (uint i = 0; i < 8; ++i)
        values[first + i] = half_of(value[i / 2], i % 2);
    }
  });
  uint wrong = 0;
  for (uint state = 0; state < WORDS; ++state)
    wrong += half_value(values[state]) != codebook_value(CODEBOOK, state);
  return wrong;
}

TEST(TrellisProduct, EveryStateHasItsValue) {
  EXPECT_EQ(wrong_values<CUDA_TRELLIS_3INST>(), 0u);
  EXPECT_EQ(wrong_values<CUDA_TRELLIS_MCG>(), 0u);
  EXPECT_EQ(wrong_values<CUDA_TRELLIS_MUL1>(), 0u);
}

} // namespace
