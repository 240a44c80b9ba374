// No virtual functions.
#include <metal_stdlib>
using namespace metal;

struct Shape {
  virtual float area() const { return 0.0f; } // error: virtual functions are not supported
};
