// No run-time types.
#include <metal_stdlib>
using namespace metal;

struct Shape {
  float side;
};
kernel void types(device uint* out [[buffer(0)]], device Shape* shapes [[buffer(1)]]) {
  device Shape* shape = static_cast<device Shape*>(shapes);
  out[0] = shape != nullptr;
}
