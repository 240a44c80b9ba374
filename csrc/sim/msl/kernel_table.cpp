// The exported symbol of a kernel library: the kernels of all its translated sources. Compiled once per library with
// METAL_SIM_LEVEL, a string.
#include "../kernel_library.h"

extern "C" {
// Bounds of the section that METAL_SIM_KERNEL fills; the linker defines them.
extern const metal_sim::Kernel* const __start_metal_sim_kernels[] __attribute__((visibility("hidden"), weak));
extern const metal_sim::Kernel* const __stop_metal_sim_kernels[] __attribute__((visibility("hidden"), weak));
}

#ifdef METAL_SIM_EXACT
extern const metal_sim::ExactServices* metal_sim_services;
#endif

extern "C" __attribute__((visibility("default"))) const metal_sim::KernelLibrary* metal_sim_kernel_library() {
  static const metal_sim::KernelLibrary library = {
      metal_sim::KERNEL_LIBRARY_ABI,
#ifdef METAL_SIM_EXACT
      "exact",
#else
      "native",
#endif
      METAL_SIM_LEVEL,
      SIMD_WIDTH,
      __start_metal_sim_kernels,
      static_cast<uint32_t>(__stop_metal_sim_kernels - __start_metal_sim_kernels),
#ifdef METAL_SIM_EXACT
      &metal_sim_services,
#else
      nullptr,
#endif
  };
  return &library;
}
