#include "recording.h"

#include <cstring>

namespace metal_sim {

std::byte* Recording::copy(const void* bytes, size_t length) {
  constexpr size_t alignment = 16;
  constexpr size_t gap = 64; // belongs to nobody, so that reading past the end is noticed by the exact engine
  if (block_ < blocks_.size() && used_ + length > BLOCK_BYTES) {
    ++block_;
    used_ = 0;
  }
  if (block_ == blocks_.size())
    blocks_.push_back(std::make_unique_for_overwrite<std::byte[]>(BLOCK_BYTES)); // new aligns to 16
  std::byte* place = blocks_[block_].get() + used_;
  std::memcpy(place, bytes, length);
  used_ += (length + alignment - 1) / alignment * alignment + gap;
  return place;
}

void Recording::clear() {
  dispatches.clear();
  marks.clear();
  for (Counted* object : retained_)
    object->drop_reference();
  retained_.clear();
  block_ = used_ = 0;
}

} // namespace metal_sim
