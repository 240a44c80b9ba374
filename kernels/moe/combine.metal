// combine: every token's output is the weighted sum of the rows that its experts computed.
//
//   out[t, :] = sum over slots s = 0, 1, ... of weight(t, s) * rows[place(t * slots + s), :]
//
// in fp32 and in slot order, whatever order the rows were computed in, rounded once. place(a) = inverse[a], or a itself
// where rows are in order of assignments. A slot whose assignment was dropped (GROUP_NONE there, an id of no expert
// here) adds nothing. slots = top_k + shared; shared experts come last, with weight 1 unless given.
//
// Layouts: see combine.h. A threadgroup takes one token and a block of columns, a thread COMBINE_COLUMNS consecutive
// ones of them. A one-thread threadgroup takes the row in pieces of COLUMNS. SLOTS_AT_A_TIME rows are read together:
// their places first, then the rows, so that a token waits for memory twice, not twice per slot.
//
// Bytes per token: 4 * slots * H read, sizeof(T) * H written.
#include "../tiles/early_start.h"
#include "assignment.h"
#include "combine.h"
#include "group.h"

constexpr constant uint THREADS = simdgroups(COMBINE_SIMDGROUPS, SIMD_WIDTH) * SIMD_WIDTH;
/// Columns of a thread at a time. One thread's 512 sums are 2 KiB, which stay in the L1 cache while rows stream by.
constexpr constant uint COLUMNS = SIMD_WIDTH == 1 ? 512 : COMBINE_COLUMNS;
constexpr constant uint SLOTS_AT_A_TIME = SIMD_WIDTH == 1 ? 4 : 8;

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

/// sum[c] += weight * column c of N rows, in order, for c < count; a null row adds nothing.
template <uint N>
inline void add_rows(thread float (&sum)[COLUMNS], device const float* const thread (&row)[N],
                     thread const float (&weight)[N], uint count) {
  for (uint c = 0; c < count; ++c) {
    UNROLL
    for (uint i = 0; i < N; ++i)
      sum[c] += weight[i] * row[i][c];
  }
}

/// The same for the registers of a GPU's thread: all loads first. Adding 0 for a null row changes no bit of a sum that
/// began with 0.
template <uint N>
inline void add_columns(thread float (&sum)[COLUMNS], device const float* const thread (&row)[N],
                        thread const float (&weight)[N], uint count, bool vectorized) {
  float4 value[N];
  UNROLL
  for (uint i = 0; i < N; ++i) {
    value[i] = float4(0.0f);
    if (row[i] && vectorized) {
      value[i] = *reinterpret_cast<device const float4*>(row[i]);
    } else if (row[i]) {
      UNROLL
      for (uint c = 0; c < COMBINE_COLUMNS; ++c)
        if (c < count)
          value[i][c] = row[i][c];
    }
  }
  UNROLL
  for (uint i = 0; i < N; ++i) {
    UNROLL
    for (uint c = 0; c < COMBINE_COLUMNS; ++c)
      sum[c] += weight[i] * value[i][c];
  }
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void combine(device const float* rows [[buffer(0)]], device const uint* inverse [[buffer(1)]],
             device const int* ids [[buffer(2)]], device const uchar* topk_weights [[buffer(3)]],
             device const uchar* shared_weights [[buffer(4)]], device T* out [[buffer(5)]],
             constant CombineArgs& args [[buffer(6)]], uint2 threadgroup_position [[threadgroup_position_in_grid]],
             uint2 threadgroups [[threadgroups_per_grid]], uint thread_index [[thread_index_in_threadgroup]],
             uint lane [[thread_index_in_simdgroup]]) {
  const uint token = threadgroup_position.y;
  const uint slots = args.top_k + args.shared;
  device const uint* places = inverse + ulong(token) * slots;
  // In order of assignments, of which each has a lane: the slots that name an expert, as bits.
  uint present = 0;
  if (args.rows_by_assignment)
    present = uint(lanes_where(lane < slots && slot_expert(ids, args, token, lane) != NO_EXPERT));
  device T* out_row = out + ulong(token) * args.out_row_stride;

  for (uint first = (threadgroup_position.x * THREADS + thread_index) * COLUMNS; first < args.hidden;
       first += threadgroups.x * THREADS * COLUMNS) {
    const uint count = min(COLUMNS, args.hidden - first);
    float sum[COLUMNS];
    for (uint c = 0; c < (SIMD_WIDTH == 1 ? count : COLUMNS); ++c)
      sum[c] = 0.0f;
    for (uint slot = 0; slot < slots; slot += SLOTS_AT_A_TIME) {
      uint place[SLOTS_AT_A_TIME];
      UNROLL
      for (uint i = 0; i < SLOTS_AT_A_TIME; ++i)
        place[i] = GROUP_NONE;
      if (args.rows_by_assignment) {
        UNROLL
        for (uint i = 0; i < SLOTS_AT_A_TIME; ++i)
          if (slot + i < slots && (present >> (slot + i) & 1) != 0)
            place[i] = token * slots + slot + i;
      } else {
        UNROLL
        for (uint i = 0; i < SLOTS_AT_A_TIME; ++i)
          if (slot + i < slots)
            place[i] = places[slot + i];
      }
      device const float* row[SLOTS_AT_A_TIME];
      float weight[SLOTS_AT_A_TIME];
      bool all = true;
      UNROLL
      for (uint i = 0; i < SLOTS_AT_A_TIME; ++i) {
        all = all && place[i] != GROUP_NONE;
        row[i] = place[i] != GROUP_NONE ? rows + ulong(place[i]) * args.hidden + first : nullptr;
        weight[i] = slot + i < slots ? slot_weight(topk_weights, shared_weights, args, token, slot + i) : 0.0f;
        weight[i] = place[i] != GROUP_NONE ? weight[i] : 0.0f;
      }
      wait_for_previous_kernel(); // which has nothing to do with places and weights
      if (SIMD_WIDTH > 1) {
        add_columns<SLOTS_AT_A_TIME>(sum, row, weight, count, args.vectorized);
      } else if (all) {
        add_rows<SLOTS_AT_A_TIME>(sum, row, weight, count);
      } else {
        UNROLL
        for (uint i = 0; i < SLOTS_AT_A_TIME; ++i) {
          device const float* const one_row[1] = {row[i]};
          const float one_weight[1] = {weight[i]};
          if (row[i])
            add_rows<1>(sum, one_row, one_weight, count);
        }
      }
    }
    if (SIMD_WIDTH > 1 && args.vectorized) {
      vec<T, 4> rounded;
      UNROLL
      for (uint c = 0; c < COMBINE_COLUMNS; ++c)
        rounded[c] = T(sum[c]);
      *reinterpret_cast<device vec<T, 4>*>(out_row + first) = rounded;
    } else {
      for (uint c = 0; c < (SIMD_WIDTH == 1 ? count : COLUMNS); ++c)
        if (c < count)
          out_row[first + c] = T(sum[c]);
    }
  }
}

template [[host_name("combine_fp32")]] [[kernel]] decltype(combine<float>) combine<float>;
template [[host_name("combine_fp16")]] [[kernel]] decltype(combine<half>) combine<half>;
template [[host_name("combine_bf16")]] [[kernel]] decltype(combine<bfloat>) combine<bfloat>;
