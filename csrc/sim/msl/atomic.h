// Atomic types and their explicit functions, on device and threadgroup memory.
#pragma once

#include "scalar.h"

#ifdef METAL_SIM_CUDA
#include "cuda_atomic.h"
#else

namespace metal {

enum memory_order { memory_order_relaxed = __ATOMIC_RELAXED };

template <typename T>
struct atomic {
  T value;
};

template <typename T>
METAL_FUNC T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  return __atomic_load_n(&object->value, __ATOMIC_RELAXED);
}
template <typename T>
METAL_FUNC void atomic_store_explicit(volatile atomic<T>* object, T desired, memory_order) {
  __atomic_store_n(&object->value, desired, __ATOMIC_RELAXED);
}
template <typename T>
METAL_FUNC T atomic_exchange_explicit(volatile atomic<T>* object, T desired, memory_order) {
  return __atomic_exchange_n(&object->value, desired, __ATOMIC_RELAXED);
}
template <typename T>
METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected, T desired, memory_order,
                                                      memory_order) {
  return __atomic_compare_exchange_n(&object->value, expected, desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

#define METAL_SIM_ATOMIC(NAME)                                                                                         \
  template <typename T>                                                                                                \
  METAL_FUNC T atomic_##NAME##_explicit(volatile atomic<T>* object, T operand, memory_order) {                         \
    return __atomic_##NAME(&object->value, operand, __ATOMIC_RELAXED);                                                 \
  }
METAL_SIM_ATOMIC(fetch_add)
METAL_SIM_ATOMIC(fetch_sub)
METAL_SIM_ATOMIC(fetch_and)
METAL_SIM_ATOMIC(fetch_or)
METAL_SIM_ATOMIC(fetch_xor)
#undef METAL_SIM_ATOMIC

template <typename T>
METAL_FUNC T atomic_fetch_min_explicit(volatile atomic<T>* object, T operand, memory_order order) {
  T old = atomic_load_explicit(object, order);
  while (operand < old && !atomic_compare_exchange_weak_explicit(object, &old, operand, order, order)) {
  }
  return old;
}
template <typename T>
METAL_FUNC T atomic_fetch_max_explicit(volatile atomic<T>* object, T operand, memory_order order) {
  T old = atomic_load_explicit(object, order);
  while (old < operand && !atomic_compare_exchange_weak_explicit(object, &old, operand, order, order)) {
  }
  return old;
}

using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_bool = atomic<bool>;

} // namespace metal

#endif
