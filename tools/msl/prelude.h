// The part of metal_stdlib that kernels use, as declarations for clang, in which an address space is part of a type as
// it is in Metal: a pointer into the wrong one is an error. Only types matter, nothing here is ever run. A function
// that a kernel is the first to use is added here, as Metal's specification declares it.
//
// Read in two languages (clang.py says why): C++14 with address-space attributes, in which a pointer without an address
// space is one to `thread` memory, and C++ for OpenCL, in which it is generic and can be told from `thread`.
#pragma once
#pragma clang system_header

#ifdef __OPENCL_CPP_VERSION__
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
// Words of OpenCL that are plain names, or something else, in Metal.
#define global metal_global
#define local metal_local
#define generic metal_generic
#define pipe metal_pipe
#define atomic_int metal_atomic_int
#define atomic_uint metal_atomic_uint
#define atomic_float metal_atomic_float
#else
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#define thread
typedef _Float16 half;
#endif
#define METAL_FUNC inline

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
template <typename T>
struct typing_elements {
  static constexpr constant int count = 1;
};
template <typename T, int N>
struct typing_elements<vec<T, N>> {
  static constexpr constant int count = N;
};
constexpr int typing_sum() { return 0; }
template <typename... C>
constexpr int typing_sum(int first, C... rest) {
  return first + typing_sum(rest...);
}
template <typename T, int N>
struct typing_vector {
  static vec<T, N> of();
  static vec<T, N> of(T);
  template <typename U>
  static vec<T, N> of(vec<U, N>);
  /// Scalars and shorter vectors, one after another.
  template <typename A, typename B, typename... E>
  static vec<T, N> of(A, B, E...) {
    static_assert(typing_sum(typing_elements<A>::count, typing_elements<B>::count, typing_elements<E>::count...) == N,
                  "one value per element");
    return {};
  }
};
#define TYPING_VECTOR_NAMES(T)                                                                                         \
  using T##2 = vec<T, 2>;                                                                                              \
  using T##3 = vec<T, 3>;                                                                                              \
  using T##4 = vec<T, 4>;                                                                                              \
  using packed_##T##2 = vec<T, 2>;                                                                                     \
  using packed_##T##3 = vec<T, 3>;                                                                                     \
  using packed_##T##4 = vec<T, 4>;
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
// What clang compares vectors of 32-bit elements to.
using bool2 = vec<int, 2>;
using bool3 = vec<int, 3>;
using bool4 = vec<int, 4>;

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

template <typename T>
struct numeric_limits {
  static constexpr T max();
  static constexpr T min();
  static constexpr T lowest();
  static constexpr T infinity();
  static constexpr T quiet_NaN();
};

// Metal's library knows no bfloat: it works on the float that a bfloat turns into.
template <typename T>
using typing_result = conditional_t<is_same<T, bfloat>::value, float, T>;

// Operands of one type, as in Metal, where other mixtures are ambiguous; a scalar becomes a vector.
template <typename T>
typing_result<T> min(T, T);
template <typename T>
typing_result<T> max(T, T);
template <typename T>
typing_result<T> clamp(T, T, T);
template <typename T>
typing_result<T> abs(T);
template <typename T>
typing_result<T> select(T, T, bool);
template <typename T, int N>
vec<T, N> min(vec<T, N>, T);
template <typename T, int N>
vec<T, N> max(vec<T, N>, T);
template <typename T, int N>
vec<T, N> clamp(vec<T, N>, T, T);
template <typename T, int N>
vec<T, N> select(vec<T, N>, vec<T, N>, vec<int, N>);
template <int N>
bool any(vec<int, N>);
template <int N>
bool all(vec<int, N>);
template <typename T>
T popcount(T);
template <typename T>
T rotate(T, T);
template <typename T>
T extract_bits(T, uint offset, uint bits);
template <typename T>
T insert_bits(T, T, uint offset, uint bits);
template <typename T>
T addsat(T, T);
template <typename T>
T subsat(T, T);
template <typename T>
T mad(T, T, T);
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
  T sin(T);                                                                                                            \
  T cos(T);                                                                                                            \
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
float length(float2);
float length(float3);
float length(float4);
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
// Not of bfloat, which Metal's simdgroup functions do not take.
#define TYPING_SIMD(NAME, ...)                                                                                         \
  template <typename T>                                                                                                \
  T NAME(T __VA_ARGS__);                                                                                               \
  bfloat NAME(bfloat __VA_ARGS__) = delete;
TYPING_SIMD(simd_sum)
TYPING_SIMD(simd_product)
TYPING_SIMD(simd_min)
TYPING_SIMD(simd_max)
TYPING_SIMD(simd_and)
TYPING_SIMD(simd_or)
TYPING_SIMD(simd_xor)
TYPING_SIMD(simd_prefix_inclusive_sum)
TYPING_SIMD(simd_prefix_exclusive_sum)
TYPING_SIMD(simd_broadcast, , ushort)
TYPING_SIMD(simd_broadcast_first)
TYPING_SIMD(simd_shuffle, , ushort)
TYPING_SIMD(simd_shuffle_xor, , ushort)
TYPING_SIMD(simd_shuffle_up, , ushort)
TYPING_SIMD(simd_shuffle_down, , ushort)
TYPING_SIMD(simd_shuffle_rotate_up, , ushort)
TYPING_SIMD(simd_shuffle_rotate_down, , ushort)
#undef TYPING_SIMD
template <typename T>
T simd_shuffle_and_fill_up(T, T, ushort);
bfloat simd_shuffle_and_fill_up(bfloat, bfloat, ushort) = delete;
template <typename T>
T simd_shuffle_and_fill_down(T, T, ushort);
bfloat simd_shuffle_and_fill_down(bfloat, bfloat, ushort) = delete;

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
  T atomic_fetch_max_explicit(volatile SPACE atomic<T>*, T, memory_order);                                             \
  template <typename T>                                                                                                \
  T atomic_fetch_and_explicit(volatile SPACE atomic<T>*, T, memory_order);                                             \
  template <typename T>                                                                                                \
  T atomic_fetch_or_explicit(volatile SPACE atomic<T>*, T, memory_order);                                              \
  template <typename T>                                                                                                \
  T atomic_fetch_xor_explicit(volatile SPACE atomic<T>*, T, memory_order);                                             \
  template <typename T>                                                                                                \
  bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>*, thread T*, T, memory_order, memory_order);
TYPING_ATOMICS(device)
TYPING_ATOMICS(threadgroup)
#undef TYPING_ATOMICS

// Bound to kernels; no kernel uses them yet.
template <typename T>
struct texture2d {};
struct sampler {};
template <typename T, size_t N>
struct array {
  T elements[N];
};

/// Columns, rows. A lane of a simdgroup of 32 holds two elements of 8 x 8.
template <typename T, int C, int R>
struct simdgroup_matrix {
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal);
  thread vec<T, 2>& thread_elements() thread;
  thread const vec<T, 2>& thread_elements() thread const;

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

/// Whether a pipeline gives the function constant a value.
template <typename T>
bool is_function_constant_defined(constant T&);

// From here on: constructors of vectors.
#define bool2(...) (metal::typing_vector<int, 2>::of(__VA_ARGS__))
#define bool3(...) (metal::typing_vector<int, 3>::of(__VA_ARGS__))
#define bool4(...) (metal::typing_vector<int, 4>::of(__VA_ARGS__))
#define packed_float2(...) (metal::typing_vector<float, 2>::of(__VA_ARGS__))
#define packed_float3(...) (metal::typing_vector<float, 3>::of(__VA_ARGS__))
#define packed_float4(...) (metal::typing_vector<float, 4>::of(__VA_ARGS__))
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
