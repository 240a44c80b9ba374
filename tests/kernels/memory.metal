// Attributes of kernel parameters, address spaces, threadgroup memory, barriers and atomics.
#include <metal_stdlib>
using namespace metal;

/// Every attribute, by thread: 24 words each.
kernel void attributes(device uint* out [[buffer(2)]], uint3 in_grid [[thread_position_in_grid]],
                       uint3 group [[threadgroup_position_in_grid]],
                       ushort3 in_group [[thread_position_in_threadgroup]], uint index [[thread_index_in_threadgroup]],
                       ushort lane [[thread_index_in_simdgroup]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
                       ushort3 group_size [[threads_per_threadgroup]], uint3 groups [[threadgroups_per_grid]],
                       ushort width [[threads_per_simdgroup]], ushort simdgroups [[simdgroups_per_threadgroup]],
                       uint3 size [[threads_per_grid]]) {
  device uint* to = out + 24 * (in_grid.x + size.x * (in_grid.y + size.y * in_grid.z));
  uint n = 0;
  to[n++] = in_grid.x;
  to[n++] = in_grid.y;
  to[n++] = in_grid.z;
  to[n++] = group.x;
  to[n++] = group.y;
  to[n++] = group.z;
  to[n++] = in_group.x;
  to[n++] = in_group.y;
  to[n++] = in_group.z;
  to[n++] = index;
  to[n++] = lane;
  to[n++] = simdgroup;
  to[n++] = group_size.x;
  to[n++] = group_size.y;
  to[n++] = group_size.z;
  to[n++] = groups.x;
  to[n++] = groups.y;
  to[n++] = width;
  to[n++] = simdgroups;
  to[n++] = size.z;
}

struct Scale {
  float factor;
  uint count;
};

/// Reverses each block of a threadgroup through threadgroup memory, and counts elements by a threadgroup atomic.
[[kernel, max_total_threads_per_threadgroup(256)]] void
reverse_blocks(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
               constant Scale& scale [[buffer(2)]], constant float* offsets [[buffer(3)]],
               device atomic_uint* total [[buffer(4)]], threadgroup float* block [[threadgroup(0)]],
               threadgroup atomic_uint* counter [[threadgroup(1)]], uint group [[threadgroup_position_in_grid]],
               uint i [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  if (i == 0)
    atomic_store_explicit(counter, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint first = group * threads;
  const bool inside = first + i < scale.count;
  block[i] = inside ? in[first + i] : 0.0f;
  if (inside)
    atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint count = atomic_load_explicit(counter, memory_order_relaxed);
  if (inside)
    out[first + i] = block[count - 1 - i] * scale.factor + offsets[i % 2];
  if (i == 0) {
    atomic_fetch_add_explicit(&total[0], count, memory_order_relaxed);
    atomic_fetch_max_explicit(&total[1], group, memory_order_relaxed);
    atomic_fetch_min_explicit(&total[2], group, memory_order_relaxed);
    atomic_fetch_or_explicit(&total[3], 1u << group, memory_order_relaxed);
    uint expected = 0;
    atomic_compare_exchange_weak_explicit(&total[4], &expected, 7u, memory_order_relaxed, memory_order_relaxed);
  }
}

template <uint N>
inline uint sum_unrolled(thread const uint (&values)[N]) {
  uint sum = 0;
#pragma unroll
  for (uint i = 0; i < N; ++i)
    sum += values[i];
  return sum;
}

/// Arrays in thread memory, unrolled loops, a host name of its own, and writes of whole structures.
[[host_name("renamed")]] kernel void original(device Scale* out [[buffer(0)]], device uint4* wide [[buffer(1)]]) {
  uint values[5] = {1, 2, 3, 4, 5};
  Scale result;
  result.factor = 2.0f;
  result.count = sum_unrolled(values);
  out[0] = result;
  out[1] = out[0];
  wide[1] = wide[0];
}

/// Reads one element beyond `in` where `index` says so: the exact engine must notice.
kernel void read_at(device const uint* in [[buffer(0)]], device uint* out [[buffer(1)]],
                    constant uint& index [[buffer(2)]]) {
  out[0] = in[index];
}

/// Neighbours meet in threadgroup memory without a barrier: the exact engine must notice.
kernel void missing_barrier(device uint* out [[buffer(0)]], threadgroup uint* shared [[threadgroup(0)]],
                            uint i [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  shared[i] = i;
  out[i] = shared[(i + 1) % threads];
}
