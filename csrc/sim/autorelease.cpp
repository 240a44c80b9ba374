// Autorelease pools: one stack of pending releases per thread, on which every pool is a mark.
#include "foundation.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace metal_sim {
namespace {

class PoolObject;

struct PoolStack {
  std::vector<Counted*> objects;
  std::vector<PoolObject*> pools; // innermost last

  void release_above(size_t mark) {
    while (objects.size() > mark) { // a release may autorelease more
      Counted* object = objects.back();
      objects.pop_back();
      object->drop_reference();
    }
  }
  ~PoolStack() { release_above(0); }
};

PoolStack& stack() {
  thread_local PoolStack stack;
  return stack;
}

class PoolObject final : public NS::AutoreleasePool {
public:
  PoolObject() : stack_(&stack()), mark_(stack_->objects.size()) { stack_->pools.push_back(this); }

  ~PoolObject() override {
    if (!stack_)
      return; // ended with a pool around it
    if (stack_ != &stack()) {
      std::fputs("NS::AutoreleasePool: released on another thread than the one that made it\n", stderr);
      std::abort();
    }
    PoolStack& stack = *stack_;
    while (stack.pools.back() != this) {
      stack.pools.back()->stack_ = nullptr;
      stack.pools.pop_back();
    }
    stack.release_above(mark_);
    stack.pools.pop_back();
  }

private:
  PoolStack* stack_;
  const size_t mark_;
};

} // namespace

void autorelease(Counted* object) { stack().objects.push_back(object); }

} // namespace metal_sim

namespace NS {

AutoreleasePool* AutoreleasePool::alloc() { return new metal_sim::PoolObject; }
AutoreleasePool* AutoreleasePool::init() { return this; }
void AutoreleasePool::drain() { release(); }
void AutoreleasePool::addObject(Object* object) { metal_sim::autorelease(object); }

void AutoreleasePool::showPools() {
  const auto& stack = metal_sim::stack();
  std::fprintf(stderr, "%zu objects in %zu autorelease pools\n", stack.objects.size(), stack.pools.size());
}

} // namespace NS
