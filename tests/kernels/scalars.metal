// Scalar types and functions. Each kernel runs as one thread and writes its results one after another.
#include <metal_stdlib>
using namespace metal;

template <typename T>
[[kernel]] void math(device const T* in [[buffer(0)]], device float* out [[buffer(1)]],
                     constant uint& count [[buffer(2)]]) {
  for (uint i = 0; i < count; ++i) {
    const T x = in[i];
    device float* to = out + 20 * i;
    to[0] = float(exp(x));
    to[1] = float(exp2(x));
    to[2] = float(log(abs(x) + T(1)));
    to[3] = float(log2(abs(x) + T(1)));
    to[4] = float(sqrt(abs(x)));
    to[5] = float(rsqrt(abs(x) + T(1)));
    to[6] = float(tanh(x));
    to[7] = float(precise::exp(x));
    to[8] = float(fast::exp(x));
    to[9] = float(floor(x));
    to[10] = float(ceil(x));
    to[11] = float(round(x));
    to[12] = float(rint(x));
    to[13] = float(trunc(x));
    to[14] = float(fma(x, T(2), T(1)));
    to[15] = float(clamp(x, T(-1), T(1)));
    to[16] = float(min(x, T(0.5f)));
    to[17] = float(max(x, T(0.5f)));
    to[18] = float(sin(x));
    to[19] = float(select(x, T(7), x < T(0)));
  }
}

#define MATH(name, T) template [[host_name("math_" #name)]] [[kernel]] decltype(math<T>) math<T>;
MATH(fp32, float)
MATH(fp16, half)
MATH(bf16, bfloat)

/// Bits of each float rounded to the 16-bit types, and back.
kernel void conversions(device const float* in [[buffer(0)]], device ushort* halves [[buffer(1)]],
                        device ushort* bfloats [[buffer(2)]], device float* back [[buffer(3)]],
                        constant uint& count [[buffer(4)]]) {
  for (uint i = 0; i < count; ++i) {
    halves[i] = as_type<ushort>(half(in[i]));
    bfloats[i] = as_type<ushort>(bfloat(in[i]));
    back[2 * i] = float(as_type<half>(halves[i]));
    back[2 * i + 1] = as_type<bfloat>(bfloats[i]);
  }
}

/// The same through the loops that the native engine's kernels use.
template <typename T, uint N>
[[kernel]] void array_conversions(device const float* in [[buffer(0)]], device T* narrowed [[buffer(1)]],
                                  device float* widened [[buffer(2)]]) {
#ifdef METAL_SIM_NATIVE
  metal_sim::narrow<N>(in, narrowed);
  metal_sim::widen<N>(narrowed, widened);
#else
  for (uint i = 0; i < N; ++i) {
    narrowed[i] = T(in[i]);
    widened[i] = float(narrowed[i]);
  }
#endif
}

#define ARRAYS(name, T)                                                                                                \
  template [[host_name(                                                                                                \
      "array_conversions_" #name)]] [[kernel]] decltype(array_conversions<T, 61>) array_conversions<T, 61>;
ARRAYS(fp32, float)
ARRAYS(fp16, half)
ARRAYS(bf16, bfloat)

constant constexpr float TABLE[3] = {1.5f, 2.5f, 3.5f};
constant half HALF_LITERAL = 1.0h;

kernel void arithmetic(device float* out [[buffer(0)]]) {
  uint n = 0;
  const half h = 0.1f;
  const bfloat b = bfloat(0.1f);
  out[n++] = h;
  out[n++] = b;
  const half square = h * h;
  out[n++] = square;
  out[n++] = b * b;    // rounded to bfloat
  out[n++] = b * 0.1f; // a float
  out[n++] = 2 * b - b / 4;
  out[n++] = -b;
  bfloat sum = bfloat(0.0f);
  sum += 1.0bf;
  sum += b;
  sum *= 3;
  out[n++] = sum;
  out[n++] = b < 0.2f && b == b && h > 0.05h ? 1.0f : 0.0f;
  out[n++] = TABLE[1] + float(HALF_LITERAL) + .5h + 2e1h + 1.25bf;
  out[n++] = isnan(NAN) && isnan(half(NAN)) && isnan(bfloat(NAN)) && !isnan(INFINITY) ? 1.0f : 0.0f;
  out[n++] = isinf(INFINITY) && isinf(half(70000.0f)) && !isinf(half(65504.0f)) && isfinite(1.0f) ? 1.0f : 0.0f;
  out[n++] = numeric_limits<half>::max();
  out[n++] = numeric_limits<bfloat>::lowest();
  out[n++] = numeric_limits<float>::infinity();
  out[n++] = float(numeric_limits<short>::min());
}

kernel void integers(device const uint* in [[buffer(0)]], device uint* out [[buffer(1)]]) {
  uint n = 0;
  const uint x = in[0];
  const int y = int(in[1]);
  out[n++] = popcount(x);
  out[n++] = clz(x);
  out[n++] = ctz(x);
  out[n++] = clz(ushort(x));
  out[n++] = popcount(uchar(0xFF));
  out[n++] = uint(abs(y));
  out[n++] = uint(min(y, -3));
  out[n++] = max(x, 5u);
  out[n++] = uint(clamp(y, -2, 2));
  out[n++] = rotate(x, 8u);
  out[n++] = reverse_bits(x);
  out[n++] = extract_bits(x, 4u, 8u);
  out[n++] = uint(extract_bits(int(x), 4u, 8u));
  out[n++] = insert_bits(0u, 0xFFu, 4u, 8u);
  out[n++] = mulhi(x, 0x10000u);
  out[n++] = addsat(x, 0xFFFFFFFFu);
  out[n++] = subsat(1u, x);
  out[n++] = uint(mad(y, 2, 1));
  out[n++] = clz(0u);
  out[n++] = ctz(0u);
  out[n++] = uint(ulong(x) * 4096ul >> 20);
}
