// A temporary gets a name before a function template takes it by reference.
#include <metal_stdlib>
using namespace metal;

template <typename T>
struct Pair {
  T a;
  T b;
};
template <typename T>
inline T sum(thread const Pair<T>& pair) { return pair.a + pair.b; }
template <typename P>
inline float first(thread const P& pair) { return float(pair.a); }
inline Pair<float> make(float x) { return {x, x}; }
inline float root(thread const float& x) { return sqrt(x); }
kernel void temporary(device float* out [[buffer(0)]]) {
  out[0] = sum(make(1.0f)); // error: (?s)no matching function.*give it a name
  out[1] = first(make(1.0f)); // error: (?s)no matching function.*give it a name
  out[2] = root(2.0f); // error: (?s)no matching function.*give it a name
}
