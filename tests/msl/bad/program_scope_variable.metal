// Variables of program scope and static members are constants in the constant address space.
#include <metal_stdlib>
using namespace metal;

constexpr uint WIDTH = 4; // error: constant address space
namespace sizes {
constexpr uint HEIGHT = 4; // error: constant address space
}
struct Tile {
  static constexpr uint ROWS = 8; // error: constant address space
};
device float* remembered; // error: constant address space
constant uint UNKNOWN; // error: must be initialized|default initialization
