// Simdgroup functions and matrices, attributes, threadgroup memory and atomics, on every engine.
#include "msl_support.h"

#include <metal_sim/control.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>

namespace metal_sim::testing {
namespace {

struct Bfloat {
  uint16_t bits;
  Bfloat() = default;
  explicit Bfloat(float x) : bits(uint16_t(std::bit_cast<uint32_t>(x) >> 16)) {} // of values that need no rounding
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

class Simdgroup : public Kernels {
protected:
  template <typename T>
  void expect_functions(const char* kernel) {
    const uint32_t w = width();
    constexpr uint32_t ROWS = 14;
    std::vector<T> in(w), out(ROWS * w, T(-1.0f));
    for (uint32_t i = 0; i < w; ++i)
      in[i] = T(float((i * 7) % 8 + 1)); // sums stay exact in every type
    ASSERT_EQ(run(kernel, {bind(in), bind(out)}, {1, 1, 1}, {w, 1, 1}), "");
    float sum = 0, greatest = float(in[0]), least = float(in[0]);
    for (T x : in) {
      sum += float(x);
      greatest = std::max(greatest, float(x));
      least = std::min(least, float(x));
    }
    float before = 0;
    for (uint32_t i = 0; i < w; ++i) {
      const float x = float(in[i]);
      const bool one = w == 1;
      const float expected[ROWS] = {sum,
                                    greatest,
                                    least,
                                    before + x,
                                    before,
                                    float(in[w - 1]),
                                    float(in[0]),
                                    float(in[(i + 1) % w]),
                                    float(in[i ^ (w / 2)]),
                                    float(in[i == 0 ? 0 : i - 1]),
                                    float(in[i + 1 < w ? i + 1 : i]),
                                    i + 1 < w ? float(in[i + 1]) : 99.0f,
                                    i > 0 ? float(in[i - 1]) : 99.0f,
                                    one ? x : float(in[(i + 1) % w])};
      for (uint32_t row = 0; row < ROWS; ++row)
        EXPECT_EQ(float(out[row * w + i]), expected[row]) << kernel << ", row " << row << ", lane " << i;
      before += x;
    }
  }
};

TEST_P(Simdgroup, Functions) {
  expect_functions<float>("simdgroup_functions_fp32");
  expect_functions<Half>("simdgroup_functions_fp16");
  expect_functions<int>("simdgroup_functions_int32");
}

TEST_P(Simdgroup, VotesAmongLanesThatAreLeft) {
  const uint32_t w = width();
  for (uint32_t live : {w, (w + 1) / 2}) {
    std::vector<uint32_t> in(w);
    uint64_t ballot = 0;
    uint32_t any = 0, lanes = 0;
    for (uint32_t i = 0; i < live; ++i) {
      in[i] = i % 3 ? 1u << (i % 8) : 0;
      ballot |= in[i] ? 1ull << i : 0;
      any |= in[i];
      lanes += i;
    }
    std::vector<uint64_t> out(8 * w, 99);
    ASSERT_EQ(run("votes", {bind(in), bind(out), bind(live)}, {1, 1, 1}, {w, 1, 1}), "");
    for (uint32_t i = 0; i < w; ++i) {
      const std::vector<uint64_t> got(out.begin() + 8 * i, out.begin() + 8 * i + 8);
      const std::vector<uint64_t> expected = {
          ballot, any != 0, ballot == (1ull << live) - 1, i == 0, (1ull << live) - 1, live, any, lanes};
      EXPECT_EQ(got, i < live ? expected : std::vector<uint64_t>(8, 99)) << "lane " << i;
    }
  }
}

struct MatrixArgs {
  uint32_t stride, origin_row, origin_column, transpose_b, transpose_d;
};

class Matrix : public Kernels {
protected:
  template <typename T, typename Acc>
  void expect_product(const char* kernel, double tolerance) {
    std::mt19937 random(7);
    for (uint32_t variant = 0; variant < 4; ++variant) {
      MatrixArgs args{19, variant, 2 * variant, variant & 1, variant >> 1};
      const auto rows = args.origin_row + 8;
      std::vector<T> a(rows * args.stride), b(64);
      std::vector<Acc> c(rows * args.stride), d(rows * args.stride, Acc(-5.0f));
      for (T& x : a)
        x = T(float(int(random() % 33) - 16) / 8);
      for (T& x : b)
        x = T(float(int(random() % 33) - 16) / 8);
      for (Acc& x : c)
        x = Acc(float(int(random() % 33) - 16) / 8);
      ASSERT_EQ(
          run(kernel, {bind(a), bind(b), bind(c), bind(d), bind(args)}, {1, 1, 1}, {width(), 1, 1}, {64 * sizeof(T)}),
          "");
      std::vector<Acc> expected(d.size(), Acc(-5.0f));
      for (uint32_t i = 0; i < 8; ++i)
        for (uint32_t j = 0; j < 8; ++j) {
          const auto at = [&](uint32_t r, uint32_t k) {
            return (args.origin_row + r) * args.stride + args.origin_column + k;
          };
          double sum = float(c[at(i, j)]);
          for (uint32_t k = 0; k < 8; ++k)
            sum += double(float(a[at(i, k)])) * float(b[args.transpose_b ? 8 * j + k : 8 * k + j]);
          expected[args.transpose_d ? at(j, i) : at(i, j)] = Acc(float(sum));
        }
      for (size_t i = 0; i < d.size(); ++i)
        EXPECT_NEAR(float(d[i]), float(expected[i]), tolerance)
            << kernel << ", variant " << variant << ", element " << i;
    }
  }
};

TEST_P(Matrix, MultiplyAccumulate) {
  expect_product<float, float>("matrix_fp32", 0);
  expect_product<Half, Half>("matrix_fp16", 0);
  expect_product<Half, float>("matrix_fp16_fp32", 0);
  expect_product<Bfloat, float>("matrix_bf16_fp32", 0);
}

TEST_P(Matrix, Elements) {
  std::vector<float> out(192);
  ASSERT_EQ(run("matrix_elements", {bind(out)}, {1, 1, 1}, {width(), 1, 1}), "");
  for (uint32_t i = 0; i < 64; ++i) {
    EXPECT_EQ(out[i], 1.5f);
    EXPECT_EQ(out[64 + i], 3.0f);
    EXPECT_EQ(out[128 + i], i % 9 ? 0.0f : 2.0f);
  }
}

class Memory : public Kernels {};

TEST_P(Memory, Attributes) {
  const MTL::Size groups(3, 2, 2), threads = exact() ? MTL::Size(20, 2, 1) : MTL::Size(1, 1, 1);
  const uint32_t size[3] = {uint32_t(groups.width * threads.width), uint32_t(groups.height * threads.height),
                            uint32_t(groups.depth * threads.depth)};
  std::vector<uint32_t> out(24 * size[0] * size[1] * size[2]);
  ASSERT_EQ(run("attributes", {{}, {}, bind(out)}, groups, threads), "");
  const auto tx = uint32_t(threads.width), ty = uint32_t(threads.height), all = tx * ty;
  for (uint32_t z = 0; z < size[2]; ++z)
    for (uint32_t y = 0; y < size[1]; ++y)
      for (uint32_t x = 0; x < size[0]; ++x) {
        const uint32_t* got = out.data() + 24 * (x + size[0] * (y + size[1] * z));
        const uint32_t index = x % tx + tx * (y % ty);
        const std::vector<uint32_t> expected = {x,
                                                y,
                                                z,
                                                x / tx,
                                                y / ty,
                                                z,
                                                x % tx,
                                                y % ty,
                                                0,
                                                index,
                                                index % width(),
                                                index / width(),
                                                tx,
                                                ty,
                                                1,
                                                3,
                                                2,
                                                width(),
                                                (all + width() - 1) / width(),
                                                2};
        ASSERT_EQ(std::vector<uint32_t>(got, got + 20), expected) << x << ", " << y << ", " << z;
      }
}

TEST_P(Memory, ThreadgroupMemoryBarriersAndAtomics) {
  const uint32_t threads = exact() ? 96 : 1, groups = 5;
  struct {
    float factor;
    uint32_t count;
  } scale = {2.0f, threads * groups - (exact() ? 10 : 0)};
  std::vector<float> in(scale.count), offsets = {0.25f, 0.5f};
  for (uint32_t i = 0; i < scale.count; ++i)
    in[i] = float(i);
  for (uint64_t seed = 0; seed < 4; ++seed) {
    set_exact_seed(seed);
    std::vector<float> out(scale.count, -1.0f);
    std::vector<uint32_t> total = {0, 0, 100, 0, 0};
    ASSERT_EQ(run("reverse_blocks", {bind(in), bind(out), bind(scale), bind(offsets), bind(total)}, {groups, 1, 1},
                  {threads, 1, 1}, {threads * 4, 4}),
              "");
    for (uint32_t i = 0; i < scale.count; ++i) {
      const uint32_t first = i / threads * threads, count = std::min(threads, scale.count - first);
      EXPECT_EQ(out[i], 2.0f * in[first + count - 1 - (i - first)] + offsets[(i - first) % 2]) << i;
    }
    EXPECT_EQ(total, (std::vector<uint32_t>{scale.count, groups - 1, 0, (1u << groups) - 1, 7}));
  }
  set_exact_seed(0);
}

TEST_P(Memory, ThreadArraysAndHostNames) {
  struct Scale {
    float factor;
    uint32_t count;
  };
  std::vector<Scale> out(2);
  std::vector<uint32_t> wide(8);
  for (uint32_t i = 0; i < 4; ++i)
    wide[i] = i + 1;
  ASSERT_EQ(run("renamed", {bind(out), bind(wide)}), "");
  EXPECT_EQ(out[0].count, 15u);
  EXPECT_EQ(out[1].factor, 2.0f);
  EXPECT_EQ(wide[7], 4u);
  EXPECT_EQ(run("original", {bind(out), bind(wide)}), "no kernel original");
}

class Checks : public Kernels {};

TEST_P(Checks, ForbiddenAccessesAreNoticed) {
  std::vector<uint32_t> in(4, 5), out(4);
  uint32_t index = 3;
  EXPECT_EQ(run("read_at", {bind(in), bind(out), bind(index)}), "");
  EXPECT_EQ(out[0], 5u);
  index = 4;
  EXPECT_NE(run("read_at", {bind(in), bind(out), bind(index)}).find("'in'"), std::string::npos);
  std::vector<uint32_t> places(64);
  EXPECT_NE(run("missing_barrier", {bind(places)}, {1, 1, 1}, {64, 1, 1}, {256}).find("data race"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Engines, Simdgroup, ::testing::ValuesIn(targets()), name_of);
INSTANTIATE_TEST_SUITE_P(Engines, Matrix, ::testing::ValuesIn(targets()), name_of);
INSTANTIATE_TEST_SUITE_P(Engines, Memory, ::testing::ValuesIn(targets()), name_of);
INSTANTIATE_TEST_SUITE_P(Exact, Checks, ::testing::Values(Target{"exact", ""}), name_of);

} // namespace
} // namespace metal_sim::testing
