// From a matrix to its decoder: written by cmake/list_decoders.py from lines of the other headers.
#pragma once
#include "affine.h"
#include "dense_run.h"
#include "mxfp4.h"

/// visit.run<Decoder>() with the decoder of `matrix`. Uniform in a simdgroup, outside of its inner loops. Inlined
/// always: a kernel that is compiled for one format must not keep the decoders of the others.
template <typename Visit>
METAL_FUNC void with_decoder(thread const QuantizedMatrix& matrix, thread const Visit& visit) {
  switch (matrix.format * 64 + matrix.bits) {
  case AffineRun<2>::FORMAT * 64 + AffineRun<2>::BITS:
    return visit.template run<AffineRun<2>>();
  case AffineRun<3>::FORMAT * 64 + AffineRun<3>::BITS:
    return visit.template run<AffineRun<3>>();
  case AffineRun<4>::FORMAT * 64 + AffineRun<4>::BITS:
    return visit.template run<AffineRun<4>>();
  case AffineRun<5>::FORMAT * 64 + AffineRun<5>::BITS:
    return visit.template run<AffineRun<5>>();
  case AffineRun<6>::FORMAT * 64 + AffineRun<6>::BITS:
    return visit.template run<AffineRun<6>>();
  case AffineRun<8>::FORMAT * 64 + AffineRun<8>::BITS:
    return visit.template run<AffineRun<8>>();
  case DenseRun<WORD_BITS / 2>::FORMAT * 64 + DenseRun<WORD_BITS / 2>::BITS:
    return visit.template run<DenseRun<WORD_BITS / 2>>();
  case DenseRun<WORD_BITS>::FORMAT * 64 + DenseRun<WORD_BITS>::BITS:
    return visit.template run<DenseRun<WORD_BITS>>();
  case MxRun<FORMAT_MXFP4, 4>::FORMAT * 64 + MxRun<FORMAT_MXFP4, 4>::BITS:
    return visit.template run<MxRun<FORMAT_MXFP4, 4>>();
  case MxRun<FORMAT_MXFP8, 8>::FORMAT * 64 + MxRun<FORMAT_MXFP8, 8>::BITS:
    return visit.template run<MxRun<FORMAT_MXFP8, 8>>();
  default:
    return visit.template run<NvRun>();
  }
}
