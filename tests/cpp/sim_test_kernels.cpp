// A kernel library written by hand, for tests of the engines: some kernels are right, most are broken on purpose.
//
// One file serves both engines: copied to `exact.so` it is a library of the exact engine, else one of the native
// engine.
#include "sim/kernel_library.h"

#include <atomic>
#include <cstring>
#include <dlfcn.h>
#include <string_view>

namespace {

using namespace metal_sim;

const ExactServices* services = nullptr;

// What the memory instrumentation of a compiled kernel does.
template <class T>
T load(const T* address) {
  if (services)
    services->access(address, sizeof(T), Access::Read);
  return *address;
}

template <class T>
void store(T* address, T value) {
  if (services)
    services->access(address, sizeof(T), Access::Write);
  *address = value;
}

uint32_t increment(uint32_t* address) {
  if (services)
    services->access(address, sizeof *address, Access::Atomic);
  return __atomic_fetch_add(address, 1, __ATOMIC_RELAXED);
}

void threadgroup_barrier(uint32_t memory) {
  if (services)
    services->threadgroup_barrier(memory);
}

void simdgroup_barrier(uint32_t memory) {
  if (services)
    services->simdgroup_barrier(memory);
}

template <class T>
T* buffer(const KernelArguments& arguments, uint32_t index) {
  return static_cast<T*>(arguments.buffers[index]);
}

uint32_t* shared(const KernelArguments& arguments) { return static_cast<uint32_t*>(arguments.threadgroup[0]); }

uint32_t linear(Size3 place, Size3 size) { return (place.z * size.y + place.y) * size.x + place.x; }

uint32_t group(const ThreadContext& thread) {
  return linear(thread.threadgroup_position_in_grid, thread.threadgroups_per_grid);
}

uint32_t in_group(const ThreadContext& thread) { return thread.thread_index_in_threadgroup; }

uint32_t threads(const ThreadContext& thread) {
  const Size3 size = thread.threads_per_threadgroup;
  return size.x * size.y * size.z;
}

uint32_t in_grid(const ThreadContext& thread) { return group(thread) * threads(thread) + in_group(thread); }

// out[i] = in[i] for i < *count.
void copy(const KernelArguments& a, const ThreadContext& t) {
  const uint32_t i = in_grid(t);
  if (i < load(buffer<const uint32_t>(a, 2)))
    store(buffer<uint32_t>(a, 1) + i, load(buffer<const uint32_t>(a, 0) + i));
}

// out[i] = 1 + out[i], for in-place and ordering tests.
void add_one(const KernelArguments& a, const ThreadContext& t) {
  uint32_t* out = buffer<uint32_t>(a, 0) + in_grid(t);
  store(out, load(out) + 1);
}

// out[i] = everything that the attributes say about thread i: 8 words.
void describe(const KernelArguments& a, const ThreadContext& t) {
  uint32_t* out = buffer<uint32_t>(a, 0) + in_grid(t) * 8;
  store(out + 0, group(t));
  store(out + 1, in_group(t));
  store(out + 2, t.thread_index_in_simdgroup);
  store(out + 3, t.simdgroup_index_in_threadgroup);
  store(out + 4, t.simdgroups_per_threadgroup);
  store(out + 5, t.thread_position_in_threadgroup.x);
  store(out + 6, t.thread_position_in_threadgroup.y);
  store(out + 7, t.thread_position_in_threadgroup.z);
}

// Takes until the host stores something to buffer 0.
void wait_for_host(const KernelArguments& a, const ThreadContext&) {
  while (!__atomic_load_n(buffer<uint32_t>(a, 0), __ATOMIC_ACQUIRE)) {
  }
}

void read_past_end(const KernelArguments& a, const ThreadContext& t) {
  store(buffer<uint32_t>(a, 1) + in_grid(t), load(buffer<const uint32_t>(a, 0) + in_grid(t) + 1));
}

void read_before_begin(const KernelArguments& a, const ThreadContext&) { load(buffer<const uint32_t>(a, 0) - 1); }

void read_null(const KernelArguments&, const ThreadContext&) { load(static_cast<const uint32_t*>(nullptr)); }

void write_read_only(const KernelArguments& a, const ThreadContext&) { store(buffer<uint32_t>(a, 0), 1u); }

void write_past_threadgroup_memory(const KernelArguments& a, const ThreadContext& t) {
  store(shared(a) + in_group(t) + 1, 1u);
}

// Reads one range that begins in one bound buffer and ends in the next.
void read_across(const KernelArguments& a, const ThreadContext&) {
  services->access(buffer<const uint32_t>(a, 0), 16, Access::Read);
}

// Uses the stack and constants of the library.
void use_own_memory(const KernelArguments& a, const ThreadContext& t) {
  static const uint32_t squares[] = {0, 1, 4, 9};
  uint32_t local[4];
  for (uint32_t i = 0; i < 4; ++i)
    store(local + i, load(squares + i));
  store(buffer<uint32_t>(a, 0) + in_grid(t), load(local + in_grid(t) % 4));
}

void read_stack_of_another(const KernelArguments& a, const ThreadContext& t) {
  uint32_t local = in_group(t);
  const uint32_t* mine = &local;
  const void* const* all = services->exchange("pointer", &mine, sizeof mine);
  const uint32_t* theirs;
  std::memcpy(&theirs, all[t.thread_index_in_simdgroup ^ 1], sizeof theirs);
  store(buffer<uint32_t>(a, 0) + in_grid(t), load(theirs));
}

void overflow_stack(const KernelArguments&, const ThreadContext&) {
  const char here = 0;
  // Through an integer: the compiler knows the size of `here`.
  load(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(&here) - (241 << 10)));
}

// Every thread writes the same word.
void race_writes(const KernelArguments& a, const ThreadContext& t) { store(shared(a), in_group(t)); }

// Each thread reads what its neighbour wrote; `order` is what happens between.
template <class Order>
void exchange_with_neighbour(const KernelArguments& a, const ThreadContext& t, Order order) {
  store(shared(a) + in_group(t), in_group(t));
  order();
  store(buffer<uint32_t>(a, 0) + in_grid(t), load(shared(a) + (in_group(t) + 1) % threads(t)));
}

void neighbour_unordered(const KernelArguments& a, const ThreadContext& t) {
  exchange_with_neighbour(a, t, [] {});
}

void neighbour_barrier(const KernelArguments& a, const ThreadContext& t) {
  exchange_with_neighbour(a, t, [] { threadgroup_barrier(MEMORY_THREADGROUP); });
}

void neighbour_wrong_memory(const KernelArguments& a, const ThreadContext& t) {
  exchange_with_neighbour(a, t, [] { threadgroup_barrier(MEMORY_DEVICE); });
}

void neighbour_simdgroup_barrier(const KernelArguments& a, const ThreadContext& t) {
  exchange_with_neighbour(a, t, [] { simdgroup_barrier(MEMORY_THREADGROUP); });
}

// All threads read a word, then one overwrites it.
void race_write_after_read(const KernelArguments& a, const ThreadContext& t) {
  if (in_group(t) == 0)
    store(shared(a), 7u);
  threadgroup_barrier(MEMORY_THREADGROUP);
  const uint32_t value = load(shared(a));
  if (in_group(t) == 0)
    store(shared(a), value);
}

// Counts threads in threadgroup memory and in out[0].
void count_atomically(const KernelArguments& a, const ThreadContext& t) {
  if (in_group(t) == 0)
    store(shared(a), 0u);
  threadgroup_barrier(MEMORY_THREADGROUP);
  increment(shared(a));
  increment(buffer<uint32_t>(a, 0));
  threadgroup_barrier(MEMORY_THREADGROUP);
  if (in_group(t) == 0)
    store(buffer<uint32_t>(a, 0) + 1 + group(t), load(shared(a)));
}

void race_atomic_with_plain(const KernelArguments& a, const ThreadContext& t) {
  if (in_group(t) == 0)
    store(buffer<uint32_t>(a, 0), 0u);
  else
    increment(buffer<uint32_t>(a, 0));
}

// Every threadgroup writes out[0].
void race_threadgroups(const KernelArguments& a, const ThreadContext& t) {
  if (in_group(t) == 0)
    store(buffer<uint32_t>(a, 0), group(t));
}

// A threadgroup reads what another writes in the same dispatch.
void race_read_other_threadgroup(const KernelArguments& a, const ThreadContext& t) {
  uint32_t* out = buffer<uint32_t>(a, 0);
  if (in_group(t) == 0)
    store(out + group(t), load(out + (group(t) + 1) % t.threadgroups_per_grid.x));
}

void diverge_at_barrier(const KernelArguments&, const ThreadContext& t) {
  if (in_group(t) < 5)
    threadgroup_barrier(MEMORY_THREADGROUP);
}

void diverge_in_operations(const KernelArguments&, const ThreadContext& t) {
  const uint32_t value = 0;
  services->exchange(in_group(t) < 5 ? "simd_sum" : "simd_max", &value, sizeof value);
}

void barrier_against_exchange(const KernelArguments&, const ThreadContext& t) {
  const uint32_t value = 0;
  if (in_group(t) % 2)
    simdgroup_barrier(MEMORY_NONE);
  else
    services->exchange("simd_sum", &value, sizeof value);
}

// out[i] = sum of the positions of the live threads of the simdgroup, three times over; odd threads leave first.
void simd_sum(const KernelArguments& a, const ThreadContext& t) {
  uint32_t value = in_group(t);
  if (value % 2)
    return;
  for (int round = 0; round < 3; ++round) {
    const void* const* all = services->exchange("simd_sum", &value, sizeof value);
    uint32_t sum = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      uint32_t one = 0;
      if (all[lane])
        std::memcpy(&one, all[lane], sizeof one);
      sum += one;
    }
    store(buffer<uint32_t>(a, 0) + in_grid(t), sum);
  }
}

// out[i] = what stands in threadgroup memory that nobody has written.
void read_unwritten(const KernelArguments& a, const ThreadContext& t) {
  store(buffer<uint32_t>(a, 0) + in_grid(t), load(shared(a) + in_group(t)));
}

// out[1 + n] = the n-th thread to get here; out[0] counts.
void record_order(const KernelArguments& a, const ThreadContext& t) {
  uint32_t* out = buffer<uint32_t>(a, 0);
  store(out + 1 + increment(out), in_grid(t));
}

constexpr KernelArgument input = {ArgumentKind::Buffer, 0, 4, false, "in"};
constexpr KernelArgument output_0 = {ArgumentKind::Buffer, 0, 4, true, "out"};
constexpr KernelArgument output_1 = {ArgumentKind::Buffer, 1, 4, true, "out"};
constexpr KernelArgument next_input = {ArgumentKind::Buffer, 1, 4, false, "next"};
constexpr KernelArgument count = {ArgumentKind::Buffer, 2, 4, false, "count"};
constexpr KernelArgument memory = {ArgumentKind::Threadgroup, 0, 4, true, "memory"};

constexpr KernelArgument in_out_count[] = {input, output_1, count};
constexpr KernelArgument in_out[] = {input, output_1};
constexpr KernelArgument in_only[] = {input};
constexpr KernelArgument in_next[] = {input, next_input};
constexpr KernelArgument out_only[] = {output_0};
constexpr KernelArgument memory_only[] = {memory};
constexpr KernelArgument out_memory[] = {output_0, memory};

template <uint32_t count>
constexpr Kernel kernel(const char* name, void (*entry)(const KernelArguments&, const ThreadContext&),
                        const KernelArgument (&arguments)[count], uint32_t max_threads = 1024) {
  return {name, entry, arguments, count, max_threads, nullptr, 0};
}

constexpr Kernel table[] = {
    kernel("copy", copy, in_out_count),
    kernel("add_one", add_one, out_only),
    kernel("describe", describe, out_only),
    kernel("at_most_64_threads", describe, out_only, 64),
    kernel("wait_for_host", wait_for_host, out_only),
    kernel("read_past_end", read_past_end, in_out),
    kernel("read_before_begin", read_before_begin, in_only),
    kernel("read_null", read_null, in_only),
    kernel("write_read_only", write_read_only, in_only),
    kernel("write_past_threadgroup_memory", write_past_threadgroup_memory, memory_only),
    kernel("read_across", read_across, in_next),
    kernel("use_own_memory", use_own_memory, out_only),
    kernel("read_stack_of_another", read_stack_of_another, out_only),
    kernel("overflow_stack", overflow_stack, out_only),
    kernel("race_writes", race_writes, memory_only),
    kernel("neighbour_unordered", neighbour_unordered, out_memory),
    kernel("neighbour_barrier", neighbour_barrier, out_memory),
    kernel("neighbour_wrong_memory", neighbour_wrong_memory, out_memory),
    kernel("neighbour_simdgroup_barrier", neighbour_simdgroup_barrier, out_memory),
    kernel("race_write_after_read", race_write_after_read, memory_only),
    kernel("count_atomically", count_atomically, out_memory),
    kernel("race_atomic_with_plain", race_atomic_with_plain, out_only),
    kernel("race_threadgroups", race_threadgroups, out_only),
    kernel("race_read_other_threadgroup", race_read_other_threadgroup, out_only),
    kernel("diverge_at_barrier", diverge_at_barrier, out_only),
    kernel("diverge_in_operations", diverge_in_operations, out_only),
    kernel("barrier_against_exchange", barrier_against_exchange, out_only),
    kernel("simd_sum", simd_sum, out_only),
    kernel("read_unwritten", read_unwritten, out_memory),
    kernel("record_order", record_order, out_only),
};
constexpr uint32_t KERNELS = sizeof table / sizeof *table;

} // namespace

extern "C" __attribute__((visibility("default"))) const KernelLibrary* metal_sim_kernel_library() {
  static const KernelLibrary library = [] {
    static const Kernel* pointers[KERNELS];
    for (uint32_t i = 0; i < KERNELS; ++i)
      pointers[i] = &table[i];
    Dl_info info;
    dladdr(reinterpret_cast<const void*>(table), &info);
    const std::string_view file = info.dli_fname;
    const bool exact = file.ends_with("exact.so");
    const uint32_t abi = file.ends_with("future.so") ? KERNEL_LIBRARY_ABI + 1 : KERNEL_LIBRARY_ABI;
    return KernelLibrary{abi,     exact ? "exact" : "native", "test", exact ? 32u : 1u, pointers,
                         KERNELS, exact ? &services : nullptr};
  }();
  return &library;
}
