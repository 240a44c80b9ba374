// A constant of a struct type has its members in braces.
#include <metal_stdlib>
using namespace metal;

struct Stages {
  uint count;
  uint bytes;
};
constexpr Stages stages(uint rows) { return {rows < 32 ? 1u : 2u, rows * 64}; } // 32: rows
constexpr constant Stages DEFAULT = {1, 64};
template <uint ROWS>
struct Tile {
  static constexpr constant uint STAGES = stages(ROWS).count;
};
inline uint bytes() { return Tile<16>::STAGES * DEFAULT.bytes; }
