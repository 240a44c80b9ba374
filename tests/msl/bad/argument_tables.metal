// 31 buffers, 31 threadgroup arguments, 128 textures, 16 samplers.
#include <metal_stdlib>
using namespace metal;

kernel void too_many(device uint* a [[buffer(31)]], // error: beyond Metal's table of 31 buffer arguments
                     threadgroup uint* b [[threadgroup(31)]], // error: table of 31 threadgroup arguments
                     texture2d<float> c [[texture(128)]], // error: table of 128 texture arguments
                     array<texture2d<float>, 100> d [[texture(29)]], // error: table of 128 texture arguments
                     sampler e [[sampler(16)]], // error: table of 16 sampler arguments
                     array<texture2d<float>, 8> f [[texture(8)]],
                     texture2d<float> g [[texture(15)]], // error: texture\(15\) is both 'f' and 'g'
                     device uint* h, // error: 'h' needs one attribute
                     uint i [[buffer(1)]], // error: must be a pointer or reference to device or constant
                     device uint* j [[threadgroup(1)]], // error: must be a pointer or reference to threadgroup
                     float3 k [[stage_in]]) { // error: not one of a kernel's inputs
  (void)f;
}
