// Elements of a row beyond its last whole run: dense weights have any number of columns, nvfp4 any number of blocks of
// 16. All other formats have whole runs alone.
#pragma once
#include "mxfp4.h"

/// Whether K elements of a row of `matrix` are more than whole runs.
inline bool has_tail(thread const QuantizedMatrix& matrix, uint K) {
  return (matrix.format == FORMAT_DENSE || matrix.format == FORMAT_NVFP4) && K % RUN_ELEMENTS != 0;
}

/// Element k of a row, one beyond its last whole run.
inline float tail_weight(thread const QuantizedMatrix& matrix, uint row, uint k) {
  if (matrix.format == FORMAT_DENSE)
    return load_scale(matrix.row_codes(row), k, matrix.scale_type);
  const uint pair = matrix.row_codes(row)[k / 2];
  const float scale = e4m3(matrix.row_scales(row)[k / (RUN_ELEMENTS / 2)]) * (E4M3_UNIT * E2M1_UNIT);
  return e2m1(k % 2 ? pair >> 4 : pair & 15) * scale;
}
