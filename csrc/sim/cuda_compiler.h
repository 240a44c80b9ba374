// Machine code of a kernel for one GPU architecture: from the cache on disk, or from NVRTC, NVIDIA's run-time compiler,
// which is found when it is first needed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace metal_sim {

/// A translated .metal source: see cuda_source.py.
struct CudaSource {
  std::string name; // for the compiler's messages
  std::string text;
};

struct CudaBinary {
  std::string image; // a cubin
  bool from_cache;
};

/// The kernel `kernel` of `source`, with further options for the compiler, for compute capability major * 10 + minor.
/// std::runtime_error with the compiler's
/// log where it does not compile, and where there is no NVRTC. `use_cache`: false where what the cache holds has
/// failed.
///
/// The cache is $XDG_CACHE_HOME/metal_moe/cuda (else ~/.cache/metal_moe/cuda): one file per source text, options and
/// NVRTC version. A cache that cannot be read or written is as good as an empty one.
CudaBinary cuda_binary(const CudaSource& source, const std::string& kernel, const std::vector<std::string>& definitions,
                       int architecture, bool use_cache = true);

/// Threadgroup memory that most kernels for an architecture are compiled for: half of a multiprocessor's shared memory,
/// so that it holds two threadgroups, whose loads and arithmetic overlap.
uint32_t cuda_threadgroup_bytes(int architecture);

/// "13.0". std::runtime_error where there is no NVRTC.
std::string nvrtc_version();

} // namespace metal_sim
