// Stacks, and switching between them: what the exact engine makes a kernel's threads of.
#pragma once

#include <cstddef>
#include <cstdint>

/// Saves the registers that a call preserves on the current stack, stores the stack pointer in `*from`, and continues
/// where the stack `to` was left. Floating-point modes are shared by all.
extern "C" void metal_sim_switch_stack(void** from, void* to);

namespace metal_sim {

/// Equal stacks in one mapping, each above a guard that faults. Memory is taken when touched.
class FiberStacks {
public:
  FiberStacks() = default;
  FiberStacks(const FiberStacks&) = delete;
  FiberStacks& operator=(const FiberStacks&) = delete;
  ~FiberStacks();

  /// Makes at least `count`. Stacks in use do not survive.
  void reserve(uint32_t count);

  /// A stack pointer that begins `entry` when switched to. `entry` must not return.
  void* begin(uint32_t index, void (*entry)()) const;

  uintptr_t bottom(uint32_t index) const { return base_ + index * STRIDE + GUARD; }
  bool in_guard(uint32_t index, uintptr_t address) const { return address - (bottom(index) - GUARD) < GUARD; }
  /// Whether `address` belongs to any of the stacks.
  bool contains(uintptr_t address) const { return address - base_ < count_ * STRIDE; }

  // Kernels keep accumulators on the stack: a few KiB, several times that where the compiler does not optimise.
  static constexpr size_t BYTES = 240 << 10;

private:
  static constexpr size_t GUARD = 16 << 10; // whole pages at any page size up to 16 KiB
  static constexpr size_t STRIDE = GUARD + BYTES;

  uintptr_t base_ = 0;
  uint32_t count_ = 0;
};

} // namespace metal_sim
