#include "fiber.h"

#include <new>
#include <sys/mman.h>

#if defined(__x86_64__)

asm(R"(
  .text
  .globl metal_sim_switch_stack
  .hidden metal_sim_switch_stack
  .type metal_sim_switch_stack, @function
metal_sim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size metal_sim_switch_stack, . - metal_sim_switch_stack
)");

namespace {
constexpr size_t SAVED_WORDS = 8; // six registers, the return address, and the entry's own return address: none
constexpr size_t RETURN_WORD = 6;
} // namespace

#elif defined(__aarch64__)

asm(R"(
  .text
  .globl metal_sim_switch_stack
  .hidden metal_sim_switch_stack
  .type metal_sim_switch_stack, %function
metal_sim_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size metal_sim_switch_stack, . - metal_sim_switch_stack
)");

namespace {
constexpr size_t SAVED_WORDS = 20;
constexpr size_t RETURN_WORD = 11; // x30
} // namespace

#endif

namespace metal_sim {

FiberStacks::~FiberStacks() {
  if (count_)
    munmap(reinterpret_cast<void*>(base_), count_ * STRIDE);
}

void FiberStacks::reserve(uint32_t count) {
  if (count <= count_)
    return;
  void* memory = mmap(nullptr, count * STRIDE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED)
    throw std::bad_alloc();
  madvise(memory, count * STRIDE, MADV_NOHUGEPAGE); // each touches a few KiB
  if (count_)
    munmap(reinterpret_cast<void*>(base_), count_ * STRIDE);
  base_ = reinterpret_cast<uintptr_t>(memory);
  count_ = count;
  for (uint32_t i = 0; i < count; ++i)
    mprotect(reinterpret_cast<void*>(bottom(i) - GUARD), GUARD, PROT_NONE);
}

void* FiberStacks::begin(uint32_t index, void (*entry)()) const {
  // Stacks that end at the same offset of a page would compete for the same few cache sets.
  const size_t offset = index % 32 * 128;
  auto* words = reinterpret_cast<uintptr_t*>(bottom(index) + BYTES - offset) - SAVED_WORDS;
  for (size_t i = 0; i < SAVED_WORDS; ++i)
    words[i] = 0;
  words[RETURN_WORD] = reinterpret_cast<uintptr_t>(entry);
  return words;
}

} // namespace metal_sim
