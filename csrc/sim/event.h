// Shared events: values that command buffers of different queues wait for and signal.
#pragma once

#include "objects.h"

#include <condition_variable>
#include <mutex>

namespace metal_sim {

class EventObject final : public MTL::SharedEvent {
public:
  explicit EventObject(DeviceObject* device) : device(device) {}

  uint64_t value() const;
  /// Never lowers the value.
  void signal(uint64_t value);
  /// Blocks the calling thread.
  void wait(uint64_t value);

  DeviceObject* const device;
  Label label;

private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t value_ = 0;
};

} // namespace metal_sim
