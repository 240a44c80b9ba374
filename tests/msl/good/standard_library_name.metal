// There is no C++ standard library: nothing of it is declared.
#include <metal_stdlib>
using namespace metal;

inline uint larger(uint a, uint b) { return max(a, b); }
inline float root(float x) { return metal::sqrt(x); }
