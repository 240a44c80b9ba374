// Atomic types and functions on NVIDIA GPUs: relaxed, among the threads of a grid.
#pragma once

#include "scalar.h"

namespace metal {

enum memory_order { memory_order_relaxed = 0 };

template <typename T>
struct atomic {
  static_assert(sizeof(T) == 4, "atomic: 32-bit types");
  T value;
};

template <typename T>
METAL_FUNC T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  return object->value;
}
template <typename T>
METAL_FUNC void atomic_store_explicit(volatile atomic<T>* object, T desired, memory_order) {
  object->value = desired;
}

#define METAL_SIM_ATOMIC(NAME, FUNCTION)                                                                               \
  template <typename T>                                                                                                \
  METAL_FUNC T atomic_##NAME##_explicit(volatile atomic<T>* object, T operand, memory_order) {                         \
    return FUNCTION(const_cast<T*>(&object->value), operand);                                                          \
  }
METAL_SIM_ATOMIC(exchange, ::atomicExch)
METAL_SIM_ATOMIC(fetch_add, ::atomicAdd)
METAL_SIM_ATOMIC(fetch_sub, ::atomicSub)
METAL_SIM_ATOMIC(fetch_and, ::atomicAnd)
METAL_SIM_ATOMIC(fetch_or, ::atomicOr)
METAL_SIM_ATOMIC(fetch_xor, ::atomicXor)
METAL_SIM_ATOMIC(fetch_min, ::atomicMin)
METAL_SIM_ATOMIC(fetch_max, ::atomicMax)
#undef METAL_SIM_ATOMIC

template <typename T>
METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected, T desired, memory_order,
                                                      memory_order) {
  const T before = ::atomicCAS(const_cast<T*>(&object->value), *expected, desired);
  const bool exchanged = before == *expected;
  *expected = before;
  return exchanged;
}

using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;

} // namespace metal
