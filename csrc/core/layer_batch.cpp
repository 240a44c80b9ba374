#include "layer_batch.h"

#include "observer.h"
#include "trace.h"

#include <exception>
#include <utility>

namespace metal_moe {

constinit thread_local LayerBatch* LayerBatch::innermost = nullptr;

void SharedStream::check_caller(const char* operation) const {
  check_not_forked(operation, generation_);
  if (is_handling())
    throw std::logic_error(std::string(operation) + ": called by a completion handler of the same stream");
}

void SharedStream::close() {
  if (generation_ != fork_generation()) {
    stream_.reset(); // without the lock, which a thread of the parent may have held
    return;
  }
  check_caller("close");
  const std::lock_guard lock(mutex_);
  stream_.reset();
}

bool SharedStream::is_closed() const {
  const std::lock_guard lock(mutex_);
  return !stream_;
}

void LayerBatch::enter() {
  if (entered())
    throw std::logic_error("the batch is entered already");
  if (!waits_ && !shared_ && !innermost)
    throw std::logic_error("a batch that does not wait needs a stream or a batch around it that does");
  self_ = shared_from_this();
  outer_ = innermost;
  innermost = this;
  if (shared_)
    targets_.push_back({shared_->context(), shared_, nullptr});
}

void LayerBatch::leave() {
  LayerBatch** place = &innermost;
  while (*place && *place != this)
    place = &(*place)->outer_;
  if (!*place)
    throw std::logic_error("this thread has not entered the batch");
  *place = outer_;
  const auto self = std::exchange(self_, nullptr); // to the end of this function
  struct Cleared {
    LayerBatch& batch;
    ~Cleared() {
      batch.targets_.clear();
      batch.outer_ = nullptr;
    }
  } cleared{*this};
  waits_ ? synchronize() : commit();
}

LayerBatch::Target* LayerBatch::target_of(Context& context) {
  for (Target& target : targets_)
    if (&target.context == &context)
      return &target;
  if (outer_)
    if (Target* target = outer_->target_of(context))
      return target;
  if (shared_ || context.runs_on_caller_streams())
    return nullptr;
  targets_.push_back({context, nullptr, std::make_unique<StreamLease>(context)});
  return &targets_.back();
}

void LayerBatch::pass(const Context& context) {
  if (statistics_.passed++ != 0 || !observing())
    return;
  const std::string operation = std::string(last_dispatch().operation) + " on " + context.engine();
  tell_note(context.runs_on_caller_streams()
                ? "LayerBatch does nothing for " + operation + ", which runs on PyTorch's stream"
                : "CommandStream of another device does nothing for " + operation);
}

void LayerBatch::encoded(Target& target, CommandStream& stream, bool is_layer) {
  statistics_.operations += 1;
  statistics_.layers += is_layer;
  target.layers += is_layer;
  const uint32_t before = stream.pending_dispatches();
  if (layers_ == 0)
    stream.end_operation();
  else if (target.layers >= layers_ || before / layers_ >= DISPATCHES_PER_LAYER)
    stream.commit();
  if (before > 0 && stream.pending_dispatches() == 0) {
    statistics_.commits += 1;
    target.layers = 0;
  }
}

template <class Use>
void LayerBatch::for_each_stream(const Use& function) {
  std::exception_ptr first;
  for (LayerBatch* batch = this; batch; batch = batch->outer_)
    for (Target& target : batch->targets_) {
      try {
        use(target, [&](CommandStream& stream) {
          target.layers = 0;
          function(stream);
        });
      } catch (...) {
        if (!first)
          first = std::current_exception();
      }
    }
  if (first)
    std::rethrow_exception(first);
}

void LayerBatch::commit() {
  for_each_stream([&](CommandStream& stream) {
    statistics_.commits += stream.pending_dispatches() > 0;
    stream.commit();
  });
}

void LayerBatch::synchronize() {
  for_each_stream([&](CommandStream& stream) {
    statistics_.commits += stream.pending_dispatches() > 0;
    stream.synchronize();
  });
}

void LayerBatch::discard() {
  for_each_stream([](CommandStream& stream) { stream.discard(); });
}

} // namespace metal_moe
