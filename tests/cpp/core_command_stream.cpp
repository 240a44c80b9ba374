// CommandStream: order, commit policy, completion handlers, bounded flight, scratch lifetime, kept errors.
#include "core_support.h"

#include <algorithm>
#include <atomic>
#include <future>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

using namespace std::chrono_literals;

namespace metal_moe::testing {
namespace {

struct Stream : ::testing::Test, Copying {
  Stream() : Copying("native") {}
};

TEST_F(Stream, RunsWhatWasEncoded) {
  auto stream = context.new_stream();
  copy(*stream);
  EXPECT_EQ(stream->pending_dispatches(), 1u);
  stream->synchronize();
  EXPECT_EQ(to, from);
  EXPECT_EQ(stream->pending_dispatches(), 0u);
  EXPECT_EQ(stream->in_flight(), 0u);
}

TEST_F(Stream, DispatchesSeeWhatEarlierOnesWrote) {
  auto stream = context.new_stream();
  BufferView previous = source.view();
  for (int i = 0; i < 20; ++i) {
    const BufferView next = stream->scratch(1024);
    encode_copy(*stream, device, previous, next, 1024);
    previous = next;
  }
  encode_copy(*stream, device, previous, destination.view(), 1024);
  stream->synchronize();
  EXPECT_EQ(to, from);
}

TEST_F(Stream, EventsOrderStreams) {
  const auto event = NS::TransferPtr(context.device()->newSharedEvent());
  auto first = context.new_stream(), second = context.new_stream();
  std::vector<int32_t> between(256, -1);
  const TensorView middle = tensor(context, between, {256});
  second->wait_for(event.get(), 1);
  encode_copy(*second, device, middle.view(), destination.view(), 1024);
  second->commit();
  EXPECT_EQ(second->in_flight(), 1u);
  encode_copy(*first, device, source.view(), middle.view(), 1024);
  first->signal(event.get(), 1);
  first->commit();
  second->synchronize();
  EXPECT_EQ(to, from);
  first->synchronize();
}

TEST_F(Stream, CommitsEventsWithoutDispatches) {
  const auto event = NS::TransferPtr(context.device()->newSharedEvent());
  auto stream = context.new_stream();
  stream->signal(event.get(), 5);
  stream->synchronize();
  EXPECT_EQ(event->signaledValue(), 5u);
}

TEST_F(Stream, SynchronizeWithoutWorkIsHarmless) {
  auto stream = context.new_stream();
  last_dispatch() = {};
  stream->synchronize();
  stream->commit();
  EXPECT_EQ(last_dispatch().commits, 0u);
}

TEST_F(Stream, CommitsAfterTheDispatchesOfThePolicy) {
  CommandStream::Policy policy;
  policy.max_dispatches = 4;
  auto stream = context.new_stream(policy);
  last_dispatch() = {};
  for (int i = 1; i <= 10; ++i) {
    copy(*stream);
    stream->end_operation();
    EXPECT_EQ(last_dispatch().commits, uint32_t(i / 4));
  }
  stream->synchronize();
  EXPECT_EQ(last_dispatch().commits, 3u);
  EXPECT_EQ(last_dispatch().dispatches, 10u);
}

TEST_F(Stream, CommitsAfterTheBytesOfThePolicy) {
  CommandStream::Policy policy;
  policy.max_bytes = 1 << 20;
  auto stream = context.new_stream(policy);
  last_dispatch() = {};
  copy(*stream, (1 << 20) - 1);
  stream->end_operation();
  EXPECT_EQ(last_dispatch().commits, 0u);
  copy(*stream, 1);
  stream->end_operation();
  EXPECT_EQ(last_dispatch().commits, 1u);
}

TEST_F(Stream, NeverSplitsAnOperation) {
  CommandStream::Policy policy;
  policy.max_dispatches = 2;
  auto stream = context.new_stream(policy);
  last_dispatch() = {};
  for (int i = 0; i < 9; ++i)
    copy(*stream);
  EXPECT_EQ(last_dispatch().commits, 0u);
  stream->end_operation();
  EXPECT_EQ(last_dispatch().commits, 1u);
}

TEST_F(Stream, HandlersRunWithoutAnybodyWaiting) {
  auto stream = context.new_stream();
  std::promise<bool> written;
  copy(*stream);
  stream->on_completed([&](const Completion&) { written.set_value(to == from); });
  stream->commit();
  auto result = written.get_future();
  ASSERT_EQ(result.wait_for(10s), std::future_status::ready);
  EXPECT_TRUE(result.get()) << "a handler sees the results";
  stream->synchronize();
}

TEST_F(Stream, HandlersRunOnAThreadOfTheStreamInOrder) {
  auto stream = context.new_stream();
  std::vector<std::thread::id> threads;
  std::vector<int> order;
  const double before = seconds_now();
  double last = before;
  for (int i = 0; i < 20; ++i) {
    copy(*stream);
    stream->on_completed([&, i](const Completion& completion) {
      threads.push_back(std::this_thread::get_id());
      order.push_back(i);
      EXPECT_GE(completion.gpu_start, last) << "one after the other";
      EXPECT_GE(completion.gpu_end, completion.gpu_start);
      EXPECT_EQ(completion.error, "");
      last = completion.gpu_end;
    });
    stream->commit();
  }
  stream->synchronize(); // executes on this thread what is left, where the stand-in has not begun with it
  std::vector<int> expected(20);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(order, expected);
  EXPECT_LE(last, seconds_now());
  EXPECT_NE(threads.front(), std::this_thread::get_id());
  EXPECT_EQ(std::count(threads.begin(), threads.end(), threads.front()), 20);
}

TEST_F(Stream, ASlowHandlerStopsNoOtherWork) {
  auto stream = context.new_stream(), other = context.new_stream();
  std::promise<void> release;
  std::vector<int32_t> last(256, -1);
  const TensorView view = tensor(context, last, {256});
  copy(*stream);
  stream->on_completed([&](const Completion&) { release.get_future().wait(); });
  stream->commit();
  encode_copy(*stream, device, source.view(), view.view(), 1024); // behind it, on the same stream
  const auto event = NS::TransferPtr(context.device()->newSharedEvent());
  stream->signal(event.get(), 1);
  stream->commit();
  other->wait_for(event.get(), 1);
  other->synchronize();
  EXPECT_EQ(last, from);
  EXPECT_EQ(stream->in_flight(), 2u) << "completed is what the handlers in front of it have returned for";
  release.set_value();
  stream->synchronize();
}

TEST_F(Stream, HandlersMustNotUseTheirStream) {
  auto stream = context.new_stream();
  std::string message;
  copy(*stream);
  stream->on_completed([&](const Completion&) {
    for (const auto& call : {+[](CommandStream& s) { s.synchronize(); }, +[](CommandStream& s) { s.scratch(1); }}) {
      try {
        call(*stream);
      } catch (const std::logic_error& error) {
        message += error.what();
      }
    }
  });
  stream->synchronize();
  EXPECT_EQ(message, "synchronize: called by a completion handler of the same stream"
                     "encode: called by a completion handler of the same stream");
}

TEST_F(Stream, KeepsObjectsUntilTheirCommandBufferHasCompleted) {
  auto stream = context.new_stream();
  std::promise<void> release;
  auto first = std::make_shared<int>(1), dropped = std::make_shared<int>(2);
  copy(*stream);
  stream->keep(first);
  stream->on_completed([&](const Completion&) { release.get_future().wait(); });
  stream->commit();
  EXPECT_EQ(first.use_count(), 2);
  copy(*stream);
  stream->keep(dropped);
  stream->discard();
  EXPECT_EQ(dropped.use_count(), 1);
  EXPECT_EQ(first.use_count(), 2);
  release.set_value();
  stream->synchronize();
  EXPECT_EQ(first.use_count(), 1);
}

TEST_F(Stream, SeveralEncodersInOneCommandBuffer) {
  auto stream = context.new_stream();
  last_dispatch() = {};
  BufferView previous = source.view();
  for (int i = 0; i < 8; ++i) {
    const BufferView next = stream->scratch(1024);
    encode_copy(*stream, device, previous, next, 1024);
    stream->end_encoder();
    previous = next;
  }
  encode_copy(*stream, device, previous, destination.view(), 1024);
  stream->synchronize();
  EXPECT_EQ(last_dispatch().commits, 1u);
  EXPECT_EQ(to, from);
}

TEST_F(Stream, ScratchIsNotReusedBeforeCompletion) {
  auto stream = context.new_stream();
  BufferPool& pool = context.pool();
  const auto before = pool.statistics();
  std::promise<void> running, release;
  const BufferView scratch = stream->scratch(12345);
  encode_copy(*stream, device, source.view(), scratch, 1024);
  stream->on_completed([&](const Completion&) {
    running.set_value();
    release.get_future().wait();
  });
  stream->commit();
  running.get_future().wait(); // executed, not yet completed
  EXPECT_EQ(pool.statistics().buffers_in_use, before.buffers_in_use + 1);
  EXPECT_NE(pool.acquire(12345).get(), scratch.buffer);
  EXPECT_EQ(stream->in_flight(), 1u);
  release.set_value();
  stream->synchronize();
  EXPECT_EQ(pool.statistics().buffers_in_use, before.buffers_in_use);
}

TEST_F(Stream, BoundsCommandBuffersInFlight) {
  CommandStream::Policy policy;
  policy.max_in_flight = 2;
  auto stream = context.new_stream(policy);
  std::promise<void> release;
  copy(*stream);
  stream->on_completed([&](const Completion&) { release.get_future().wait(); });
  stream->commit();
  copy(*stream);
  stream->commit();
  EXPECT_EQ(stream->in_flight(), 2u);
  copy(*stream);
  auto third = std::async(std::launch::async, [&] { stream->commit(); });
  EXPECT_EQ(third.wait_for(50ms), std::future_status::timeout) << "the third waits for the first";
  release.set_value();
  third.get();
  EXPECT_LE(stream->in_flight(), 2u);
  stream->synchronize();
}

TEST_F(Stream, ExceptionsOfHandlersAreKept) {
  auto stream = context.new_stream();
  copy(*stream);
  stream->on_completed([](const Completion&) { throw std::runtime_error("the handler's own trouble"); });
  stream->commit();
  try {
    stream->synchronize();
    FAIL() << "no exception";
  } catch (const ExecutionError& error) {
    EXPECT_NE(std::string(error.what()).find("the handler's own trouble"), std::string::npos) << error.what();
  }
  stream->synchronize(); // reported once
}

TEST_F(Stream, DiscardDropsWorkAndFreesScratch) {
  auto stream = context.new_stream();
  const auto before = context.pool().statistics().buffers_in_use;
  encode_copy(*stream, device, source.view(), stream->scratch(1024), 1024);
  copy(*stream);
  stream->discard();
  EXPECT_EQ(context.pool().statistics().buffers_in_use, before);
  stream->synchronize();
  EXPECT_EQ(to[0], -1);
  copy(*stream); // and works afterwards
  stream->synchronize();
  EXPECT_EQ(to, from);
}

TEST_F(Stream, RefusesMoreThreadsThanThePipelineAllows) {
  auto stream = context.new_stream();
  const Pipeline& pipeline = device.pipeline(GATHER_KERNEL);
  stream->use(pipeline);
  try {
    stream->dispatch(MTL::Size(1, 1, 1), pipeline.max_threads + 1, 0);
    FAIL() << "no exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("gather_experts"), std::string::npos) << error.what();
  }
}

TEST_F(Stream, DestructionWaitsForWork) {
  for (int i = 0; i < 100; ++i) {
    std::fill(to.begin(), to.end(), -1);
    {
      auto stream = context.new_stream();
      copy(*stream);
      stream->commit();
    }
    ASSERT_EQ(to, from);
  }
}

TEST_F(Stream, BorrowedEncodesIntoItsOwnersCommandBuffer) {
  AutoreleaseScope scope;
  const auto queue = NS::TransferPtr(context.device()->newCommandQueue());
  MTL::CommandBuffer* commands = queue->commandBuffer();
  MTL::ComputeCommandEncoder* encoder = commands->computeCommandEncoder();
  const auto before = context.pool().statistics().buffers_in_use;
  last_dispatch() = {};
  {
    CommandStream stream(commands, encoder, context.pool());
    const BufferView scratch = stream.scratch(1024);
    encode_copy(stream, device, source.view(), scratch, 1024);
    encode_copy(stream, device, scratch, destination.view(), 1024);
    stream.end_operation();
    stream.commit();
    EXPECT_THROW(stream.synchronize(), std::logic_error);
  }
  EXPECT_EQ(last_dispatch().commits, 0u);
  EXPECT_EQ(context.pool().statistics().buffers_in_use, before + 1) << "until the owner's buffer completes";
  encoder->endEncoding();
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_EQ(to, from);
  EXPECT_EQ(context.pool().statistics().buffers_in_use, before);
}

// What is committed when a process forks is the parent's to complete; the child is told so, and waits for nothing.
TEST_F(Stream, TheChildOfAForkIsToldThatTheStreamIsItsParents) {
  auto stream = context.new_stream();
  std::promise<void> release;
  copy(*stream);
  stream->on_completed([&](const Completion&) { release.get_future().wait(); });
  stream->commit();
  copy(*stream);
  const pid_t child = fork();
  ASSERT_NE(child, -1);
  if (child == 0) {
    alarm(30); // ends a child that waits for threads that it does not have
    int failed = 0;
    for (const auto& call : {+[](CommandStream& s) { s.synchronize(); }, +[](CommandStream& s) { s.commit(); },
                             +[](CommandStream& s) { s.keep(std::make_shared<int>(1)); }}) {
      failed += 1;
      try {
        call(*stream);
      } catch (const std::runtime_error& error) {
        failed -= std::string(error.what()).find("forked") != std::string::npos;
      }
    }
    stream.reset();
    // One of its own works, and so does what a synchronous call leases.
    std::fill(to.begin(), to.end(), -1);
    auto own = context.new_stream();
    copy(*own);
    own->synchronize();
    failed += to != from;
    std::fill(to.begin(), to.end(), -1);
    run_operation(device, "test", [&](CommandStream& leased) { copy(leased); });
    failed += to != from;
    _exit(failed);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  release.set_value();
  stream->synchronize(); // and the parent's goes on
  EXPECT_EQ(to, from);
}

// The exact engine checks every access against the bound buffers: an overrun is an error of the command buffer.
struct FailingStream : ::testing::Test {
  MoeEngine& exact = engine("exact");
  Context& context = exact.context();
  std::vector<int32_t> from = std::vector<int32_t>(256, 7), to = std::vector<int32_t>(256, -1);
  TensorView source = tensor(context, from, {256}), destination = tensor(context, to, {256});

  void encode(CommandStream& stream, uint32_t bytes) {
    encode_copy(stream, exact, source.view(), destination.view(), bytes);
  }
};

TEST_F(FailingStream, ErrorsComeAtTheNextSynchronizeAndNameTheKernel) {
  auto stream = context.new_stream();
  encode(*stream, 1028);
  stream->commit();
  for (int i = 0; i < 3; ++i) { // later work does not hide it
    encode(*stream, 1024);
    stream->commit();
  }
  try {
    stream->synchronize();
    FAIL() << "no exception";
  } catch (const ExecutionError& error) {
    EXPECT_NE(std::string(error.what()).find("gather_experts"), std::string::npos) << error.what();
  }
  encode(*stream, 1024);
  EXPECT_NO_THROW(stream->synchronize()) << "reported once";
  EXPECT_EQ(to, from);
}

TEST_F(FailingStream, ScratchComesBackAfterAnError) {
  auto stream = context.new_stream();
  const auto before = context.pool().statistics().buffers_in_use;
  encode_copy(*stream, exact, source.view(), stream->scratch(1024), 4096);
  EXPECT_THROW(stream->synchronize(), ExecutionError);
  EXPECT_EQ(context.pool().statistics().buffers_in_use, before);
}

TEST_F(FailingStream, ErrorsStayWithTheirStream) {
  auto bad = context.new_stream(), good = context.new_stream();
  encode(*bad, 1028);
  bad->commit();
  encode(*good, 1024);
  EXPECT_NO_THROW(good->synchronize());
  EXPECT_THROW(bad->synchronize(), ExecutionError);
}

TEST_F(FailingStream, ALeasedStreamIsCleanForTheNextCall) {
  EXPECT_THROW(run_operation(exact, "test", [&](CommandStream& stream) { encode(stream, 1028); }), ExecutionError);
  std::fill(to.begin(), to.end(), -1);
  EXPECT_THROW(run_operation(exact, "test",
                             [&](CommandStream& stream) {
                               encode(stream, 1024);
                               throw std::invalid_argument("half way");
                             }),
               std::invalid_argument);
  EXPECT_EQ(to[0], -1) << "what an exception interrupted is not run";
  run_operation(exact, "test", [&](CommandStream& stream) { encode(stream, 1024); });
  EXPECT_EQ(to, from);
  EXPECT_EQ(last_dispatch().dispatches, 1u);
  EXPECT_STREQ(last_dispatch().engine, "exact");
}

} // namespace
} // namespace metal_moe::testing
