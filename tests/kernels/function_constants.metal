// Function constants: values that a pipeline sets, and what follows from them. One thread per element.
#include <metal_stdlib>
using namespace metal;

constant uint FACTOR [[function_constant(2)]];
constant int OFFSET [[function_constant(7)]];
constant bool NEGATE [[function_constant(0)]];
constant float SCALE [[function_constant(65535)]];

constant int ADDED = is_function_constant_defined(OFFSET) ? OFFSET : -1;
constant bool NEGATED = is_function_constant_defined(NEGATE) ? NEGATE : false;
constant uint SQUARE = FACTOR * FACTOR;
constant float SCALED = is_function_constant_defined(SCALE) ? SCALE : 0.5f;

template <uint N>
inline int polynomial(int x) {
  int sum = 0;
  for (uint i = 0; i < N; ++i)
    sum = sum * x + int(SQUARE);
  return sum;
}

/// out[i] = FACTOR * i + ADDED, negated or not; integer of SCALED * 4; value of a loop over SQUARE.
kernel void combine_constants(device int* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  const int value = int(FACTOR * i) + ADDED;
  out[3 * i] = NEGATED ? -value : value;
  out[3 * i + 1] = int(SCALED * 4.0f);
  out[3 * i + 2] = polynomial<3>(2);
}
