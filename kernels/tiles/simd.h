// How many threads a simdgroup has, and what follows from it. Read by kernels and by the host code that encodes them.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
using namespace metal;
// Apple GPUs run simdgroups of 32 threads. An engine whose simdgroup is something else defines SIMD_WIDTH before
// this line; kernels never write the number.
#ifndef SIMD_WIDTH
#define SIMD_WIDTH 32
#endif
// A constant that kernels and host code both read: Metal wants those of program scope in the constant address space.
#define SHARED_CONSTANT constexpr constant
#else
#include <cstdint>
using uint = uint32_t;
#define SHARED_CONSTANT constexpr
#endif

/// Simdgroups of a threadgroup, where `wanted` is the number on a GPU. With one-thread simdgroups a threadgroup is one
/// thread: more of them would only divide work that the compiler vectorises.
constexpr uint simdgroups(uint wanted, uint simd_width) { return simd_width == 1 ? 1 : wanted; }

#ifdef __METAL_VERSION__
inline uint divide_up(uint a, uint b) { return (a + b - 1) / b; }

// A loop whose count is a constant and whose body indexes registers.
#if defined(METAL_SIM_CUDA)
#define UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif
// The same where the count is a lane's share: of one-thread simdgroups that is everything, too much to write out.
#if SIMD_WIDTH == 1
#define UNROLL_SHARE
#else
#define UNROLL_SHARE UNROLL
#endif
#endif
