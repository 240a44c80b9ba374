#include "buffer_pool.h"

#include "counters.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

namespace metal_moe {

PooledBuffer& PooledBuffer::operator=(PooledBuffer&& other) noexcept {
  if (this != &other) {
    reset();
    pool_ = std::exchange(other.pool_, nullptr);
    buffer_ = std::exchange(other.buffer_, nullptr);
    bucket_ = other.bucket_;
  }
  return *this;
}

void PooledBuffer::reset() noexcept {
  if (buffer_)
    pool_->give_back(std::exchange(buffer_, nullptr), bucket_);
}

BufferPool::~BufferPool() { trim(); }

PooledBuffer BufferPool::acquire(size_t bytes) {
  const auto bucket = static_cast<uint32_t>(std::bit_width(std::max(bytes, MIN_CAPACITY) - 1));
  if (bucket >= BUCKETS)
    throw std::invalid_argument("scratch buffer of " + std::to_string(bytes) + " bytes: the limit is " +
                                std::to_string(size_t(1) << (BUCKETS - 1)));
  const size_t capacity = size_t(1) << bucket;
  MTL::Buffer* buffer = nullptr;
  {
    std::lock_guard lock(mutex_);
    auto& idle = idle_[bucket];
    if (!idle.empty()) {
      buffer = idle.back(); // last in, first out: the one most likely still in cache
      idle.pop_back();
      statistics_.hits += 1;
      statistics_.bytes_idle -= capacity;
      statistics_.buffers_idle -= 1;
      count_loan(capacity);
    }
  }
  const bool reused = buffer != nullptr;
  if (!reused) {
    buffer = device_->newBuffer(capacity, MTL::ResourceStorageModeShared); // no lock: the device may take long
    if (!buffer && trim() > 0)
      buffer = device_->newBuffer(capacity, MTL::ResourceStorageModeShared);
    if (!buffer)
      throw std::runtime_error("the device has no memory for a scratch buffer of " + std::to_string(capacity) +
                               " bytes, beside " + std::to_string(statistics().bytes_in_use) +
                               " bytes of others in use");
    std::lock_guard lock(mutex_);
    statistics_.misses += 1;
    count_loan(capacity);
    // Room for every buffer of the bucket to come back, so that give_back allocates nothing.
    idle_[bucket].reserve(idle_[bucket].size() + statistics_.buffers_in_use);
  }
  count(reused ? Counter::PoolHits : Counter::PoolMisses);
  if (poison_)
    std::memset(buffer->contents(), 0xFF, capacity);
  return PooledBuffer(this, buffer, bucket);
}

void BufferPool::count_loan(size_t capacity) {
  statistics_.buffers_in_use += 1;
  statistics_.bytes_in_use += capacity;
  statistics_.high_water = std::max(statistics_.high_water, statistics_.bytes_in_use);
}

void BufferPool::give_back(MTL::Buffer* buffer, uint32_t bucket) noexcept {
  const size_t capacity = size_t(1) << bucket;
  std::lock_guard lock(mutex_);
  idle_[bucket].push_back(buffer);
  statistics_.bytes_in_use -= capacity;
  statistics_.buffers_in_use -= 1;
  statistics_.bytes_idle += capacity;
  statistics_.buffers_idle += 1;
}

size_t BufferPool::trim(size_t keep_bytes) {
  std::vector<MTL::Buffer*> dropped;
  size_t freed = 0;
  {
    std::lock_guard lock(mutex_);
    for (uint32_t bucket = BUCKETS; bucket-- > 0;) {
      auto& idle = idle_[bucket];
      while (!idle.empty() && statistics_.bytes_idle > keep_bytes) {
        dropped.push_back(idle.back());
        idle.pop_back();
        freed += size_t(1) << bucket;
        statistics_.bytes_idle -= size_t(1) << bucket;
        statistics_.buffers_idle -= 1;
      }
    }
    statistics_.trimmed += dropped.size();
  }
  for (MTL::Buffer* buffer : dropped)
    buffer->release();
  return freed;
}

BufferPool::Statistics BufferPool::statistics() const {
  std::lock_guard lock(mutex_);
  return statistics_;
}

} // namespace metal_moe
