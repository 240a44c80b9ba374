// No lambdas: Metal has them from 3.2 on, and 3.1 is what is built for.
#include <metal_stdlib>
using namespace metal;

struct Shifted {
  uint offset;
  uint operator()(uint i) const { return i + offset; }
};
kernel void each(device uint* out [[buffer(0)]]) {
  Shifted shifted = {2};
  out[0] = shifted(1);
}
