// Command queues and command buffers: who executes what, when, on which thread.
//
// A queue has no thread of its own until it needs one. Whoever waits executes: waitUntilCompleted() runs the buffers in
// front on the calling thread, so that commit and wait cost no thread switch. A commit arms a timer; if nobody has
// waited when it fires, the queue's worker executes what is pending.
#pragma once

#include "objects.h"
#include "recording.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace metal_sim {

class CommandBufferObject;
class EncoderObject;

/// The part of a queue that its worker shares: outlives the queue object until the worker has seen `stop`.
class Schedule : public std::enable_shared_from_this<Schedule> {
public:
  Schedule();
  ~Schedule();

  /// Reserves a place in the order of execution.
  void enqueue(CommandBufferObject* buffer);
  /// Enqueues where that has not happened, and makes the buffer ready to execute.
  void commit(CommandBufferObject* buffer);
  void wait(CommandBufferObject* buffer);
  /// Ends the worker. Nothing may be pending.
  void stop();

private:
  /// Executes the buffer in front. `lock` is released meanwhile.
  void run_front(std::unique_lock<std::mutex>& lock);
  bool front_is_ready() const;
  void arm(uint64_t nanoseconds);
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<CommandBufferObject*> pending_; // each with a reference
  std::thread::id runner_;                   // who executes now, if anybody
  uint32_t sleepers_ = 0;                    // threads waiting for changed_
  int timer_ = -1;
  bool armed_ = false;
  bool soon_ = false; // armed without delay
  bool stop_ = false;
  uint64_t delay_;
  std::thread worker_;
};

class QueueObject final : public MTL::CommandQueue {
public:
  explicit QueueObject(DeviceObject* device);
  ~QueueObject() override;

  std::unique_ptr<Recording> take_recording();
  void give_back(std::unique_ptr<Recording> recording);

  DeviceObject* const device;
  const std::shared_ptr<Schedule> schedule;
  Label label;

private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Recording>> idle_;
};

class CommandBufferObject final : public MTL::CommandBuffer {
public:
  CommandBufferObject(NS::SharedPtr<QueueObject> queue, bool retains);
  ~CommandBufferObject() override;

  /// Runs all dispatches, then the handlers.
  void execute();
  /// Starts all dispatches on the stream, then calls the handlers.
  void launch();

  const NS::SharedPtr<QueueObject> queue;
  const bool retains; // buffers and pipelines
  std::unique_ptr<Recording> recording;
  EncoderObject* encoder = nullptr; // open
  bool on_stream = false;           // of the program's; the queue's schedule never sees the buffer
  void* stream = nullptr;
  std::atomic<MTL::CommandBufferStatus> status{MTL::CommandBufferStatusNotEnqueued};
  std::atomic<bool> finished{false}; // executed, handlers included
  NS::SharedPtr<ErrorObject> error;
  double start = 0, end = 0;
  std::vector<MTL::HandlerFunction> scheduled_handlers;
  std::vector<MTL::HandlerFunction> completed_handlers;
  Label label;

private:
  void finish(std::string failure, MTL::CommandBufferError code);
};

} // namespace metal_sim
