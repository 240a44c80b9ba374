// Kernels that begin before the one in front of them has ended: one that keeps the rules, and others.
#include "../../kernels/tiles/early_start.h"

kernel void write_values(device uint* values [[buffer(0)]], uint i [[thread_position_in_grid]]) { values[i] = 10 * i; }

/// out[i] = values[places[i]]: places are known early, values only after the wait.
kernel void early_places(device const uint* places [[buffer(0)]], device const uint* values [[buffer(1)]],
                         device uint* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  const uint place = places[i];
  wait_for_previous_kernel();
  out[i] = values[place];
}

kernel void early_values(device const uint* places [[buffer(0)]], device const uint* values [[buffer(1)]],
                         device uint* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  const uint value = values[places[i]];
  wait_for_previous_kernel();
  out[i] = value;
}

kernel void early_out(device const uint* places [[buffer(0)]], device const uint* values [[buffer(1)]],
                      device uint* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  out[i] = 0;
  wait_for_previous_kernel();
  out[i] = values[places[i]];
}

/// Only even threads wait by themselves, and odd ones store all the same.
kernel void early_odd_threads(device const uint* places [[buffer(0)]], device const uint* values [[buffer(1)]],
                              device uint* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  if (i % 2 == 0)
    wait_for_previous_kernel();
  out[i] = places[i];
  if (i % 2 == 0)
    out[i] = values[places[i]];
}

/// Threads beyond the first ten return without a wait of their own.
kernel void early_return(device const uint* places [[buffer(0)]], device const uint* values [[buffer(1)]],
                         device uint* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  if (places[i] >= 10)
    return;
  wait_for_previous_kernel();
  out[i] = values[places[i]];
}
