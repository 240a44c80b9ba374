// StreamScratch: one memory for all operations of a stream. Written for macOS, and plain enough to run anywhere.
#include "apple/stream_scratch.h"
#include "core_support.h"

namespace metal_moe::testing {
namespace {

struct Scratch : ::testing::Test {
  Context& context = engine("native").context();
  BufferPool& pool = context.pool();
  apple::StreamScratch scratch;
};

TEST_F(Scratch, PiecesDoNotOverlapAndAreAligned) {
  scratch.begin();
  std::vector<std::pair<uintptr_t, uintptr_t>> pieces;
  for (size_t bytes : {1u, 300u, 0u, 5000u, 128u, 70000u, 3u}) {
    const BufferView view = scratch.allocate(pool, bytes);
    ASSERT_LE(view.offset + bytes, view.buffer->length());
    const auto begin = reinterpret_cast<uintptr_t>(view.buffer->contents()) + view.offset;
    EXPECT_EQ(view.offset % 128, 0u);
    for (const auto& [other_begin, other_end] : pieces)
      EXPECT_TRUE(begin >= other_end || begin + bytes <= other_begin);
    pieces.emplace_back(begin, begin + bytes);
  }
}

TEST_F(Scratch, TheNextOperationHasTheSameMemory) {
  std::vector<BufferView> first;
  scratch.begin();
  for (size_t bytes : {1000u, 20000u, 300000u})
    first.push_back(scratch.allocate(pool, bytes));
  const uint64_t misses = pool.statistics().misses;
  for (int operation = 0; operation < 5; ++operation) {
    scratch.begin();
    for (size_t i = 0; const size_t bytes : {1000u, 20000u, 300000u}) {
      const BufferView view = scratch.allocate(pool, bytes);
      EXPECT_EQ(view.buffer, first[i].buffer);
      EXPECT_EQ(view.offset, first[i].offset);
      ++i;
    }
  }
  EXPECT_EQ(pool.statistics().misses, misses);
}

TEST_F(Scratch, GrowsInFewBlocks) {
  const uint64_t before = pool.statistics().buffers_in_use;
  for (size_t bytes = 256; bytes <= size_t(1) << 22; bytes += bytes / 4) {
    scratch.begin();
    scratch.allocate(pool, bytes);
    scratch.allocate(pool, bytes);
  }
  EXPECT_LE(pool.statistics().buffers_in_use - before, 17u); // one for each power of two at most
}

TEST_F(Scratch, GoesBackWhenTheCommandBufferHasCompleted) {
  const uint64_t before = pool.statistics().buffers_in_use;
  scratch.begin();
  scratch.allocate(pool, 1000);
  const auto queue = NS::TransferPtr(context.device()->newCommandQueue());
  const AutoreleaseScope scope;
  MTL::CommandBuffer* commands = queue->commandBuffer();
  scratch.release_after(commands);
  EXPECT_EQ(pool.statistics().buffers_in_use, before + 1);
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_EQ(pool.statistics().buffers_in_use, before);
  scratch.begin();
  EXPECT_TRUE(scratch.allocate(pool, 1000));
}

} // namespace
} // namespace metal_moe::testing
