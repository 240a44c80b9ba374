// Functions of metal_stdlib on scalars and vectors: common, integer, relational, mathematical, geometric.
//
// All are templates: where a host header has put a function of the same name into the global namespace (abs, exp), that
// one is preferred instead of the call being ambiguous.
#pragma once

#include "vector.h"

namespace metal {

// Elementwise versions of a function for vectors.
#define METAL_SIM_ELEMENTWISE_1(NAME)                                                                                  \
  template <typename T, int N>                                                                                         \
  METAL_FUNC auto NAME(const vec<T, N>& a) -> vec<decltype(NAME(T())), N> {                                            \
    vec<decltype(NAME(T())), N> result;                                                                                \
    for (int i = 0; i < N; ++i)                                                                                        \
      result[i] = NAME(a[i]);                                                                                          \
    return result;                                                                                                     \
  }
#define METAL_SIM_ELEMENTWISE_2(NAME)                                                                                  \
  template <typename T, int N>                                                                                         \
  METAL_FUNC vec<T, N> NAME(const vec<T, N>& a, metal_sim::Same<vec<T, N>> b) {                                        \
    vec<T, N> result;                                                                                                  \
    for (int i = 0; i < N; ++i)                                                                                        \
      result[i] = NAME(a[i], b[i]);                                                                                    \
    return result;                                                                                                     \
  }
#define METAL_SIM_ELEMENTWISE_3(NAME)                                                                                  \
  template <typename T, int N>                                                                                         \
  METAL_FUNC vec<T, N> NAME(const vec<T, N>& a, metal_sim::Same<vec<T, N>> b, metal_sim::Same<vec<T, N>> c) {          \
    vec<T, N> result;                                                                                                  \
    for (int i = 0; i < N; ++i)                                                                                        \
      result[i] = NAME(a[i], b[i], c[i]);                                                                              \
    return result;                                                                                                     \
  }

// The C library's function on floats.
#ifdef METAL_SIM_CUDA
#define METAL_SIM_LIBM(NAME) ::NAME##f
#else
#define METAL_SIM_LIBM(NAME) __builtin_##NAME##f
#endif

// Mathematical functions: computed in float, rounded to the argument's type.
#define METAL_SIM_MATH_1(NAME, EXPRESSION)                                                                             \
  template <metal_sim::FloatScalar T>                                                                                  \
  METAL_FUNC T NAME(T value) {                                                                                         \
    const float x = float(value);                                                                                      \
    return T(EXPRESSION);                                                                                              \
  }                                                                                                                    \
  METAL_SIM_ELEMENTWISE_1(NAME)
#define METAL_SIM_MATH_2(NAME, EXPRESSION)                                                                             \
  template <metal_sim::FloatScalar T>                                                                                  \
  METAL_FUNC T NAME(T first, metal_sim::Same<T> second) {                                                              \
    const float x = float(first), y = float(second);                                                                   \
    return T(EXPRESSION);                                                                                              \
  }                                                                                                                    \
  METAL_SIM_ELEMENTWISE_2(NAME)
#define METAL_SIM_MATH_3(NAME, EXPRESSION)                                                                             \
  template <metal_sim::FloatScalar T>                                                                                  \
  METAL_FUNC T NAME(T first, metal_sim::Same<T> second, metal_sim::Same<T> third) {                                    \
    const float x = float(first), y = float(second), z = float(third);                                                 \
    return T(EXPRESSION);                                                                                              \
  }                                                                                                                    \
  METAL_SIM_ELEMENTWISE_3(NAME)

METAL_SIM_MATH_1(acos, METAL_SIM_LIBM(acos)(x))
METAL_SIM_MATH_1(acosh, METAL_SIM_LIBM(acosh)(x))
METAL_SIM_MATH_1(asin, METAL_SIM_LIBM(asin)(x))
METAL_SIM_MATH_1(asinh, METAL_SIM_LIBM(asinh)(x))
METAL_SIM_MATH_1(atan, METAL_SIM_LIBM(atan)(x))
METAL_SIM_MATH_1(atanh, METAL_SIM_LIBM(atanh)(x))
METAL_SIM_MATH_1(ceil, METAL_SIM_LIBM(ceil)(x))
METAL_SIM_MATH_1(cos, METAL_SIM_LIBM(cos)(x))
METAL_SIM_MATH_1(cosh, METAL_SIM_LIBM(cosh)(x))
METAL_SIM_MATH_1(cospi, METAL_SIM_LIBM(cos)(x* M_PI_F))
METAL_SIM_MATH_1(exp, METAL_SIM_LIBM(exp)(x))
METAL_SIM_MATH_1(exp2, METAL_SIM_LIBM(exp2)(x))
METAL_SIM_MATH_1(exp10, METAL_SIM_LIBM(pow)(10.0f, x))
METAL_SIM_MATH_1(fabs, METAL_SIM_LIBM(fabs)(x))
METAL_SIM_MATH_1(floor, METAL_SIM_LIBM(floor)(x))
METAL_SIM_MATH_1(fract, x - METAL_SIM_LIBM(floor)(x))
METAL_SIM_MATH_1(log, METAL_SIM_LIBM(log)(x))
METAL_SIM_MATH_1(log2, METAL_SIM_LIBM(log2)(x))
METAL_SIM_MATH_1(log10, METAL_SIM_LIBM(log10)(x))
METAL_SIM_MATH_1(rint, METAL_SIM_LIBM(rint)(x))
METAL_SIM_MATH_1(round, METAL_SIM_LIBM(round)(x))
METAL_SIM_MATH_1(rsqrt, 1.0f / METAL_SIM_LIBM(sqrt)(x))
METAL_SIM_MATH_1(saturate, x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f)
METAL_SIM_MATH_1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
METAL_SIM_MATH_1(sin, METAL_SIM_LIBM(sin)(x))
METAL_SIM_MATH_1(sinh, METAL_SIM_LIBM(sinh)(x))
METAL_SIM_MATH_1(sinpi, METAL_SIM_LIBM(sin)(x* M_PI_F))
METAL_SIM_MATH_1(sqrt, METAL_SIM_LIBM(sqrt)(x))
METAL_SIM_MATH_1(tan, METAL_SIM_LIBM(tan)(x))
METAL_SIM_MATH_1(tanh, METAL_SIM_LIBM(tanh)(x))
METAL_SIM_MATH_1(trunc, METAL_SIM_LIBM(trunc)(x))
METAL_SIM_MATH_2(atan2, METAL_SIM_LIBM(atan2)(x, y))
METAL_SIM_MATH_2(copysign, METAL_SIM_LIBM(copysign)(x, y))
METAL_SIM_MATH_2(fdim, x > y ? x - y : 0.0f)
METAL_SIM_MATH_2(fmax, METAL_SIM_LIBM(fmax)(x, y))
METAL_SIM_MATH_2(fmin, METAL_SIM_LIBM(fmin)(x, y))
METAL_SIM_MATH_2(fmod, METAL_SIM_LIBM(fmod)(x, y))
METAL_SIM_MATH_2(pow, METAL_SIM_LIBM(pow)(x, y))
METAL_SIM_MATH_2(powr, METAL_SIM_LIBM(pow)(x, y))
METAL_SIM_MATH_2(step, y < x ? 0.0f : 1.0f)
METAL_SIM_MATH_3(fma, METAL_SIM_LIBM(fma)(x, y, z))
METAL_SIM_MATH_3(mix, x + (y - x) * z)

// Relational.
#define METAL_SIM_RELATIONAL(NAME, EXPRESSION)                                                                         \
  template <metal_sim::FloatScalar T>                                                                                  \
  METAL_FUNC bool NAME(T value) {                                                                                      \
    const uint32_t word = as_type<uint32_t>(float(value)) & 0x7FFFFFFFu;                                               \
    return EXPRESSION;                                                                                                 \
  }                                                                                                                    \
  METAL_SIM_ELEMENTWISE_1(NAME)
METAL_SIM_RELATIONAL(isnan, word > 0x7F800000u)
METAL_SIM_RELATIONAL(isinf, word == 0x7F800000u)
METAL_SIM_RELATIONAL(isfinite, word < 0x7F800000u)
#undef METAL_SIM_RELATIONAL

template <metal_sim::FloatScalar T>
METAL_FUNC bool signbit(T value) {
  return as_type<uint32_t>(float(value)) >> 31 != 0;
}

/// b where the condition holds, else a.
template <metal_sim::Scalar T>
METAL_FUNC T select(T a, T b, bool condition) {
  return condition ? b : a;
}
template <typename T, int N>
METAL_FUNC vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& condition) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i)
    result[i] = condition[i] ? b[i] : a[i];
  return result;
}
template <typename T, int N>
METAL_FUNC vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, bool condition) {
  return condition ? b : a;
}

template <typename T, int N>
METAL_FUNC bool any(const vec<T, N>& a) {
  bool result = false;
  for (int i = 0; i < N; ++i)
    result |= bool(a[i]);
  return result;
}
template <typename T, int N>
METAL_FUNC bool all(const vec<T, N>& a) {
  bool result = true;
  for (int i = 0; i < N; ++i)
    result &= bool(a[i]);
  return result;
}

// Common and integer.
template <metal_sim::Scalar T>
METAL_FUNC constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <metal_sim::Scalar T>
METAL_FUNC constexpr T max(T a, T b) {
  return a < b ? b : a;
}
template <metal_sim::Scalar T>
METAL_FUNC constexpr T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
template <metal_sim::Scalar T>
METAL_FUNC constexpr T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <metal_sim::Scalar T>
METAL_FUNC constexpr T clamp(T value, T low, T high) {
  return min(max(value, low), high);
}
template <metal_sim::Scalar T>
METAL_FUNC constexpr T abs(T a) {
  return a < T(0) ? T(-a) : a == T(0) ? T(0) : a;
}
template <metal_sim::Scalar T>
METAL_FUNC T mad(T a, T b, T c) {
  return T(a * b + c);
}
METAL_SIM_ELEMENTWISE_2(min)
METAL_SIM_ELEMENTWISE_2(max)
METAL_SIM_ELEMENTWISE_3(min3)
METAL_SIM_ELEMENTWISE_3(max3)
METAL_SIM_ELEMENTWISE_3(clamp)
METAL_SIM_ELEMENTWISE_1(abs)
METAL_SIM_ELEMENTWISE_3(mad)

#ifdef METAL_SIM_CUDA
#define METAL_SIM_POPCOUNT __popcll
#define METAL_SIM_COUNT_LEADING_ZEROS __clzll
#define METAL_SIM_COUNT_TRAILING_ZEROS(WORD) (__ffsll(WORD) - 1)
#else
#define METAL_SIM_POPCOUNT __builtin_popcountll
#define METAL_SIM_COUNT_LEADING_ZEROS __builtin_clzll
#define METAL_SIM_COUNT_TRAILING_ZEROS(WORD) __builtin_ctzll(WORD)
#endif
template <metal_sim::IntegerScalar T>
METAL_FUNC T popcount(T a) {
  return T(METAL_SIM_POPCOUNT(static_cast<unsigned long long>(a) & (~0ull >> (64 - 8 * sizeof(T)))));
}
template <metal_sim::IntegerScalar T>
METAL_FUNC T clz(T a) {
  const unsigned long long word = static_cast<unsigned long long>(a) & (~0ull >> (64 - 8 * sizeof(T)));
  return T(word == 0 ? 8 * int(sizeof(T)) : METAL_SIM_COUNT_LEADING_ZEROS(word) - 8 * int(8 - sizeof(T)));
}
template <metal_sim::IntegerScalar T>
METAL_FUNC T ctz(T a) {
  return T(a == 0 ? 8 * int(sizeof(T)) : METAL_SIM_COUNT_TRAILING_ZEROS(static_cast<unsigned long long>(a)));
}
template <metal_sim::IntegerScalar T>
METAL_FUNC T rotate(T value, metal_sim::Same<T> places) {
  using Word = decltype(T(0) + 0ull);
  constexpr Word bits = 8 * sizeof(T), mask = ~Word(0) >> (64 - bits);
  const Word word = Word(value) & mask, left = Word(places) % bits;
  return T((word << left | word >> ((bits - left) % bits)) & mask);
}
template <metal_sim::IntegerScalar T>
METAL_FUNC T reverse_bits(T value) {
  T result = 0;
  for (int i = 0; i < 8 * int(sizeof(T)); ++i)
    result = T(result << 1 | ((value >> i) & 1));
  return result;
}
template <metal_sim::IntegerScalar T>
METAL_FUNC T extract_bits(T value, uint offset, uint bits) {
  if (bits == 0)
    return 0;
  const uint drop = 64 - bits;
  if constexpr (numeric_limits<T>::is_signed)
    return T((long(value) << (drop - offset)) >> drop);
  else
    return T((ulong(value) << (drop - offset)) >> drop);
}
template <metal_sim::IntegerScalar T>
METAL_FUNC T insert_bits(T base, T insert, uint offset, uint bits) {
  const ulong mask = bits == 0 ? 0 : (~0ul >> (64 - bits)) << offset;
  return T((ulong(base) & ~mask) | ((ulong(insert) << offset) & mask));
}
/// Upper half of the product.
template <metal_sim::IntegerScalar T>
METAL_FUNC T mulhi(T a, T b) {
  using Wide = conditional_t<numeric_limits<T>::is_signed, __int128, unsigned __int128>;
  return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
}
template <metal_sim::IntegerScalar T>
METAL_FUNC T addsat(T a, T b) {
  if (b < T(0))
    return a < T(numeric_limits<T>::min() - b) ? numeric_limits<T>::min() : T(a + b);
  return a > T(numeric_limits<T>::max() - b) ? numeric_limits<T>::max() : T(a + b);
}
template <metal_sim::IntegerScalar T>
METAL_FUNC T subsat(T a, T b) {
  if (b < T(0))
    return a > T(numeric_limits<T>::max() + b) ? numeric_limits<T>::max() : T(a - b);
  return a < T(numeric_limits<T>::min() + b) ? numeric_limits<T>::min() : T(a - b);
}
#undef METAL_SIM_POPCOUNT
#undef METAL_SIM_COUNT_LEADING_ZEROS
#undef METAL_SIM_COUNT_TRAILING_ZEROS
METAL_SIM_ELEMENTWISE_1(popcount)
METAL_SIM_ELEMENTWISE_1(clz)
METAL_SIM_ELEMENTWISE_1(ctz)

// Geometric.
template <typename T, int N>
METAL_FUNC T dot(const vec<T, N>& a, metal_sim::Same<vec<T, N>> b) {
  T result = T(a[0] * b[0]);
  for (int i = 1; i < N; ++i)
    result = T(result + a[i] * b[i]);
  return result;
}
template <typename T, int N>
METAL_FUNC T length_squared(const vec<T, N>& a) {
  return dot(a, a);
}
template <typename T, int N>
METAL_FUNC T length(const vec<T, N>& a) {
  return sqrt(dot(a, a));
}

#undef METAL_SIM_LIBM
#undef METAL_SIM_MATH_1
#undef METAL_SIM_MATH_2
#undef METAL_SIM_MATH_3
#undef METAL_SIM_ELEMENTWISE_1
#undef METAL_SIM_ELEMENTWISE_2
#undef METAL_SIM_ELEMENTWISE_3

// An engine has one precision for each function.
namespace precise = ::metal;
namespace fast = ::metal;

} // namespace metal
