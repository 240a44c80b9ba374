#include "own_queue.h"

#include "torch_mps.h"

#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string_view>

namespace metal_moe::apple {

namespace {

struct OwnQueue {
  std::unique_ptr<CommandStream> stream;
  NS::SharedPtr<MTL::SharedEvent> event;
  uint64_t value = 0; // that the event was last told to reach
};

/// Made with the first operation, never freed: the GPU may outlive static objects.
OwnQueue& own_queue(Context& context) {
  static OwnQueue* made = nullptr;
  if (!made)
    made = new OwnQueue{context.new_stream(), NS::TransferPtr(context.device()->newSharedEvent())};
  return *made;
}

/// PyTorch's stream signals `value` after all that it holds, and starts on it.
void signal_from(at::mps::MPSStream* stream, const MTL::Event* event, uint64_t value) {
  auto run = [&] {
    stream->endKernelCoalescing();
    metal_object<MTL::CommandBuffer>(stream->commandBuffer())->encodeSignalEvent(event, value);
    stream->synchronize(at::mps::SyncType::COMMIT);
  };
  on_queue(stream, run);
}

/// What PyTorch's stream is given from now on runs after the event has reached `value`.
void wait_on(at::mps::MPSStream* stream, const MTL::Event* event, uint64_t value) {
  auto run = [&] {
    stream->endKernelCoalescing();
    metal_object<MTL::CommandBuffer>(stream->commandBuffer())->encodeWait(event, value);
  };
  on_queue(stream, run);
}

} // namespace

bool uses_own_queue() {
  const char* value = std::getenv("METAL_MOE_MPS_QUEUE");
  const std::string_view queue = value ? value : "torch";
  if (queue != "torch" && queue != "own")
    throw std::invalid_argument("METAL_MOE_MPS_QUEUE is \"" + std::string(queue) +
                                "\"; it must be \"torch\" or \"own\"");
  return queue == "own";
}

void run_on_own_queue(Context& context, const std::function<void(CommandStream&)>& encode) {
  static std::mutex mutex; // the stream is used by one thread at a time
  const std::lock_guard lock(mutex);
  OwnQueue& own = own_queue(context);
  own.stream->check();
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  signal_from(stream, own.event.get(), ++own.value);
  own.stream->wait_for(own.event.get(), own.value);
  try {
    encode(*own.stream);
  } catch (...) {
    own.stream->discard(); // PyTorch has signalled, and waits for nothing
    throw;
  }
  own.stream->signal(own.event.get(), ++own.value);
  own.stream->commit();
  wait_on(stream, own.event.get(), own.value);
}

} // namespace metal_moe::apple
