// Profiles of streams: every dispatch is timed once, however many a command buffer holds.
#include "core_support.h"

#include "core/counters.h"

namespace metal_moe::testing {
namespace {

struct Observed : ::testing::TestWithParam<const char*>, Copying {
  Observed() : Copying(GetParam()) {}
};

TEST_P(Observed, MoreDispatchesThanASampleBufferHolds) {
  CommandStream::Policy policy;
  policy.max_dispatches = 1000;
  const auto stream =
      std::make_unique<CommandStream>(NS::TransferPtr(context.device()->newCommandQueue()), context.pool(), policy);
  Profile profile;
  for (int i = 0; i < 150; ++i)
    copy(*stream, 2048);
  stream->synchronize();
  profile.stop();
  copy(*stream);
  stream->synchronize();
  EXPECT_EQ(to, from);
  const auto kernels = profile.kernels();
  ASSERT_EQ(kernels.size(), 1u);
  EXPECT_EQ(kernels[0].kernel, "gather_experts");
  EXPECT_EQ(kernels[0].dispatches, 150u);
  EXPECT_EQ(kernels[0].timed, 150u);
  EXPECT_EQ(kernels[0].bytes, 150u * 2048u);
  EXPECT_LT(0u, kernels[0].least_ns);
  EXPECT_LE(kernels[0].most_ns, kernels[0].total_ns);
}

TEST_P(Observed, ScratchOutlivesDispatchesThatRunAlone) {
  const auto stream = context.new_stream();
  const Profile profile;
  BufferView previous = source.view();
  for (int i = 0; i < 20; ++i) {
    const BufferView next = stream->scratch(1024);
    encode_copy(*stream, device, previous, next, 1024);
    previous = next;
  }
  EXPECT_EQ(context.pool().statistics().buffers_in_use, 20u);
  encode_copy(*stream, device, previous, destination.view(), 1024);
  stream->synchronize();
  EXPECT_EQ(to, from);
  EXPECT_EQ(context.pool().statistics().buffers_in_use, 0u);
}

TEST_P(Observed, BeginningAndEndingBetweenDispatchesOfACommandBuffer) {
  const auto stream = context.new_stream();
  copy(*stream);
  {
    Profile profile;
    copy(*stream);
    profile.stop();
    copy(*stream);
    stream->synchronize();
    ASSERT_EQ(profile.kernels().size(), 1u);
    EXPECT_EQ(profile.kernels()[0].timed, 1u);
  }
  copy(*stream);
  stream->synchronize();
  EXPECT_EQ(to, from);
}

TEST_P(Observed, WhatIsDroppedHasNoTime) {
  const auto stream = context.new_stream();
  Profile profile;
  copy(*stream);
  stream->discard();
  stream->synchronize();
  profile.stop();
  ASSERT_EQ(profile.kernels().size(), 1u);
  EXPECT_EQ(profile.kernels()[0].dispatches, 1u);
  // Where dispatches run alone this one has run.
  EXPECT_EQ(profile.kernels()[0].timed, 0u);
}

INSTANTIATE_TEST_SUITE_P(Engines, Observed, ::testing::Values("native", "exact"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Counting, NothingIsLostBetweenThreads) {
  const auto before = read_counters();
  count(Counter::Copies, 3);
  count(Fallback::UnalignedRows);
  const auto after = read_counters();
  const auto fallback = static_cast<uint32_t>(Counter::Fallbacks) + static_cast<uint32_t>(Fallback::UnalignedRows);
  EXPECT_EQ(after[static_cast<uint32_t>(Counter::Copies)] - before[static_cast<uint32_t>(Counter::Copies)], 3u);
  EXPECT_EQ(after[fallback] - before[fallback], 1u);
}

} // namespace
} // namespace metal_moe::testing
