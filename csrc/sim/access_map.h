// Which memory a kernel's threads may touch during one dispatch, and how errors name it.
#pragma once

#include "engine.h"
#include "race_detector.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace metal_sim {

class AccessMap {
public:
  /// A range without gaps in what is allowed.
  struct Region {
    uintptr_t begin, end;
    bool writable;
    Shadow* shadow; // null: nobody writes it, so nothing can race
  };

  /// Everything that `dispatch` binds. `threadgroup`: the places of its threadgroup arguments.
  void build(const Dispatch& dispatch, void* const* threadgroup);
  /// The engine's own memory that kernels may read.
  void add_readable(const void* begin, size_t bytes);
  /// Read-only and other data of the shared object that holds `kernel`.
  void add_image(const void* code);
  /// To be called after the last addition.
  void finish();

  /// The region that holds all of the access, or null.
  const Region* find(uintptr_t address, size_t bytes) {
    uint16_t& slot = recent_[address / 4096 % recent_.size()];
    if (slot < regions_.size()) {
      const Region& region = regions_[slot];
      if (address - region.begin < region.end - region.begin && bytes <= region.end - address)
        return &region;
    }
    return search(address, bytes, slot);
  }

  /// "read 4 bytes at offset 64 of argument 'in' (buffer 0, 64 bytes)", with the nearest argument.
  std::string describe(uintptr_t address, size_t bytes, Access access) const;

private:
  struct Bound {
    uintptr_t begin, end;
    bool writable;
    bool raceable;
    MemoryKind kind;
    const KernelArgument* argument; // null: not an argument
  };

  const Region* search(uintptr_t address, size_t bytes, uint16_t& slot);

  std::vector<Bound> bounds_;
  std::vector<Region> regions_; // disjoint, ascending
  std::vector<Shadow> shadows_;
  std::vector<Shadow::Page> spare_;
  std::array<uint16_t, 64> recent_; // region last found for a page
};

} // namespace metal_sim
