// Function constants are scalars of the program that pipelines set: each has an index of its own and no value here.
#include <metal_stdlib>
using namespace metal;

constant uint BITS [[function_constant(0)]];
constant uint WIDTH [[function_constant(0)]]; // error: function_constant\(0\) is both 'BITS' and 'WIDTH'
struct Shape {
  uint rows;
};
constant Shape SHAPE [[function_constant(1)]];   // error: 'SHAPE' is of type 'Shape'; it must be one of float, int
constant uint TOO_HIGH [[function_constant(65536)]]; // error: index '65536'; it must be 0 to 65535

kernel void local(device uint* out [[buffer(0)]]) {
  constant uint INSIDE [[function_constant(4)]]; // error: must be a constant of the program
  out[0] = BITS + WIDTH + SHAPE.rows + TOO_HIGH + INSIDE;
}
