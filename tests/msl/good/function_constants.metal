// Function constants are scalars of the program that pipelines set: each has an index of its own and no value here.
#include <metal_stdlib>
using namespace metal;

constant uint BITS [[function_constant(0)]];
constant uint WIDTH [[function_constant(1)]];
constant float SCALE [[function_constant(65535)]];
constant bool SIGNED [[function_constant(7)]];
// What follows from them is a constant too; a default where one is not defined.
constant uint COLUMNS = is_function_constant_defined(WIDTH) ? WIDTH : 8u;
constant bool WIDE = COLUMNS > 16u;

inline float scaled(uint code) { return WIDE && SIGNED ? -SCALE * float(code) : SCALE * float(code); }

kernel void decode(device const uint* in [[buffer(0)]], device float* out [[buffer(1)]],
                   uint i [[thread_position_in_grid]]) {
  if (i < COLUMNS)
    out[i] = scaled(in[i] & ((1u << BITS) - 1));
}
