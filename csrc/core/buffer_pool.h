// Scratch buffers that outlive a call: kept in power-of-two buckets and handed out again.
#pragma once

#include "fork.h"
#include "metal.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace metal_moe {

class BufferPool;

/// A buffer on loan from a pool; goes back to it when destroyed. Whoever has encoded it must keep it until the command
/// buffer has completed (CommandStream::scratch does).
class PooledBuffer {
public:
  PooledBuffer() = default;
  PooledBuffer(PooledBuffer&& other) noexcept { *this = std::move(other); }
  PooledBuffer& operator=(PooledBuffer&& other) noexcept;
  ~PooledBuffer() { reset(); }

  /// Gives the buffer back.
  void reset() noexcept;

  MTL::Buffer* get() const { return buffer_; }
  /// Bytes of the buffer: the power of two at or above what was asked for.
  size_t capacity() const { return size_t(1) << bucket_; }
  explicit operator bool() const { return buffer_ != nullptr; }

private:
  friend class BufferPool;
  PooledBuffer(BufferPool* pool, MTL::Buffer* buffer, uint32_t bucket)
      : pool_(pool), buffer_(buffer), bucket_(bucket) {}

  BufferPool* pool_ = nullptr;
  MTL::Buffer* buffer_ = nullptr; // owned: one reference
  uint32_t bucket_ = 0;
};

/// Thread-safe and lazy: nothing is allocated before it is asked for, and the device is asked only where no idle buffer
/// of the bucket exists. Contents are whatever the last user left. The pool must outlive what it lends.
class BufferPool {
public:
  struct Statistics {
    uint64_t hits;       // loans served from idle buffers
    uint64_t misses;     // loans that allocated
    uint64_t trimmed;    // buffers given back to the device
    size_t bytes_in_use; // capacity on loan now
    size_t bytes_idle;   // capacity kept for later
    size_t high_water;   // largest bytes_in_use ever
    size_t buffers_in_use;
    size_t buffers_idle;
  };

  /// `poison`: fill every buffer that is lent with 0xFF bytes (NaN in every float type), so that a kernel that reads
  /// what it never wrote shows.
  explicit BufferPool(MTL::Device* device, bool poison = false) : device_(device), poison_(poison) {}
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  /// A buffer of at least `bytes` (0 counts as 1), capacity the next power of two, never under MIN_CAPACITY. Idle
  /// buffers are given back to a device that has no memory left. std::invalid_argument above the largest bucket,
  /// std::runtime_error with the size where there is still none.
  PooledBuffer acquire(size_t bytes);

  /// Gives idle buffers back to the device, largest first, until at most `keep_bytes` stay idle. Returns bytes freed.
  size_t trim(size_t keep_bytes = 0);

  Statistics statistics() const;

  /// Smallest buffer: below it a bucket would save less than the buffer's own bookkeeping costs.
  static constexpr size_t MIN_CAPACITY = 256;

private:
  friend class PooledBuffer;
  void count_loan(size_t capacity); // with the lock held
  void give_back(MTL::Buffer* buffer, uint32_t bucket) noexcept;

  static constexpr uint32_t BUCKETS = 48; // up to 2^47 bytes: more than any device addresses

  MTL::Device* device_;
  const bool poison_;
  mutable std::mutex mutex_;
  const ForkGuard guard_{mutex_};
  std::array<std::vector<MTL::Buffer*>, BUCKETS> idle_;
  Statistics statistics_{};
};

} // namespace metal_moe
