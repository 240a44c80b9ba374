// The services that the exact engine offers to the kernels it runs.
#pragma once

#include "kernel_library.h"

namespace metal_sim {

const ExactServices& exact_services();

} // namespace metal_sim
