// What cuda_trellis.h does in words of the machine. Compute capability 8.0 or later.
#pragma once

#include "cuda_load.h"
#include "cuda_tile.h"

namespace metal_sim {

METAL_FUNC void load_words(const uint* from, uint32_t& first, uint32_t& second) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "l"(from));
}
METAL_FUNC void load_words(const uint* from, uint32_t& word) {
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(from));
}

/// Of two words the sums of their fp16 halves, the first one's in the low half.
METAL_FUNC uint32_t add_halves(uint32_t first, uint32_t second) {
  uint32_t sums;
  asm("{.reg .f16 a, b, c, d;\n\t"
      "mov.b32 {a, b}, %1;\n\t"
      "mov.b32 {c, d}, %2;\n\t"
      "add.rn.f16 a, a, b;\n\t"
      "add.rn.f16 c, c, d;\n\t"
      "mov.b32 %0, {a, c};}"
      : "=r"(sums)
      : "r"(first), "r"(second));
  return sums;
}

/// fp16 a * b + c in both halves; a's low half twice if TWICE.
template <bool TWICE>
METAL_FUNC uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  if (TWICE)
    asm("{.reg .f16 low, high;\n\t"
        ".reg .b32 both;\n\t"
        "mov.b32 {low, high}, %1;\n\t"
        "mov.b32 both, {low, low};\n\t"
        "fma.rn.f16x2 %0, both, %2, %3;}"
        : "=r"(result)
        : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

/// product = a b in bytes without signs: 16 rows, 32 columns of a, 8 columns of b.
METAL_FUNC void multiply_bytes(uint32_t (&product)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%10, %10, %10, %10};"
               : "=r"(product[0]), "=r"(product[1]), "=r"(product[2]), "=r"(product[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}

} // namespace metal_sim
