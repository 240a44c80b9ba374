// gather_experts: the weights of selected experts side by side, chosen by ids that stay on the device.
//
//   out[i] = weights[ids[i]], or zeros where ids[i] is outside 0..E-1
//
// Layouts: see gather.h. Element types do not matter: an expert is `bytes_per_expert` bytes, copied in the widest units
// that divide it. Grid row i is one selected expert; a threadgroup copies GATHER_BLOCK_BYTES of it, neighbouring
// threads neighbouring units.
//
// Bytes: 2 * count * bytes_per_expert.
#include "../tiles/scalar.h"
#include "gather.h"

constexpr constant uint THREADS = simdgroups(GATHER_SIMDGROUPS, SIMD_WIDTH) * SIMD_WIDTH;

template <typename Unit>
inline void copy_units(device const uchar* from, device uchar* to, uint bytes, uint thread_index) {
  device const Unit* source = reinterpret_cast<device const Unit*>(from);
  device Unit* target = reinterpret_cast<device Unit*>(to);
  const uint units = bytes / sizeof(Unit);
  for (uint i = thread_index; i < units; i += THREADS)
    target[i] = source[i];
}

template <typename Unit>
inline void zero_units(device uchar* to, uint bytes, uint thread_index) {
  device Unit* target = reinterpret_cast<device Unit*>(to);
  const uint units = bytes / sizeof(Unit);
  for (uint i = thread_index; i < units; i += THREADS)
    target[i] = Unit(0);
}

template <typename Unit>
inline void gather_block(device const uchar* weights, device uchar* to, ulong bytes_per_expert, ulong begin,
                         uint expert, uint thread_index) {
  const uint bytes = uint(min(bytes_per_expert - begin, ulong(GATHER_BLOCK_BYTES)));
  if (expert == NO_EXPERT)
    zero_units<Unit>(to, bytes, thread_index);
  else
    copy_units<Unit>(weights + ulong(expert) * bytes_per_expert + begin, to, bytes, thread_index);
}

[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void gather_experts(device const uchar* weights [[buffer(0)]], device const int* ids [[buffer(1)]],
                    device uchar* out [[buffer(2)]], constant GatherArgs& args [[buffer(3)]],
                    uint2 threadgroup_position [[threadgroup_position_in_grid]],
                    uint thread_index [[thread_index_in_threadgroup]]) {
  const uint i = threadgroup_position.y;
  const ulong bytes_per_expert = as_type<ulong>(uint2(args.bytes_per_expert_low, args.bytes_per_expert_high));
  const ulong begin = ulong(threadgroup_position.x) * GATHER_BLOCK_BYTES;
  if (i >= args.count || begin >= bytes_per_expert)
    return;
  const uint expert = load_id(ids, ulong(i) * args.id_stride, args.id_words, args.experts);
  device uchar* to = out + ulong(i) * bytes_per_expert + begin;
  switch (args.unit_bytes) {
  case 16:
    return gather_block<uint4>(weights, to, bytes_per_expert, begin, expert, thread_index);
  case 8:
    return gather_block<uint2>(weights, to, bytes_per_expert, begin, expert, thread_index);
  case 4:
    return gather_block<uint>(weights, to, bytes_per_expert, begin, expert, thread_index);
  case 2:
    return gather_block<ushort>(weights, to, bytes_per_expert, begin, expert, thread_index);
  default:
    return gather_block<uchar>(weights, to, bytes_per_expert, begin, expert, thread_index);
  }
}
