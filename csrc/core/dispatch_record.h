// One dispatch, as observers see it.
#pragma once

#include "trace.h"

#include <cstddef>
#include <cstdint>

namespace metal_moe {

struct DispatchRecord {
  // Static storage, all.
  const char* kernel = "";
  const char* operation = "";
  const char* engine = "";
  const char* family = "";
  FamilyChoice choice = FamilyChoice::None;

  uint32_t grid[3] = {}; // threadgroups
  uint32_t threads = 0;  // of a threadgroup
  size_t bytes = 0;      // that it reads and writes, as its encoder says

  uint32_t track = 0;        // the queue or stream
  uint64_t encode_start = 0; // nanoseconds of the host's clock
  uint64_t encode_end = 0;
  uint64_t device_start = 0; // the same clock; 0: unknown
  uint64_t device_end = 0;
};

} // namespace metal_moe
