// What the last operation of this thread did: which kernels, how many dispatches and commits. Costs a few stores per
// dispatch, so it is always on; tests and users read it to know which family ran.
#pragma once

#include "counters.h"

#include <array>
#include <cstdint>

namespace metal_moe {

/// Why a layer has its family.
enum class FamilyChoice : uint8_t {
  None,      // no expert kernels ran
  Tokens,    // by the number of tokens, from the device's table
  Requested, // kernel=
  Format     // the weights' format has kernels of its own
};

/// "", "tokens", "kernel", "format".
const char* family_choice_name(FamilyChoice choice);

struct DispatchTrace {
  /// Kernels kept by name; dispatches beyond are counted only.
  static constexpr uint32_t MAX_KERNELS = 16;

  const char* operation = ""; // "fused_moe", ...
  const char* engine = "";
  const char* family = ""; // of the expert kernels; empty where none ran
  FamilyChoice choice = FamilyChoice::None;
  uint32_t row_tile = 0;
  uint32_t tile_n = 0;
  bool vectorized = false;
  /// Codes of gate, up and down that expert kernels were compiled for (kernels/formats/matrix_code.h); 0: none.
  std::array<uint32_t, 3> codes{};
  uint32_t activation = 0;      // of the experts
  const char* layer_batch = ""; // "encoded" in one, "passed" where a batch does nothing for it; empty without
  uint32_t dispatches = 0;
  uint32_t commits = 0;
  std::array<const char*, MAX_KERNELS> kernels{}; // in order of dispatch, static storage

  void add_dispatch(const char* kernel) {
    if (dispatches < MAX_KERNELS)
      kernels[dispatches] = kernel;
    ++dispatches;
    count(Counter::Dispatches);
  }
  void add_commit() {
    ++commits;
    count(Counter::Commits);
  }
};

/// The record of the calling thread's last operation.
DispatchTrace& last_dispatch();

} // namespace metal_moe
