#include "caller_stream.h"

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
    : commands_(NS::TransferPtr(metal_sim::new_stream_command_buffer(context.caller_queue(), handle))),
      encoder_(open_encoder(commands_.get())),
      stream_(commands_.get(), encoder_.get(), context.pool(), std::move(allocate)) {}

CallerStream::~CallerStream() {
  if (!ended_)
    encoder_->endEncoding();
}

void CallerStream::commit() {
  encoder_->endEncoding();
  ended_ = true;
  commands_->commit();
  last_dispatch().add_commit();
  if (commands_->status() == MTL::CommandBufferStatusError) {
    AutoreleaseScope scope;
    throw ExecutionError(describe(commands_->error()));
  }
}

} // namespace metal_moe
