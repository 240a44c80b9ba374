// No virtual functions.
#include <metal_stdlib>
using namespace metal;

struct Shape {
  float side;
  float area() const { return side * side; }
};
