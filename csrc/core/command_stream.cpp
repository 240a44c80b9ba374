#include "command_stream.h"

#include "observer.h"
#include "trace.h"

#include <exception>

namespace metal_moe {

constinit thread_local const CommandStream* CommandStream::handling_ = nullptr;

CommandStream::CommandStream(NS::SharedPtr<MTL::CommandQueue> queue, BufferPool& pool, const Policy& policy)
    : queue_(std::move(queue)), pool_(pool), policy_(policy), track_key_(this), borrows_encoder_(false) {}

CommandStream::CommandStream(MTL::CommandBuffer* commands, MTL::ComputeCommandEncoder* encoder, BufferPool& pool,
                             Allocate allocate, const void* key)
    : pool_(pool), policy_{}, allocate_(std::move(allocate)), track_key_(key), borrows_encoder_(encoder != nullptr),
      encoder_(NS::RetainPtr(encoder)), encoding_(std::make_unique<Submission>(this)) {
  encoding_->commands = NS::RetainPtr(commands);
}

CommandStream::~CommandStream() {
  if (!owned()) {
    end_encoding();
    // The owner's command buffer outlives this stream: it carries the scratch.
    if (!encoding_->scratch.empty()) {
      auto scratch = std::make_shared<std::vector<PooledBuffer>>(std::move(encoding_->scratch));
      encoding_->commands->addCompletedHandler(
          MTL::HandlerFunction([scratch](MTL::CommandBuffer*) { scratch->clear(); }));
    }
    return;
  }
  if (forked()) {
    // The threads that would complete anything are the parent's. Whatever would wait for them is left alone.
    encoding_.release();
    encoder_.detach();
    new std::deque(std::move(in_flight_));
    completions_.release();
    queue_->retain();
    return;
  }
  discard();
  while (!in_flight_.empty())
    wait_for_oldest();
}

void CommandStream::check_caller(const char* operation) const {
  check_not_forked(operation, generation_);
  if (handling_ == this)
    throw std::logic_error(std::string(operation) + ": called by a completion handler of the same stream");
}

void CommandStream::open_commands() {
  check_caller("encode");
  if (!encoding_) {
    if (spare_.empty()) {
      encoding_ = std::make_unique<Submission>(this);
    } else {
      encoding_ = std::move(spare_.back());
      spare_.pop_back();
    }
  }
  if (encoding_->commands)
    return;
  AutoreleaseScope scope;
  encoding_->commands = NS::RetainPtr(queue_->commandBuffer());
}

void CommandStream::open() {
  open_commands();
  AutoreleaseScope scope;
  encoder_ = NS::RetainPtr(encoding_->commands->computeCommandEncoder());
}

void CommandStream::use(const Pipeline& pipeline) {
  if (observing() || timed_) [[unlikely]]
    open_timed();
  if (!encoder_)
    open();
  pipeline_ = &pipeline;
  encoder_->setComputePipelineState(pipeline.state.get());
}

void CommandStream::dispatch(const MTL::Size& threadgroups, uint32_t threads, size_t bytes) {
  if (threads > pipeline_->max_threads)
    throw std::invalid_argument(std::string("kernel '") + pipeline_->name + "': " + std::to_string(threads) +
                                " threads per threadgroup, the pipeline allows " +
                                std::to_string(pipeline_->max_threads));
  encoder_->dispatchThreadgroups(threadgroups, MTL::Size(threads, 1, 1));
  encoding_->kernels.push_back(pipeline_->name);
  last_dispatch().add_dispatch(pipeline_->name);
  pending_dispatches_ += 1;
  pending_bytes_ += bytes;
  if (observing()) [[unlikely]]
    tell_dispatch(threadgroups, threads, bytes);
}

void CommandStream::end_encoding() {
  if (borrows_encoder_ || !encoder_)
    return;
  encoder_->endEncoding();
  encoder_.reset();
  pipeline_ = nullptr;
}

void CommandStream::open_timed() {
  encode_start_ = observing() ? clock_now() : 0;
  if (borrows_encoder_)
    return;
  if (timed_ || observing_times())
    end_encoding();
  timed_ = observing_times();
  if (!timed_)
    return;
  open_commands();
  const AutoreleaseScope scope;
  MTL::Device* device = encoding_->commands->device();
  if (!encoding_->times)
    encoding_->times = std::make_unique<KernelTimes>(device);
  // Where the device takes no timestamps, dispatches of an owned stream run alone; see run_alone().
  encoder_ = NS::RetainPtr(KernelTimes::supported(device) ? encoding_->times->encoder(encoding_->commands.get())
                                                          : encoding_->commands->computeCommandEncoder());
}

void CommandStream::tell_dispatch(const MTL::Size& threadgroups, uint32_t threads, size_t bytes) {
  const DispatchTrace& trace = last_dispatch();
  DispatchRecord record;
  record.kernel = pipeline_->name;
  record.operation = trace.operation;
  record.engine = trace.engine;
  record.family = trace.family;
  record.choice = trace.choice;
  record.grid[0] = static_cast<uint32_t>(threadgroups.width);
  record.grid[1] = static_cast<uint32_t>(threadgroups.height);
  record.grid[2] = static_cast<uint32_t>(threadgroups.depth);
  record.threads = threads;
  record.bytes = bytes;
  record.track = track_of(track_key_, trace.engine);
  record.encode_end = clock_now();
  record.encode_start = encode_start_ ? encode_start_ : record.encode_end;
  metal_moe::tell_dispatch(record);
  if (!timed_ || !encoding_->times)
    return;
  encoding_->times->add(record);
  if (owned() && !KernelTimes::supported(encoding_->commands->device()))
    run_alone();
}

/// The dispatch in a command buffer of its own, to its end, for the device to say how long that took. The submission
/// goes on in the next command buffer, with the scratch of all.
void CommandStream::run_alone() {
  end_encoding();
  const auto commands = std::move(encoding_->commands);
  commands->commit();
  commands->waitUntilCompleted();
  if (commands->status() == MTL::CommandBufferStatusError) {
    const AutoreleaseScope scope;
    const std::lock_guard lock(completions_->mutex);
    if (completions_->error.empty())
      completions_->error = std::string("command buffer failed (kernels ") + encoding_->kernels.back() +
                            "): " + describe(commands->error());
  }
  encoding_->times->set_alone(commands->GPUStartTime(), commands->GPUEndTime());
  open_commands();
}

BufferView CommandStream::scratch(size_t bytes) {
  if (allocate_)
    return allocate_(bytes);
  open_commands();
  encoding_->scratch.push_back(pool_.acquire(bytes));
  return {encoding_->scratch.back().get(), 0};
}

void CommandStream::on_completed(Handler handler) {
  if (!owned())
    throw std::logic_error("on_completed: a borrowed stream has no completion of its own");
  open_commands();
  if (!completions_->thread) {
    completions_->thread = std::make_unique<CompletionThread>();
    completions_->posts_to.store(completions_->thread.get(), std::memory_order_release);
  }
  encoding_->handlers.push_back(std::move(handler));
}

void CommandStream::keep(std::shared_ptr<void> object) {
  if (!owned())
    throw std::logic_error("keep: a borrowed stream does not know when it has completed");
  open_commands();
  encoding_->kept.push_back(std::move(object));
}

void CommandStream::end_encoder() {
  if (encoder_)
    commands_between_dispatches("end_encoder");
}

MTL::CommandBuffer* CommandStream::commands_between_dispatches(const char* operation) {
  if (!owned())
    throw std::logic_error(std::string(operation) + ": a borrowed stream is ordered by its owner");
  open_commands();
  end_encoding();
  return encoding_->commands.get();
}

void CommandStream::wait_for(const MTL::Event* event, uint64_t value) {
  commands_between_dispatches("wait_for")->encodeWait(event, value);
}

void CommandStream::signal(const MTL::Event* event, uint64_t value) {
  commands_between_dispatches("signal")->encodeSignalEvent(event, value);
}

void CommandStream::end_operation() {
  if (pending_dispatches_ >= policy_.max_dispatches || pending_bytes_ >= policy_.max_bytes)
    commit();
}

void CommandStream::commit() {
  if (!owned() || !encoding_)
    return;
  check_caller("commit");
  while (!in_flight_.empty() && oldest_is_done())
    recycle_oldest();
  while (!in_flight_.empty() && in_flight_.size() >= policy_.max_in_flight)
    wait_for_oldest();
  end_encoding();
  if (observing()) [[unlikely]]
    tell_commit(track_of(track_key_, last_dispatch().engine), last_dispatch().engine, pending_dispatches_);
  pending_dispatches_ = 0;
  pending_bytes_ = 0;
  auto encoded = std::move(encoding_); // dropped where Metal refuses it below
  Submission* submission = encoded.get();
  submission->done = false;
  // Two words by value: fits a std::function without an allocation.
  submission->commands->addCompletedHandler(MTL::HandlerFunction(
      [this, submission](MTL::CommandBuffer* commands) { this->complete(*submission, commands); }));
  submission->commands->commit();
  in_flight_.push_back(std::move(encoded));
  last_dispatch().add_commit();
}

void CommandStream::complete(Submission& submission, MTL::CommandBuffer* commands) noexcept {
  submission.gpu_start = commands->GPUStartTime();
  submission.gpu_end = commands->GPUEndTime();
  if (commands->status() == MTL::CommandBufferStatusError) {
    AutoreleaseScope scope;
    std::string& error = submission.error = "command buffer failed";
    for (size_t i = 0; i < submission.kernels.size(); ++i)
      error.append(i == 0 ? " (kernels " : ", ").append(submission.kernels[i]);
    error.append(submission.kernels.empty() ? ": " : "): ").append(describe(commands->error()));
  }
  if (CompletionThread* thread = completions_->posts_to.load(std::memory_order_acquire))
    thread->post(submission); // with handlers or without: they complete in order
  else
    finish(submission);
}

void CommandStream::finish(Submission& submission) noexcept {
  const Completion completion{submission.gpu_start, submission.gpu_end, submission.error};
  std::string thrown;
  handling_ = this;
  for (const Handler& handler : submission.handlers) {
    try {
      handler(completion);
    } catch (const std::exception& exception) {
      if (thrown.empty())
        thrown = std::string("completion handler: ") + exception.what();
    } catch (...) {
      if (thrown.empty())
        thrown = "completion handler: unknown exception";
    }
  }
  handling_ = nullptr;
  submission.scratch.clear(); // back to the pool
  if (submission.times)
    deliver(*submission.times);
  std::lock_guard lock(completions_->mutex);
  if (completions_->error.empty())
    completions_->error = std::move(submission.error.empty() ? thrown : submission.error);
  submission.done = true;
  completions_->changed.notify_all(); // with the lock held: the stream may be destroyed as soon as it is free
}

bool CommandStream::oldest_is_done() const {
  const std::lock_guard lock(completions_->mutex);
  return in_flight_.front()->done;
}

void CommandStream::wait_for_oldest() {
  Submission& oldest = *in_flight_.front();
  count(Counter::Synchronizations);
  const ObservedWait waiting("wait for a command buffer");
  oldest.commands->waitUntilCompleted();
  {
    // Metal may return from the wait before it has called the handler.
    std::unique_lock lock(completions_->mutex);
    completions_->changed.wait(lock, [&] { return oldest.done; });
  }
  recycle_oldest();
}

void CommandStream::recycle_oldest() {
  auto submission = std::move(in_flight_.front());
  in_flight_.pop_front();
  recycle(std::move(submission));
}

void CommandStream::recycle(std::unique_ptr<Submission> submission) {
  submission->commands.reset();
  submission->kernels.clear();
  submission->scratch.clear();
  submission->handlers.clear();
  submission->kept.clear();
  submission->error.clear();
  submission->times.reset();
  spare_.push_back(std::move(submission));
}

void CommandStream::synchronize() {
  if (!owned())
    throw std::logic_error("synchronize: a borrowed stream is waited for by its owner");
  check_caller("synchronize");
  commit();
  while (!in_flight_.empty())
    wait_for_oldest();
  check();
}

void CommandStream::check() {
  std::string error;
  {
    std::lock_guard lock(completions_->mutex);
    error.swap(completions_->error);
  }
  if (!error.empty())
    throw ExecutionError(error);
}

void CommandStream::discard() noexcept {
  if (!owned() || !encoding_ || forked())
    return;
  end_encoding(); // Metal insists, even where the command buffer is dropped
  pending_dispatches_ = 0;
  pending_bytes_ = 0;
  recycle(std::move(encoding_));
}

uint32_t CommandStream::in_flight() const {
  std::lock_guard lock(completions_->mutex);
  uint32_t count = 0;
  for (const auto& submission : in_flight_)
    count += submission->done ? 0 : 1;
  return count;
}

} // namespace metal_moe
