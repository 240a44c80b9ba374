// Function constants: constants of a source that each pipeline sets, or leaves undefined.
//
// For NVRTC they are constants of the program, which is compiled for one pipeline. Where kernels are compiled before
// there are pipelines, one is an object that looks its value up: entry points say where a dispatch has its values.
#pragma once

#include "../kernel_library.h"
#include "scalar.h"

#define is_function_constant_defined(NAME) (NAME##_is_defined)

namespace metal_sim {

template <typename T>
METAL_FUNC constexpr T constant_from_bits(uint32_t bits) {
  return T(bits);
}
template <>
METAL_FUNC constexpr float constant_from_bits<float>(uint32_t bits) {
  return as_type<float>(bits);
}

} // namespace metal_sim

#ifdef METAL_SIM_CUDA

// METAL_SIM_CONSTANT_<INDEX> is the value, or 0 where METAL_SIM_CONSTANT_<INDEX>_IS_DEFINED is false (cuda_source.py).
#define METAL_SIM_FUNCTION_CONSTANT(TYPE, NAME, PLACE, INDEX)                                                          \
  constexpr TYPE NAME = metal_sim::constant_from_bits<TYPE>(METAL_SIM_CONSTANT_##INDEX);                               \
  constexpr bool NAME##_is_defined = METAL_SIM_CONSTANT_##INDEX##_IS_DEFINED;
#define METAL_SIM_DERIVED_CONSTANT(TYPE, NAME, ...) constexpr TYPE NAME = TYPE(__VA_ARGS__);

#else

namespace metal_sim {

/// Of the dispatch that this thread runs; every entry point sets it. One per source.
static thread_local const ConstantValue* constant_values;

/// Out of line where memory is checked, for values stand in the engine's.
#ifdef METAL_SIM_EXACT
METAL_SIM_UNCHECKED __attribute__((noinline, unused))
#else
__attribute__((unused))
#endif
static ConstantValue constant_value(uint32_t place) {
  return constant_values[place];
}

template <typename T, uint32_t PLACE>
struct FunctionConstant {
  operator T() const { return constant_from_bits<T>(constant_value(PLACE).bits); }
};
template <uint32_t PLACE>
struct IsConstantDefined {
  operator bool() const { return constant_value(PLACE).defined != 0; }
};

} // namespace metal_sim

#define METAL_SIM_FUNCTION_CONSTANT(TYPE, NAME, PLACE, INDEX)                                                          \
  [[maybe_unused]] constexpr metal_sim::FunctionConstant<TYPE, PLACE> NAME;                                            \
  [[maybe_unused]] constexpr metal_sim::IsConstantDefined<PLACE> NAME##_is_defined;
// One whose value follows from function constants.
#define METAL_SIM_DERIVED_CONSTANT(TYPE, NAME, ...)                                                                    \
  struct NAME##_constant {                                                                                             \
    operator TYPE() const { return TYPE(__VA_ARGS__); }                                                                \
  };                                                                                                                   \
  [[maybe_unused]] constexpr NAME##_constant NAME;

#endif
