// The native engine: every threadgroup runs once, on however many threads.
#include "metal_sim/control.h"
#include "sim_support.h"

#include <sys/wait.h>
#include <thread>
#include <unistd.h>

namespace {

using namespace sim_test;

class Native : public testing::TestWithParam<int> {
protected:
  void SetUp() override { metal_sim::set_num_threads(GetParam()); }
  void TearDown() override { metal_sim::set_num_threads(before); }

  const int before = metal_sim::num_threads();
  Engine native{"native"};
};

INSTANTIATE_TEST_SUITE_P(Threads, Native, testing::Values(1, 2, 3, 8));

TEST_P(Native, EveryThreadgroupRunsOnce) {
  for (const MTL::Size grid : {MTL::Size(1, 1, 1), MTL::Size(2, 1, 1), MTL::Size(7, 5, 3), MTL::Size(100000, 1, 1)}) {
    const auto data = native.buffer(grid.width * grid.height * grid.depth);
    for (uint32_t round = 1; round <= 20; ++round) {
      EXPECT_EQ(native.run("add_one", {data.get()}, grid, {1, 1, 1}), "");
      EXPECT_TRUE(all_are(contents(data), round));
    }
  }
}

TEST_P(Native, AttributesAreThoseOfOneThread) {
  const auto out = native.buffer(2 * 3 * 2 * 8);
  EXPECT_EQ(native.run("describe", {out.get()}, {2, 3, 2}, {1, 1, 1}), "");
  for (uint32_t i = 0; i < 12; ++i)
    EXPECT_EQ(std::vector<uint32_t>(words(out) + i * 8, words(out) + i * 8 + 8),
              (std::vector<uint32_t>{i, 0, 0, 0, 1, 0, 0, 0}));
}

TEST_P(Native, ThreadgroupMemoryBelongsToOneThreadgroup) {
  constexpr uint32_t threadgroups = 5000;
  const auto out = native.buffer(threadgroups);
  auto* commands = native.queue->commandBuffer();
  auto* encoder = commands->computeCommandEncoder();
  const auto pipeline = native.pipeline("neighbour_barrier");
  encoder->setComputePipelineState(pipeline.get());
  encoder->setBuffer(out.get(), 0, 0);
  encoder->setThreadgroupMemoryLength(32768, 0);
  encoder->dispatchThreadgroups({threadgroups, 1, 1}, {1, 1, 1});
  encoder->endEncoding();
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_TRUE(all_are(contents(out), 0u));
}

TEST_P(Native, QueuesRunSideBySide) {
  constexpr int rounds = 200;
  std::vector<std::thread> workers;
  for (int t = 0; t < 3; ++t) {
    workers.emplace_back([] {
      Engine mine("native");
      const auto data = mine.buffer(1000);
      for (uint32_t round = 1; round <= rounds; ++round)
        EXPECT_EQ(mine.run("add_one", {data.get()}, {1000, 1, 1}, {1, 1, 1}), "");
      EXPECT_TRUE(all_are(contents(data), uint32_t(rounds)));
    });
  }
  for (auto& worker : workers)
    worker.join();
}

TEST_P(Native, TheChildOfAForkRuns) {
  const auto data = native.buffer(100000);
  ASSERT_EQ(native.run("add_one", {data.get()}, {100000, 1, 1}, {1, 1, 1}), "");
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    const bool right = native.run("add_one", {data.get()}, {100000, 1, 1}, {1, 1, 1}).empty() && words(data)[0] == 2 &&
                       words(data)[99999] == 2;
    _exit(right ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST(NativeThreads, TheNumberIsAtLeastOne) {
  const int before = metal_sim::num_threads();
  EXPECT_GE(before, 1);
  metal_sim::set_num_threads(0);
  EXPECT_EQ(metal_sim::num_threads(), 1);
  metal_sim::set_num_threads(before);
}

TEST(NativeThreads, AThreadgroupIsOneThread) {
  Engine native("native");
  const auto out = native.buffer(64);
  EXPECT_TRUE(mentions(misuse([&] { native.run("describe", {out.get()}, {1, 1, 1}, {2, 1, 1}); }),
                       {"threadsPerThreadgroup (2, 1, 1) has more than 1 elements"}));
}

} // namespace
