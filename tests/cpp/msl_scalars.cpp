// Scalar types, functions and vectors of the Metal Shading Language as the engines' headers give them.
#include "msl_support.h"

#include <bit>
#include <cmath>
#include <limits>
#include <random>

namespace metal_sim::testing {
namespace {

/// Round to nearest even by arithmetic on doubles: 8 significant bits, subnormals at 2^-133.
float round_to_bfloat(float x) {
  if (std::isnan(x) || std::isinf(x) || x == 0)
    return x;
  const int exponent = std::max(std::ilogb(x), -126);
  const double unit = std::ldexp(1.0, exponent - 7);
  return float(std::nearbyint(double(x) / unit) * unit);
}
uint16_t bfloat_bits(float x) { return uint16_t(std::bit_cast<uint32_t>(round_to_bfloat(x)) >> 16); }

std::vector<float> interesting_floats() {
  std::vector<float> values = {
      0.0f,        -0.0f,           1.0f,          -1.0f,     65504.0f,
      65519.0f,    65520.0f,        1e9f,          1e-3f,     6.1e-5f,
      5.96e-8f,    2.9e-8f,         3.4028235e38f, -3.4e38f,  1e-38f,
      1e-40f,      1.17549435e-38f, INFINITY,      -INFINITY, 1.00390625f /* halfway between two bfloats */,
      1.01171875f, 2049.0f,         2051.0f};
  std::mt19937 random(1);
  for (int i = 0; i < 4000; ++i) {
    const float x = std::bit_cast<float>(uint32_t(random()));
    if (!std::isnan(x))
      values.push_back(x);
    values.push_back(std::ldexp(float(random()) / 4294967296.0f, int(random() % 40) - 26));
  }
  return values;
}

class Scalars : public Kernels {};

TEST_P(Scalars, ConversionsRoundToNearestEven) {
  std::vector<float> in = interesting_floats();
  std::vector<uint16_t> halves(in.size()), bfloats(in.size());
  std::vector<float> back(2 * in.size());
  auto count = uint32_t(in.size());
  ASSERT_EQ(run("conversions", {bind(in), bind(halves), bind(bfloats), bind(back), bind(count)}), "");
  for (size_t i = 0; i < in.size(); ++i) {
    EXPECT_EQ(halves[i], std::bit_cast<uint16_t>(Half(in[i]))) << in[i];
    EXPECT_EQ(bfloats[i], bfloat_bits(in[i])) << in[i];
    EXPECT_EQ(back[2 * i], float(std::bit_cast<Half>(halves[i])));
    EXPECT_EQ(back[2 * i + 1], std::bit_cast<float>(uint32_t(bfloats[i]) << 16));
  }
}

TEST_P(Scalars, NanStaysNan) {
  // The second one has its only set bits where rounding to 16 bits drops them.
  std::vector<float> in = {NAN, std::bit_cast<float>(0x7F800001u), std::bit_cast<float>(0xFFFFFFFFu)};
  std::vector<uint16_t> halves(3), bfloats(3);
  std::vector<float> back(6);
  uint32_t count = 3;
  ASSERT_EQ(run("conversions", {bind(in), bind(halves), bind(bfloats), bind(back), bind(count)}), "");
  for (float x : back)
    EXPECT_TRUE(std::isnan(x));
}

TEST_P(Scalars, ArrayConversionsEqualScalarOnes) {
  constexpr size_t N = 61; // leaves a remainder at every vector width
  const std::vector<float> values = interesting_floats();
  for (size_t first = 0; first + N <= values.size(); first += N) {
    std::vector<float> in(values.begin() + long(first), values.begin() + long(first + N)), widened(N);
    std::vector<uint16_t> narrowed(N);
    ASSERT_EQ(run("array_conversions_fp16", {bind(in), bind(narrowed), bind(widened)}), "");
    for (size_t i = 0; i < N; ++i)
      ASSERT_EQ(widened[i], float(Half(in[i]))) << in[i];
    ASSERT_EQ(run("array_conversions_bf16", {bind(in), bind(narrowed), bind(widened)}), "");
    for (size_t i = 0; i < N; ++i)
      ASSERT_EQ(widened[i], round_to_bfloat(in[i])) << in[i];
    std::vector<float> copied(N);
    ASSERT_EQ(run("array_conversions_fp32", {bind(in), bind(copied), bind(widened)}), "");
    ASSERT_EQ(copied, in);
    ASSERT_EQ(widened, in);
  }
}

template <typename T>
void expect_math(const std::vector<T>& in, const std::vector<float>& out, const std::vector<float>& x,
                 double tolerance) {
  for (size_t i = 0; i < in.size(); ++i) {
    const double v = x[i];
    const double expected[] = {std::exp(v),
                               std::exp2(v),
                               std::log(std::abs(v) + 1),
                               std::log2(std::abs(v) + 1),
                               std::sqrt(std::abs(v)),
                               1 / std::sqrt(std::abs(v) + 1),
                               std::tanh(v),
                               std::exp(v),
                               std::exp(v),
                               std::floor(v),
                               std::ceil(v),
                               std::round(v),
                               std::nearbyint(v),
                               std::trunc(v),
                               2 * v + 1,
                               std::min(std::max(v, -1.0), 1.0),
                               std::min(v, 0.5),
                               std::max(v, 0.5),
                               std::sin(v),
                               v < 0 ? 7.0 : v};
    for (size_t j = 0; j < 20; ++j)
      EXPECT_NEAR(out[20 * i + j], expected[j], tolerance * (std::abs(expected[j]) + 0.05))
          << "column " << j << " of " << v;
  }
}

TEST_P(Scalars, MathFunctions) {
  std::vector<float> x;
  for (float v = -4.5f; v <= 4.5f; v += 0.25f)
    x.push_back(v); // exact in every type
  std::vector<float> out(20 * x.size());
  auto count = uint32_t(x.size());
  ASSERT_EQ(run("math_fp32", {bind(x), bind(out), bind(count)}), "");
  expect_math(x, out, x, 4e-6);
  std::vector<Half> halves(x.begin(), x.end());
  ASSERT_EQ(run("math_fp16", {bind(halves), bind(out), bind(count)}), "");
  expect_math(halves, out, x, 1.5e-3);
  std::vector<uint16_t> bfloats;
  for (float v : x)
    bfloats.push_back(bfloat_bits(v));
  ASSERT_EQ(run("math_bf16", {bind(bfloats), bind(out), bind(count)}), "");
  expect_math(bfloats, out, x, 1.2e-2);
}

TEST_P(Scalars, Arithmetic) {
  std::vector<float> out(16, -1.0f);
  ASSERT_EQ(run("arithmetic", {bind(out)}), "");
  const Half h = Half(0.1f);
  const float b = round_to_bfloat(0.1f);
  const float square = round_to_bfloat(b * b);
  const float sum = round_to_bfloat(3 * round_to_bfloat(1.0f + b));
  const std::vector<float> expected = {float(h),
                                       b,
                                       float(Half(float(h) * float(h))),
                                       square,
                                       b * 0.1f,
                                       round_to_bfloat(round_to_bfloat(2 * b) - round_to_bfloat(b / 4)),
                                       -b,
                                       sum,
                                       1.0f,
                                       2.5f + 1.0f + 0.5f + 20.0f + 1.25f,
                                       1.0f,
                                       1.0f,
                                       65504.0f,
                                       -std::bit_cast<float>(0x7F7F0000u),
                                       INFINITY,
                                       -32768.0f};
  EXPECT_EQ(out, expected);
}

TEST_P(Scalars, Integers) {
  const uint32_t x = 0x00F01234u;
  std::vector<uint32_t> in = {x, uint32_t(-7)}, out(21, 0xDEADBEEFu);
  ASSERT_EQ(run("integers", {bind(in), bind(out)}), "");
  const std::vector<uint32_t> expected = {9,
                                          8,
                                          2,
                                          3 /* of 0x1234 */,
                                          8,
                                          7,
                                          uint32_t(-7),
                                          x,
                                          uint32_t(-2),
                                          0xF0123400u,
                                          0x2C480F00u,
                                          0x23u,
                                          0x23u,
                                          0xFF0u,
                                          0xF0u,
                                          0xFFFFFFFFu,
                                          0,
                                          uint32_t(-13),
                                          32,
                                          32,
                                          uint32_t(uint64_t(x) * 4096 >> 20)};
  EXPECT_EQ(out, expected);
}

TEST_P(Scalars, Vectors) {
  struct alignas(4) Particle {
    float position[3], mass;
  };
  std::vector<float> in = {1, 2, 3, 4}, out(22, -1.0f);
  std::vector<Particle> particles(3, Particle{{-1, -1, -1}, -1});
  uint32_t offset[2] = {0, 40};
  ASSERT_EQ(run("vectors", {bind(in), bind(out), bind(particles), bind(offset)}), "");
  const std::vector<float> expected = {11,
                                       3,
                                       1 * 3 + 2 * 6 + 3 * 11 + 4 * 14,
                                       4,
                                       2,
                                       -3,
                                       5,
                                       12,
                                       1,
                                       3,
                                       2.5f,
                                       6,
                                       3,
                                       std::exp(1.0f),
                                       12,
                                       4,
                                       float(0x04030201),
                                       28,
                                       6,
                                       -1,
                                       4,
                                       2};
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_FLOAT_EQ(out[i], expected[i]) << "value " << i;
  EXPECT_EQ(particles[1].position[2], 3.0f);
  EXPECT_EQ(particles[1].mass, 42.0f);
  EXPECT_EQ(particles[0].mass, -1.0f);
  EXPECT_EQ(particles[2].position[0], -1.0f);
}

INSTANTIATE_TEST_SUITE_P(Engines, Scalars, ::testing::ValuesIn(targets()), name_of);

} // namespace
} // namespace metal_sim::testing
