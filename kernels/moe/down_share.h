// How the simdgroups of a threadgroup divide `down` of one token among them: the K of its slots, one after the other,
// in pieces of as many elements as a simdgroup takes at a time.
#pragma once
#include "assignment.h"
#include "experts.h"

constexpr constant uint DOWN_LANE_SIMDGROUPS = simdgroups(DOWN_DECODE_SIMDGROUPS, SIMD_WIDTH);
/// What a simdgroup asks for ahead of h (tiles/early_start.h), of a row of weights of one slot: all of it in layers of
/// many small experts, elsewhere the first of many loads.
constexpr constant uint DOWN_PREFETCH_BYTES = 2048;

/// Elements begin .. end - 1 of the K of a slot.
struct DownPart {
  uint slot;
  uint K;
  uint begin;
  uint end; // begin: nothing
};

/// Pieces first .. last - 1 of PIECE elements.
template <uint PIECE>
struct DownShare {
  uint first;
  uint last;

  DownShare(constant ExpertsArgs& args, uint simdgroup) {
    const uint pieces =
        args.top_k * divide_up(args.intermediate, PIECE) + args.shared * divide_up(args.shared_intermediate, PIECE);
    const uint share = divide_up(pieces, DOWN_LANE_SIMDGROUPS);
    first = min(simdgroup * share, pieces);
    last = min(first + share, pieces);
  }

  /// What the share has of the n-th slot that it has something of.
  DownPart part(constant ExpertsArgs& args, uint n) thread const {
    DownPart found{0, 0, 0, 0};
    uint slot_first = 0, passed = 0;
    for (uint slot = 0; slot < args.top_k + args.shared && slot_first < last; ++slot) {
      const uint K = slot < args.top_k ? args.intermediate : args.shared_intermediate;
      const uint begin = (max(first, slot_first) - slot_first) * PIECE, end = min((last - slot_first) * PIECE, K);
      slot_first += divide_up(K, PIECE);
      if (begin < end && passed++ == n)
        found = {slot, K, begin, end};
    }
    return found;
  }
};
