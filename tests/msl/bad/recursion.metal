// No function reaches itself.
#include <metal_stdlib>
using namespace metal;

inline uint factorial(uint n) { return n < 2 ? 1 : n * factorial(n - 1); } // error: recursion.*factorial calls factorial
inline bool odd(uint n); // error: recursion.*odd calls even calls odd
inline bool even(uint n) { return n == 0 ? true : odd(n - 1); } // error: recursion.*even calls odd calls even
inline bool odd(uint n) { return n == 0 ? false : even(n - 1); }
template <typename T>
inline T gcd(T a, T b) { return b == 0 ? a : gcd(b, a % b); } // error: recursion.*gcd calls gcd
struct Tree {
  uint depth(uint n) thread const { return n == 0 ? 0 : 1 + depth(n / 2); } // error: recursion.*depth calls depth
};
kernel void recursive(device uint* out [[buffer(0)]]) {
  Tree tree;
  out[0] = factorial(5) + uint(even(4)) + gcd(12u, 8u) + tree.depth(9);
}
