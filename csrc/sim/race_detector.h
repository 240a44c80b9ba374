// Data races: two threads that access the same byte, at least one of them writing, with nothing between that orders
// them.
//
// Threads of the exact engine run one at a time, so one clock serves all: every byte remembers who wrote and who read
// it last, and when. What orders two accesses is known by the time it happened: the start of the dispatch, of the
// threadgroup, and the last barrier of the threadgroup or simdgroup that ordered this kind of memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernel_library.h"

namespace metal_sim {

enum class MemoryKind : uint32_t { Device, Threadgroup };

/// One remembered access of one byte.
struct Stamp {
  uint64_t time : 48;
  uint64_t thread : 10; // index in its threadgroup
  uint64_t atomic : 1;
  uint64_t several_lanes : 1;      // readers: not the only one of its simdgroup
  uint64_t several_simdgroups : 1; // readers: not the only one of its threadgroup
  uint64_t several_groups : 1;     // readers: not the only one of the dispatch
};

struct Race {
  bool found = false;
  bool other_write = false;       // what the other access was
  bool other_threadgroup = false; // and who made it
  uint32_t other_thread = 0;
  uintptr_t address = 0;
};

/// The stamps of one range of memory, in pages that exist once touched.
class Shadow {
public:
  struct Cell {
    Stamp writer, reader;
  };
  static constexpr size_t PAGE = 4096;
  using Page = std::unique_ptr<Cell[]>;

  /// Pages come from `spare` and go back there. They need no clearing: what they remember is long past.
  Shadow(uintptr_t base, size_t bytes, MemoryKind kind, std::vector<Page>& spare);
  Shadow(Shadow&&) = default;
  ~Shadow();

  Cell& at(uintptr_t address) {
    Page& page = pages_[(address - base_) / PAGE];
    if (!page) [[unlikely]]
      page = new_page();
    return page[(address - base_) % PAGE];
  }
  /// How many cells from that of `address` on lie one behind the other.
  size_t left_in_page(uintptr_t address) const { return PAGE - (address - base_) % PAGE; }
  MemoryKind kind() const { return kind_; }

private:
  Page new_page();

  uintptr_t base_;
  MemoryKind kind_;
  std::vector<Page> pages_;
  std::vector<Page>* spare_;
};

class RaceDetector {
public:
  void begin_dispatch(uint32_t simd_width, uint32_t simdgroups);
  void begin_threadgroup();
  /// All threads have arrived; `memory`: MemoryFlags.
  void threadgroup_barrier(uint32_t memory);
  void simdgroup_barrier(uint32_t simdgroup, uint32_t memory);

  /// Records an access by the current threadgroup's thread `thread`, and returns the race it is part of, if any.
  Race access(Shadow& shadow, uintptr_t address, size_t bytes, Access access, uint32_t thread);

private:
  /// What orders accesses to one kind of memory.
  struct Order {
    uint64_t threadgroup_barrier = 0;
    std::vector<uint64_t> simdgroup_barriers;
  };
  struct Observer;

  uint64_t clock_ = 1;
  uint64_t dispatch_start_ = 0;
  uint64_t threadgroup_start_ = 0;
  uint32_t simd_width_ = 1;
  Order orders_[2];
};

} // namespace metal_sim
