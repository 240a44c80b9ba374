// The definitions that metal-cpp leaves to one source of a program: selectors and classes, looked up when it starts.
#define NS_PRIVATE_IMPLEMENTATION
#define MTL_PRIVATE_IMPLEMENTATION
#include <Foundation/Foundation.hpp>
#include <Metal/Metal.hpp>
