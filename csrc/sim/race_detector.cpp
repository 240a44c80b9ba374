#include "race_detector.h"

#include <algorithm>

namespace metal_sim {

Shadow::Shadow(uintptr_t base, size_t bytes, MemoryKind kind, std::vector<Page>& spare)
    : base_(base), kind_(kind), pages_((bytes + PAGE - 1) / PAGE), spare_(&spare) {}

Shadow::~Shadow() {
  for (Page& page : pages_) {
    if (page)
      spare_->push_back(std::move(page));
  }
}

Shadow::Page Shadow::new_page() {
  if (spare_->empty())
    return std::make_unique<Cell[]>(PAGE);
  Page page = std::move(spare_->back());
  spare_->pop_back();
  return page;
}

void RaceDetector::begin_dispatch(uint32_t simd_width, uint32_t simdgroups) {
  dispatch_start_ = ++clock_;
  simd_width_ = simd_width;
  for (Order& order : orders_)
    order.simdgroup_barriers.assign(simdgroups, 0);
}

void RaceDetector::begin_threadgroup() { threadgroup_start_ = ++clock_; }

void RaceDetector::threadgroup_barrier(uint32_t memory) {
  ++clock_;
  if (memory & MEMORY_DEVICE)
    orders_[size_t(MemoryKind::Device)].threadgroup_barrier = clock_;
  if (memory & MEMORY_THREADGROUP)
    orders_[size_t(MemoryKind::Threadgroup)].threadgroup_barrier = clock_;
}

void RaceDetector::simdgroup_barrier(uint32_t simdgroup, uint32_t memory) {
  ++clock_;
  if (memory & MEMORY_DEVICE)
    orders_[size_t(MemoryKind::Device)].simdgroup_barriers[simdgroup] = clock_;
  if (memory & MEMORY_THREADGROUP)
    orders_[size_t(MemoryKind::Threadgroup)].simdgroup_barriers[simdgroup] = clock_;
}

/// One thread's view at one moment: which remembered accesses are ordered before it.
struct RaceDetector::Observer {
  uint64_t scope_start; // older stamps are of other dispatches, or of other contents of threadgroup memory
  uint64_t threadgroup_start;
  uint64_t threadgroup_barrier;
  uint64_t simdgroup_barrier;
  uint32_t thread, simdgroup, simd_width;

  bool same_simdgroup(const Stamp& stamp) const { return stamp.thread / simd_width == simdgroup; }
  bool other_threadgroup(const Stamp& stamp) const {
    return stamp.time >= scope_start && stamp.time < threadgroup_start;
  }

  /// The thread of `stamp` may have made its access at the same time as this one.
  bool unordered(const Stamp& stamp) const {
    if (stamp.time < scope_start)
      return false;
    if (stamp.time < threadgroup_start)
      return true;
    if (stamp.thread == thread || stamp.time < threadgroup_barrier)
      return false;
    return !same_simdgroup(stamp) || stamp.time >= simdgroup_barrier;
  }

  /// Somebody who read the byte up to `stamp` may have done so at the same time.
  bool unordered_readers(const Stamp& stamp) const {
    if (unordered(stamp))
      return true;
    if (stamp.time < scope_start)
      return false;
    if (stamp.several_groups)
      return true;
    if (stamp.time < threadgroup_barrier)
      return false;
    return stamp.several_simdgroups || (stamp.several_lanes && stamp.time >= simdgroup_barrier);
  }

  /// Notes in `stamp`, which is to replace `before`, that it was not the only reader.
  void inherit(Stamp& stamp, const Stamp& before) const {
    if (before.time < scope_start)
      return;
    stamp.several_groups = before.several_groups || before.time < threadgroup_start;
    if (before.time < std::max(threadgroup_start, threadgroup_barrier))
      return;
    stamp.several_simdgroups = before.several_simdgroups || !same_simdgroup(before);
    if (same_simdgroup(before) && before.time >= simdgroup_barrier)
      stamp.several_lanes = before.several_lanes || before.thread != thread;
  }
};

Race RaceDetector::access(Shadow& shadow, uintptr_t address, size_t bytes, Access access, uint32_t thread) {
  const Order& order = orders_[size_t(shadow.kind())];
  Observer observer;
  observer.scope_start = shadow.kind() == MemoryKind::Device ? dispatch_start_ : threadgroup_start_;
  observer.threadgroup_start = threadgroup_start_;
  observer.threadgroup_barrier = order.threadgroup_barrier;
  observer.thread = thread;
  observer.simd_width = simd_width_;
  observer.simdgroup = thread / simd_width_;
  observer.simdgroup_barrier = order.simdgroup_barriers[observer.simdgroup];

  const bool atomic = access == Access::Atomic;
  const Stamp now = {clock_, thread, atomic, 0, 0, 0};
  Shadow::Cell* cells = nullptr;
  for (size_t i = 0, left = 0; i < bytes; ++i, --left, ++cells) {
    if (left == 0) {
      cells = &shadow.at(address + i);
      left = shadow.left_in_page(address + i);
    }
    Shadow::Cell& cell = *cells;
    const bool bad_writer = !(atomic && cell.writer.atomic) && observer.unordered(cell.writer);
    const bool bad_reader = access != Access::Read && observer.unordered_readers(cell.reader);
    if (bad_writer || bad_reader) {
      const Stamp& other = bad_writer ? cell.writer : cell.reader;
      return {true, bad_writer, observer.other_threadgroup(other), uint32_t(other.thread), address + i};
    }
    if (access == Access::Read) {
      Stamp reader = now;
      observer.inherit(reader, cell.reader);
      cell.reader = reader;
    } else {
      cell.writer = now;
    }
  }
  return {};
}

} // namespace metal_sim
