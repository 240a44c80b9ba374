// Types must agree as they must in Metal.
#include <metal_stdlib>
using namespace metal;

struct Size {
  uint width;
  Size(uint w) : width(w) {}
};
inline uint smaller(uint a, int b) { return min(a, b); } // error: no matching function
inline ulong lanes(bool b) { return simd_ballot(b); } // error: no viable conversion
inline uint missing(uint x) { return no_such_function(x); } // error: undeclared identifier
inline void copy(device Size* p, thread uint& n) {
  Size size = p; // error: no viable conversion
  n = size.width;
}
