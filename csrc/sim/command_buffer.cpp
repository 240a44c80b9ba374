#include "command_queue.h"
#include "compute_encoder.h"
#include "counter_samples.h"
#include "event.h"
#include "metal_sim/control.h"
#include "spin.h"

namespace metal_sim {
namespace {

constexpr char ERROR_DOMAIN[] = "MTLCommandBufferErrorDomain";
constexpr double NANOSECOND = 1e-9;

CommandBufferObject* impl(MTL::CommandBuffer* buffer) { return static_cast<CommandBufferObject*>(buffer); }
const CommandBufferObject* impl(const MTL::CommandBuffer* buffer) {
  return static_cast<const CommandBufferObject*>(buffer);
}

bool committed(const CommandBufferObject* buffer) {
  return buffer->status.load(std::memory_order_acquire) >= MTL::CommandBufferStatusCommitted;
}

void add_handler(const char* call, CommandBufferObject* buffer, std::vector<MTL::HandlerFunction>& handlers,
                 const MTL::HandlerFunction& function) {
  if (committed(buffer))
    misuse(call, "the command buffer has been committed");
  handlers.push_back(function);
}

void mark_event(const char* call, CommandBufferObject* buffer, const MTL::Event* event, bool signals, uint64_t value) {
  if (!event)
    misuse(call, "the event is null");
  if (committed(buffer))
    misuse(call, "the command buffer has been committed");
  if (buffer->encoder)
    misuse(call, "an encoder has not ended encoding");
  if (buffer->on_stream)
    misuse(call, "the command buffer runs on a stream of the program's");
  auto* object = static_cast<EventObject*>(static_cast<MTL::SharedEvent*>(const_cast<MTL::Event*>(event)));
  buffer->recording->retain(object);
  const auto dispatches = uint32_t(buffer->recording->dispatches.size());
  buffer->recording->marks.push_back({dispatches, signals ? Mark::Signal : Mark::Wait, object, value, nullptr});
}

void pass(const Mark& mark) {
  switch (mark.kind) {
  case Mark::Wait:
    return mark.event->wait(mark.value);
  case Mark::Signal:
    return mark.event->signal(mark.value);
  case Mark::Sample:
    return mark.samples->take(mark.value);
  }
}

/// A handler that throws has nobody to catch it, here as on Apple: the program ends.
void call_all(std::vector<MTL::HandlerFunction>& handlers, MTL::CommandBuffer* buffer) noexcept {
  for (const MTL::HandlerFunction& handler : handlers)
    handler(buffer);
  handlers.clear();
}

} // namespace

CommandBufferObject::CommandBufferObject(NS::SharedPtr<QueueObject> owner, bool retains)
    : queue(std::move(owner)), retains(retains), recording(queue->take_recording()) {}

CommandBufferObject::~CommandBufferObject() {
  if (recording)
    queue->give_back(std::move(recording));
}

void CommandBufferObject::execute() {
  // Handlers and kernels may autorelease; on the worker nobody else would end a pool.
  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  status.store(MTL::CommandBufferStatusScheduled, std::memory_order_release);
  call_all(scheduled_handlers, this);
  start = double(nanoseconds_now()) * NANOSECOND;
  std::string failure;
  MTL::CommandBufferError code = MTL::CommandBufferErrorPageFault;
  try {
    auto mark = recording->marks.begin();
    for (uint32_t i = 0; i <= recording->dispatches.size(); ++i) {
      for (; mark != recording->marks.end() && mark->dispatches == i; ++mark)
        pass(*mark);
      if (i < recording->dispatches.size() && failure.empty()) // a failed buffer still signals: nobody waits for ever
        failure = queue->device->engine.run(recording->dispatches[i], i);
    }
  } catch (const std::exception& exception) { // of the engine itself: out of memory
    failure = exception.what();
    code = MTL::CommandBufferErrorOutOfMemory;
  }
  finish(std::move(failure), code);
}

void CommandBufferObject::launch() {
  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  call_all(scheduled_handlers, this);
  start = double(nanoseconds_now()) * NANOSECOND;
  std::string failure;
  try {
    auto mark = recording->marks.begin();
    for (uint32_t i = 0; i <= recording->dispatches.size() && failure.empty(); ++i) {
      for (; mark != recording->marks.end() && mark->dispatches == i; ++mark)
        mark->samples->take_on(mark->value, stream); // events there are none
      if (i < recording->dispatches.size())
        failure = queue->device->engine.launch(recording->dispatches[i], stream);
    }
  } catch (const std::exception& exception) {
    failure = exception.what();
  }
  finish(std::move(failure), MTL::CommandBufferErrorInternal);
  finished.store(true, std::memory_order_release);
}

void CommandBufferObject::finish(std::string failure, MTL::CommandBufferError code) {
  end = double(nanoseconds_now()) * NANOSECOND;
  if (!failure.empty())
    error = NS::TransferPtr(new ErrorObject(ERROR_DOMAIN, NS::Integer(code), std::move(failure)));
  status.store(error ? MTL::CommandBufferStatusError : MTL::CommandBufferStatusCompleted, std::memory_order_release);
  queue->give_back(std::move(recording));
  call_all(completed_handlers, this);
}

} // namespace metal_sim

namespace metal_sim {

MTL::CommandBuffer* new_stream_command_buffer(MTL::CommandQueue* queue, void* stream) {
  auto* owner = static_cast<QueueObject*>(queue);
  if (!owner->device->engine.has_streams())
    misuse("new_stream_command_buffer", std::string("device '") + owner->device->name + "' has no streams");
  auto* buffer = new CommandBufferObject(NS::RetainPtr(owner), false);
  buffer->on_stream = true;
  buffer->stream = stream;
  return buffer;
}

} // namespace metal_sim

namespace MTL {

using namespace metal_sim;

Device* CommandBuffer::device() const { return impl(this)->queue->device; }
CommandQueue* CommandBuffer::commandQueue() const { return impl(this)->queue.get(); }
NS::String* CommandBuffer::label() const { return impl(this)->label.get(); }
void CommandBuffer::setLabel(const NS::String* label) { impl(this)->label.set(label); }
bool CommandBuffer::retainedReferences() const { return impl(this)->retains; }
ComputeCommandEncoder* CommandBuffer::computeCommandEncoder() { return computeCommandEncoder(DispatchTypeSerial); }

ComputeCommandEncoder* CommandBuffer::computeCommandEncoder(DispatchType dispatchType) {
  CommandBufferObject* buffer = impl(this);
  if (committed(buffer))
    misuse("CommandBuffer::computeCommandEncoder", "the command buffer has been committed");
  if (buffer->encoder)
    misuse("CommandBuffer::computeCommandEncoder", "the previous encoder has not ended encoding");
  return (new EncoderObject(NS::RetainPtr(buffer), dispatchType))->autorelease();
}

ComputeCommandEncoder* CommandBuffer::computeCommandEncoder(const ComputePassDescriptor* computePassDescriptor) {
  const auto* pass = static_cast<const PassDescriptorObject*>(computePassDescriptor);
  const AttachmentObject& attachment = *pass->attachments->first.get();
  if (attachment.samples)
    for (const NS::UInteger index : {attachment.start, attachment.end})
      if (index != CounterDontSample && index >= attachment.samples->count())
        misuse("CommandBuffer::computeCommandEncoder",
               "sample " + std::to_string(index) + " of a buffer of " + std::to_string(attachment.samples->count()));
  ComputeCommandEncoder* encoder = computeCommandEncoder(pass->type);
  if (attachment.samples)
    static_cast<EncoderObject*>(encoder)->sample(attachment.samples, attachment.start, attachment.end);
  return encoder;
}

void CommandBuffer::encodeSignalEvent(const Event* event, uint64_t value) {
  mark_event("CommandBuffer::encodeSignalEvent", impl(this), event, true, value);
}

void CommandBuffer::encodeWait(const Event* event, uint64_t value) {
  mark_event("CommandBuffer::encodeWait", impl(this), event, false, value);
}

void CommandBuffer::enqueue() {
  if (impl(this)->status != CommandBufferStatusNotEnqueued)
    misuse("CommandBuffer::enqueue", "the command buffer has been enqueued");
  if (impl(this)->on_stream)
    misuse("CommandBuffer::enqueue", "the command buffer runs on a stream of the program's");
  impl(this)->queue->schedule->enqueue(impl(this));
}

void CommandBuffer::commit() {
  CommandBufferObject* buffer = impl(this);
  if (committed(buffer))
    misuse("CommandBuffer::commit", "the command buffer has been committed");
  if (buffer->encoder)
    misuse("CommandBuffer::commit", "an encoder has not ended encoding");
  if (buffer->on_stream)
    buffer->launch();
  else
    buffer->queue->schedule->commit(buffer);
}

void CommandBuffer::waitUntilCompleted() {
  if (!committed(impl(this)))
    misuse("CommandBuffer::waitUntilCompleted", "the command buffer has not been committed");
  impl(this)->queue->schedule->wait(impl(this));
}

void CommandBuffer::waitUntilScheduled() {
  if (!committed(impl(this)))
    misuse("CommandBuffer::waitUntilScheduled", "the command buffer has not been committed");
}

void CommandBuffer::addCompletedHandler(const HandlerFunction& function) {
  add_handler("CommandBuffer::addCompletedHandler", impl(this), impl(this)->completed_handlers, function);
}

void CommandBuffer::addScheduledHandler(const HandlerFunction& function) {
  add_handler("CommandBuffer::addScheduledHandler", impl(this), impl(this)->scheduled_handlers, function);
}

CommandBufferStatus CommandBuffer::status() const { return impl(this)->status.load(std::memory_order_acquire); }

NS::Error* CommandBuffer::error() const {
  return status() == CommandBufferStatusError ? impl(this)->error.get() : nullptr;
}

CFTimeInterval CommandBuffer::GPUStartTime() const { return impl(this)->start; }
CFTimeInterval CommandBuffer::GPUEndTime() const { return impl(this)->end; }

} // namespace MTL
