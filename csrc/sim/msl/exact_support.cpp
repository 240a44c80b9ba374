// What kernels of the exact engine call: the engine's services, and the memory instrumentation of -fsanitize=thread,
// whose runtime library is this file. Compiled without that flag.
#include "exact_services.h"

#include "../kernel_library.h"

#include <string.h>

__attribute__((visibility("hidden"))) const metal_sim::ExactServices* metal_sim_services = nullptr;

namespace {

using metal_sim::Access;

/// Before an engine is installed only the library's own initialisers run.
inline void access(const volatile void* address, size_t bytes, Access kind) {
  if (metal_sim_services)
    metal_sim_services->access(const_cast<const void*>(address), bytes, kind);
}

} // namespace

namespace metal_sim {

void exact_threadgroup_barrier(uint32_t memory) { metal_sim_services->threadgroup_barrier(memory); }
void exact_simdgroup_barrier(uint32_t memory) { metal_sim_services->simdgroup_barrier(memory); }
void exact_work_ahead(bool ahead) { metal_sim_services->work_ahead(ahead); }
uint32_t exact_lane() { return metal_sim_services->lane(); }

uint64_t exact_exchange(const char* operation, const void* value, size_t bytes, void* all) {
  const void* const* published = metal_sim_services->exchange(operation, value, bytes);
  uint64_t active = 0;
  for (uint32_t lane = 0; lane < SIMD_WIDTH; ++lane) {
    char* to = static_cast<char*>(all) + lane * bytes;
    if (published[lane]) {
      memcpy(to, published[lane], bytes);
      active |= uint64_t(1) << lane;
    } else {
      memset(to, 0, bytes);
    }
  }
  return active;
}

bool exact_exchange_one(const char* operation, const void* value, size_t bytes, uint32_t lane, void* result) {
  const void* const* published = metal_sim_services->exchange(operation, value, bytes);
  if (lane >= SIMD_WIDTH || !published[lane])
    return false;
  memcpy(result, published[lane], bytes);
  return true;
}

} // namespace metal_sim

// The compilers call these by name. Hidden, so that a process that really runs under ThreadSanitizer keeps its own.
#pragma GCC visibility push(hidden)
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

#define METAL_SIM_ACCESSES(BYTES)                                                                                      \
  void __tsan_read##BYTES(void* address) { access(address, BYTES, Access::Read); }                                     \
  void __tsan_write##BYTES(void* address) { access(address, BYTES, Access::Write); }                                   \
  void __tsan_read_write##BYTES(void* address) { access(address, BYTES, Access::Write); }                              \
  void __tsan_unaligned_read##BYTES(void* address) { access(address, BYTES, Access::Read); }                           \
  void __tsan_unaligned_write##BYTES(void* address) { access(address, BYTES, Access::Write); }                         \
  void __tsan_unaligned_read_write##BYTES(void* address) { access(address, BYTES, Access::Write); }                    \
  void __tsan_volatile_read##BYTES(void* address) { access(address, BYTES, Access::Read); }                            \
  void __tsan_volatile_write##BYTES(void* address) { access(address, BYTES, Access::Write); }                          \
  void __tsan_unaligned_volatile_read##BYTES(void* address) { access(address, BYTES, Access::Read); }                  \
  void __tsan_unaligned_volatile_write##BYTES(void* address) { access(address, BYTES, Access::Write); }
METAL_SIM_ACCESSES(1)
METAL_SIM_ACCESSES(2)
METAL_SIM_ACCESSES(4)
METAL_SIM_ACCESSES(8)
METAL_SIM_ACCESSES(16)
#undef METAL_SIM_ACCESSES

void __tsan_read_range(void* address, unsigned long bytes) { access(address, bytes, Access::Read); }
void __tsan_write_range(void* address, unsigned long bytes) { access(address, bytes, Access::Write); }

void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  access(from, bytes, Access::Read);
  access(to, bytes, Access::Write);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  access(from, bytes, Access::Read);
  access(to, bytes, Access::Write);
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  access(to, bytes, Access::Write);
  return memset(to, value, bytes);
}

void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

#define METAL_SIM_FETCH(BITS, T, NAME)                                                                                 \
  T __tsan_atomic##BITS##_##NAME(volatile T* object, T operand, int) {                                                 \
    access(object, sizeof(T), Access::Atomic);                                                                         \
    return __atomic_##NAME(object, operand, __ATOMIC_SEQ_CST);                                                         \
  }
#define METAL_SIM_ATOMICS(BITS, T)                                                                                     \
  T __tsan_atomic##BITS##_load(const volatile T* object, int) {                                                        \
    access(object, sizeof(T), Access::Atomic);                                                                         \
    return __atomic_load_n(object, __ATOMIC_SEQ_CST);                                                                  \
  }                                                                                                                    \
  void __tsan_atomic##BITS##_store(volatile T* object, T value, int) {                                                 \
    access(object, sizeof(T), Access::Atomic);                                                                         \
    __atomic_store_n(object, value, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                                    \
  T __tsan_atomic##BITS##_exchange(volatile T* object, T value, int) {                                                 \
    access(object, sizeof(T), Access::Atomic);                                                                         \
    return __atomic_exchange_n(object, value, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                                    \
  METAL_SIM_FETCH(BITS, T, fetch_add)                                                                                  \
  METAL_SIM_FETCH(BITS, T, fetch_sub)                                                                                  \
  METAL_SIM_FETCH(BITS, T, fetch_and)                                                                                  \
  METAL_SIM_FETCH(BITS, T, fetch_or)                                                                                   \
  METAL_SIM_FETCH(BITS, T, fetch_xor)                                                                                  \
  METAL_SIM_FETCH(BITS, T, fetch_nand)                                                                                 \
  int __tsan_atomic##BITS##_compare_exchange_strong(volatile T* object, T* expected, T value, int, int) {              \
    access(object, sizeof(T), Access::Atomic);                                                                         \
    return __atomic_compare_exchange_n(object, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);            \
  }                                                                                                                    \
  int __tsan_atomic##BITS##_compare_exchange_weak(volatile T* object, T* expected, T value, int, int) {                \
    return __tsan_atomic##BITS##_compare_exchange_strong(object, expected, value, 0, 0);                               \
  }                                                                                                                    \
  T __tsan_atomic##BITS##_compare_exchange_val(volatile T* object, T expected, T value, int, int) {                    \
    __tsan_atomic##BITS##_compare_exchange_strong(object, &expected, value, 0, 0);                                     \
    return expected;                                                                                                   \
  }
METAL_SIM_ATOMICS(8, uint8_t)
METAL_SIM_ATOMICS(16, uint16_t)
METAL_SIM_ATOMICS(32, uint32_t)
METAL_SIM_ATOMICS(64, uint64_t)
#undef METAL_SIM_ATOMICS
#undef METAL_SIM_FETCH

} // extern "C"
#pragma GCC visibility pop
