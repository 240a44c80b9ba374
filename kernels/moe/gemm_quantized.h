// The matrix families on quantised weights: decoded to the activations' type as they are staged, see gemm.h.
#pragma once
#include "../formats/decoders.h"
#include "../formats/tail.h"
#include "gemm.h"

/// Whether rows of K elements, which begin at multiples of 16 bytes, are whole vectors: those of the format may tell.
template <typename T>
inline bool whole_vectors(uint K) {
  return (FIRST_MATRIX && row_unit(code_format(FIRST_MATRIX)) % Vector16<T>::COUNT == 0) || K % Vector16<T>::COUNT == 0;
}

/// A run of any format, between its load and its decoding.
struct PackedRun {
  uint words[RUN_MAX_WORDS];
  float first;
  float second;
};

template <typename Run>
inline void pack_run(thread const QuantizedMatrix& matrix, uint row, uint index, thread PackedRun& to, Run read) {
  static_assert(Run::WORDS <= RUN_MAX_WORDS, "a run waits in registers");
  read.load(matrix, row, index);
  UNROLL
  for (uint i = 0; i < Run::WORDS; ++i)
    to.words[i] = read.words[i];
  to.first = read.first;
  to.second = read.second;
}
template <typename Run>
inline void unpack_run(thread const PackedRun& from, thread const QuantizedMatrix&, uint, uint, thread Run& to) {
  UNROLL
  for (uint i = 0; i < Run::WORDS; ++i)
    to.words[i] = from.words[i];
  to.first = from.first;
  to.second = from.second;
}
/// Dense runs are too long to wait in registers: they are read when they are decoded.
template <uint BITS>
inline void pack_run(thread const QuantizedMatrix&, uint, uint, thread PackedRun&, DenseRun<BITS>) {}
template <uint BITS>
inline void unpack_run(thread const PackedRun&, thread const QuantizedMatrix& matrix, uint row, uint index,
                       thread DenseRun<BITS>& to) {
  to.load(matrix, row, index);
}

/// Reads run `index` of a row.
struct PackRun {
  thread const QuantizedMatrix& matrix;
  uint row;
  uint index;
  thread PackedRun& to;

  template <typename Run>
  void run() thread const {
    pack_run(matrix, row, index, to, Run());
  }
};

/// Writes the weights of a run from element k of a staged row on.
template <typename T, typename Layout>
struct DecodeRun {
  thread const PackedRun& from;
  thread const QuantizedMatrix& matrix;
  uint row; // of the matrix
  uint index;
  threadgroup T* tile;
  uint staged_row;
  uint k;

  template <typename Run>
  void run() thread const {
    Run decoder;
    unpack_run(from, matrix, row, index, decoder);
    constexpr uint COUNT = Vector16<T>::COUNT;
    UNROLL
    for (uint first = 0; first < RUN_ELEMENTS; first += COUNT) {
      Vector16<T> vector;
      UNROLL
      for (uint e = 0; e < COUNT; ++e)
        vector.element[e] = T(decoder.weight(first + e));
      *reinterpret_cast<threadgroup Vector16<T>*>(tile + Layout::at(staged_row, k + first)) = vector;
    }
  }
};

/// Stages MATRICES * COLUMNS weight rows, those of matrix 0 first. Each thread has runs of its own; those of a
/// simdgroup are of one matrix where a matrix has a simdgroup's worth of them, so that it decodes one format at a time.
template <typename T, uint MATRICES, uint COLUMNS, uint K_TILE, typename Layout>
struct QuantizedStager {
  static constexpr constant uint THREADS = GEMM_LANE_SIMDGROUPS * SIMD_WIDTH;
  static constexpr constant uint ROW_RUNS = K_TILE / RUN_ELEMENTS;
  static_assert(K_TILE % RUN_ELEMENTS == 0, "a stage holds whole runs");
  static constexpr constant uint RUNS = MATRICES * COLUMNS * ROW_RUNS;
  static constexpr constant uint PASSES = (RUNS + THREADS - 1) / THREADS;

  QuantizedMatrix matrices[MATRICES];
  uint first_column;
  uint columns;
  uint thread_index;
  PackedRun packed[SIMD_WIDTH == 1 ? 1 : PASSES];

  void load(uint k0, uint K) thread {
    if (SIMD_WIDTH == 1) // no loads under way: store loads
      return;
    UNROLL
    for (uint pass = 0; pass < PASSES; ++pass)
      load_run(place(pass), k0, K, packed[pass]);
  }

  void store(threadgroup T* tile, uint k0, uint K) thread {
    if (SIMD_WIDTH == 1) {
      for (uint run = 0; run < RUNS; ++run) {
        load_run(run, k0, K, packed[0]);
        store_run(run, k0, K, tile, packed[0]);
      }
      return;
    }
    UNROLL
    for (uint pass = 0; pass < PASSES; ++pass)
      store_run(place(pass), k0, K, tile, packed[pass]);
  }

private:
  uint place(uint pass) thread const { return thread_index + pass * THREADS; }

  /// Of a staged row. A place chosen at run time is in memory, where what the kernel was compiled for is forgotten.
  QuantizedMatrix matrix_of(uint row) thread const {
    QuantizedMatrix matrix = matrices[row / COLUMNS];
    specialize(matrix, row < COLUMNS ? FIRST_MATRIX : SECOND_MATRIX);
    return matrix;
  }

  /// Of a staged row; past the last column the last one again (its products are not stored).
  uint matrix_row(uint row) thread const { return min(first_column + row % COLUMNS, columns - 1); }

  void load_run(uint run, uint k0, uint K, thread PackedRun& to) thread const {
    const uint row = run / ROW_RUNS, k = k0 + run % ROW_RUNS * RUN_ELEMENTS;
    if (run >= RUNS || k + RUN_ELEMENTS > K)
      return;
    const QuantizedMatrix matrix = matrix_of(row);
    const PackRun pack{matrix, matrix_row(row), k / RUN_ELEMENTS, to};
    with_decoder(matrix, pack);
  }

  void store_run(uint run, uint k0, uint K, threadgroup T* tile, thread const PackedRun& from) thread const {
    const uint row = run / ROW_RUNS, k = run % ROW_RUNS * RUN_ELEMENTS;
    if (run >= RUNS)
      return;
    if (k0 + k + RUN_ELEMENTS <= K) {
      const QuantizedMatrix matrix = matrix_of(row);
      const DecodeRun<T, Layout> decode{from, matrix, matrix_row(row), (k0 + k) / RUN_ELEMENTS, tile, row, k};
      with_decoder(matrix, decode);
      return;
    }
    const QuantizedMatrix matrix = matrix_of(row);
    const uint tail = has_tail(matrix, K) ? K : 0;
    for (uint e = 0; e < RUN_ELEMENTS; e += Vector16<T>::COUNT)
      for (uint i = 0; i < Vector16<T>::COUNT; ++i) {
        const uint at = k0 + k + e + i;
        tile[Layout::at(row, k + e) + i] = T(at < tail ? tail_weight(matrix, matrix_row(row), at) : 0.0f);
      }
  }
};
