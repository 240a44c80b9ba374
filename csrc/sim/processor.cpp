#include "processor.h"

#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace metal_sim {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d); // leaves zeros where there is no such leaf
  return r;
}

/// Register states that the operating system saves.
uint32_t enabled_states() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool all(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

std::vector<ProcessorLevel> detect() {
  const Registers basic = cpuid(1), extended = cpuid(0x80000001), features = cpuid(7), more = cpuid(7, 1);
  const uint32_t states = basic.c & bit_OSXSAVE ? enabled_states() : 0;
  constexpr uint32_t ymm = 0x06, zmm = 0xE6; // XCR0: SSE and AVX; and opmask, both halves of ZMM

  const bool v2 = all(basic.c, bit_SSE3 | bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT | bit_CMPXCHG16B) &&
                  all(extended.c, bit_LAHF_LM);
  const bool v3 = v2 && all(basic.c, bit_AVX | bit_F16C | bit_FMA | bit_MOVBE) && all(extended.c, bit_LZCNT) &&
                  all(features.b, bit_AVX2 | bit_BMI | bit_BMI2) && all(states, ymm);
  const bool v4 = v3 && all(features.b, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL) &&
                  all(states, zmm);
  const bool bf16 = v4 && all(more.a, 1u << 5); // AVX512_BF16
  return {{"x86-64-v4-bf16", bf16}, {"x86-64-v4", v4}, {"x86-64-v3", v3}, {"x86-64-v2", v2}};
}

#elif defined(__aarch64__)

std::vector<ProcessorLevel> detect() {
  constexpr unsigned long hwcap2_bf16 = 1ul << 14;
  return {{"arm64-bf16", (getauxval(AT_HWCAP2) & hwcap2_bf16) != 0}, {"arm64", true}};
}

#else
#error "kernel libraries are built for x86-64 and arm64"
#endif

} // namespace

const std::vector<ProcessorLevel>& processor_levels() {
  static const std::vector<ProcessorLevel> levels = detect();
  return levels;
}

std::string forced_level() {
  const char* level = std::getenv("METAL_MOE_CPU_LEVEL");
  return level ? level : "";
}

} // namespace metal_sim
