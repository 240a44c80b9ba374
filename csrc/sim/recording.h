// What encoding a command buffer produces: dispatches, their small constants, and references to what they use.
#pragma once

#include "Foundation/Foundation.hpp"
#include "engine.h"

#include <cstddef>
#include <memory>
#include <vector>

namespace metal_sim {

class BufferObject;
class EventObject;
class PipelineObject;
class SamplesObject;

/// Memory behind one buffer index of an encoder.
struct Binding {
  std::byte* address = nullptr;         // null: nothing bound
  size_t bytes = 0;                     // to the end of the buffer
  const BufferObject* buffer = nullptr; // null: constants from setBytes
};

/// What the encoder's calls have set and the next dispatch will use.
struct EncoderState {
  const PipelineObject* pipeline = nullptr;
  Binding buffers[MAX_BUFFERS];
  uint32_t threadgroup_bytes[MAX_THREADGROUP_ARGUMENTS] = {};
};

/// What happens between dispatches. Objects are retained by the recording.
struct Mark {
  enum Kind { Wait, Signal, Sample };

  uint32_t dispatches; // how many come before it
  Kind kind;
  EventObject* event;     // of a wait or a signal
  uint64_t value;         // of the event; or the sample's index
  SamplesObject* samples; // of a sample
};

/// Recycled by the queue, so that encoding allocates nothing once warm.
class Recording {
public:
  ~Recording() { clear(); }

  /// A copy of `bytes` that stays in place until clear().
  std::byte* copy(const void* bytes, size_t length);

  /// Keeps `object` alive until clear().
  void retain(metal_sim::Counted* object) {
    object->add_reference();
    retained_.push_back(object);
  }

  /// Forgets everything and keeps the memory.
  void clear();

  std::vector<Dispatch> dispatches;
  std::vector<Mark> marks;
  EncoderState state;

private:
  static constexpr size_t BLOCK_BYTES = 16 << 10; // four times the longest constant

  std::vector<Counted*> retained_;
  std::vector<std::unique_ptr<std::byte[]>> blocks_;
  size_t block_ = 0; // in use
  size_t used_ = 0;  // bytes of it
};

} // namespace metal_sim
