// Nothing that came with C++17: Metal 3.1 is C++14, and takes these with a warning at best.
#include <metal_stdlib>
using namespace metal;

struct Pair {
  uint a;
  uint b;
};
template <typename T>
inline uint bytes() {
  if constexpr (sizeof(T) == 4) // error: constexpr if is C\+\+17
    return 4;
  return 2;
}
template <typename... T>
inline uint sum(T... values) { return (values + ... + 0u); } // error: C\+\+17
namespace a::b { // error: nested namespace definition is C\+\+17
}
kernel void new_words(device uint* out [[buffer(0)]]) {
  Pair pair = {1, 2};
  auto [a, b] = pair; // error: (decomposition|structured binding) declarations are C\+\+17
  if (uint c = a; c > 0) // error: C\+\+17
    out[0] = c + b + bytes<float>() + sum(1u, 2u);
}
