// 31 buffers, 31 threadgroup arguments, 128 textures, 16 samplers.
#include <metal_stdlib>
using namespace metal;

kernel void all(device uint* a [[buffer(30)]], threadgroup uint* b [[threadgroup(30)]],
                texture2d<float> c [[texture(127)]], array<texture2d<float>, 100> d [[texture(27)]],
                sampler e [[sampler(15)]], array<texture2d<float>, 7> f [[texture(8)]],
                texture2d<float> g [[texture(15)]], constant uint& h [[buffer(1)]]) {
  a[0] = b[0] + h;
  (void)c, (void)d, (void)e, (void)f, (void)g;
}
