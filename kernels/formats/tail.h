// Elements of a row beyond its last whole run.
#pragma once
#include "mxfp4.h"

/// What a format's number of columns is a multiple of: dense weights have any number of them, nvfp4 any number of
/// blocks of 16. All other formats have whole runs alone.
constexpr uint row_unit(uint format) {
  return format == FORMAT_DENSE ? 1 : format == FORMAT_NVFP4 ? RUN_ELEMENTS / 2 : RUN_ELEMENTS;
}

/// Whether K elements of a row of `matrix` are more than whole runs.
inline bool has_tail(thread const QuantizedMatrix& matrix, uint K) {
  return row_unit(matrix.format) != RUN_ELEMENTS && K % RUN_ELEMENTS != 0;
}

/// Element k of a row, one beyond its last whole run.
inline float tail_weight(thread const QuantizedMatrix& matrix, uint row, uint k) {
  if (matrix.format == FORMAT_DENSE)
    return load_scale(matrix.row_codes(row), k, matrix.scale_type);
  const uint pair = matrix.row_codes(row)[k / 2];
  const float scale = e4m3(matrix.row_scales(row)[k / (RUN_ELEMENTS / 2)]) * (E4M3_UNIT * E2M1_UNIT);
  return e2m1(k % 2 ? pair >> 4 : pair & 15) * scale;
}
