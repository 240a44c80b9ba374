// combine: every token's output is the weighted sum of the rows that its experts computed.
//
//   out[t, :] = sum over slots s = 0, 1, ... of weight(t, s) * rows[inverse[t * slots + s], :]
//
// in fp32 and in slot order, whatever order the rows were computed in, rounded once. A slot whose assignment was
// dropped (GROUP_NONE) adds nothing. slots = top_k + shared; shared experts come last, with weight 1 unless given.
//
// Layouts: see combine.h. A threadgroup takes one token and a block of columns; a thread takes COMBINE_COLUMNS columns
// that stand one threadgroup apart, so that neighbouring lanes read neighbouring columns. A one-thread threadgroup
// takes the row in pieces of COLUMNS. Up to SLOTS_AT_A_TIME rows are read together: that many loads are under way for
// every sum, which is read and written once for all of them.
//
// Bytes per token: 4 * slots * H read, sizeof(T) * H written.
#include "combine.h"
#include "group.h"

constexpr constant uint THREADS = simdgroups(COMBINE_SIMDGROUPS, SIMD_WIDTH) * SIMD_WIDTH;
/// Columns of a thread at a time. One thread's 512 sums are 2 KiB, which stay in the L1 cache while rows stream by.
constexpr constant uint COLUMNS = SIMD_WIDTH == 1 ? 512 : COMBINE_COLUMNS;
constexpr constant uint SLOTS_AT_A_TIME = 4;

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

/// sum[c] += weight * column c * THREADS of N rows, in order, for c < count. `columns`: how many columns the rows have
/// from their pointers on.
template <uint N>
inline void add_rows(thread float (&sum)[COLUMNS], device const float* const thread (&row)[N],
                     thread const float (&weight)[N], uint count, uint columns) {
  for (uint c = 0; c < count; ++c)
    if (SIMD_WIDTH == 1 || c * THREADS < columns) {
      UNROLL
      for (uint i = 0; i < N; ++i)
        sum[c] += weight[i] * row[i][c * THREADS];
    }
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

  for (uint first = threadgroup_position.x * THREADS * COLUMNS + thread_index; first < args.hidden;
       first += threadgroups.x * THREADS * COLUMNS) {
    const uint columns = args.hidden - first;
    // A constant on a GPU, so that the sums are registers; a loop bound where they are vectors of one thread.
    const uint count = SIMD_WIDTH == 1 ? min(COLUMNS, columns) : COLUMNS;
    float sum[COLUMNS];
    for (uint c = 0; c < count; ++c)
      sum[c] = 0.0f;
    for (uint slot = 0; slot < slots; slot += SLOTS_AT_A_TIME) {
      device const float* row[SLOTS_AT_A_TIME];
      float weight[SLOTS_AT_A_TIME];
      bool all = true;
      UNROLL
      for (uint i = 0; i < SLOTS_AT_A_TIME; ++i) {
        const uint place = slot + i < slots ? places[slot + i] : GROUP_NONE;
        all = all && place != GROUP_NONE;
        row[i] = place != GROUP_NONE ? rows + ulong(place) * args.hidden + first : nullptr;
        weight[i] = place != GROUP_NONE ? slot_weight(topk_weights, shared_weights, args, token, slot + i) : 0.0f;
      }
      if (all) {
        add_rows<SLOTS_AT_A_TIME>(sum, row, weight, count, columns);
      } else {
        UNROLL
        for (uint i = 0; i < SLOTS_AT_A_TIME; ++i) {
          device const float* const one_row[1] = {row[i]};
          const float one_weight[1] = {weight[i]};
          if (row[i])
            add_rows<1>(sum, one_row, one_weight, count, columns);
        }
      }
    }
    for (uint c = 0; c < count; ++c)
      if (SIMD_WIDTH == 1 || c * THREADS < columns)
        out_row[first + c * THREADS] = T(sum[c]);
  }
}

template [[host_name("combine_fp32")]] [[kernel]] decltype(combine<float>) combine<float>;
template [[host_name("combine_fp16")]] [[kernel]] decltype(combine<half>) combine<half>;
template [[host_name("combine_bf16")]] [[kernel]] decltype(combine<bfloat>) combine<bfloat>;
