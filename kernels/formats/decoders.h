// From a matrix to its decoder: the one place that lists them.
#pragma once
#include "affine.h"
#include "dense_run.h"
#include "mxfp4.h"

/// visit.run<Decoder>() with the decoder of `matrix`. Uniform in a simdgroup, outside of its inner loops.
template <typename Visit>
inline void with_decoder(thread const QuantizedMatrix& matrix, thread const Visit& visit) {
  switch (matrix.format * 64 + matrix.bits) {
  case FORMAT_AFFINE * 64 + 2:
    return visit.template run<AffineRun<2>>();
  case FORMAT_AFFINE * 64 + 3:
    return visit.template run<AffineRun<3>>();
  case FORMAT_AFFINE * 64 + 4:
    return visit.template run<AffineRun<4>>();
  case FORMAT_AFFINE * 64 + 5:
    return visit.template run<AffineRun<5>>();
  case FORMAT_AFFINE * 64 + 6:
    return visit.template run<AffineRun<6>>();
  case FORMAT_AFFINE * 64 + 8:
    return visit.template run<AffineRun<8>>();
  case FORMAT_MXFP4 * 64 + 4:
    return visit.template run<MxRun<FORMAT_MXFP4, 4>>();
  case FORMAT_MXFP8 * 64 + 8:
    return visit.template run<MxRun<FORMAT_MXFP8, 8>>();
  case FORMAT_DENSE * 64 + WORD_BITS / 2:
    return visit.template run<DenseRun<WORD_BITS / 2>>();
  case FORMAT_DENSE * 64 + WORD_BITS:
    return visit.template run<DenseRun<WORD_BITS>>();
  default:
    return visit.template run<NvRun>();
  }
}
