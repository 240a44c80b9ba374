// No exceptions.
#include <metal_stdlib>
using namespace metal;

inline uint checked(uint x) {
  if (x == 0)
    throw x; // error: exceptions disabled
  try { // error: exceptions disabled
    return 1 / x;
  } catch (...) {
  }
  return 0;
}
