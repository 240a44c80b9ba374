// half on NVIDIA GPUs: 16 bits that arithmetic sees as a float, converted by the GPU's instructions (round to nearest
// even). NVRTC has no such type without the headers of the CUDA toolkit.
#pragma once

struct half {
  uint16_t bits;

  half() = default;
  METAL_FUNC constexpr half(float value) : bits() { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
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
