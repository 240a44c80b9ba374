// Kernels of a library have different names.
#include <metal_stdlib>
using namespace metal;

template <typename T>
[[kernel]] void fill(device T* out [[buffer(0)]]) {
  out[0] = T(0);
}
template [[host_name("fill_fp32")]] [[kernel]] decltype(fill<float>) fill<float>;
template [[host_name("fill_fp16")]] [[kernel]] decltype(fill<half>) fill<half>;
kernel void other(device float* out [[buffer(0)]]) { out[0] = 1.0f; }
[[host_name("another")]] kernel void renamed(device float* out [[buffer(0)]]) { out[0] = 2.0f; }
