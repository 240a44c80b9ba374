// Which expert an assignment (token, slot) goes to, and which lanes of a simdgroup hold the same one.
#pragma once
#include "../tiles/scalar.h"

#ifdef __METAL_VERSION__

/// The expert of `slot` of `token`: slots from top_k on are the shared experts E, E + 1, ...; NO_EXPERT where the id
/// names none. `Args`: ExpertsArgs or CombineArgs.
template <typename Args>
inline uint slot_expert(device const int* ids, constant Args& args, uint token, uint slot) {
  if (slot >= args.top_k)
    return args.experts + slot - args.top_k;
  return load_id(ids, ulong(token) * args.ids_token_stride + ulong(slot) * args.ids_slot_stride, args.id_words,
                 args.experts);
}

inline ulong lanes_where(bool condition) { return ulong(simd_vote::vote_t(simd_ballot(condition))); }
/// The lanes before this one, as bits.
inline ulong lanes_before(uint lane) { return (1ul << lane) - 1; }

/// The lanes that hold the same expert as this one, as bits: one vote per bit of the expert, which is below `experts`.
/// 0 where this lane has none.
inline ulong lanes_of_expert(uint expert, uint experts) {
  const bool present = expert != NO_EXPERT;
  ulong lanes = lanes_where(present);
  if (SIMD_WIDTH > 1) {
    for (uint bit = 1; bit < experts; bit <<= 1) {
      const bool set = (expert & bit) != 0;
      const ulong with = lanes_where(set);
      lanes &= set ? with : ~with;
    }
  }
  return present ? lanes : 0;
}

/// The n-th lane of those in `lanes`, which are more than n.
inline uint nth_lane(uint lanes, uint n) {
  uint first = 0;
  UNROLL
  for (uint half_size = SIMD_WIDTH / 2; half_size > 0; half_size /= 2) {
    const uint lower = uint(popcount(lanes >> first & ((1u << half_size) - 1)));
    const bool above = n >= lower;
    first += above ? half_size : 0;
    n -= above ? lower : 0;
  }
  return first;
}

#endif
