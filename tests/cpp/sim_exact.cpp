// The exact engine runs right kernels right under any schedule, and finds what is wrong with the others.
#include "metal_sim/control.h"
#include "sim_support.h"

#include <set>

namespace {

using namespace sim_test;

class Exact : public testing::TestWithParam<uint64_t> {
protected:
  void SetUp() override { metal_sim::set_exact_seed(GetParam()); }
  void TearDown() override { metal_sim::set_exact_seed(before); }

  const uint64_t before = metal_sim::exact_seed();
  Engine exact{"exact"};
};

INSTANTIATE_TEST_SUITE_P(Seeds, Exact, testing::Values(0, 1, 2, 12345, ~0ull));

TEST_P(Exact, AttributesAreThoseOfEveryThread) {
  const auto out = exact.buffer(2 * 3 * 50 * 8);
  EXPECT_EQ(exact.run("describe", {out.get()}, {2, 3, 1}, {5, 2, 5}), "");
  for (uint32_t i = 0; i < 300; ++i) {
    const uint32_t place = i % 50;
    EXPECT_EQ(std::vector<uint32_t>(words(out) + i * 8, words(out) + i * 8 + 8),
              (std::vector<uint32_t>{i / 50, place, place % 32, place / 32, 2, place % 5, place / 5 % 2, place / 10}));
  }
}

TEST_P(Exact, BarriersOrderThreads) {
  for (const uint32_t threads : {4u, 32u, 100u, 1024u}) {
    const auto out = exact.buffer(3 * threads);
    EXPECT_EQ(exact.run("neighbour_barrier", {out.get()}, {3, 1, 1}, {threads, 1, 1}, true), "");
    for (uint32_t i = 0; i < 3 * threads; ++i)
      EXPECT_EQ(words(out)[i], (i + 1) % threads);
  }
}

TEST_P(Exact, SimdgroupBarriersOrderASimdgroup) {
  const auto out = exact.buffer(64);
  EXPECT_EQ(exact.run("neighbour_simdgroup_barrier", {out.get()}, {2, 1, 1}, {32, 1, 1}, true), "");
  EXPECT_TRUE(
      mentions(exact.run("neighbour_simdgroup_barrier", {out.get()}, {1, 1, 1}, {64, 1, 1}, true), {"data race"}));
}

TEST_P(Exact, ExchangesReachTheLiveThreads) {
  constexpr uint32_t threads = 80; // 16 in the last simdgroup
  const auto out = exact.buffer(threads);
  EXPECT_EQ(exact.run("simd_sum", {out.get()}, {1, 1, 1}, {threads, 1, 1}), "");
  for (uint32_t i = 0; i < threads; ++i) {
    uint32_t sum = 0;
    for (uint32_t lane = i / 32 * 32; lane < std::min(threads, i / 32 * 32 + 32); lane += 2)
      sum += lane;
    EXPECT_EQ(words(out)[i], i % 2 ? 0 : sum) << i;
  }
}

TEST_P(Exact, AtomicsCount) {
  const auto out = exact.buffer(4);
  EXPECT_EQ(exact.run("count_atomically", {out.get()}, {3, 1, 1}, {100, 1, 1}, true), "");
  EXPECT_EQ(contents(out), (std::vector<uint32_t>{300, 100, 100, 100}));
}

TEST_P(Exact, ThreadsMayUseStackAndConstants) {
  const auto out = exact.buffer(64);
  EXPECT_EQ(exact.run("use_own_memory", {out.get()}, {2, 1, 1}, {32, 1, 1}), "");
  EXPECT_EQ(words(out)[7], 9u);
}

TEST_P(Exact, UnwrittenThreadgroupMemoryIsNan) {
  const auto out = exact.buffer(64);
  EXPECT_EQ(exact.run("read_unwritten", {out.get()}, {2, 1, 1}, {32, 1, 1}, true), "");
  EXPECT_TRUE(all_are(contents(out), 0xFFFFFFFFu));
}

TEST_P(Exact, FindsReadsOutOfBounds) {
  const auto in = exact.buffer(16), out = exact.buffer(16);
  EXPECT_TRUE(mentions(exact.run("read_past_end", {in.get(), out.get()}, {2, 1, 1}, {8, 1, 1}),
                       {"kernel 'read_past_end': thread (7, 0, 0) of threadgroup (1, 0, 0) read 4 bytes",
                        "at offset 64 of argument 'in' (buffer 0, 64 bytes, read-only): out of bounds"}));
  EXPECT_TRUE(
      mentions(exact.run("read_before_begin", {in.get()}, {1, 1, 1}, {1, 1, 1}), {"at offset -4 of argument 'in'"}));
  EXPECT_TRUE(mentions(exact.run("read_null", {in.get()}, {1, 1, 1}, {1, 1, 1}), {"address 0, near no argument"}));
}

TEST_P(Exact, BoundsEndWithTheBuffer) {
  // The same memory, bound one word shorter.
  std::vector<uint32_t> memory(17);
  const auto wrap = [&](size_t words) {
    return NS::TransferPtr(exact.device->newBuffer(memory.data(), words * 4, MTL::ResourceStorageModeShared, nullptr));
  };
  const auto out = exact.buffer(16);
  EXPECT_EQ(exact.run("read_past_end", {wrap(17).get(), out.get()}, {2, 1, 1}, {8, 1, 1}), "");
  EXPECT_TRUE(mentions(exact.run("read_past_end", {wrap(16).get(), out.get()}, {2, 1, 1}, {8, 1, 1}), {"offset 64"}));
}

TEST_P(Exact, AnAccessMayCrossFromOneBindingIntoTheNext) {
  std::vector<uint32_t> memory(4);
  const auto wrap = [&](size_t first, size_t words) {
    return NS::TransferPtr(
        exact.device->newBuffer(memory.data() + first, words * 4, MTL::ResourceStorageModeShared, nullptr));
  };
  EXPECT_EQ(exact.run("read_across", {wrap(0, 2).get(), wrap(2, 2).get()}, {1, 1, 1}, {1, 1, 1}), "");
  EXPECT_TRUE(mentions(exact.run("read_across", {wrap(0, 2).get(), wrap(2, 1).get()}, {1, 1, 1}, {1, 1, 1}),
                       {"out of bounds"}));
}

TEST_P(Exact, FindsWritesToReadOnlyArguments) {
  const auto in = exact.buffer(16);
  EXPECT_TRUE(mentions(exact.run("write_read_only", {in.get()}, {1, 1, 1}, {1, 1, 1}),
                       {"wrote 4 bytes at offset 0 of argument 'in' (buffer 0, 64 bytes, read-only): the argument is "
                        "read-only"}));
  EXPECT_EQ(words(in)[0], 0u);
}

TEST_P(Exact, FindsWritesPastThreadgroupMemory) {
  EXPECT_TRUE(mentions(exact.run("write_past_threadgroup_memory", {}, {1, 1, 1}, {32, 1, 1}, true),
                       {"thread (31, 0, 0)", "offset 128 of argument 'memory' (threadgroup 0, 128 bytes)"}));
}

TEST_P(Exact, FindsMemoryOfOtherThreads) {
  const auto out = exact.buffer(32);
  EXPECT_TRUE(mentions(exact.run("read_stack_of_another", {out.get()}, {1, 1, 1}, {32, 1, 1}), {"another thread"}));
  EXPECT_TRUE(mentions(exact.run("overflow_stack", {out.get()}, {1, 1, 1}, {1, 1, 1}), {"bytes of stack"}));
}

TEST_P(Exact, FindsRacesInThreadgroupMemory) {
  const auto out = exact.buffer(64);
  EXPECT_TRUE(mentions(exact.run("race_writes", {}, {1, 1, 1}, {32, 1, 1}, true),
                       {"kernel 'race_writes': data race", "argument 'memory'", " wrote with no barrier"}));
  EXPECT_TRUE(mentions(exact.run("neighbour_unordered", {out.get()}, {1, 1, 1}, {32, 1, 1}, true), {"data race"}));
  EXPECT_TRUE(mentions(exact.run("neighbour_wrong_memory", {out.get()}, {1, 1, 1}, {32, 1, 1}, true), {"data race"}));
  EXPECT_TRUE(mentions(exact.run("race_write_after_read", {}, {1, 1, 1}, {32, 1, 1}, true), {"data race"}));
  EXPECT_TRUE(mentions(exact.run("race_write_after_read", {}, {1, 1, 1}, {64, 1, 1}, true), {"data race"}));
}

TEST_P(Exact, FindsRacesBetweenThreadgroups) {
  const auto out = exact.buffer(64);
  EXPECT_EQ(exact.run("race_threadgroups", {out.get()}, {1, 1, 1}, {32, 1, 1}), "");
  EXPECT_TRUE(mentions(exact.run("race_threadgroups", {out.get()}, {2, 1, 1}, {32, 1, 1}),
                       {"which another threadgroup of the same dispatch wrote"}));
  EXPECT_EQ(exact.run("race_read_other_threadgroup", {out.get()}, {1, 1, 1}, {32, 1, 1}), "");
  EXPECT_TRUE(mentions(exact.run("race_read_other_threadgroup", {out.get()}, {3, 1, 1}, {32, 1, 1}), {"data race"}));
}

TEST_P(Exact, FindsAtomicsThatMeetPlainAccesses) {
  const auto out = exact.buffer(1);
  EXPECT_TRUE(mentions(exact.run("race_atomic_with_plain", {out.get()}, {1, 1, 1}, {32, 1, 1}), {"data race"}));
}

TEST_P(Exact, DispatchesDoNotRaceWithEachOther) {
  const auto data = exact.buffer(64);
  for (uint32_t round = 1; round <= 3; ++round)
    EXPECT_EQ(exact.run("add_one", {data.get()}, {2, 1, 1}, {32, 1, 1}), "");
  EXPECT_TRUE(all_are(contents(data), 3u));
}

TEST_P(Exact, FindsDivergence) {
  const auto out = exact.buffer(1);
  EXPECT_TRUE(mentions(exact.run("diverge_at_barrier", {out.get()}, {1, 1, 1}, {32, 1, 1}),
                       {"kernel 'diverge_at_barrier': divergent threads of threadgroup (0, 0, 0)",
                        "5 wait in threadgroup_barrier (first (0, 0, 0))", "27 have returned (first (5, 0, 0))"}));
  EXPECT_TRUE(mentions(exact.run("barrier_against_exchange", {out.get()}, {1, 1, 1}, {32, 1, 1}),
                       {"16 wait in simdgroup_barrier", "16 wait in simd_sum"}));
  EXPECT_TRUE(mentions(exact.run("diverge_in_operations", {out.get()}, {1, 1, 1}, {32, 1, 1}),
                       {"meet in different operations", "simd_sum", "simd_max"}));
}

TEST_P(Exact, GoesOnAfterAnError) {
  const auto out = exact.buffer(64);
  EXPECT_NE(exact.run("diverge_at_barrier", {out.get()}, {2, 1, 1}, {32, 1, 1}), "");
  EXPECT_EQ(exact.run("neighbour_barrier", {out.get()}, {2, 1, 1}, {32, 1, 1}, true), "");
}

TEST(ExactSchedule, FollowsTheSeed) {
  const uint64_t before = metal_sim::exact_seed();
  const auto order = [](uint64_t seed) {
    metal_sim::set_exact_seed(seed);
    Engine exact("exact");
    const auto out = exact.buffer(129);
    EXPECT_EQ(exact.run("record_order", {out.get()}, {4, 1, 1}, {32, 1, 1}), "");
    auto recorded = contents(out);
    EXPECT_EQ(std::set<uint32_t>(recorded.begin() + 1, recorded.end()).size(), 128u);
    return recorded;
  };
  const auto first = order(1);
  EXPECT_EQ(metal_sim::exact_seed(), 1u);
  EXPECT_EQ(order(1), first);
  EXPECT_NE(order(2), first);
  metal_sim::set_exact_seed(before);
}

} // namespace
