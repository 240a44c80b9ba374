// Barriers and simdgroup functions: what all engines share, then the engine's own.
#pragma once

#include "functions.h"

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
};
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

/// One bit per lane.
class simd_vote {
public:
  using vote_t = ulong;

  METAL_FUNC explicit constexpr simd_vote(vote_t lanes) : lanes_(lanes) {}
  METAL_FUNC explicit constexpr operator vote_t() const { return lanes_; }
  METAL_FUNC constexpr bool any() const { return lanes_ != 0; }
  METAL_FUNC constexpr bool all() const { return lanes_ == ~vote_t(0) >> (64 - SIMD_WIDTH); }

private:
  vote_t lanes_;
};

} // namespace metal

#if defined(METAL_SIM_NATIVE)
#include "simdgroup_native.h"
#elif defined(METAL_SIM_CUDA)
#include "simdgroup_cuda.h"
#else
#include "simdgroup_exact.h"
#endif
