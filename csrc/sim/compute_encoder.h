// The compute command encoder: checks what Metal's API validation checks, and records dispatches.
#pragma once

#include "command_queue.h"

namespace metal_sim {

class EncoderObject final : public MTL::ComputeCommandEncoder {
public:
  EncoderObject(NS::SharedPtr<CommandBufferObject> buffer, MTL::DispatchType type);

  /// The state to change; misuse where encoding has ended.
  EncoderState& state(const char* call);
  void end();

  const NS::SharedPtr<CommandBufferObject> buffer;
  const MTL::DispatchType type;
  Label label;

private:
  bool ended_ = false;
};

} // namespace metal_sim
