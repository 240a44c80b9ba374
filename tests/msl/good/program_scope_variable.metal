// Variables of program scope and static members are constants in the constant address space.
#include <metal_stdlib>
using namespace metal;

constexpr constant uint WIDTH = 4;
namespace sizes {
constexpr constant uint HEIGHT = 4;
}
struct Tile {
  static constexpr constant uint ROWS = 8;
};
constant float TABLE[2] = {1.0f, 2.0f};
inline float sum() {
  constexpr uint COUNT = WIDTH * sizes::HEIGHT * Tile::ROWS;
  return TABLE[0] + TABLE[1] + float(COUNT);
}
