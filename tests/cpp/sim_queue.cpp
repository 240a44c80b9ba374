// Command queues: order, waiting, completion handlers, several threads, and life times.
#include "sim_support.h"

#include <atomic>
#include <chrono>
#include <future>
#include <thread>

namespace {

using namespace sim_test;

class Queue : public testing::Test {
protected:
  /// A command buffer that adds one to word 0 of `data`.
  MTL::CommandBuffer* add_one() {
    auto* commands = native.queue->commandBuffer();
    auto* encoder = commands->computeCommandEncoder();
    encoder->setComputePipelineState(pipeline.get());
    encoder->setBuffer(data.get(), 0, 0);
    encoder->dispatchThreadgroups({1, 1, 1}, {1, 1, 1});
    encoder->endEncoding();
    return commands;
  }

  /// A command buffer that takes until word 0 of `gate` is set.
  MTL::CommandBuffer* wait_for_gate() {
    auto* commands = native.queue->commandBuffer();
    auto* encoder = commands->computeCommandEncoder();
    encoder->setComputePipelineState(waiting.get());
    encoder->setBuffer(gate.get(), 0, 0);
    encoder->dispatchThreadgroups({1, 1, 1}, {1, 1, 1});
    encoder->endEncoding();
    return commands;
  }

  void open_gate() { __atomic_store_n(words(gate), 1u, __ATOMIC_RELEASE); }

  Engine native{"native"};
  NS::SharedPtr<MTL::ComputePipelineState> pipeline = native.pipeline("add_one");
  NS::SharedPtr<MTL::ComputePipelineState> waiting = native.pipeline("wait_for_host");
  NS::SharedPtr<MTL::Buffer> data = native.buffer(1), gate = native.buffer(1);
};

constexpr auto LONG = std::chrono::seconds(60); // far beyond anything but a hang

TEST_F(Queue, AnEmptyBufferCompletes) {
  auto* commands = native.queue->commandBuffer();
  EXPECT_EQ(commands->status(), MTL::CommandBufferStatusNotEnqueued);
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_EQ(commands->status(), MTL::CommandBufferStatusCompleted);
}

TEST_F(Queue, HandlersRunWithoutAnybodyWaiting) {
  for (int round = 0; round < 3; ++round) {
    std::promise<uint32_t> seen;
    auto* commands = add_one();
    commands->addCompletedHandler([&](MTL::CommandBuffer* buffer) {
      EXPECT_EQ(buffer->status(), MTL::CommandBufferStatusCompleted);
      seen.set_value(words(data)[0]);
    });
    commands->commit();
    auto future = seen.get_future();
    ASSERT_EQ(future.wait_for(LONG), std::future_status::ready);
    EXPECT_EQ(future.get(), uint32_t(round + 1));
  }
}

TEST_F(Queue, HandlersHaveRunWhenTheWaitEnds) {
  std::vector<int> order;
  auto* commands = add_one();
  commands->addScheduledHandler([&](MTL::CommandBuffer*) { order.push_back(0); });
  commands->addCompletedHandler([&](MTL::CommandBuffer*) { order.push_back(1); });
  commands->addCompletedHandler([&](MTL::CommandBuffer*) { order.push_back(2); });
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2}));
}

TEST_F(Queue, CommitDoesNotWait) {
  auto* blocked = wait_for_gate();
  blocked->commit();
  auto* behind = add_one();
  behind->commit();
  EXPECT_NE(behind->status(), MTL::CommandBufferStatusCompleted);
  EXPECT_EQ(words(data)[0], 0u);
  open_gate();
  behind->waitUntilCompleted();
  EXPECT_EQ(blocked->status(), MTL::CommandBufferStatusCompleted);
  EXPECT_EQ(words(data)[0], 1u);
}

TEST_F(Queue, BuffersRunInTheOrderOfCommits) {
  std::vector<int> order;
  MTL::CommandBuffer* last = nullptr;
  for (int i = 0; i < 100; ++i) {
    last = add_one();
    last->addCompletedHandler([&order, i](MTL::CommandBuffer*) { order.push_back(i); });
    last->commit();
  }
  last->waitUntilCompleted();
  ASSERT_EQ(order.size(), 100u);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
  EXPECT_EQ(words(data)[0], 100u);
}

TEST_F(Queue, EnqueueReservesAPlace) {
  std::vector<int> order;
  auto* first = add_one();
  auto* second = add_one();
  first->addCompletedHandler([&](MTL::CommandBuffer*) { order.push_back(1); });
  second->addCompletedHandler([&](MTL::CommandBuffer*) { order.push_back(2); });
  first->enqueue();
  EXPECT_EQ(first->status(), MTL::CommandBufferStatusEnqueued);
  second->commit();
  std::thread late([&] { first->commit(); });
  second->waitUntilCompleted();
  late.join();
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
}

TEST_F(Queue, ManyThreadsMayCommitAndWait) {
  constexpr int threads = 4, rounds = 500;
  std::atomic<int> handlers{0};
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      for (int i = 0; i < rounds; ++i) {
        const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
        auto* commands = add_one();
        commands->addCompletedHandler([&](MTL::CommandBuffer*) { ++handlers; });
        commands->commit();
        if ((i + t) % 3 != 0)
          commands->waitUntilCompleted();
      }
    });
  }
  for (auto& worker : workers)
    worker.join();
  auto* last = add_one();
  last->commit();
  last->waitUntilCompleted();
  EXPECT_EQ(words(data)[0], uint32_t(threads * rounds + 1));
  EXPECT_EQ(handlers, threads * rounds);
}

TEST_F(Queue, WaitingInAHandlerForTheSameQueueIsRefused) {
  std::string message;
  auto* first = add_one();
  auto* second = add_one();
  first->addCompletedHandler([&](MTL::CommandBuffer*) {
    second->commit();
    message = misuse([&] { second->waitUntilCompleted(); });
  });
  first->commit();
  first->waitUntilCompleted();
  EXPECT_TRUE(mentions(message, {"wait for itself"}));
  second->waitUntilCompleted();
  EXPECT_EQ(words(data)[0], 2u);
}

TEST_F(Queue, ACommittedBufferOutlivesItsOwners) {
  std::promise<uint32_t> seen;
  {
    const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
    auto* commands = add_one();
    commands->addCompletedHandler([&](MTL::CommandBuffer*) { seen.set_value(words(data)[0]); });
    commands->commit();
  }
  native.queue.reset(); // the worker releases the last reference
  auto future = seen.get_future();
  ASSERT_EQ(future.wait_for(LONG), std::future_status::ready);
  EXPECT_EQ(future.get(), 1u);
}

TEST_F(Queue, WhatIsNeverCommittedLeavesNothingBehind) {
  {
    const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
    add_one();
    EXPECT_GT(data->retainCount(), 1u);
  }
  EXPECT_EQ(data->retainCount(), 1u);
  EXPECT_EQ(native.queue->retainCount(), 1u);
}

TEST(QueueErrors, AreKeptOnTheBufferAndOthersGoOn) {
  Engine exact("exact");
  const auto in = exact.buffer(4), out = exact.buffer(4);
  const auto broken = exact.pipeline("read_past_end"), right = exact.pipeline("add_one");
  const auto encode = [&](MTL::ComputePipelineState* pipeline, int dispatches) {
    auto* commands = exact.queue->commandBuffer();
    auto* encoder = commands->computeCommandEncoder();
    encoder->setBuffer(in.get(), 0, 0);
    encoder->setBuffer(out.get(), 0, 1);
    for (int i = 0; i < dispatches; ++i) {
      encoder->setComputePipelineState(pipeline);
      encoder->dispatchThreadgroups({1, 1, 1}, {4, 1, 1});
      pipeline = right.get();
    }
    encoder->endEncoding();
    return commands;
  };
  auto* bad = encode(broken.get(), 2);
  auto* good = encode(right.get(), 1);
  std::string in_handler;
  bad->addCompletedHandler([&](MTL::CommandBuffer* buffer) {
    EXPECT_EQ(buffer->status(), MTL::CommandBufferStatusError);
    in_handler = buffer->error()->localizedDescription()->utf8String();
  });
  bad->commit();
  good->commit();
  good->waitUntilCompleted();
  EXPECT_TRUE(mentions(in_handler, {"kernel 'read_past_end'"}));
  EXPECT_EQ(bad->status(), MTL::CommandBufferStatusError);
  EXPECT_STREQ(bad->error()->domain()->utf8String(), "MTLCommandBufferErrorDomain");
  EXPECT_EQ(good->status(), MTL::CommandBufferStatusCompleted);
  EXPECT_EQ(good->error(), nullptr);
  EXPECT_TRUE(all_are(contents(in), 1u)); // the dispatch behind the broken one did not run
}

TEST_F(Queue, EventsOrderQueues) {
  const auto event = NS::TransferPtr(native.device->newSharedEvent());
  EXPECT_EQ(event->signaledValue(), 0u);
  const auto other = NS::TransferPtr(native.device->newCommandQueue());
  auto* second = other->commandBuffer();
  second->encodeWait(event.get(), 7);
  second->encodeSignalEvent(event.get(), 8);
  second->commit();
  auto* first = wait_for_gate();
  first->encodeSignalEvent(event.get(), 7);
  first->commit();
  std::this_thread::sleep_for(std::chrono::milliseconds(20)); // the queues' workers have begun
  EXPECT_EQ(event->signaledValue(), 0u);
  EXPECT_LT(second->status(), MTL::CommandBufferStatusCompleted);
  open_gate();
  second->waitUntilCompleted();
  EXPECT_EQ(event->signaledValue(), 8u);
  first->waitUntilCompleted(); // it signals before it has completed
  EXPECT_EQ(first->status(), MTL::CommandBufferStatusCompleted);
  event->setSignaledValue(3);
  EXPECT_EQ(event->signaledValue(), 8u) << "never lower";
}

TEST_F(Queue, EventsStandBetweenEncoders) {
  const auto event = NS::TransferPtr(native.device->newSharedEvent());
  auto* commands = native.queue->commandBuffer();
  auto* encoder = commands->computeCommandEncoder();
  EXPECT_THROW(commands->encodeSignalEvent(event.get(), 1), std::logic_error);
  EXPECT_THROW(commands->encodeWait(event.get(), 1), std::logic_error);
  encoder->endEncoding();
  EXPECT_THROW(commands->encodeWait(nullptr, 1), std::logic_error);
  commands->commit();
  EXPECT_THROW(commands->encodeSignalEvent(event.get(), 1), std::logic_error);
  commands->waitUntilCompleted();
}

} // namespace
