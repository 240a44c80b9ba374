// half on NVIDIA GPUs: 16 bits that arithmetic sees as a float, converted by the GPU's instructions (round to nearest
// even). NVRTC has no such type without the headers of the CUDA toolkit.
#pragma once

namespace metal_sim {

/// The same rounding where a constant is evaluated by the compiler.
METAL_FUNC constexpr uint16_t half_bits(float value) {
  const uint32_t word = __builtin_bit_cast(uint32_t, value), absolute = word & 0x7FFFFFFFu;
  const uint16_t sign = uint16_t(word >> 16 & 0x8000u);
  if (absolute > 0x7F800000u) // NaN
    return uint16_t(sign | 0x7E00u);
  if (absolute >= 0x47800000u) // from 2^16 on
    return uint16_t(sign | 0x7C00u);
  if (absolute >= 0x38800000u) { // from 2^-14 on; a carry may end at infinity
    const uint32_t rebiased = absolute - (112u << 23);
    return uint16_t(sign | (rebiased + 0xFFFu + (rebiased >> 13 & 1u)) >> 13);
  }
  const uint32_t shift = 126u - (absolute >> 23); // subnormal: in units of 2^-24
  if (shift > 25u)
    return sign;
  const uint32_t digits = (absolute & 0x7FFFFFu) | 0x800000u, result = digits >> shift;
  const uint32_t rest = digits & ((1u << shift) - 1u), middle = 1u << (shift - 1u);
  return uint16_t(sign | (result + (rest > middle || (rest == middle && (result & 1u)) ? 1u : 0u)));
}

} // namespace metal_sim

struct half {
  uint16_t bits;

  half() = default;
  METAL_FUNC constexpr half(float value) : bits() {
    if (__builtin_is_constant_evaluated())
      bits = metal_sim::half_bits(value);
    else
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  }
  METAL_FUNC constexpr operator float() const {
    float value = 0;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};

METAL_FUNC constexpr half operator-(half a) {
  a.bits ^= 0x8000u;
  return a;
}
