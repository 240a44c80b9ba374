// There is no C++ standard library: nothing of it is declared.
#include <metal_stdlib>
using namespace metal;

inline uint larger(uint a, uint b) { return std::max(a, b); } // error: undeclared identifier 'std'
inline float root(float x) { return sqrtf(x); } // error: undeclared identifier 'sqrtf'
