// The time that the device takes for each dispatch of a command buffer. Every dispatch gets a compute encoder of its
// own, whose beginning and end the device notes in a counter sample buffer: Apple's GPUs take timestamps at the
// boundaries of encoders only.
#pragma once

#include "dispatch_record.h"
#include "metal.h"

#include <memory>
#include <vector>

namespace metal_moe {

class KernelTimes {
public:
  /// Whether the device takes timestamps at the boundaries of encoders.
  static bool supported(MTL::Device* device);

  explicit KernelTimes(MTL::Device* device) : device_(device) {}
  KernelTimes(const KernelTimes&) = delete;
  KernelTimes& operator=(const KernelTimes&) = delete;

  /// An encoder for the next dispatch, timed; autoreleased. Without timestamps where the device has no memory for more.
  MTL::ComputeCommandEncoder* encoder(MTL::CommandBuffer* commands);
  /// What was encoded into the last encoder.
  void add(const DispatchRecord& record) { records_.push_back({record, pairs_, open_timed_}); }
  /// Times of a dispatch that was in a command buffer alone.
  void set_alone(double start_seconds, double end_seconds);

  /// Reads the timestamps of a command buffer that has completed.
  void resolve();
  /// With times once they are resolved.
  std::vector<DispatchRecord> records() const;

private:
  /// Of a sample buffer: as many as a layer has dispatches, several times over.
  static constexpr uint32_t PAIRS = 64;

  struct Entry {
    DispatchRecord record;
    uint32_t pairs; // encoders up to its own
    bool timed;
  };

  bool add_samples();

  MTL::Device* device_;
  std::vector<NS::SharedPtr<MTL::CounterSampleBuffer>> samples_;
  std::vector<Entry> records_;
  uint32_t pairs_ = 0;                        // encoders with timestamps
  bool open_timed_ = false;                   // the last one is
  MTL::Timestamp host_ = 0, device_time_ = 0; // the same moment, before the first encoder
};

} // namespace metal_moe
