// The engine for validation: runs every thread of a kernel as a fiber, in an order drawn from a seed, and checks what
// each may do.
//
// Threadgroups run one after another in random order, the fibers of one switching only where threads meet (barriers and
// simdgroup operations); whoever can go on is chosen at random. Since every access is checked against what the dispatch
// binds and against what other threads did without order, one schedule finds nearly every race.
#include "access_map.h"
#include "engine.h"
#include "exact_services.h"
#include "fiber.h"
#include "metal_sim/control.h"
#include "objects.h"
#include "race_detector.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <vector>

namespace metal_sim {
namespace {

constexpr size_t MAX_EXCHANGE = 1024;
constexpr uint32_t EXCHANGE_TURNS = 3;    // a table outlives the next exchange: two in use while a third is filled
constexpr uint32_t THREADGROUP_GAP = 256; // around threadgroup arguments: an access past one hits no other

std::atomic<uint64_t>& seed() {
  static std::atomic<uint64_t> value = [] {
    const char* text = std::getenv("METAL_MOE_EXACT_SEED");
    return text ? std::strtoull(text, nullptr, 0) : 0ull;
  }();
  return value;
}

/// splitmix64: small, and good from any seed.
class Random {
public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  uint32_t below(uint32_t limit) { return uint32_t((next() >> 32) * limit >> 32); }

private:
  uint64_t state_;
};

std::string text(Size3 p) {
  std::string text("(");
  text += std::to_string(p.x);
  text += ", ";
  text += std::to_string(p.y);
  text += ", ";
  text += std::to_string(p.z);
  return text += ")";
}

enum class State : uint8_t { Runnable, ThreadgroupBarrier, SimdgroupBarrier, Exchange, Returned };

struct Thread {
  void* stack;
  State state;
  const char* operation; // where state is Exchange
  bool ahead;            // of the end of the dispatch in front
  ThreadContext context;
};

struct Simdgroup {
  uint32_t first, count; // threads
  uint32_t live;         // not returned
  uint32_t in_barrier;
  uint32_t barrier_memory;
  uint32_t in_exchange;
  const char* operation;
  size_t bytes;
  uint32_t turn;
};

/// Why a thread cannot go on. Put into words on the main stack: that of the thread may be all but used up.
struct Fault {
  enum class Kind {
    None,
    OutOfBounds,
    ReadOnly,
    OtherStack,
    StackOverflow,
    Race,
    EarlyRead,
    EarlyWrite,
    OtherOperation,
    ExchangeTooLong
  };
  Kind kind = Kind::None;
  uintptr_t address = 0; // of the access
  size_t bytes = 0;      // of the access or exchange
  Access access = Access::Read;
  Race race;
  const char* operation = nullptr; // of the exchange
};

/// Runs one dispatch at a time.
class Runner {
public:
  std::string run(const Dispatch& dispatch, uint32_t sequence);

  void threadgroup_barrier(uint32_t memory);
  void simdgroup_barrier(uint32_t memory);
  const void* const* exchange(const char* operation, const void* value, size_t bytes);
  uint32_t lane() const { return current_ % simd_width_; }
  void access(uintptr_t address, size_t bytes, Access access);
  void work_ahead(bool ahead);

private:
  static void fiber_entry();

  void place_threadgroup_memory();
  void make_threads();
  void run_threadgroup(uint32_t index);
  void start_threads(uint32_t index);
  void schedule();
  void make_runnable(uint32_t thread);
  void complete_exchange(uint32_t simdgroup);
  [[noreturn]] void thread_returned();
  /// Abandons all fibers and returns to run_threadgroup.
  [[noreturn]] void fail(const Fault& fault);
  [[noreturn]] void fail_access(Fault::Kind kind, uintptr_t address, size_t bytes, Access access);
  void access_early(uintptr_t address, size_t bytes, Access access, const AccessMap::Region& region);
  void remember_writes();
  void access_unusual(uintptr_t address, size_t bytes, Access access, const AccessMap::Region* region);

  std::string who(uint32_t thread) const;
  std::string describe_stall() const;
  std::string describe(const Fault& fault) const;
  std::string describe_race(const Fault& fault) const;

  void** exchange_table(uint32_t simdgroup, uint32_t turn) {
    return tables_.data() + (simdgroup * EXCHANGE_TURNS + turn) * simd_width_;
  }
  std::byte* exchange_values(uint32_t simdgroup, uint32_t turn) {
    return values_.data() + (simdgroup * EXCHANGE_TURNS + turn) * simd_width_ * MAX_EXCHANGE;
  }

  const Dispatch* dispatch_ = nullptr;
  KernelArguments arguments_;
  uint32_t simd_width_ = 1;
  Random random_{0};
  Fault fault_;
  std::string failure_;

  FiberStacks stacks_;
  void* main_stack_ = nullptr;
  uint32_t current_ = 0;       // thread that runs
  uintptr_t stack_bottom_ = 0; // of it

  std::vector<Thread> threads_;
  std::vector<Simdgroup> simdgroups_;
  std::vector<uint32_t> runnable_;
  uint32_t returned_ = 0;
  uint32_t in_barrier_ = 0;
  uint32_t barrier_memory_ = 0;
  uint32_t ahead_ = 0; // threads that work ahead of the end of the dispatch in front

  struct Range {
    uintptr_t begin, end;
  };
  std::vector<Range> written_; // what the dispatch in front may have written

  std::vector<void*> tables_;
  std::vector<std::byte> values_;
  std::vector<std::byte> threadgroup_memory_;
  AccessMap map_;
  RaceDetector races_;
};

// The runner whose fibers run on this thread. Looked up at every access of a kernel, hence the model that costs one
// load; a library loaded late has room for a pointer.
__attribute__((tls_model("initial-exec"))) thread_local Runner* active = nullptr;

std::string Runner::run(const Dispatch& dispatch, uint32_t sequence) {
  dispatch_ = &dispatch;
  simd_width_ = dispatch.library->simd_width;
  random_ = Random(seed().load() ^ uint64_t(sequence) << 32);
  failure_.clear();
  fault_ = {};
  place_threadgroup_memory();
  make_threads();

  map_.build(dispatch, arguments_.threadgroup);
  map_.add_readable(&arguments_, sizeof arguments_);
  map_.add_readable(threads_.data(), threads_.size() * sizeof(Thread));
  map_.add_readable(tables_.data(), tables_.size() * sizeof(void*));
  map_.add_readable(values_.data(), values_.size());
  map_.add_image(reinterpret_cast<const void*>(dispatch.kernel->entry));
  map_.finish();
  races_.begin_dispatch(simd_width_, uint32_t(simdgroups_.size()));

  std::vector<uint32_t> order(volume(dispatch.grid));
  std::iota(order.begin(), order.end(), 0u);
  for (uint32_t i = uint32_t(order.size()); i > 1; --i)
    std::swap(order[i - 1], order[random_.below(i)]);
  active = this;
  for (const uint32_t index : order) {
    run_threadgroup(index);
    if (!failure_.empty())
      break;
  }
  active = nullptr;
  remember_writes();
  return failure_.empty() ? "" : std::string("kernel '") + dispatch.kernel->name + "': " + failure_;
}

void Runner::remember_writes() {
  written_.clear();
  for (uint32_t i = 0; i < dispatch_->kernel->argument_count; ++i) {
    const KernelArgument& argument = dispatch_->kernel->arguments[i];
    if (argument.kind != ArgumentKind::Buffer || !argument.writable)
      continue;
    const auto begin = reinterpret_cast<uintptr_t>(dispatch_->arguments.buffers[argument.index]);
    written_.push_back({begin, begin + dispatch_->buffer_bytes[argument.index]});
  }
}

void Runner::place_threadgroup_memory() {
  arguments_ = dispatch_->arguments;
  size_t bytes = THREADGROUP_GAP;
  std::vector<std::pair<uint32_t, size_t>> places;
  for (uint32_t i = 0; i < dispatch_->kernel->argument_count; ++i) {
    const KernelArgument& argument = dispatch_->kernel->arguments[i];
    if (argument.kind != ArgumentKind::Threadgroup)
      continue;
    places.emplace_back(argument.index, bytes);
    bytes += dispatch_->threadgroup_bytes[argument.index] + THREADGROUP_GAP;
  }
  constexpr size_t alignment = 64;
  threadgroup_memory_.resize(std::max(threadgroup_memory_.size(), bytes + alignment));
  const auto start = reinterpret_cast<uintptr_t>(threadgroup_memory_.data());
  const uintptr_t base = (start + alignment - 1) / alignment * alignment;
  for (const auto& [index, place] : places)
    arguments_.threadgroup[index] = reinterpret_cast<void*>(base + place);
}

void Runner::make_threads() {
  const Size3 group = dispatch_->group;
  const auto count = uint32_t(volume(group));
  const uint32_t simdgroups = (count + simd_width_ - 1) / simd_width_;
  stacks_.reserve(count);
  threads_.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    ThreadContext& context = threads_[i].context;
    context.threadgroups_per_grid = dispatch_->grid;
    context.threads_per_threadgroup = group;
    context.thread_position_in_threadgroup = position(i, group);
    context.thread_index_in_threadgroup = i;
    context.thread_index_in_simdgroup = i % simd_width_;
    context.simdgroup_index_in_threadgroup = i / simd_width_;
    context.simdgroups_per_threadgroup = simdgroups;
  }
  simdgroups_.resize(simdgroups);
  tables_.resize(size_t(simdgroups) * EXCHANGE_TURNS * simd_width_);
  values_.resize(size_t(simdgroups) * EXCHANGE_TURNS * simd_width_ * MAX_EXCHANGE);
}

void Runner::run_threadgroup(uint32_t index) {
  // What threads find in memory that nobody has written is not a number.
  std::memset(threadgroup_memory_.data(), 0xFF, threadgroup_memory_.size());
  start_threads(index);
  races_.begin_threadgroup();
  // The main stack takes part in the switch as a thread that is not in threads_.
  const uint32_t place = random_.below(uint32_t(runnable_.size()));
  current_ = runnable_[place];
  runnable_[place] = runnable_.back();
  runnable_.pop_back();
  stack_bottom_ = stacks_.bottom(current_);
  metal_sim_switch_stack(&main_stack_, threads_[current_].stack);
  if (fault_.kind != Fault::Kind::None)
    failure_ = describe(fault_);
  else if (returned_ != threads_.size())
    failure_ = describe_stall();
}

void Runner::start_threads(uint32_t index) {
  const auto count = uint32_t(threads_.size());
  const Size3 position_in_grid = position(index, dispatch_->grid);
  runnable_.clear();
  for (uint32_t i = 0; i < count; ++i) {
    threads_[i].context.threadgroup_position_in_grid = position_in_grid;
    threads_[i].stack = stacks_.begin(i, fiber_entry);
    threads_[i].ahead = false;
    make_runnable(i);
  }
  for (uint32_t i = 0; i < simdgroups_.size(); ++i) {
    const uint32_t first = i * simd_width_, threads = std::min(simd_width_, count - first);
    simdgroups_[i] = {first, threads, threads, 0, 0, 0, nullptr, 0, 0};
  }
  returned_ = in_barrier_ = ahead_ = 0;
}

void Runner::fiber_entry() {
  Runner& runner = *active;
  runner.dispatch_->kernel->entry(runner.arguments_, runner.threads_[runner.current_].context);
  runner.thread_returned();
}

void Runner::make_runnable(uint32_t thread) {
  threads_[thread].state = State::Runnable;
  runnable_.push_back(thread);
}

/// Goes on with any runnable thread, or with the main stack where there is none.
void Runner::schedule() {
  void** from = &threads_[current_].stack;
  if (runnable_.empty()) {
    metal_sim_switch_stack(from, main_stack_);
    return;
  }
  const uint32_t place = random_.below(uint32_t(runnable_.size()));
  const uint32_t next = runnable_[place];
  runnable_[place] = runnable_.back();
  runnable_.pop_back();
  if (next == current_)
    return;
  current_ = next;
  stack_bottom_ = stacks_.bottom(next);
  metal_sim_switch_stack(from, threads_[next].stack);
}

void Runner::thread_returned() {
  threads_[current_].state = State::Returned;
  ++returned_;
  const uint32_t simdgroup = current_ / simd_width_;
  Simdgroup& group = simdgroups_[simdgroup];
  --group.live;
  if (group.in_exchange > 0 && group.in_exchange == group.live)
    complete_exchange(simdgroup);
  schedule();
  std::abort(); // nobody resumes a thread that has returned
}

void Runner::fail(const Fault& fault) {
  fault_ = fault;
  void* abandoned;
  metal_sim_switch_stack(&abandoned, main_stack_);
  std::abort();
}

void Runner::fail_access(Fault::Kind kind, uintptr_t address, size_t bytes, Access access) {
  fail({.kind = kind, .address = address, .bytes = bytes, .access = access, .race = {}, .operation = nullptr});
}

void Runner::threadgroup_barrier(uint32_t memory) {
  const auto count = uint32_t(threads_.size());
  barrier_memory_ = in_barrier_ == 0 ? memory : barrier_memory_ & memory;
  threads_[current_].state = State::ThreadgroupBarrier;
  if (++in_barrier_ == count) {
    in_barrier_ = 0;
    races_.threadgroup_barrier(barrier_memory_);
    for (uint32_t i = 0; i < count; ++i)
      make_runnable(i);
  }
  schedule();
}

void Runner::simdgroup_barrier(uint32_t memory) {
  const uint32_t simdgroup = current_ / simd_width_;
  Simdgroup& group = simdgroups_[simdgroup];
  group.barrier_memory = group.in_barrier == 0 ? memory : group.barrier_memory & memory;
  threads_[current_].state = State::SimdgroupBarrier;
  if (++group.in_barrier == group.count) {
    group.in_barrier = 0;
    races_.simdgroup_barrier(simdgroup, group.barrier_memory);
    for (uint32_t i = 0; i < group.count; ++i)
      make_runnable(group.first + i);
  }
  schedule();
}

const void* const* Runner::exchange(const char* operation, const void* value, size_t bytes) {
  const uint32_t simdgroup = current_ / simd_width_;
  Simdgroup& group = simdgroups_[simdgroup];
  if (bytes > MAX_EXCHANGE)
    fail({.kind = Fault::Kind::ExchangeTooLong, .bytes = bytes, .race = {}, .operation = operation});
  const uint32_t turn = group.turn;
  void** table = exchange_table(simdgroup, turn);
  if (group.in_exchange == 0) {
    group.operation = operation;
    group.bytes = bytes;
    std::fill_n(table, simd_width_, nullptr);
  } else if (group.bytes != bytes || (group.operation != operation && std::strcmp(group.operation, operation) != 0)) {
    fail({.kind = Fault::Kind::OtherOperation, .bytes = bytes, .race = {}, .operation = operation});
  }
  constexpr size_t alignment = 16;
  const size_t stride = (bytes + alignment - 1) / alignment * alignment;
  std::byte* slot = exchange_values(simdgroup, turn) + lane() * stride;
  std::memcpy(slot, value, bytes);
  table[lane()] = slot;
  threads_[current_].state = State::Exchange;
  threads_[current_].operation = operation;
  if (++group.in_exchange == group.live)
    complete_exchange(simdgroup);
  schedule();
  return table;
}

void Runner::complete_exchange(uint32_t simdgroup) {
  Simdgroup& group = simdgroups_[simdgroup];
  group.in_exchange = 0;
  group.turn = (group.turn + 1) % EXCHANGE_TURNS;
  for (uint32_t i = group.first; i < group.first + group.count; ++i) {
    if (threads_[i].state == State::Exchange)
      make_runnable(i);
  }
}

void Runner::access(uintptr_t address, size_t bytes, Access access) {
  if (address - stack_bottom_ < FiberStacks::BYTES && bytes <= stack_bottom_ + FiberStacks::BYTES - address)
    return;
  const AccessMap::Region* region = map_.find(address, bytes);
  if (!region || (access != Access::Read && !region->writable)) [[unlikely]] {
    access_unusual(address, bytes, access, region);
    return;
  }
  if (ahead_ > 0 && threads_[current_].ahead) [[unlikely]]
    access_early(address, bytes, access, *region);
  if (!region->shadow)
    return;
  const Race race = races_.access(*region->shadow, address, bytes, access, current_);
  if (race.found) [[unlikely]]
    fail({.kind = Fault::Kind::Race,
          .address = address,
          .bytes = bytes,
          .access = access,
          .race = race,
          .operation = nullptr});
}

void Runner::work_ahead(bool ahead) {
  ahead_ += uint32_t(ahead) - uint32_t(threads_[current_].ahead);
  threads_[current_].ahead = ahead;
}

/// An access by a thread that works ahead of the end of the dispatch in front.
void Runner::access_early(uintptr_t address, size_t bytes, Access access, const AccessMap::Region& region) {
  if (access != Access::Read) {
    if (region.shadow && region.shadow->kind() == MemoryKind::Device)
      fail_access(Fault::Kind::EarlyWrite, address, bytes, access);
    return;
  }
  for (const Range& range : written_)
    if (address < range.end && address + bytes > range.begin)
      fail_access(Fault::Kind::EarlyRead, address, bytes, access);
}

/// An access that lies in no one region, or writes what may only be read.
void Runner::access_unusual(uintptr_t address, size_t bytes, Access access, const AccessMap::Region* region) {
  if (bytes == 0)
    return;
  if (region)
    fail_access(Fault::Kind::ReadOnly, address, bytes, access);
  // It may begin in one region and end in the next: their seam is no error.
  if (map_.find(address, 1)) {
    size_t head = 1;
    while (map_.find(address, head + 1))
      ++head;
    if (map_.find(address + head, 1)) {
      this->access(address, head, access);
      this->access(address + head, bytes - head, access);
      return;
    }
  }
  if (stacks_.in_guard(current_, address))
    fail_access(Fault::Kind::StackOverflow, address, bytes, access);
  if (stacks_.contains(address))
    fail_access(Fault::Kind::OtherStack, address, bytes, access);
  fail_access(Fault::Kind::OutOfBounds, address, bytes, access);
}

std::string Runner::who(uint32_t thread) const {
  const ThreadContext& context = threads_[thread].context;
  return "thread " + text(context.thread_position_in_threadgroup) + " of threadgroup " +
         text(context.threadgroup_position_in_grid);
}

std::string Runner::describe(const Fault& fault) const {
  const auto access = [&] { return who(current_) + " " + map_.describe(fault.address, fault.bytes, fault.access); };
  switch (fault.kind) {
  case Fault::Kind::None:
    break;
  case Fault::Kind::OutOfBounds:
    return access() + ": out of bounds";
  case Fault::Kind::ReadOnly:
    return access() + ": the argument is read-only";
  case Fault::Kind::EarlyRead:
    return access() + ", which the kernel before may have written, ahead of wait_for_previous_kernel()";
  case Fault::Kind::EarlyWrite:
    return access() + " ahead of wait_for_previous_kernel()";
  case Fault::Kind::OtherStack:
    return who(current_) + " accessed the thread memory of another thread";
  case Fault::Kind::StackOverflow:
    return who(current_) + " needs more than " + std::to_string(FiberStacks::BYTES) + " bytes of stack";
  case Fault::Kind::Race:
    return describe_race(fault);
  case Fault::Kind::OtherOperation: {
    const Simdgroup& group = simdgroups_[current_ / simd_width_];
    return "threads of one simdgroup meet in different operations: " + who(current_) + " calls " + fault.operation +
           " (" + std::to_string(fault.bytes) + " bytes) where others call " + group.operation + " (" +
           std::to_string(group.bytes) + " bytes)";
  }
  case Fault::Kind::ExchangeTooLong:
    return std::string(fault.operation) + " exchanges " + std::to_string(fault.bytes) + " bytes, more than " +
           std::to_string(MAX_EXCHANGE);
  }
  return "";
}

std::string Runner::describe_race(const Fault& fault) const {
  const Race& race = fault.race;
  const std::string other = race.other_threadgroup ? std::string("another threadgroup of the same dispatch")
                                                   : "thread " + text(position(race.other_thread, dispatch_->group)) +
                                                         " of the same threadgroup";
  return "data race: " + who(current_) + " " + map_.describe(fault.address, fault.bytes, fault.access) + ", which " +
         other + (race.other_write ? " wrote" : " read") +
         (race.other_threadgroup ? "" : " with no barrier for this memory between them");
}

std::string Runner::describe_stall() const {
  struct Place {
    std::string name;
    uint32_t threads;
    uint32_t first;
  };
  std::vector<Place> places;
  for (uint32_t i = 0; i < threads_.size(); ++i) {
    const Thread& thread = threads_[i];
    const std::string name = thread.state == State::ThreadgroupBarrier ? "wait in threadgroup_barrier"
                             : thread.state == State::SimdgroupBarrier ? "wait in simdgroup_barrier"
                             : thread.state == State::Exchange         ? std::string("wait in ") + thread.operation
                                                                       : "have returned";
    const auto known = std::find_if(places.begin(), places.end(), [&](const Place& p) { return p.name == name; });
    if (known == places.end())
      places.push_back({name, 1, i});
    else
      ++known->threads;
  }
  std::string text = "divergent threads of threadgroup " +
                     metal_sim::text(threads_[0].context.threadgroup_position_in_grid) + " wait forever: ";
  for (size_t i = 0; i < places.size(); ++i)
    text += (i ? ", " : "") + std::to_string(places[i].threads) + " " + places[i].name + " (first " +
            metal_sim::text(threads_[places[i].first].context.thread_position_in_threadgroup) + ")";
  return text;
}

class ExactEngine final : public Engine {
public:
  uint32_t max_threads_per_threadgroup() const override { return MAX_THREADS_PER_THREADGROUP; }
  const char* name() const override { return "exact"; }

  std::string run(const Dispatch& dispatch, uint32_t sequence) override {
    const std::lock_guard lock(mutex_);
    return runner_.run(dispatch, sequence);
  }

private:
  std::mutex mutex_;
  Runner runner_;
};

} // namespace

Engine& exact_engine() {
  static auto* engine = new ExactEngine; // immortal: a queue's worker may still run when main() has returned
  return *engine;
}

const ExactServices& exact_services() {
  static constexpr ExactServices services = {
      [](uint32_t memory) { active->threadgroup_barrier(memory); },
      [](uint32_t memory) { active->simdgroup_barrier(memory); },
      [](const char* operation, const void* value, size_t bytes) { return active->exchange(operation, value, bytes); },
      [] { return active->lane(); },
      [](const void* address, size_t bytes, Access access) {
        if (active) // instrumented code also runs when a library is loaded
          active->access(reinterpret_cast<uintptr_t>(address), bytes, access);
      },
      [](bool ahead) { active->work_ahead(ahead); },
  };
  return services;
}

void set_exact_seed(uint64_t value) { seed().store(value); }
uint64_t exact_seed() { return seed().load(); }

} // namespace metal_sim
