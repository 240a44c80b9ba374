// What the entry points of translated kernels are written with. Included after the kernels, it ends the qualifiers of
// keywords.h.
#pragma once

#undef device
#undef threadgroup
#undef thread
#undef constant
#undef kernel

#include "../kernel_library.h"
#include "vector.h"

namespace metal_sim {

template <unsigned Index, typename First, typename... Rest>
struct Nth : Nth<Index - 1, Rest...> {};
template <typename First, typename... Rest>
struct Nth<0, First, Rest...> {
  using type = First;
};

/// What a buffer or threadgroup argument points to: the target of a pointer or of a reference.
template <typename T>
struct Target;
template <typename T>
struct Target<T*> {
  using type = T;
  METAL_FUNC static T* bind(void* memory) { return static_cast<T*>(memory); }
};
template <typename T>
struct Target<T&> {
  using type = T;
  METAL_FUNC static T& bind(void* memory) { return *static_cast<T*>(memory); }
};

template <typename T>
constexpr uint32_t alignment_of = alignof(T);
template <>
inline constexpr uint32_t alignment_of<void> = 1;
template <>
inline constexpr uint32_t alignment_of<const void> = 1;

template <typename T>
constexpr bool is_writable = true;
template <typename T>
constexpr bool is_writable<const T> = false;

/// An attribute's three coordinates as the type that the kernel declares: one integer (x), or a vector of 2 or 3.
template <typename T>
struct Coordinates {
  METAL_FUNC static T from(const Size3& size) { return T(size.x); }
};
template <typename T>
struct Coordinates<metal::vec<T, 2>> {
  METAL_FUNC static metal::vec<T, 2> from(const Size3& size) { return metal::vec<T, 2>(size.x, size.y); }
};
template <typename T>
struct Coordinates<metal::vec<T, 3>> {
  METAL_FUNC static metal::vec<T, 3> from(const Size3& size) { return metal::vec<T, 3>(size.x, size.y, size.z); }
};
template <typename T>
struct Coordinates<const T> : Coordinates<T> {};

/// Parameters of a kernel function, by place.
template <typename Function>
struct Parameters;
template <typename... P>
struct Parameters<void (*)(P...)> {
  template <unsigned Place>
  using Type = typename Nth<Place, P...>::type;

  template <unsigned Place>
  static constexpr KernelArgument describe(ArgumentKind kind, uint32_t index, const char* name) {
    using T = typename Target<Type<Place>>::type;
    return {kind, index, alignment_of<T>, is_writable<T>, name};
  }
  template <unsigned Place>
  METAL_FUNC static Type<Place> bind(void* memory) {
    return Target<Type<Place>>::bind(memory);
  }
  template <unsigned Place>
  METAL_FUNC static auto coordinates(const Size3& size) {
    return Coordinates<Type<Place>>::from(size);
  }
  template <unsigned Place>
  METAL_FUNC static auto number(uint32_t value) {
    return Type<Place>(value);
  }
};

METAL_FUNC Size3 thread_position_in_grid(const ThreadContext& context) {
  const Size3 &group = context.threadgroup_position_in_grid, &size = context.threads_per_threadgroup,
              &place = context.thread_position_in_threadgroup;
  return {group.x * size.x + place.x, group.y * size.y + place.y, group.z * size.z + place.z};
}
METAL_FUNC Size3 threads_per_grid(const ThreadContext& context) {
  const Size3 &groups = context.threadgroups_per_grid, &size = context.threads_per_threadgroup;
  return {groups.x * size.x, groups.y * size.y, groups.z * size.z};
}

} // namespace metal_sim

#ifdef METAL_SIM_CUDA
#include "cuda_entry.h"
#else

// Of a kernel that begins before the one in front of it has ended.
#ifdef METAL_SIM_EXACT
#define METAL_SIM_WORK_AHEAD(AHEAD) metal_sim::exact_work_ahead(AHEAD)
#else
#define METAL_SIM_WORK_AHEAD(AHEAD) static_cast<void>(0)
#endif

// The linker gathers these pointers into one array; kernel_table.cpp gives it to the engine. An external name per
// kernel makes two kernels of one name a link error.
#define METAL_SIM_KERNEL(NAME, ENTRY, ARGUMENTS, COUNT, MAX_THREADS, CONSTANTS, CONSTANT_COUNT)                        \
  extern "C" __attribute__((visibility("hidden"))) const metal_sim::Kernel metal_sim_kernel_##NAME;                    \
  const metal_sim::Kernel metal_sim_kernel_##NAME = {#NAME,       ENTRY,     ARGUMENTS,     COUNT,                     \
                                                     MAX_THREADS, CONSTANTS, CONSTANT_COUNT};                          \
  __attribute__((section("metal_sim_kernels"), used)) static const metal_sim::Kernel* const metal_sim_pointer_##NAME = \
      &metal_sim_kernel_##NAME;

#endif
