// BufferPool: buckets, reuse, statistics, trim, and many threads at once.
#include "core_support.h"

#include <atomic>
#include <fstream>
#include <random>
#include <sys/resource.h>
#include <thread>
#include <unistd.h>

namespace metal_moe::testing {
namespace {

struct Pool : ::testing::Test {
  MTL::Device* device = engine("native").context().device();
  BufferPool pool{device};
};

TEST_F(Pool, AllocatesNothingBeforeItIsAsked) {
  const auto s = pool.statistics();
  EXPECT_EQ(s.misses, 0u);
  EXPECT_EQ(s.bytes_in_use + s.bytes_idle, 0u);
}

TEST_F(Pool, CapacityIsTheNextPowerOfTwo) {
  for (size_t bytes : {size_t(0), size_t(1), size_t(255), size_t(256)})
    EXPECT_EQ(pool.acquire(bytes).capacity(), BufferPool::MIN_CAPACITY) << bytes;
  EXPECT_EQ(pool.acquire(257).capacity(), 512u);
  EXPECT_EQ(pool.acquire(4096).capacity(), 4096u);
  EXPECT_EQ(pool.acquire(4097).capacity(), 8192u);
  const PooledBuffer buffer = pool.acquire(5000);
  EXPECT_GE(buffer.get()->length(), 5000u);
}

TEST_F(Pool, ReusesWithinABucketOnly) {
  MTL::Buffer* first = pool.acquire(1000).get(); // back at the end of the statement
  const PooledBuffer same = pool.acquire(513);
  EXPECT_EQ(same.get(), first);
  EXPECT_NE(pool.acquire(1000).get(), first);
  EXPECT_NE(pool.acquire(100).get(), first);
  EXPECT_EQ(pool.statistics().hits, 1u);
  EXPECT_EQ(pool.statistics().misses, 3u);
}

TEST_F(Pool, CountsUseIdleAndHighWater) {
  {
    const PooledBuffer a = pool.acquire(1 << 12), b = pool.acquire(1 << 14);
    EXPECT_EQ(pool.statistics().bytes_in_use, (1u << 12) + (1u << 14));
    EXPECT_EQ(pool.statistics().buffers_in_use, 2u);
  }
  const PooledBuffer a = pool.acquire(1 << 12);
  const auto s = pool.statistics();
  EXPECT_EQ(s.bytes_in_use, 1u << 12);
  EXPECT_EQ(s.bytes_idle, 1u << 14);
  EXPECT_EQ(s.buffers_idle, 1u);
  EXPECT_EQ(s.high_water, (1u << 12) + (1u << 14));
}

TEST_F(Pool, TrimFreesLargestFirstDownToTheLimit) {
  {
    const PooledBuffer a = pool.acquire(1 << 12), b = pool.acquire(1 << 13), c = pool.acquire(1 << 14);
  }
  const PooledBuffer in_use = pool.acquire(1 << 12);
  EXPECT_EQ(pool.trim(1 << 13), size_t(1) << 14);
  EXPECT_EQ(pool.statistics().bytes_idle, 1u << 13);
  EXPECT_EQ(pool.trim(), size_t(1) << 13);
  const auto s = pool.statistics();
  EXPECT_EQ(s.bytes_idle, 0u);
  EXPECT_EQ(s.trimmed, 2u);
  EXPECT_EQ(s.bytes_in_use, 1u << 12) << "what is on loan stays";
}

TEST_F(Pool, MovedFromLoansGiveNothingBack) {
  PooledBuffer a = pool.acquire(300);
  PooledBuffer b = std::move(a);
  EXPECT_FALSE(a);
  a.reset();
  EXPECT_EQ(pool.statistics().buffers_in_use, 1u);
  b = pool.acquire(300); // the first goes back
  EXPECT_EQ(pool.statistics().buffers_in_use, 1u);
  EXPECT_EQ(pool.statistics().buffers_idle, 1u);
}

TEST_F(Pool, RefusesWhatNoDeviceCanHold) {
  EXPECT_THROW(pool.acquire(size_t(1) << 60), std::invalid_argument);
  EXPECT_EQ(pool.statistics().buffers_in_use, 0u);
}

/// While it lives, the process can map `bytes` more than it has.
class AddressLimit {
public:
  explicit AddressLimit(size_t bytes) {
    getrlimit(RLIMIT_AS, &before_);
    size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlimit limit{pages * static_cast<size_t>(sysconf(_SC_PAGESIZE)) + bytes, before_.rlim_max};
    setrlimit(RLIMIT_AS, &limit);
  }
  ~AddressLimit() { setrlimit(RLIMIT_AS, &before_); }

private:
  rlimit before_;
};

TEST_F(Pool, GivesIdleBuffersBackBeforeItFails) {
  constexpr size_t MIB = size_t(1) << 20;
  const AddressLimit limit(768 * MIB);
  pool.acquire(256 * MIB);
  const PooledBuffer kept = pool.acquire(128 * MIB);
  const PooledBuffer large = pool.acquire(512 * MIB); // beside the others there is no room for it
  EXPECT_EQ(pool.statistics().trimmed, 1u);
  EXPECT_EQ(pool.statistics().bytes_idle, 0u);
}

TEST_F(Pool, OutOfMemorySaysHowMuchAndLosesNothing) {
  constexpr size_t MIB = size_t(1) << 20;
  const AddressLimit limit(512 * MIB);
  const PooledBuffer kept = pool.acquire(1 * MIB);
  try {
    pool.acquire(1000 * MIB);
    FAIL() << "no exception";
  } catch (const std::runtime_error& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("1073741824 bytes"), std::string::npos) << text;
    EXPECT_NE(text.find("1048576 bytes of others in use"), std::string::npos) << text;
  }
  EXPECT_EQ(pool.statistics().buffers_in_use, 1u);
  EXPECT_TRUE(pool.acquire(2 * MIB));
}

TEST_F(Pool, PoisonedLoansAreNaN) {
  BufferPool poisoned(device, true);
  for (int loan = 0; loan < 2; ++loan) {
    const PooledBuffer buffer = poisoned.acquire(1024);
    auto* bytes = static_cast<unsigned char*>(buffer.get()->contents());
    EXPECT_EQ(std::accumulate(bytes, bytes + 1024, 0), 0xFF * 1024);
    std::memset(bytes, 0, 1024);
  }
  EXPECT_EQ(poisoned.statistics().hits, 1u);
}

TEST_F(Pool, ManyThreadsNeverShareALoan) {
  constexpr int THREADS = 8, LOANS = 2000, HELD = 4;
  std::atomic<int> overlaps{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < THREADS; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      PooledBuffer held[HELD];
      const auto stamp = [&](PooledBuffer& buffer, bool check) {
        auto* words = static_cast<volatile int*>(buffer.get()->contents());
        if (check && (words[0] != t || words[1] != t))
          ++overlaps;
        words[0] = t;
        words[1] = t;
      };
      for (int i = 0; i < LOANS; ++i) {
        PooledBuffer& slot = held[random() % HELD];
        if (slot)
          stamp(slot, true);
        slot = pool.acquire(size_t(1) << (8 + random() % 6));
        stamp(slot, false);
        if (i % 500 == 0)
          pool.trim(4096);
        stamp(slot, true);
      }
    });
  for (auto& thread : threads)
    thread.join();
  EXPECT_EQ(overlaps, 0);
  const auto s = pool.statistics();
  EXPECT_EQ(s.bytes_in_use, 0u);
  EXPECT_EQ(s.buffers_in_use, 0u);
  EXPECT_EQ(s.hits + s.misses, uint64_t(THREADS) * LOANS);
  EXPECT_EQ(s.buffers_idle + s.trimmed, s.misses);
  pool.trim();
  EXPECT_EQ(pool.statistics().bytes_idle, 0u);
}

} // namespace
} // namespace metal_moe::testing
