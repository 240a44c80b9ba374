// No derived classes.
#include <metal_stdlib>
using namespace metal;

struct Shape {
  float side;
};
struct Square : Shape { // error: derived classes are not supported.*'Shape'
  float area() const { return side * side; }
};
