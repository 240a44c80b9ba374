// The inner loop of the GEMV families: dot products along K of R weight rows with C activation rows.
//
// A lane takes LANE_ELEMENTS consecutive elements at a time (16 bytes of a 16-bit type), the lanes of a simdgroup
// interleaved, so that a simdgroup reads each row in one contiguous stream. It loads STEPS such runs of every row
// before it uses the first: what keeps memory busy is the number of loads under way, not the number of lanes. What is
// left of K goes element by element.
#pragma once
#include "rows.h"

constexpr constant uint LANE_ELEMENTS = 8;
/// Elements of a row that a simdgroup takes at a time.
constexpr constant uint SIMDGROUP_ELEMENTS = SIMD_WIDTH * LANE_ELEMENTS;

#ifdef METAL_SIM_NATIVE
// One thread has the whole row, and the engine the loop over the processor's vectors.
template <bool VECTORIZED, typename Acc, uint R, uint C, typename T>
inline void dot_rows(thread const Rows<T, R>& w, thread const Rows<T, C>& x, uint K, uint, thread float (&sum)[R][C]) {
  metal_sim::dot_rows<sizeof(Acc) == 2>(w.row, w.next, x.row, K, sum);
}
#else

/// Element i (0 or 1) of two 16-bit ones in a word, as fp32; the tag says what they are.
inline float word_element(uint word, uint i, half) { return float(as_type<half>(ushort(i == 0 ? word : word >> 16))); }
inline float word_element(uint word, uint i, bfloat) {
  return as_type<float>(i == 0 ? word << 16 : word & 0xFFFF0000u);
}
inline float word_element(uint word, uint, float) { return as_type<float>(word); }

/// The words of device memory that element 0 of `from` begins. Any alignment that T has.
inline uint load_word(device const half* from) {
  return uint(as_type<ushort>(from[0])) | uint(as_type<ushort>(from[1])) << 16;
}
inline uint load_word(device const bfloat* from) {
  return uint(as_type<ushort>(from[0])) | uint(as_type<ushort>(from[1])) << 16;
}
inline uint load_word(device const float* from) { return as_type<uint>(from[0]); }

/// LANE_ELEMENTS elements of a row, in words as they are in memory: a GPU's compiler gives a 16-bit element that lives
/// from one step of a loop to the next a register of its own.
template <typename T>
struct LaneRun {
  static constexpr constant uint PER_WORD = 4 / sizeof(T);
  static constexpr constant uint VECTORS = LANE_ELEMENTS / Vector16<T>::COUNT;
  Vector16<uint> vector[VECTORS];

  float element(uint i) thread const {
    return word_element(vector[i / PER_WORD / 4].element[i / PER_WORD % 4], i % PER_WORD, T(0));
  }
};

/// The next run of R weight rows and C activation rows.
template <typename T, uint R, uint C>
struct LaneRuns {
  LaneRun<T> w[R];
  LaneRun<T> x[C];
};

/// VECTORIZED: `from` is a multiple of 16 bytes, and loads are 16 bytes wide. ONCE: see load_vector_once.
template <bool VECTORIZED, bool ONCE, typename T>
inline void load_run(device const T* from, thread LaneRun<T>& run) {
  UNROLL
  for (uint v = 0; v < LaneRun<T>::VECTORS; ++v)
    if (!VECTORIZED) {
      UNROLL
      for (uint i = 0; i < 4; ++i)
        run.vector[v].element[i] = load_word(from + (4 * v + i) * LaneRun<T>::PER_WORD);
    } else if (ONCE) {
      load_vector_once(reinterpret_cast<device const Vector16<uint>*>(from) + v, run.vector[v]);
    } else {
      load_vector(reinterpret_cast<device const Vector16<uint>*>(from) + v, run.vector[v]);
    }
}

template <bool VECTORIZED, uint R, uint C, typename T>
inline void load_runs(thread const Rows<T, R>& w, thread const Rows<T, C>& x, uint k, thread LaneRuns<T, R, C>& runs) {
  UNROLL
  for (uint r = 0; r < R; ++r)
    load_run<VECTORIZED, true>(w.row[r] + k, runs.w[r]);
  UNROLL
  for (uint c = 0; c < C; ++c)
    load_run<VECTORIZED, false>(x.row[c] + k, runs.x[c]);
}

template <typename Acc, uint R, uint C, typename T>
inline void add_products(thread const LaneRuns<T, R, C>& runs, thread float (&sum)[R][C]) {
  UNROLL
  for (uint r = 0; r < R; ++r) {
    UNROLL
    for (uint c = 0; c < C; ++c) {
      Acc part = Acc(0);
      UNROLL
      for (uint i = 0; i < LANE_ELEMENTS; ++i)
        part = fma(Acc(runs.w[r].element(i)), Acc(runs.x[c].element(i)), part);
      sum[r][c] += float(part);
    }
  }
}

/// sum[r][c] = this lane's part of w.row[r] . x.row[c]; the simdgroup's sum over lanes is the dot product.
/// Acc = half: products and sums of up to LANE_ELEMENTS elements in fp16, those sums added in fp32.
template <bool VECTORIZED, typename Acc, uint R, uint C, typename T>
inline void dot_rows(thread const Rows<T, R>& w, thread const Rows<T, C>& x, uint K, uint lane,
                     thread float (&sum)[R][C]) {
  UNROLL
  for (uint r = 0; r < R; ++r) {
    UNROLL
    for (uint c = 0; c < C; ++c)
      sum[r][c] = 0.0f;
  }

  const uint whole = K / LANE_ELEMENTS * LANE_ELEMENTS;
  uint k = lane * LANE_ELEMENTS;
  LaneRuns<T, R, C> runs;
  if (!VECTORIZED) { // many narrow loads: no registers for two runs of them
    for (; k < whole; k += SIMDGROUP_ELEMENTS) {
      load_runs<false>(w, x, k, runs);
      add_products<Acc>(runs, sum);
    }
  } else if (k < whole) {
    load_runs<true>(w, x, k, runs);
    for (k += SIMDGROUP_ELEMENTS; k < whole; k += SIMDGROUP_ELEMENTS) {
      LaneRuns<T, R, C> next;
      load_runs<true>(w, x, k, next);
      add_products<Acc>(runs, sum);
      runs = next;
    }
    add_products<Acc>(runs, sum);
  }
  for (k = whole + lane; k < K; k += SIMD_WIDTH) {
    UNROLL
    for (uint r = 0; r < R; ++r) {
      UNROLL
      for (uint c = 0; c < C; ++c)
        sum[r][c] += float(w.row[r][k]) * float(x.row[c][k]);
    }
  }
}
#endif
