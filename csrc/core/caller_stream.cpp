#include "caller_stream.h"

#include "observer.h"
#include "trace.h"

#include <metal_sim/control.h>

namespace metal_moe {

namespace {

NS::SharedPtr<MTL::ComputeCommandEncoder> open_encoder(MTL::CommandBuffer* commands) {
  AutoreleaseScope scope;
  return NS::RetainPtr(commands->computeCommandEncoder());
}

} // namespace

CallerStream::CallerStream(Context& context, void* handle, CommandStream::Allocate allocate)
    : handle_(handle), commands_(NS::TransferPtr(metal_sim::new_stream_command_buffer(context.caller_queue(), handle))),
      encoder_(observing_times() ? nullptr : open_encoder(commands_.get())),
      stream_(commands_.get(), encoder_.get(), context.pool(), std::move(allocate), handle) {}

CallerStream::~CallerStream() {
  if (!ended_ && encoder_)
    encoder_->endEncoding();
}

void CallerStream::commit() {
  if (encoder_)
    encoder_->endEncoding();
  else
    stream_.end_encoding();
  ended_ = true;
  auto times = stream_.take_times();
  commands_->commit();
  DispatchTrace& trace = last_dispatch();
  trace.add_commit();
  if (observing()) [[unlikely]]
    tell_commit(track_of(handle_, trace.engine), trace.engine, trace.dispatches);
  if (times)
    deliver_later(std::move(times));
  if (commands_->status() == MTL::CommandBufferStatusError) {
    AutoreleaseScope scope;
    throw ExecutionError(describe(commands_->error()));
  }
}

} // namespace metal_moe
