// Trellis weights (EXL3): 16 x 16 tiles, each one ring of 256 * bits bits.
//
// The rate is given as `half_bits`, twice the bits of a weight: 2, 4, ... 16, and the odd ones between. Weight t of a
// tile ends at bit ((t + 1) * half_bits) / 2 of the ring, rounded down; the 16 bits that end there are its state, and a
// codebook turns the state into an fp16. A tile is 4 * half_bits words of 32 bits, the most significant bit first.
//
// Weights come in 32 runs of 8. With q = r % 4, run r holds inputs 2q, 2q + 1, 2q + 8, 2q + 9 of output r / 4, then the
// same inputs of output r / 4 + 8. A run takes 4 * half_bits bits of its own and reaches up to 15 bits back into those
// before it, around the ring.
//
// docs/formats.md has the layout of whole matrices.
#pragma once
#include "../tiles/simd.h"

SHARED_CONSTANT uint TRELLIS_TILE = 16; // inputs, and outputs, of a tile
SHARED_CONSTANT uint TRELLIS_RUN = 8;   // weights that are decoded together
SHARED_CONSTANT uint TRELLIS_RUNS = TRELLIS_TILE * TRELLIS_TILE / TRELLIS_RUN;
SHARED_CONSTANT uint TRELLIS_STATE_BITS = 16;

/// The function from states to values, numbered as in records.
enum TrellisCodebook : uint { TRELLIS_3INST = 0, TRELLIS_MCG = 1, TRELLIS_MUL1 = 2 };

/// Bytes of a tile.
constexpr uint trellis_tile_bytes(uint half_bits) { return 16 * half_bits; }

#ifdef __METAL_VERSION__

constexpr constant uint TRELLIS_WORD_BITS = 32; // 32: bits of a word

/// Input and output of weight i of a run, within the tile.
inline uint trellis_input(uint run, uint i) { return 2 * (run & 3) + (i & 1) + 8 * (i >> 1 & 1); }
inline uint trellis_output(uint run, uint i) { return (run >> 2) + 8 * (i >> 2); }

#ifdef METAL_SIM_NATIVE
/// fp32 rounded to fp16, and an fp16 as fp32, for values that are normal or zero as fp16, as those of codebooks are:
/// integer arithmetic that a processor's compiler makes vectors of.
inline float trellis_round(float value) {
  const uint bits = as_type<uint>(value);
  return as_type<float>((bits + 0xFFFu + (bits >> 13 & 1)) & 0xFFFFE000u);
}
inline float trellis_half(uint bits) {
  return as_type<float>(((bits & 0x8000u) << 16) | (((bits & 0x7FFFu) << 13) + 0x38000000u));
}
#else
inline float trellis_round(float value) { return float(half(value)); }
inline float trellis_half(uint bits) { return float(as_type<half>(ushort(bits))); }
#endif

/// The value of a 16-bit state, an fp16.
template <uint CODEBOOK>
inline float trellis_value(uint state) {
  if (CODEBOOK == TRELLIS_MUL1) {
    const uint product = state * 0x83DCD12Du;
    const uint pairs = (product & 0x00FF00FFu) + ((product >> 8) & 0x00FF00FFu);
    const uint bytes = (pairs & 0xFFFFu) + (pairs >> 16); // the sum of the product's four bytes
    // EXL3 has an fp16 fma. The product fits fp32, so that this rounds once too, and to the same fp16 in all states.
    return trellis_round(fma(float(1024 + bytes), 887.0f / 131072.0f, -10.3828125f));
  }
  const uint product = CODEBOOK == TRELLIS_MCG ? state * 0xCBAC1FEDu : state * 89226354u + 64248484u;
  // Of each half the sign and the low bits stay, the exponent becomes one near that of 1.
  const uint halves = (product & 0x8FFF8FFFu) ^ 0x3B603B60u;
  return trellis_round(trellis_half(halves & 0xFFFFu) + trellis_half(halves >> 16));
}

/// Bits `begin` to `begin` + 31 of the words from `word` on, `begin` < 32.
inline uint trellis_bits(uint word, uint next, uint begin) {
  return word << begin | (next >> 1) >> (TRELLIS_WORD_BITS - 1 - begin);
}

/// The words that hold a run's states, from a run's first state on: bit 0 of word 0 is that state's first.
template <uint HALF_BITS>
struct TrellisRun {
  /// Words of a tile; bits of a run; bits from the beginning of the first state to the end of the last; their words.
  static constexpr constant uint TILE_WORDS = 4 * HALF_BITS;
  static constexpr constant uint BITS = 4 * HALF_BITS;
  static constexpr constant uint SPAN = BITS - HALF_BITS / 2 + TRELLIS_STATE_BITS;
  static constexpr constant uint WORDS = (SPAN + TRELLIS_WORD_BITS - 1) / TRELLIS_WORD_BITS;
  /// One more than read, so that a state's second word always has a place.
  uint word[WORDS + 1];

  void load(device const uint* tile, uint run) thread {
    // One turn of the ring more: the first runs begin before its beginning.
    const uint begin = run * BITS + HALF_BITS / 2 + TILE_WORDS * TRELLIS_WORD_BITS - TRELLIS_STATE_BITS;
    uint at = begin / TRELLIS_WORD_BITS;
    at = at >= TILE_WORDS ? at - TILE_WORDS : at;
    uint here = tile[at];
    UNROLL
    for (uint i = 0; i < WORDS; ++i) {
      at = at + 1 == TILE_WORDS ? 0 : at + 1;
      const uint next = tile[at];
      word[i] = trellis_bits(here, next, begin % TRELLIS_WORD_BITS);
      here = next;
    }
    word[WORDS] = 0;
  }

  /// State of weight i.
  uint state(uint i) thread const {
    const uint begin = (i + 1) * HALF_BITS / 2 - HALF_BITS / 2;
    return trellis_bits(word[begin / TRELLIS_WORD_BITS], word[begin / TRELLIS_WORD_BITS + 1],
                        begin % TRELLIS_WORD_BITS) >>
           (TRELLIS_WORD_BITS - TRELLIS_STATE_BITS);
  }
};

/// The 8 values of a run.
template <uint HALF_BITS, uint CODEBOOK>
inline void trellis_decode(device const uint* tile, uint run, thread float (&value)[TRELLIS_RUN]) {
  TrellisRun<HALF_BITS> words;
  words.load(tile, run);
  UNROLL
  for (uint i = 0; i < TRELLIS_RUN; ++i)
    value[i] = trellis_value<CODEBOOK>(words.state(i));
}

#if SIMD_WIDTH == 1
/// The 256 values of a tile, in the ring's order.
template <uint HALF_BITS, uint CODEBOOK>
inline void trellis_decode_tile(device const uint* tile, thread float (&value)[TRELLIS_RUNS * TRELLIS_RUN]) {
#if defined(METAL_SIM_NATIVE) && defined(__AVX2__)
  metal_sim::trellis_decode_tile<HALF_BITS, CODEBOOK>(tile, value);
#else
  constexpr uint WORDS = 4 * HALF_BITS;
  uint ring[WORDS + 2]; // the last word before the first, for states that begin there; and one to read beyond it
  ring[0] = tile[WORDS - 1];
  for (uint i = 0; i < WORDS; ++i)
    ring[i + 1] = tile[i];
  ring[WORDS + 1] = 0;
  for (uint t = 0; t < TRELLIS_RUNS * TRELLIS_RUN; ++t) {
    const uint begin = (t + 1) * HALF_BITS / 2 + TRELLIS_WORD_BITS - TRELLIS_STATE_BITS;
    const uint word = begin / TRELLIS_WORD_BITS;
    value[t] = trellis_value<CODEBOOK>(trellis_bits(ring[word], ring[word + 1], begin % TRELLIS_WORD_BITS) >>
                                       (TRELLIS_WORD_BITS - TRELLIS_STATE_BITS));
  }
#endif
}

/// Four runs have all 16 inputs of two outputs, c and c + 8: elements of x in their order, the same for each c.
constexpr constant uint TRELLIS_ROUND = 4 * TRELLIS_RUN;
/// Sums of a tile: four places, to be added up at the end, for each output; those of output c, then of c + 8.
constexpr constant uint TRELLIS_SUMS = 4 * TRELLIS_TILE;

/// sum[r] += the tile's weights times x[r], for `count` rows. The tile that is taken in its place with the next inputs
/// lies `next` words further on: an engine may ask memory for it early.
template <uint HALF_BITS, uint CODEBOOK, uint ROWS>
inline void trellis_add_tile(device const uint* tile, ulong next, thread const float (&x)[ROWS][TRELLIS_ROUND],
                             uint count, thread float (&sum)[ROWS][TRELLIS_SUMS]) {
#if defined(METAL_SIM_NATIVE) && defined(__AVX2__)
  metal_sim::trellis_add_tile<HALF_BITS, CODEBOOK, ROWS>(tile, next, x, count, sum);
#else
  (void)next;
  float value[TRELLIS_RUNS * TRELLIS_RUN];
  trellis_decode_tile<HALF_BITS, CODEBOOK>(tile, value);
  for (uint r = 0; r < count; ++r)
    for (uint c = 0; c < TRELLIS_TILE / 2; ++c)
      for (uint q = 0; q < 4; ++q)
        for (uint i = 0; i < TRELLIS_RUN; ++i)
          sum[r][c * TRELLIS_RUN + i] += value[c * TRELLIS_ROUND + q * TRELLIS_RUN + i] * x[r][q * TRELLIS_RUN + i];
#endif
}

/// The sum of output n.
inline float trellis_sum(thread const float (&sum)[TRELLIS_SUMS], uint n) {
  const uint first = n % 8 * TRELLIS_RUN + n / 8 * 4;
  return (sum[first] + sum[first + 1]) + (sum[first + 2] + sum[first + 3]);
}
#endif

/// work.run<HALF_BITS, CODEBOOK>() for a whole rate.
template <uint HALF_BITS, typename Work>
inline void with_trellis_codebook(uint codebook, thread const Work& work) {
  switch (codebook) {
  case TRELLIS_3INST:
    return work.template run<HALF_BITS, TRELLIS_3INST>();
  case TRELLIS_MCG:
    return work.template run<HALF_BITS, TRELLIS_MCG>();
  default:
    return work.template run<HALF_BITS, TRELLIS_MUL1>();
  }
}

/// work.run<HALF_BITS, CODEBOOK>() for what a matrix has: rates are chosen here, outside of loops. Rates of n + 1/2
/// exist with mul1 alone. Always inlined: a constant rate leaves one of them.
template <typename Work>
METAL_FUNC void with_trellis_code(uint half_bits, uint codebook, thread const Work& work) {
  switch (half_bits) {
  case 2:
    return with_trellis_codebook<2>(codebook, work);
  case 3:
    return work.template run<3, TRELLIS_MUL1>();
  case 4:
    return with_trellis_codebook<4>(codebook, work);
  case 5:
    return work.template run<5, TRELLIS_MUL1>();
  case 6:
    return with_trellis_codebook<6>(codebook, work);
  case 7:
    return work.template run<7, TRELLIS_MUL1>();
  case 8:
    return with_trellis_codebook<8>(codebook, work);
  case 9:
    return work.template run<9, TRELLIS_MUL1>();
  case 10:
    return with_trellis_codebook<10>(codebook, work);
  case 11:
    return work.template run<11, TRELLIS_MUL1>();
  case 12:
    return with_trellis_codebook<12>(codebook, work);
  case 13:
    return work.template run<13, TRELLIS_MUL1>();
  case 14:
    return with_trellis_codebook<14>(codebook, work);
  case 15:
    return work.template run<15, TRELLIS_MUL1>();
  default:
    return with_trellis_codebook<16>(codebook, work);
  }
}

#endif
