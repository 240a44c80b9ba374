// vec<T, 2..4> and the packed vectors: members x, y, z, w, indexing, elementwise operators, and swizzles that the
// translator turns from `v.xyz` into `v.swizzle<0, 1, 2>()`.
#pragma once

#include "scalar.h"

namespace metal {

template <typename T, int N>
struct vec;

} // namespace metal

namespace metal_sim {

/// Members of a vector of N elements; Alignment is that of the whole vector (of one element where packed).
template <typename T, int N, size_t Alignment>
struct alignas(Alignment) Elements;
template <typename T, size_t Alignment>
struct alignas(Alignment) Elements<T, 2, Alignment> {
  T x, y;
};
template <typename T, size_t Alignment>
struct alignas(Alignment) Elements<T, 3, Alignment> {
  T x, y, z;
};
template <typename T, size_t Alignment>
struct alignas(Alignment) Elements<T, 4, Alignment> {
  T x, y, z, w;
};

} // namespace metal_sim

namespace metal {

/// Vector whose size and alignment are those of a power of two elements: a vec<T, 3> occupies four.
template <typename T, int N>
struct vec : metal_sim::Elements<T, N, sizeof(T) * (N == 3 ? 4 : N)> {
  static_assert(N >= 2 && N <= 4, "vec: 2 to 4 elements");

  vec() = default;
  template <metal_sim::Scalar U>
  METAL_FUNC vec(U value) {
    for (int i = 0; i < N; ++i)
      (*this)[i] = T(value);
  }
  template <typename U>
  METAL_FUNC explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; ++i)
      (*this)[i] = T(other[i]);
  }
  /// From scalars and shorter vectors, N elements in all.
  template <typename A, typename B, typename... More>
  METAL_FUNC vec(const A& a, const B& b, const More&... more) {
    static_assert(count<A>() + count<B>() + (0 + ... + count<More>()) == N, "vec: wrong number of elements");
    int place = 0;
    put(place, a);
    put(place, b);
    (put(place, more), ...);
  }

  METAL_FUNC T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }
  METAL_FUNC const T& operator[](int i) const { return reinterpret_cast<const T*>(this)[i]; }

  template <int... Places>
  METAL_FUNC const vec<T, int(sizeof...(Places))> swizzle() const {
    return vec<T, int(sizeof...(Places))>((*this)[Places]...);
  }

private:
  template <typename A>
  static constexpr int count() {
    if constexpr (metal_sim::Scalar<A>)
      return 1;
    else
      return A::SIZE;
  }
  template <typename A>
  METAL_FUNC void put(int& place, const A& a) {
    if constexpr (metal_sim::Scalar<A>) {
      (*this)[place++] = T(a);
    } else {
      for (int i = 0; i < A::SIZE; ++i)
        (*this)[place++] = a[i];
    }
  }

public:
  static constexpr int SIZE = N;
};

/// Vector without padding, aligned as one element.
template <typename T, int N>
struct packed_vec : metal_sim::Elements<T, N, sizeof(T)> {
  packed_vec() = default;
  METAL_FUNC packed_vec(const vec<T, N>& other) {
    for (int i = 0; i < N; ++i)
      (*this)[i] = other[i];
  }
  METAL_FUNC operator vec<T, N>() const {
    vec<T, N> result;
    for (int i = 0; i < N; ++i)
      result[i] = (*this)[i];
    return result;
  }
  METAL_FUNC T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }
  METAL_FUNC const T& operator[](int i) const { return reinterpret_cast<const T*>(this)[i]; }
};

} // namespace metal

namespace metal_sim {

/// Not deduced from: lets a scalar operand convert to the element type of the vector beside it.
template <typename T>
struct Identity {
  using type = T;
};
template <typename T>
using Same = typename Identity<T>::type;

} // namespace metal_sim

namespace metal {

#define METAL_SIM_VECTOR_BINARY(OP, RESULT)                                                                            \
  template <typename T, int N>                                                                                         \
  METAL_FUNC vec<RESULT, N> operator OP(const vec<T, N>& a, const vec<T, N>& b) {                                      \
    vec<RESULT, N> result;                                                                                             \
    for (int i = 0; i < N; ++i)                                                                                        \
      result[i] = RESULT(a[i] OP b[i]);                                                                                \
    return result;                                                                                                     \
  }                                                                                                                    \
  template <typename T, int N, metal_sim::Scalar U>                                                                    \
  METAL_FUNC vec<RESULT, N> operator OP(const vec<T, N>& a, U b) {                                                     \
    return a OP vec<T, N>(b);                                                                                          \
  }                                                                                                                    \
  template <typename T, int N, metal_sim::Scalar U>                                                                    \
  METAL_FUNC vec<RESULT, N> operator OP(U a, const vec<T, N>& b) {                                                     \
    return vec<T, N>(a) OP b;                                                                                          \
  }
#define METAL_SIM_VECTOR_ARITHMETIC(OP)                                                                                \
  METAL_SIM_VECTOR_BINARY(OP, T)                                                                                       \
  template <typename T, int N>                                                                                         \
  METAL_FUNC vec<T, N>& operator OP## = (vec<T, N> & a, const vec<T, N>& b) {                                          \
    return a = a OP b;                                                                                                 \
  }                                                                                                                    \
  template <typename T, int N, metal_sim::Scalar U>                                                                    \
  METAL_FUNC vec<T, N>& operator OP## = (vec<T, N> & a, U b) {                                                         \
    return a = a OP vec<T, N>(b);                                                                                      \
  }
METAL_SIM_VECTOR_ARITHMETIC(+)
METAL_SIM_VECTOR_ARITHMETIC(-)
METAL_SIM_VECTOR_ARITHMETIC(*)
METAL_SIM_VECTOR_ARITHMETIC(/)
METAL_SIM_VECTOR_ARITHMETIC(%)
METAL_SIM_VECTOR_ARITHMETIC(&)
METAL_SIM_VECTOR_ARITHMETIC(|)
METAL_SIM_VECTOR_ARITHMETIC(^)
METAL_SIM_VECTOR_ARITHMETIC(<<)
METAL_SIM_VECTOR_ARITHMETIC(>>)
METAL_SIM_VECTOR_BINARY(==, bool)
METAL_SIM_VECTOR_BINARY(!=, bool)
METAL_SIM_VECTOR_BINARY(<, bool)
METAL_SIM_VECTOR_BINARY(<=, bool)
METAL_SIM_VECTOR_BINARY(>, bool)
METAL_SIM_VECTOR_BINARY(>=, bool)
METAL_SIM_VECTOR_BINARY(&&, bool)
METAL_SIM_VECTOR_BINARY(||, bool)
#undef METAL_SIM_VECTOR_ARITHMETIC
#undef METAL_SIM_VECTOR_BINARY

#define METAL_SIM_VECTOR_UNARY(OP, RESULT)                                                                             \
  template <typename T, int N>                                                                                         \
  METAL_FUNC vec<RESULT, N> operator OP(const vec<T, N>& a) {                                                          \
    vec<RESULT, N> result;                                                                                             \
    for (int i = 0; i < N; ++i)                                                                                        \
      result[i] = RESULT(OP a[i]);                                                                                     \
    return result;                                                                                                     \
  }
METAL_SIM_VECTOR_UNARY(-, T)
METAL_SIM_VECTOR_UNARY(~, T)
METAL_SIM_VECTOR_UNARY(!, bool)
#undef METAL_SIM_VECTOR_UNARY

} // namespace metal

#ifdef METAL_SIM_CUDA
// NVRTC has structs of some of these names. Kernels are compiled in a namespace of their own, where keywords.h declares
// the names of MSL; the headers need but one.
namespace metal {
using ulong2 = vec<ulong, 2>;
}
#else
#include "vector_names.h"
#endif
