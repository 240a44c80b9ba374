// The address-space and function qualifiers of the Metal Shading Language. An engine has one address space, so they
// vanish, except that `constant` memory cannot be written. Included last, and undone by entry.h: the words are ordinary
// names in other headers.
#pragma once

#ifdef METAL_SIM_CUDA
// Translated kernels stand in this namespace, where these names are found before NVRTC's own.
namespace metal_sim_kernels {
#include "vector_names.h"
}
#endif

#define device
#define threadgroup
#define thread
#define constant const
#define kernel static
