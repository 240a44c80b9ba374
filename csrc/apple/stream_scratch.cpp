#include "stream_scratch.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace metal_moe::apple {

namespace {

/// Every piece begins at a multiple of it: the widest access of a kernel, and a cache line.
constexpr size_t ALIGNMENT = 128;

} // namespace

StreamScratch& StreamScratch::of(at::mps::MPSStream* stream) {
  static std::mutex mutex;
  static auto& all = *new std::unordered_map<at::mps::MPSStream*, std::unique_ptr<StreamScratch>>;
  const std::lock_guard lock(mutex);
  auto& scratch = all[stream];
  if (!scratch)
    scratch = std::make_unique<StreamScratch>();
  return *scratch;
}

void StreamScratch::begin() { block_ = used_ = 0; }

BufferView StreamScratch::allocate(BufferPool& pool, size_t bytes) {
  bytes = (std::max<size_t>(bytes, 1) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  for (; block_ < blocks_.size(); ++block_, used_ = 0)
    if (used_ + bytes <= blocks_[block_].capacity())
      break;
  if (block_ == blocks_.size()) {
    // Twice what there is: layers that grow do not end up with a block each.
    size_t total = 0;
    for (const PooledBuffer& block : blocks_)
      total += block.capacity();
    blocks_.push_back(pool.acquire(std::max(bytes, total)));
    used_ = 0;
  }
  const BufferView view{blocks_[block_].get(), used_};
  used_ += bytes;
  return view;
}

void StreamScratch::release_after(MTL::CommandBuffer* commands) {
  auto blocks = std::make_shared<std::vector<PooledBuffer>>(std::move(blocks_));
  blocks_.clear();
  begin();
  commands->addCompletedHandler(MTL::HandlerFunction([blocks](MTL::CommandBuffer*) { blocks->clear(); }));
}

} // namespace metal_moe::apple
