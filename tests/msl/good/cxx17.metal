// Nothing that came with C++17: Metal 3.1 is C++14, and takes these with a warning at best.
#include <metal_stdlib>
using namespace metal;

struct Pair {
  uint a;
  uint b;
};
template <typename T>
inline uint bytes() {
  if (sizeof(T) == 4)
    return 4;
  return 2;
}
inline uint sum() { return 0; }
template <typename... T>
inline uint sum(uint first, T... rest) {
  return first + sum(rest...);
}
namespace a {
namespace b {}
} // namespace a
kernel void old_words(device uint* out [[buffer(0)]]) {
  Pair pair = {1, 2};
  const uint c = pair.a;
  if (c > 0)
    out[0] = c + pair.b + bytes<float>() + sum(1u, 2u);
}
