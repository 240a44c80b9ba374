// Vectors: construction, members, swizzles, operators, functions, loads and stores. One thread.
#include <metal_stdlib>
using namespace metal;

struct Particle {
  packed_float3 position;
  float mass;
};

kernel void vectors(device const float4* in [[buffer(0)]], device float* out [[buffer(1)]],
                    device Particle* particles [[buffer(2)]], constant uint2& offset [[buffer(3)]]) {
  uint n = 0;
  const float4 a = in[0];
  float4 b = float4(a.xy, 5.0f, 6.0f);
  out[n++] = b.w + b[2];
  b += a * 2.0f;
  out[n++] = b.x;
  out[n++] = dot(a, b);
  const float3 c = float3(a.wzy);
  out[n++] = c.x;
  out[n++] = c.z;
  const float2 d = float2(1.0f) - a.zw;
  out[n++] = d.y;
  out[n++] = length(float2(3.0f, 4.0f));
  const half4 h = half4(a);
  out[n++] = float(h.z * h.w);
  const bool4 less = a < 2.5f;
  out[n++] = any(less) && !all(less) ? 1.0f : 0.0f;
  out[n++] = select(a, b, less).x;
  out[n++] = max(a, 2.5f).x;
  out[n++] = max(a, b).y;
  out[n++] = clamp(a, 2.0f, 3.0f).w;
  out[n++] = exp(a).x;
  const uint3 u = uint3(1, 2, 3) << 2u;
  out[n++] = float(u.z);
  const uchar4 bytes = as_type<uchar4>(0x04030201u);
  out[n++] = float(bytes.w);
  out[n++] = float(as_type<uint>(bytes));
  out[n++] = float(sizeof(float3)) + float(sizeof(packed_float3));
  out[n++] = fma(a, a, a).y;
  out[n++] = (-a).x;
  out[n++] = float((uint4(7u) & uint4(3u, 1u, 4u, 8u)).z);
  out[n++] = bfloat4(a).y;
  particles[1].position = packed_float3(a.xyz);
  particles[1].mass = float3(particles[1].position).y + float(offset.y);
}
