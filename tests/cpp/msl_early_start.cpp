// Work ahead of the wait for the kernel in front: allowed where nobody writes what is read, an error of `exact`
// elsewhere.
#include "msl_support.h"

#include <utility>

namespace metal_sim::testing {
namespace {

constexpr uint32_t COUNT = 64;

class EarlyStart : public Kernels {
protected:
  /// What `kernel` answers behind one that writes the values.
  std::string run_behind(const char* kernel) {
    EXPECT_EQ(run_all("write_values", {bind(values)}), "");
    return run_all(kernel, {bind(places), bind(values), bind(out)});
  }
  void expect(const char* kernel, const char* message) {
    const std::string failure = run_behind(kernel);
    if (exact())
      EXPECT_NE(failure.find(message), std::string::npos) << failure;
    else
      EXPECT_EQ(failure, "");
  }
  std::string run_all(const char* kernel, std::vector<Binding> buffers) {
    return run(kernel, std::move(buffers), {COUNT / width(), 1, 1}, {width(), 1, 1});
  }

  void SetUp() override {
    Kernels::SetUp();
    for (uint32_t i = 0; i < COUNT; ++i)
      places[i] = COUNT - 1 - i;
  }

  std::vector<uint32_t> places = std::vector<uint32_t>(COUNT), values = std::vector<uint32_t>(COUNT),
                        out = std::vector<uint32_t>(COUNT, 7);
};

TEST_P(EarlyStart, ReadsWhatTheKernelInFrontDoesNotWrite) {
  ASSERT_EQ(run_behind("early_places"), "");
  for (uint32_t i = 0; i < COUNT; ++i)
    EXPECT_EQ(out[i], 10 * places[i]);
}

TEST_P(EarlyStart, FindsReadsOfWhatItWrites) {
  expect("early_values", "of argument 'values' (buffer 1, 256 bytes, read-only), which the kernel before may have "
                         "written, ahead of wait_for_previous_kernel()");
}

TEST_P(EarlyStart, FindsWrites) {
  expect("early_out", "of argument 'out' (buffer 2, 256 bytes) ahead of wait_for_previous_kernel()");
  expect("early_odd_threads", "of argument 'out' (buffer 2, 256 bytes) ahead of wait_for_previous_kernel()");
}

TEST_P(EarlyStart, ThreadsMayReturnFirst) {
  ASSERT_EQ(run_behind("early_return"), "");
  for (uint32_t i = 0; i < COUNT; ++i)
    EXPECT_EQ(out[i], places[i] < 10 ? 10 * places[i] : 7);
}

TEST_P(EarlyStart, OnlyTheKernelRightInFrontCounts) {
  std::vector<uint32_t> others(COUNT);
  ASSERT_EQ(run_all("write_values", {bind(values)}), "");
  ASSERT_EQ(run_all("write_values", {bind(others)}), "");
  EXPECT_EQ(run_all("early_values", {bind(places), bind(values), bind(out)}), "");
  EXPECT_EQ(out[0], 10 * places[0]);
}

INSTANTIATE_TEST_SUITE_P(Engines, EarlyStart, ::testing::ValuesIn(targets()), name_of);

} // namespace
} // namespace metal_sim::testing
