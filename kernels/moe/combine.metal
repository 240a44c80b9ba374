// combine: every token's output is the weighted sum of the rows that its experts computed.
//
//   out[t, :] = sum over slots s = 0, 1, ... of weight(t, s) * rows[inverse[t * slots + s], :]
//
// in fp32 and in slot order, whatever order the rows were computed in, rounded once. A slot whose assignment was
// dropped (GROUP_NONE) adds nothing. slots = top_k + shared; shared experts come last, with weight 1 unless given.
//
// Layouts: see combine.h. A threadgroup takes one token and a block of columns; a thread takes COMBINE_COLUMNS columns
// that stand one threadgroup apart, so that neighbouring lanes read neighbouring columns. A one-thread threadgroup
// takes the row in pieces small enough to stay in vector registers.
//
// Bytes per token: 4 * slots * H read, sizeof(T) * H written.
#include "combine.h"
#include "group.h"

constexpr constant uint THREADS = simdgroups(COMBINE_SIMDGROUPS, SIMD_WIDTH) * SIMD_WIDTH;
/// Columns of a thread at a time. 64 fp32 sums are 4 of AVX-512's registers or 16 of NEON's, which has 32.
constexpr constant uint COLUMNS = SIMD_WIDTH == 1 ? 64 : COMBINE_COLUMNS;

inline float slot_weight(device const uchar* topk_weights, device const uchar* shared_weights,
                         constant CombineArgs& args, uint token, uint slot) {
  if (slot < args.top_k)
    return load_scalar(topk_weights, ulong(token) * args.weights_token_stride + ulong(slot) * args.weights_slot_stride,
                       args.weights_type);
  if (args.has_shared_weights == 0)
    return 1.0f;
  return load_scalar(shared_weights,
                     ulong(token) * args.shared_token_stride + ulong(slot - args.top_k) * args.shared_slot_stride,
                     args.shared_type);
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void combine(device const float* rows [[buffer(0)]], device const uint* inverse [[buffer(1)]],
             device const uchar* topk_weights [[buffer(2)]], device const uchar* shared_weights [[buffer(3)]],
             device T* out [[buffer(4)]], constant CombineArgs& args [[buffer(5)]],
             uint2 threadgroup_position [[threadgroup_position_in_grid]], uint2 threadgroups [[threadgroups_per_grid]],
             uint thread_index [[thread_index_in_threadgroup]]) {
  const uint token = threadgroup_position.y;
  const uint slots = args.top_k + args.shared;
  device const uint* places = inverse + ulong(token) * slots;
  device T* out_row = out + ulong(token) * args.out_row_stride;

  for (uint block = threadgroup_position.x * THREADS * COLUMNS; block < args.hidden;
       block += threadgroups.x * THREADS * COLUMNS) {
    const uint first = block + thread_index;
    const bool whole = args.hidden - block >= THREADS * COLUMNS;
    float sum[COLUMNS];
    for (uint c = 0; c < COLUMNS; ++c)
      sum[c] = 0.0f;
    for (uint slot = 0; slot < slots; ++slot) {
      const uint place = places[slot];
      if (place == GROUP_NONE)
        continue;
      const float weight = slot_weight(topk_weights, shared_weights, args, token, slot);
      device const float* row = rows + ulong(place) * args.hidden + first;
      if (whole) {
        for (uint c = 0; c < COLUMNS; ++c)
          sum[c] += weight * row[c * THREADS];
      } else {
        for (uint c = 0; c < COLUMNS; ++c)
          if (first + c * THREADS < args.hidden)
            sum[c] += weight * row[c * THREADS];
      }
    }
    if (whole) {
      for (uint c = 0; c < COLUMNS; ++c)
        out_row[first + c * THREADS] = T(sum[c]);
    } else {
      for (uint c = 0; c < COLUMNS; ++c)
        if (first + c * THREADS < args.hidden)
          out_row[first + c * THREADS] = T(sum[c]);
    }
  }
}

template [[host_name("combine_fp32")]] [[kernel]] decltype(combine<float>) combine<float>;
template [[host_name("combine_fp16")]] [[kernel]] decltype(combine<half>) combine<half>;
template [[host_name("combine_bf16")]] [[kernel]] decltype(combine<bfloat>) combine<bfloat>;
