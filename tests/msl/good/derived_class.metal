// No derived classes.
#include <metal_stdlib>
using namespace metal;

struct Shape {
  float side;
};
struct Square {
  Shape shape;
  float area() const { return shape.side * shape.side; }
};
