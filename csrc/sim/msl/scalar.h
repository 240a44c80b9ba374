// Scalar types: the short names of the integers, half, bfloat, and what the functions of metal_stdlib need to know of
// types. Includes no library header with functions in the global namespace: a kernel that says `using namespace metal`
// would see them.
#pragma once

#if !defined(METAL_SIM_NATIVE) && !defined(METAL_SIM_EXACT) && !defined(METAL_SIM_CUDA)
#error "define METAL_SIM_NATIVE, METAL_SIM_EXACT or METAL_SIM_CUDA, and SIMD_WIDTH"
#endif

#ifdef METAL_SIM_CUDA
#include "cuda_integers.h"
#else
#include <stddef.h>
#include <stdint.h>
#endif

#define METAL_FUNC inline __attribute__((always_inline))

// For functions that touch the engine's memory or nothing but their own stack: no memory checks in the exact engine.
#ifdef METAL_SIM_EXACT
#define METAL_SIM_UNCHECKED __attribute__((no_sanitize("thread")))
#else
#define METAL_SIM_UNCHECKED
#endif

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

#ifndef METAL_SIM_CUDA
// g++ 12 for arm64 knows _Float16 in C only; __fp16 has the same bits and promotes to float.
#if defined(__aarch64__) && !defined(__clang__) && __GNUC__ < 13
using half = __fp16;
#else
using half = _Float16;
#endif
#endif

namespace metal {

/// Reinterprets the bits of a value as another type of the same size.
template <typename To, typename From>
METAL_FUNC constexpr To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, from);
}

} // namespace metal

using metal::as_type;

#ifdef METAL_SIM_CUDA
#include "cuda_half.h"
#endif

/// 16-bit brain floating point: the upper half of a float. Conversion rounds to nearest even and keeps NaN. On
/// processors written on integers without branches, so that loops that convert arrays vectorise at every level.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  METAL_FUNC constexpr bfloat(float value) : bits(round(value)) {}
  METAL_FUNC constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

  METAL_FUNC static constexpr uint16_t round(float value) {
#ifdef METAL_SIM_CUDA
    if (!__builtin_is_constant_evaluated()) {
      uint16_t rounded = 0;
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
      return rounded;
    }
#endif
    const auto word = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
    const uint32_t quiet = (word >> 16) | 0x40u;
    return uint16_t((word & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
  }
};

namespace metal {

template <bool Condition, typename Then, typename Else>
struct conditional {
  using type = Then;
};
template <typename Then, typename Else>
struct conditional<false, Then, Else> {
  using type = Else;
};
template <bool Condition, typename Then, typename Else>
using conditional_t = typename conditional<Condition, Then, Else>::type;

template <bool Condition, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool Condition, typename T = void>
using enable_if_t = typename enable_if<Condition, T>::type;

template <typename T>
struct remove_cv {
  using type = T;
};
template <typename T>
struct remove_cv<const T> {
  using type = T;
};
template <typename T>
struct remove_cv<volatile T> {
  using type = T;
};
template <typename T>
struct remove_cv<const volatile T> {
  using type = T;
};
template <typename T>
using remove_cv_t = typename remove_cv<T>::type;

template <typename A, typename B>
inline constexpr bool is_same_v = false;
template <typename A>
inline constexpr bool is_same_v<A, A> = true;
template <typename A, typename B>
struct is_same {
  static constexpr bool value = is_same_v<A, B>;
};

template <typename T>
inline constexpr bool is_floating_point_v =
    is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> || is_same_v<remove_cv_t<T>, bfloat>;
template <typename T>
struct is_floating_point {
  static constexpr bool value = is_floating_point_v<T>;
};

template <typename T, typename... Others>
inline constexpr bool is_one_of_v = (is_same_v<T, Others> || ...);

template <typename T>
inline constexpr bool is_integral_v = is_one_of_v<remove_cv_t<T>, bool, char, signed char, uchar, short, ushort, int,
                                                  uint, long, ulong, long long, unsigned long long>;
template <typename T>
struct is_integral {
  static constexpr bool value = is_integral_v<T>;
};

template <typename T>
inline constexpr bool is_arithmetic_v = is_floating_point_v<T> || is_integral_v<T>;

} // namespace metal

namespace metal_sim {

template <typename T>
concept FloatScalar = metal::is_floating_point_v<T>;
template <typename T>
concept IntegerScalar = metal::is_integral_v<T>;
template <typename T>
concept Scalar = FloatScalar<T> || IntegerScalar<T>;

/// Result of arithmetic between F (bfloat, half) and another type.
template <typename F, typename T>
using WithSmallFloat = metal::conditional_t<metal::is_integral_v<T>, F, float>;

} // namespace metal_sim

// Arithmetic of two bfloats is rounded to bfloat, as on a GPU; with a float it is a float. Both directions with another
// type are spelled out because the two implicit conversions would be equally good otherwise. Where half is a class as
// well, its operators leave those with bfloat to bfloat's.
#define METAL_SIM_SMALL_FLOAT_OPERATOR(F, OTHER, OP)                                                                   \
  METAL_FUNC constexpr F operator OP(F a, F b) { return F(float(a) OP float(b)); }                                     \
  template <metal_sim::Scalar T>                                                                                       \
    requires(!metal::is_same_v<T, F> && !metal::is_same_v<T, OTHER>)                                                   \
  METAL_FUNC constexpr metal_sim::WithSmallFloat<F, T> operator OP(F a, T b) {                                         \
    return metal_sim::WithSmallFloat<F, T>(float(a) OP float(b));                                                      \
  }                                                                                                                    \
  template <metal_sim::Scalar T>                                                                                       \
    requires(!metal::is_same_v<T, F> && !metal::is_same_v<T, OTHER>)                                                   \
  METAL_FUNC constexpr metal_sim::WithSmallFloat<F, T> operator OP(T a, F b) {                                         \
    return metal_sim::WithSmallFloat<F, T>(float(a) OP float(b));                                                      \
  }                                                                                                                    \
  template <metal_sim::Scalar T>                                                                                       \
  METAL_FUNC constexpr F& operator OP## = (F & a, T b) {                                                               \
    return a = F(float(a) OP float(b));                                                                                \
  }
METAL_SIM_SMALL_FLOAT_OPERATOR(bfloat, bfloat, +)
METAL_SIM_SMALL_FLOAT_OPERATOR(bfloat, bfloat, -)
METAL_SIM_SMALL_FLOAT_OPERATOR(bfloat, bfloat, *)
METAL_SIM_SMALL_FLOAT_OPERATOR(bfloat, bfloat, /)
#ifdef METAL_SIM_CUDA
METAL_SIM_SMALL_FLOAT_OPERATOR(half, bfloat, +)
METAL_SIM_SMALL_FLOAT_OPERATOR(half, bfloat, -)
METAL_SIM_SMALL_FLOAT_OPERATOR(half, bfloat, *)
METAL_SIM_SMALL_FLOAT_OPERATOR(half, bfloat, /)
#endif
#undef METAL_SIM_SMALL_FLOAT_OPERATOR

METAL_FUNC constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }

#define MAXFLOAT 3.40282347e+38f
#undef INFINITY
#undef NAN
#ifdef METAL_SIM_CUDA
#define INFINITY __builtin_bit_cast(float, 0x7F800000u)
#define NAN __builtin_bit_cast(float, 0x7FC00000u)
#else
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#endif
#define HUGE_VALF INFINITY
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.19209290e-07f
#define HALF_MAX half(65504.0f)
#define HALF_MIN half(6.103515625e-05f)
#define HALF_EPSILON half(9.765625e-04f)
#define M_E_F 2.71828182845904523536028747135266250f
#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_PI_F 3.14159265358979323846264338327950288f
#define M_2_SQRTPI_F 1.12837916709551257389615890312154517f
#define M_SQRT2_F 1.41421356237309504880168872420969808f
#define M_SQRT1_2_F 0.707106781186547524400844362104849039f
#undef INT_MAX
#undef UINT_MAX
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u

namespace metal {

template <typename T>
struct numeric_limits;

#define METAL_SIM_INTEGER_LIMITS(T)                                                                                    \
  template <>                                                                                                          \
  struct numeric_limits<T> {                                                                                           \
    static constexpr bool is_signed = T(-1) < T(0);                                                                    \
    static constexpr int digits = int(sizeof(T) * 8) - int(is_signed);                                                 \
    static constexpr T max() { return T(~0ull >> (64 - digits)); }                                                     \
    static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }                                              \
    static constexpr T lowest() { return min(); }                                                                      \
  };
METAL_SIM_INTEGER_LIMITS(char)
METAL_SIM_INTEGER_LIMITS(int8_t)
METAL_SIM_INTEGER_LIMITS(uchar)
METAL_SIM_INTEGER_LIMITS(short)
METAL_SIM_INTEGER_LIMITS(ushort)
METAL_SIM_INTEGER_LIMITS(int)
METAL_SIM_INTEGER_LIMITS(uint)
METAL_SIM_INTEGER_LIMITS(long)
METAL_SIM_INTEGER_LIMITS(ulong)
#undef METAL_SIM_INTEGER_LIMITS

#define METAL_SIM_FLOAT_LIMITS(T, WORD, MAX, MIN, EPSILON, INF, QUIET)                                                 \
  template <>                                                                                                          \
  struct numeric_limits<T> {                                                                                           \
    static constexpr bool is_signed = true;                                                                            \
    static constexpr T max() { return as_type<T>(WORD(MAX)); }                                                         \
    static constexpr T min() { return as_type<T>(WORD(MIN)); }                                                         \
    static constexpr T lowest() { return as_type<T>(WORD(MAX | (1u << (sizeof(WORD) * 8 - 1)))); }                     \
    static constexpr T epsilon() { return as_type<T>(WORD(EPSILON)); }                                                 \
    static constexpr T infinity() { return as_type<T>(WORD(INF)); }                                                    \
    static constexpr T quiet_NaN() { return as_type<T>(WORD(QUIET)); }                                                 \
  };
METAL_SIM_FLOAT_LIMITS(float, uint32_t, 0x7F7FFFFFu, 0x00800000u, 0x34000000u, 0x7F800000u, 0x7FC00000u)
METAL_SIM_FLOAT_LIMITS(half, uint16_t, 0x7BFFu, 0x0400u, 0x1400u, 0x7C00u, 0x7E00u)
METAL_SIM_FLOAT_LIMITS(bfloat, uint16_t, 0x7F7Fu, 0x0080u, 0x3C00u, 0x7F80u, 0x7FC0u)
#undef METAL_SIM_FLOAT_LIMITS

/// Fixed-size array with value semantics.
template <typename T, size_t N>
struct array {
  T elements[N];

  METAL_FUNC constexpr T& operator[](size_t i) { return elements[i]; }
  METAL_FUNC constexpr const T& operator[](size_t i) const { return elements[i]; }
  METAL_FUNC constexpr T* data() { return elements; }
  METAL_FUNC constexpr const T* data() const { return elements; }
  METAL_FUNC static constexpr size_t size() { return N; }
};

} // namespace metal
