// Operations on MPS tensors: encoded into the compute encoder that PyTorch's current stream has open, in order with all
// that PyTorch encodes before and after. No command buffer of ours, no commit, no wait, no second queue.
//
// Errors of the GPU belong to PyTorch's command buffer: PyTorch records them when it completes and raises them at the
// next synchronisation (torch.mps.synchronize, .cpu(), .item()).
#include "own_queue.h"
#include "stream_scratch.h"
#include "torch_mps.h"

#include "../bindings/gil.h"
#include "../bindings/torch_stream.h"
#include "../core/observer.h"

#include <pybind11/pybind11.h>

namespace metal_moe::bindings {

namespace {

/// PyTorch's encoder for the length of an operation. The next kernel is PyTorch's: it sets every buffer that it uses,
/// but perhaps no threadgroup memory, so ours must not stay behind.
class BorrowedEncoder {
public:
  explicit BorrowedEncoder(at::mps::MPSStream* stream)
      : encoder_(apple::metal_object<MTL::ComputeCommandEncoder>(stream->commandEncoder())) {}
  ~BorrowedEncoder() { encoder_->setThreadgroupMemoryLength(0, 0); }
  BorrowedEncoder(const BorrowedEncoder&) = delete;
  BorrowedEncoder& operator=(const BorrowedEncoder&) = delete;

  MTL::ComputeCommandEncoder* get() const { return encoder_; }

private:
  MTL::ComputeCommandEncoder* encoder_; // PyTorch's
};

/// Encodes into encoders of its own in PyTorch's command buffer, one for each dispatch: the GPU takes timestamps where
/// encoders begin and end.
void encode_timed(Context& context, at::mps::MPSStream* stream, const CommandStream::Allocate& allocate,
                  const std::function<void(CommandStream&)>& encode) {
  stream->endKernelCoalescing();
  auto* commands = apple::metal_object<MTL::CommandBuffer>(stream->commandBuffer());
  CommandStream timed(commands, nullptr, context.pool(), allocate, stream);
  encode(timed);
  timed.end_encoding();
  if (const auto times = std::shared_ptr<KernelTimes>(timed.take_times()))
    commands->addCompletedHandler(MTL::HandlerFunction([times](MTL::CommandBuffer*) { deliver(*times); }));
}

} // namespace

void run_on_current_stream(Context& context, const std::function<void(CommandStream&)>& encode) {
  const GilRelease release;
  if (apple::uses_own_queue()) {
    apple::run_on_own_queue(context, encode);
    return;
  }
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream(); // another one at every call, perhaps
  apple::StreamScratch& scratch = apple::StreamScratch::of(stream);
  auto run = [&] {
    const auto allocate = [&](size_t bytes) { return scratch.allocate(context.pool(), bytes); };
    scratch.begin();
    if (observing_times()) {
      encode_timed(context, stream, allocate, encode);
      return;
    }
    const BorrowedEncoder encoder(stream);
    CommandStream borrowed(nullptr, encoder.get(), context.pool(), allocate);
    encode(borrowed);
  };
  apple::on_queue(stream, run);
}

void release_stream_scratch(Context&) {
  const GilRelease release;
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  apple::StreamScratch& scratch = apple::StreamScratch::of(stream);
  auto run = [&] { scratch.release_after(apple::metal_object<MTL::CommandBuffer>(stream->commandBuffer())); };
  apple::on_queue(stream, run);
}

} // namespace metal_moe::bindings
