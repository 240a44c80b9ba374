// The compute command encoder: checks what Metal's API validation checks, and records dispatches.
#pragma once

#include "command_queue.h"
#include "counter_samples.h"

namespace metal_sim {

class EncoderObject final : public MTL::ComputeCommandEncoder {
public:
  EncoderObject(NS::SharedPtr<CommandBufferObject> buffer, MTL::DispatchType type);

  /// The state to change; misuse where encoding has ended.
  EncoderState& state(const char* call);
  void end();
  /// Notes when the encoder begins, now, and when it ends, in the samples of these indices.
  void sample(NS::SharedPtr<SamplesObject> samples, NS::UInteger start, NS::UInteger end);

  const NS::SharedPtr<CommandBufferObject> buffer;
  const MTL::DispatchType type;
  Label label;

private:
  void mark(NS::UInteger index);

  bool ended_ = false;
  NS::SharedPtr<SamplesObject> samples_;
  NS::UInteger end_sample_ = 0;
};

} // namespace metal_sim
