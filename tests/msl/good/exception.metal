// No exceptions.
#include <metal_stdlib>
using namespace metal;

inline uint checked(uint x) { return x == 0 ? 0 : 1 / x; }
