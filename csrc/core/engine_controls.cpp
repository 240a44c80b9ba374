#include "engine_controls.h"

#if defined(__APPLE__)

namespace metal_moe {

void set_num_threads(int) {}
int num_threads() { return 0; }
void set_exact_seed(uint64_t) {}

} // namespace metal_moe

#else

#include <metal_sim/control.h>

namespace metal_moe {

void set_num_threads(int threads) { metal_sim::set_num_threads(threads); }
int num_threads() { return metal_sim::num_threads(); }
void set_exact_seed(uint64_t seed) { metal_sim::set_exact_seed(seed); }

} // namespace metal_moe

#endif
