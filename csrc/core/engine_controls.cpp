#include "engine_controls.h"

#if defined(__APPLE__)

#include <stdexcept>

namespace metal_moe {

void set_num_threads(int) {}
int num_threads() { return 0; }
void set_exact_seed(uint64_t) {}
void set_nvrtc_path(const std::string&) {}
std::string compile_cuda_kernel(const std::string&, const std::string&, const std::map<uint32_t, uint32_t>&, int) {
  throw std::runtime_error("there is no cuda engine on macOS");
}

} // namespace metal_moe

#else

#include <metal_sim/control.h>

namespace metal_moe {

void set_num_threads(int threads) { metal_sim::set_num_threads(threads); }
int num_threads() { return metal_sim::num_threads(); }
void set_exact_seed(uint64_t seed) { metal_sim::set_exact_seed(seed); }
void set_nvrtc_path(const std::string& path) { metal_sim::set_nvrtc_path(path); }
std::string compile_cuda_kernel(const std::string& library, const std::string& kernel,
                                const std::map<uint32_t, uint32_t>& constants, int architecture) {
  return metal_sim::compile_cuda_kernel(library, kernel, constants, architecture);
}

} // namespace metal_moe

#endif
