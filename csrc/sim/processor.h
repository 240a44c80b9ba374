// Processor levels that kernel libraries are compiled for, and which of them this processor runs.
#pragma once

#include <string>
#include <vector>

namespace metal_sim {

struct ProcessorLevel {
  const char* name; // "x86-64-v4", "arm64-bf16", ...
  bool supported;   // by this processor and its operating system
};

/// All levels of this architecture, best first.
const std::vector<ProcessorLevel>& processor_levels();

/// The level that METAL_MOE_CPU_LEVEL names, else "".
std::string forced_level();

} // namespace metal_sim
