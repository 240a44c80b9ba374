// There is no C++ standard library: its headers are not found.
#include <metal_stdlib>
#include <vector> // error: 'vector' not found.*standard library
using namespace metal;
