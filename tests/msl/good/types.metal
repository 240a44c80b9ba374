// Types must agree as they must in Metal.
#include <metal_stdlib>
using namespace metal;

struct Size {
  uint width;
};
inline uint smaller(uint a, int b) { return min(a, uint(b)); }
inline ulong lanes(bool b) { return ulong(simd_vote::vote_t(simd_ballot(b))); }
inline void copy(device Size* p, constant Size& c, threadgroup Size* t, thread uint& n) {
  Size size = p[0];
  p[1] = size;
  const Size other = c;
  t[0] = other;
  t[1] = p[0];
  n = size.width + other.width + t[1].width;
}
