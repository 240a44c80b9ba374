// Products with trellis weights on NVIDIA GPUs' tensor cores: tiles are stored in the order of their fragments.
// Compute capability 8.0 or later.
//
// m16n8k16 takes 16 outputs times 16 inputs as its first factor: of them lane (g, q), g = lane / 4, q = lane % 4, holds
// outputs g and g + 8 at four inputs, which is a run. Inputs are what the product sums over, in any order: so a lane
// takes the four runs of output g of tile q of four tiles, which are 32 consecutive weights, a whole number of words.
// Four products then make all four tiles.
//
// The second factor are rows of x, in fp16: a row is split into two columns, its values rounded and what that leaves
// times 2^11, both scaled by a power of two. Together they have 22 bits. Weights are fp16 as they are. Sums are fp32.
#pragma once

// A test on a processor brings the words of its own.
#ifndef METAL_SIM_TEST_WARPS
#include "cuda_trellis_instructions.h"
#endif

namespace metal_sim {

/// As formats/trellis.h has them.
enum CudaTrellisCodebook : uint { CUDA_TRELLIS_3INST = 0, CUDA_TRELLIS_MCG = 1, CUDA_TRELLIS_MUL1 = 2 };

METAL_FUNC uint32_t trellis_funnel(uint32_t high, uint32_t low, uint32_t shift) {
  return __funnelshift_l(low, high, shift);
}

/// A lane's 32 weights: their words as loaded, then from the 16 bits before them on.
template <uint HALF_BITS>
struct TrellisCodes {
  static constexpr uint WORDS = (HALF_BITS + 1) / 2;
  uint32_t word[WORDS];

  /// Of column g of a tile.
  METAL_FUNC void load(const uint* tile, uint g) {
    const uint* from = tile + g * HALF_BITS / 2;
    if constexpr (HALF_BITS % 8 == 0) {
#pragma unroll
      for (uint i = 0; i < WORDS; i += 4) {
        uint4 four;
        cuda_load_once(from + i, &four);
        word[i] = four.x, word[i + 1] = four.y, word[i + 2] = four.z, word[i + 3] = four.w;
      }
    } else if constexpr (HALF_BITS % 4 == 0) {
#pragma unroll
      for (uint i = 0; i < WORDS; i += 2)
        load_words(from + i, word[i], word[i + 1]);
    } else {
#pragma unroll
      for (uint i = 0; i < WORDS; ++i)
        load_words(from + i, word[i]);
    }
  }

  /// stream[0]: the 16 bits before the weights, in its low half; their own from stream[1] on. All lanes must take part.
  METAL_FUNC void align(uint lane, uint32_t (&stream)[WORDS + 2]) const {
    const uint32_t before = __shfl_sync(ALL_LANES, word[WORDS - 1], (lane + 28) % SIMD_WIDTH);
    stream[WORDS + 1] = 0;
    if constexpr (HALF_BITS % 2 == 0) {
      stream[0] = before;
#pragma unroll
      for (uint i = 0; i < WORDS; ++i)
        stream[i + 1] = word[i];
    } else {
      const uint32_t shift = lane / 4 % 2 * 16; // odd columns begin in the middle of a word
      stream[0] = trellis_funnel(before, word[0], shift);
#pragma unroll
      for (uint i = 0; i < WORDS; ++i)
        stream[i + 1] = trellis_funnel(word[i], i + 1 < WORDS ? word[i + 1] : 0, shift);
    }
  }
};

/// The first bit of the state of weight t of a lane's 32, in its stream.
METAL_FUNC constexpr uint trellis_begin(uint half_bits, uint t) { return (t + 1) * half_bits / 2 + 16; }

/// How far to shift the stream so that all states that begin in one place of a byte begin with a byte, and few words
/// are shifted for them: whole bytes more than it takes where that saves a word.
METAL_FUNC constexpr uint trellis_shift(uint half_bits, uint place) {
  if (place == 0)
    return 0;
  uint best = place, fewest = ~0u;
  for (uint shift = place; shift < SIMD_WIDTH; shift += 8) {
    uint words = 0, seen = ~0u;
    bool possible = true;
    for (uint t = 0; t < 32; ++t) { // 32: the lane's weights
      const uint begin = trellis_begin(half_bits, t);
      if (begin % 8 != place)
        continue;
      possible = possible && begin >= shift;
      const uint word = (begin - shift) / 32, last = (begin - shift + 15) / 32;
      words += (word != seen) + (last != word);
      seen = last;
    }
    if (possible && words < fewest) {
      fewest = words;
      best = shift;
    }
  }
  return best;
}

/// The state of weight t of a lane's 32, twice: in both halves of a word. A permutation of bytes then needs no zeros;
/// the codebook's factor makes up for it.
template <uint HALF_BITS, uint T, uint COUNT>
METAL_FUNC uint32_t trellis_state_twice(const uint32_t (&stream)[COUNT]) {
  constexpr uint BEGIN = trellis_begin(HALF_BITS, T), SHIFT = trellis_shift(HALF_BITS, BEGIN % 8);
  constexpr uint BYTE = (BEGIN - SHIFT) / 8, WORD = BYTE / 4;
  const auto shifted = [&](uint i) {
    return SHIFT == 0 ? stream[i] : trellis_funnel(stream[i], i + 1 < COUNT ? stream[i + 1] : 0, SHIFT);
  };
  const uint32_t early = shifted(WORD);
  // Byte 0 of a word in the ring's order is its most significant one, byte 3 of the permutation's first argument.
  constexpr uint HIGH = 3 - BYTE % 4;
  if constexpr (HIGH > 0)
    return __byte_perm(early, early, (HIGH - 1) * 0x101 | HIGH * 0x1010);
  else
    return __byte_perm(early, shifted(WORD + 1), 0x0707);
}

/// A constant in a register: the compiler would make it anew for each use. All lanes must take part, with the same
/// bits.
METAL_FUNC uint32_t trellis_constant(uint32_t bits) { return __reduce_or_sync(ALL_LANES, bits); }

/// States to the fp16 values of a codebook. All lanes must take part.
template <uint CODEBOOK>
struct TrellisValues {
  /// The codebook's factor over 2^16 + 1, modulo 2^32: for states that stand in both halves of a word.
  static constexpr uint32_t FACTOR = CODEBOOK == CUDA_TRELLIS_3INST ? 0x88DF7C72u : 0xABBF1FEDu;
  static constexpr uint32_t ADDEND = CODEBOOK == CUDA_TRELLIS_3INST ? 64248484u : 0u;
  uint32_t mask = trellis_constant(0x8FFF8FFFu);

  METAL_FUNC explicit TrellisValues(uint) {}

  METAL_FUNC uint32_t halves(uint32_t state) const { return ((state * FACTOR + ADDEND) & mask) ^ 0x3B603B60u; }

  /// value[i]: a pair, of states 2i and 2i + 1.
  METAL_FUNC void operator()(const uint32_t (&state)[8], uint32_t (&value)[4]) const {
#pragma unroll
    for (uint i = 0; i < 4; ++i)
      value[i] = add_halves(halves(state[2 * i]), halves(state[2 * i + 1]));
  }
};

/// fp16 1024 + the sum of the product's four bytes, times 887 / 2^17, minus 10.3828125. Tensor cores make the sums:
/// lane (g, q) has columns 4q to 4q + 3 and 16 + 4q to 16 + 4q + 3 of rows g and g + 8 of a matrix of bytes, four
/// words, and of the product elements 2q and 2q + 1 of these rows. Of the other factor it has the same rows of column
/// g.
template <>
struct TrellisValues<CUDA_TRELLIS_MUL1> {
  static constexpr uint32_t FACTOR = 0xB2AFD12Du;
  /// Twos where an even element is the sum of four columns, and an odd one.
  uint32_t even, odd;
  uint32_t high = trellis_constant(0x7AEE0000u); // fp16 0 and 887 * 2^6

  METAL_FUNC explicit TrellisValues(uint lane) {
    const uint32_t twos = trellis_constant(0x02020202u);
    even = lane / 4 == lane % 4 * 2 ? twos : 0;
    odd = lane / 4 == lane % 4 * 2 + 1 ? twos : 0;
  }

  /// Of twice the sums. An integer below 2048 has the bits of the fp16 of as many times 2^-24, so 887 / 2^18 times it
  /// is 887 * 2^6 times that; 1024 of the addend are of the product. The second value goes to the high half, then the
  /// first below it.
  METAL_FUNC uint32_t pair(uint32_t first, uint32_t second) const {
    return multiply_add_halves<false>(first, 0x00007AEEu, multiply_add_halves<true>(second, high, 0xC2E8C2E8u));
  }

  /// value[i]: a pair, of states 2i and 2i + 1.
  METAL_FUNC void operator()(const uint32_t (&state)[8], uint32_t (&value)[4]) const {
#pragma unroll
    for (uint i = 0; i < 8; i += 4) {
      // Rows g and g + 8 take turns: products of states i and i + 2 are row g's.
      const uint32_t word[4] = {state[i] * FACTOR, state[i + 2] * FACTOR, state[i + 1] * FACTOR, state[i + 3] * FACTOR};
      uint32_t twice[4];
      multiply_bytes(twice, word, even, odd);
      value[i / 2] = pair(twice[0], twice[1]);
      value[i / 2 + 1] = pair(twice[2], twice[3]);
    }
  }
};

/// Run RUN of a lane's column as a first factor, whose inputs are 2 * RUN, 2 * RUN + 1 and eight more each.
template <uint HALF_BITS, uint CODEBOOK, uint RUN, uint COUNT>
METAL_FUNC void trellis_run(uint32_t (&a)[4], const uint32_t (&stream)[COUNT], const TrellisValues<CODEBOOK>& values) {
  const uint32_t state[8] = {
      trellis_state_twice<HALF_BITS, 8 * RUN>(stream),     trellis_state_twice<HALF_BITS, 8 * RUN + 1>(stream),
      trellis_state_twice<HALF_BITS, 8 * RUN + 2>(stream), trellis_state_twice<HALF_BITS, 8 * RUN + 3>(stream),
      trellis_state_twice<HALF_BITS, 8 * RUN + 4>(stream), trellis_state_twice<HALF_BITS, 8 * RUN + 5>(stream),
      trellis_state_twice<HALF_BITS, 8 * RUN + 6>(stream), trellis_state_twice<HALF_BITS, 8 * RUN + 7>(stream)};
  uint32_t value[4];
  values(state, value);
  a[0] = value[0], a[1] = value[2], a[2] = value[1], a[3] = value[3]; // output g + 8 is of the last four
}

/// All runs of a lane's column.
template <uint HALF_BITS, uint CODEBOOK, uint RUN = 0, uint COUNT>
METAL_FUNC void trellis_runs(uint32_t (&a)[4][4], const uint32_t (&stream)[COUNT],
                             const TrellisValues<CODEBOOK>& values) {
  trellis_run<HALF_BITS, CODEBOOK, RUN>(a[RUN], stream, values);
  if constexpr (RUN < 3)
    trellis_runs<HALF_BITS, CODEBOOK, RUN + 1>(a, stream, values);
}

/// sum[f] += runs RUN to 3 of a lane's column times x[f], the lane's eight words: inputs 2j, 2j + 1 and 2j + 8, 2j + 9
/// of its tile in words 2j and 2j + 1.
template <uint HALF_BITS, uint CODEBOOK, uint RUN = 0, uint COUNT, uint FRAGMENTS>
METAL_FUNC void trellis_multiply_add(float (&sum)[FRAGMENTS][4], const uint32_t (&stream)[COUNT],
                                     const uint32_t (&x)[FRAGMENTS][8], const TrellisValues<CODEBOOK>& values) {
  uint32_t a[4];
  trellis_run<HALF_BITS, CODEBOOK, RUN>(a, stream, values);
#pragma unroll
  for (uint f = 0; f < FRAGMENTS; ++f)
    multiply_add_fragments(half{}, sum[f], a, x[f][2 * RUN], x[f][2 * RUN + 1]);
  if constexpr (RUN < 3)
    trellis_multiply_add<HALF_BITS, CODEBOOK, RUN + 1>(sum, stream, x, values);
}

/// Splits block number `block` of 128 of a row of x into the two columns of a second factor: 16 bytes (step, part, q,
/// column) of it are words 4 * part to 4 * part + 3 of tile 4 * step + q. A lane has four consecutive values. The
/// factor of the block, in all lanes.
METAL_FUNC float store_trellis_block(uint4* words, uint block, uint lane, const float (&value)[4]) {
  uint32_t largest = 0;
#pragma unroll
  for (uint i = 0; i < 4; ++i)
    largest = max(largest, __builtin_bit_cast(uint32_t, value[i]) & 0x7FFFFFFFu);
  // The power of two that takes the largest value to 2^14 or just above, of those whose inverse is normal as well.
  const uint32_t exponent = min(268u - (__reduce_max_sync(ALL_LANES, largest) >> 23), 253u);
  const float scale = __builtin_bit_cast(float, exponent << 23);
  uint16_t part[2][4];
#pragma unroll
  for (uint i = 0; i < 4; ++i) {
    const half high = half(value[i] * scale);
    const half low = half((value[i] * scale - float(high)) * 2048.0f);
    part[0][i] = high.bits, part[1][i] = low.bits;
  }
  const uint tile = lane / 4, quarter = lane % 4;
  uint4* of_tile = words + (((2 * block + tile / 4) * 2 + quarter % 2) * 4 + tile % 4) * 2;
#pragma unroll
  for (uint column = 0; column < 2; ++column) {
    uint32_t* to = reinterpret_cast<uint32_t*>(of_tile + column);
    to[quarter / 2] = part[column][0] | uint32_t(part[column][1]) << 16;
    to[quarter / 2 + 2] = part[column][2] | uint32_t(part[column][3]) << 16;
  }
  return __builtin_bit_cast(float, (254u - exponent) << 23);
}

/// sum of a row = factor times the sum of its two columns.
METAL_FUNC float trellis_row_sum(float factor, float high, float low) {
  return factor * (high + low * (1.0f / 2048.0f));
}

/// A lane's codes of two steps, which make a block: those of a step, columns g of TILES tiles of four rows of tiles,
/// are asked for two steps ahead.
template <uint HALF_BITS, uint TILES>
struct TrellisCodesAhead {
  const uint* from;   // of the lane's row of tiles
  size_t step_stride; // words
  uint g;
  TrellisCodes<HALF_BITS> of_step[2][TILES];

  METAL_FUNC TrellisCodesAhead(const uint* first, uint row_stride, uint lane)
      : from(first + size_t(lane % 4) * row_stride), step_stride(size_t(4) * row_stride), g(lane / 4) {
    load(0);
    load(1);
  }

  METAL_FUNC void load(uint s) {
#pragma unroll
    for (uint i = 0; i < TILES; ++i)
      of_step[s][i].load(from + s * step_stride + i * (4 * HALF_BITS), g);
  }
  METAL_FUNC void next_block() { from += 2 * step_stride; }

  /// The streams of a step of this block. MORE: then asks for that of the next one, which `from` is at.
  template <bool MORE, uint COUNT>
  METAL_FUNC void take(uint s, uint lane, uint32_t (&stream)[TILES][COUNT]) {
#pragma unroll
    for (uint i = 0; i < TILES; ++i)
      of_step[s][i].align(lane, stream[i]);
    if (MORE)
      load(s);
  }
};

/// A row of x in shared memory, as the second factor, then the factors of blocks of 128: RotatedRow of
/// moe/rotated_row.h. Rows that several threadgroups multiply are stored like that in device memory.
struct CudaRotatedRow {
  static constexpr uint BLOCK = 128;
  static constexpr uint STEP_WORDS = 16; // of 16 bytes: x of a step, four tiles
  uint4* words;
  float* factor;

  METAL_FUNC CudaRotatedRow(float* memory, uint blocks)
      : words(reinterpret_cast<uint4*>(memory)), factor(memory + blocks * BLOCK) {}

  METAL_FUNC void store(uint block, uint lane, const float (&value)[4]) const {
    const float of_block = store_trellis_block(words, block, lane, value);
    if (lane == 0)
      factor[block] = of_block;
  }

  /// RotatedRow::multiply: sum[i] of column i of tiles, in lanes with q = 0 for outputs g and g + 8.
  template <uint HALF_BITS, uint CODEBOOK, uint TILES>
  METAL_FUNC void multiply(const uint* first, uint row_stride, uint blocks, uint lane, float (&sum)[TILES][2]) const {
    const TrellisValues<CODEBOOK> values(lane);
    const uint4* x = words + lane % 4 * 2 + lane / 4 % 2; // columns beyond the two are never looked at
    TrellisCodesAhead<HALF_BITS, TILES> codes(first, row_stride, lane);
#pragma unroll
    for (uint i = 0; i < TILES; ++i)
      sum[i][0] = sum[i][1] = 0.0f;
    for (uint block = 0; block + 1 < blocks; ++block) {
      codes.next_block();
      add_block<true>(codes, x, values, factor[block], lane, sum);
    }
    add_block<false>(codes, x, values, factor[blocks - 1], lane, sum);
  }

private:
  /// sum += the products of a block, the first of x, which then begins with the next. MORE: codes of that one are asked
  /// for. The last block has a copy of the code of its own: a load that may not be wanted would keep the registers that
  /// it loads to.
  template <bool MORE, uint HALF_BITS, uint TILES, uint CODEBOOK>
  METAL_FUNC static void add_block(TrellisCodesAhead<HALF_BITS, TILES>& codes, const uint4*& x,
                                   const TrellisValues<CODEBOOK>& values, const float& factor, uint lane,
                                   float (&sum)[TILES][2]) {
    float part[TILES][1][4] = {};
    add_step<0, MORE>(codes, x, values, part, lane);
    add_step<1, MORE>(codes, x, values, part, lane);
    x += 2 * STEP_WORDS;
#pragma unroll
    for (uint i = 0; i < TILES; ++i) {
      sum[i][0] += trellis_row_sum(factor, part[i][0][0], part[i][0][1]);
      sum[i][1] += trellis_row_sum(factor, part[i][0][2], part[i][0][3]);
    }
  }

  template <uint S, bool MORE, uint HALF_BITS, uint TILES, uint CODEBOOK>
  METAL_FUNC static void add_step(TrellisCodesAhead<HALF_BITS, TILES>& codes, const uint4* x,
                                  const TrellisValues<CODEBOOK>& values, float (&part)[TILES][1][4], uint lane) {
    uint32_t stream[TILES][TrellisCodes<HALF_BITS>::WORDS + 2];
    codes.template take<MORE>(S, lane, stream);
    const uint4 first = x[S * STEP_WORDS], second = x[S * STEP_WORDS + STEP_WORDS / 2];
    const uint32_t fragment[1][8] = {{first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w}};
#pragma unroll
    for (uint i = 0; i < TILES; ++i)
      trellis_multiply_add<HALF_BITS, CODEBOOK>(part[i], stream[i], fragment, values);
  }
};

} // namespace metal_sim
