// The part of metal_stdlib that kernels use, as declarations for clang, in which an address space is part of a type as
// it is in Metal: a pointer into the wrong one is an error. `thread` is the default. Only types matter, nothing here is
// ever run. A function that a kernel is the first to use is added here.
#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define METAL_FUNC inline

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define M_PI_F 3.14159265358979323846f
#define UINT_MAX 0xFFFFFFFFu

// A vector can be read and written in every address space, so it is the compiler's own. Those take no list of elements
// in their constructor: a macro per name, which is replaced only before a parenthesis, calls a function that does.
namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
template <typename T, int N>
struct typing_vector {
  static vec<T, N> of();
  static vec<T, N> of(T);
  template <typename U>
  static vec<T, N> of(vec<U, N>);
  template <typename... E>
  static vec<T, N> of(T, T, E... rest) {
    static_assert(2 + sizeof...(E) == N, "one value per element");
    return {};
  }
};
#define TYPING_VECTOR_NAMES(T)                                                                                         \
  using T##2 = vec<T, 2>;                                                                                              \
  using T##3 = vec<T, 3>;                                                                                              \
  using T##4 = vec<T, 4>;
TYPING_VECTOR_NAMES(char)
TYPING_VECTOR_NAMES(uchar)
TYPING_VECTOR_NAMES(short)
TYPING_VECTOR_NAMES(ushort)
TYPING_VECTOR_NAMES(int)
TYPING_VECTOR_NAMES(uint)
TYPING_VECTOR_NAMES(long)
TYPING_VECTOR_NAMES(ulong)
TYPING_VECTOR_NAMES(half)
TYPING_VECTOR_NAMES(float)
TYPING_VECTOR_NAMES(bfloat)
#undef TYPING_VECTOR_NAMES

template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F>
struct conditional {
  using type = T;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;
template <typename T, typename U>
struct is_same {
  static constexpr constant bool value = false;
};
template <typename T>
struct is_same<T, T> {
  static constexpr constant bool value = true;
};
template <typename T, typename U>
constexpr constant bool is_same_v = is_same<T, U>::value;

// Both operands of one type, as in Metal, where other mixtures are ambiguous.
template <typename T>
T min(T, T);
template <typename T>
T max(T, T);
template <typename T>
T clamp(T, T, T);
template <typename T>
T abs(T);
template <typename T>
T select(T, T, bool);
template <typename T>
T popcount(T);
template <typename T>
T clz(T);
template <typename T>
T ctz(T);
template <typename T>
T reverse_bits(T);
template <typename T>
T mulhi(T, T);

#define TYPING_MATH_OF(T)                                                                                              \
  T exp(T);                                                                                                            \
  T exp2(T);                                                                                                           \
  T log(T);                                                                                                            \
  T log2(T);                                                                                                           \
  T sqrt(T);                                                                                                           \
  T rsqrt(T);                                                                                                          \
  T tanh(T);                                                                                                           \
  T fabs(T);                                                                                                           \
  T floor(T);                                                                                                          \
  T ceil(T);                                                                                                           \
  T round(T);                                                                                                          \
  T rint(T);                                                                                                           \
  T trunc(T);                                                                                                          \
  T fmin(T, T);                                                                                                        \
  T fmax(T, T);                                                                                                        \
  T pow(T, T);                                                                                                         \
  T fma(T, T, T);                                                                                                      \
  bool isnan(T);                                                                                                       \
  bool isinf(T);                                                                                                       \
  bool isfinite(T);
TYPING_MATH_OF(float)
TYPING_MATH_OF(half)
#define TYPING_MATH_VECTORS(T) TYPING_MATH_OF(T##2) TYPING_MATH_OF(T##3) TYPING_MATH_OF(T##4)
TYPING_MATH_VECTORS(float)
TYPING_MATH_VECTORS(half)
float dot(float2, float2);
float dot(float3, float3);
float dot(float4, float4);
half dot(half4, half4);
namespace precise {
TYPING_MATH_OF(float)
}
namespace fast {
TYPING_MATH_OF(float)
}
#undef TYPING_MATH_VECTORS
#undef TYPING_MATH_OF

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

class simd_vote {
public:
  typedef ulong vote_t;
  explicit simd_vote(vote_t = 0);
  explicit operator vote_t() const;
  bool all() const;
  bool any() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_all(bool);
bool simd_any(bool);
bool simd_is_first();
template <typename T>
T simd_sum(T);
template <typename T>
T simd_product(T);
template <typename T>
T simd_min(T);
template <typename T>
T simd_max(T);
template <typename T>
T simd_and(T);
template <typename T>
T simd_or(T);
template <typename T>
T simd_xor(T);
template <typename T>
T simd_prefix_inclusive_sum(T);
template <typename T>
T simd_prefix_exclusive_sum(T);
template <typename T>
T simd_broadcast(T, ushort);
template <typename T>
T simd_broadcast_first(T);
template <typename T>
T simd_shuffle(T, ushort);
template <typename T>
T simd_shuffle_xor(T, ushort);
template <typename T>
T simd_shuffle_up(T, ushort);
template <typename T>
T simd_shuffle_down(T, ushort);

enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  T value;
};
using atomic_uint = atomic<uint>;
using atomic_int = atomic<int>;
#define TYPING_ATOMICS(SPACE)                                                                                          \
  template <typename T>                                                                                                \
  T atomic_load_explicit(const volatile SPACE atomic<T>*, memory_order);                                               \
  template <typename T>                                                                                                \
  void atomic_store_explicit(volatile SPACE atomic<T>*, T, memory_order);                                              \
  template <typename T>                                                                                                \
  T atomic_exchange_explicit(volatile SPACE atomic<T>*, T, memory_order);                                              \
  template <typename T>                                                                                                \
  T atomic_fetch_add_explicit(volatile SPACE atomic<T>*, T, memory_order);                                             \
  template <typename T>                                                                                                \
  T atomic_fetch_sub_explicit(volatile SPACE atomic<T>*, T, memory_order);                                             \
  template <typename T>                                                                                                \
  T atomic_fetch_min_explicit(volatile SPACE atomic<T>*, T, memory_order);                                             \
  template <typename T>                                                                                                \
  T atomic_fetch_max_explicit(volatile SPACE atomic<T>*, T, memory_order);
TYPING_ATOMICS(device)
TYPING_ATOMICS(threadgroup)
#undef TYPING_ATOMICS

/// Columns, rows. A lane of a simdgroup of 32 holds two elements of 8 x 8.
template <typename T, int C, int R>
struct simdgroup_matrix {
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal);
  vec<T, 2>& thread_elements();
  const vec<T, 2>& thread_elements() const;

private:
  vec<T, 2> elements;
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;
template <typename T, int C, int R>
simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T);
template <typename T, int C, int R>
simdgroup_matrix<T, C, R> make_diagonal_simdgroup_matrix(T);
#define TYPING_MATRIX_MEMORY(SPACE)                                                                                    \
  template <typename T, int C, int R>                                                                                  \
  void simdgroup_load(thread simdgroup_matrix<T, C, R>&, const SPACE T*, ulong elements_per_row = C,                   \
                      ulong2 matrix_origin = 0, bool transpose_matrix = false);                                        \
  template <typename T, int C, int R>                                                                                  \
  void simdgroup_store(simdgroup_matrix<T, C, R>, SPACE T*, ulong elements_per_row = C, ulong2 matrix_origin = 0,      \
                       bool transpose_matrix = false);
TYPING_MATRIX_MEMORY(device)
TYPING_MATRIX_MEMORY(threadgroup)
#undef TYPING_MATRIX_MEMORY
template <typename D, typename A, typename B, int C, int K, int R>
void simdgroup_multiply(thread simdgroup_matrix<D, C, R>&, simdgroup_matrix<A, K, R>, simdgroup_matrix<B, C, K>);
template <typename D, typename A, typename B, typename S, int C, int K, int R>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, C, R>&, simdgroup_matrix<A, K, R>,
                                   simdgroup_matrix<B, C, K>, simdgroup_matrix<S, C, R>);

} // namespace metal

/// Another type's bits: both must have the same size.
template <typename T, typename U>
T as_type(U) {
  static_assert(sizeof(T) == sizeof(U), "as_type keeps the bits: sizes must be equal");
}

// From here on: constructors of vectors.
#define char2(...) (metal::typing_vector<char, 2>::of(__VA_ARGS__))
#define char3(...) (metal::typing_vector<char, 3>::of(__VA_ARGS__))
#define char4(...) (metal::typing_vector<char, 4>::of(__VA_ARGS__))
#define uchar2(...) (metal::typing_vector<uchar, 2>::of(__VA_ARGS__))
#define uchar3(...) (metal::typing_vector<uchar, 3>::of(__VA_ARGS__))
#define uchar4(...) (metal::typing_vector<uchar, 4>::of(__VA_ARGS__))
#define short2(...) (metal::typing_vector<short, 2>::of(__VA_ARGS__))
#define short3(...) (metal::typing_vector<short, 3>::of(__VA_ARGS__))
#define short4(...) (metal::typing_vector<short, 4>::of(__VA_ARGS__))
#define ushort2(...) (metal::typing_vector<ushort, 2>::of(__VA_ARGS__))
#define ushort3(...) (metal::typing_vector<ushort, 3>::of(__VA_ARGS__))
#define ushort4(...) (metal::typing_vector<ushort, 4>::of(__VA_ARGS__))
#define int2(...) (metal::typing_vector<int, 2>::of(__VA_ARGS__))
#define int3(...) (metal::typing_vector<int, 3>::of(__VA_ARGS__))
#define int4(...) (metal::typing_vector<int, 4>::of(__VA_ARGS__))
#define uint2(...) (metal::typing_vector<uint, 2>::of(__VA_ARGS__))
#define uint3(...) (metal::typing_vector<uint, 3>::of(__VA_ARGS__))
#define uint4(...) (metal::typing_vector<uint, 4>::of(__VA_ARGS__))
#define long2(...) (metal::typing_vector<long, 2>::of(__VA_ARGS__))
#define long3(...) (metal::typing_vector<long, 3>::of(__VA_ARGS__))
#define long4(...) (metal::typing_vector<long, 4>::of(__VA_ARGS__))
#define ulong2(...) (metal::typing_vector<ulong, 2>::of(__VA_ARGS__))
#define ulong3(...) (metal::typing_vector<ulong, 3>::of(__VA_ARGS__))
#define ulong4(...) (metal::typing_vector<ulong, 4>::of(__VA_ARGS__))
#define half2(...) (metal::typing_vector<half, 2>::of(__VA_ARGS__))
#define half3(...) (metal::typing_vector<half, 3>::of(__VA_ARGS__))
#define half4(...) (metal::typing_vector<half, 4>::of(__VA_ARGS__))
#define float2(...) (metal::typing_vector<float, 2>::of(__VA_ARGS__))
#define float3(...) (metal::typing_vector<float, 3>::of(__VA_ARGS__))
#define float4(...) (metal::typing_vector<float, 4>::of(__VA_ARGS__))
#define bfloat2(...) (metal::typing_vector<bfloat, 2>::of(__VA_ARGS__))
#define bfloat3(...) (metal::typing_vector<bfloat, 3>::of(__VA_ARGS__))
#define bfloat4(...) (metal::typing_vector<bfloat, 4>::of(__VA_ARGS__))
