// A constant of a struct type has its members in braces.
#include <metal_stdlib>
using namespace metal;

struct Stages {
  uint count;
  uint bytes;
};
constexpr Stages stages(uint rows) { return {rows < 32 ? 1u : 2u, rows * 64}; } // 32: rows
constexpr constant Stages STAGES = stages(16); // error: (?s)no matching constructor.*members in braces
