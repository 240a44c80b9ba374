// LayerBatch: when it commits, what it waits for, nesting, errors, threads, streams that several threads share.
#include "core_support.h"

#include "core/layer_batch.h"

#include <atomic>
#include <future>
#include <thread>

namespace metal_moe::testing {
namespace {

struct Batch : ::testing::Test, Copying {
  Batch() : Copying("native") { last_dispatch() = {}; }
  bool layer(LayerBatch& batch, bool is_layer = true) {
    return batch.encode(context, is_layer, nullptr, [&](CommandStream& stream) { copy(stream); });
  }
};

std::shared_ptr<LayerBatch> entered(uint32_t layers, bool waits = true) {
  auto batch = std::make_shared<LayerBatch>(layers, waits);
  batch->enter();
  return batch;
}

template <class Error, class Call>
void expect_error(const Call& call, const char* part) {
  try {
    call();
    ADD_FAILURE() << "no exception";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST_F(Batch, CommitsWhenFullAndAtItsEnd) {
  auto batch = entered(3);
  for (uint32_t i = 1; i <= 7; ++i) {
    EXPECT_TRUE(layer(*batch));
    EXPECT_EQ(last_dispatch().commits, i / 3) << i;
  }
  batch->leave();
  EXPECT_EQ(last_dispatch().commits, 3u);
  EXPECT_EQ(batch->statistics().layers, 7u);
  EXPECT_EQ(batch->statistics().operations, 7u);
  EXPECT_EQ(batch->statistics().commits, 3u);
  EXPECT_EQ(to, from);
  EXPECT_EQ(LayerBatch::current(), nullptr);
}

TEST_F(Batch, OperationsThatAreNoLayersDoNotFillIt) {
  auto batch = entered(2);
  for (int i = 0; i < 20; ++i)
    layer(*batch, false);
  EXPECT_EQ(last_dispatch().commits, 0u);
  for (int i = 20; i < 64; ++i) // but neither do they go on without end
    layer(*batch, false);
  EXPECT_EQ(last_dispatch().commits, 1u);
  batch->leave();
  EXPECT_EQ(last_dispatch().commits, 1u) << "nothing was left";
}

TEST_F(Batch, WithoutOperationsNothingHappens) {
  auto batch = entered(2);
  batch->commit();
  batch->synchronize();
  batch->discard();
  batch->leave();
  EXPECT_EQ(last_dispatch().commits, 0u);
}

TEST_F(Batch, OneMayBeEnteredAgain) {
  auto batch = entered(8);
  layer(*batch);
  batch->leave();
  batch->enter();
  std::fill(to.begin(), to.end(), -1);
  layer(*batch);
  batch->leave();
  EXPECT_EQ(to, from);
  EXPECT_EQ(batch->statistics().commits, 2u);
}

TEST_F(Batch, AnInnerOneEncodesBehindTheOuterAndItsEndWaitsForBoth) {
  auto outer = entered(8);
  std::vector<int32_t> between(256, -1);
  const TensorView middle = tensor(context, between, {256});
  outer->encode(context, true, nullptr,
                [&](CommandStream& stream) { encode_copy(stream, device, source.view(), middle.view(), 1024); });
  auto inner = entered(8);
  EXPECT_EQ(LayerBatch::current(), inner.get());
  inner->encode(context, true, nullptr, [&](CommandStream& stream) {
    EXPECT_EQ(stream.pending_dispatches(), 1u) << "the outer one's stream";
    encode_copy(stream, device, middle.view(), destination.view(), 1024);
  });
  inner->leave();
  EXPECT_EQ(to, from);
  EXPECT_EQ(last_dispatch().commits, 1u) << "both in one command buffer";
  EXPECT_EQ(LayerBatch::current(), outer.get());
  outer->leave();
  EXPECT_EQ(last_dispatch().commits, 1u);
}

TEST_F(Batch, AnInnerOneOfFewerLayersCommitsByItsOwnCount) {
  auto outer = entered(8);
  layer(*outer);
  auto inner = entered(2);
  layer(*inner);
  EXPECT_EQ(last_dispatch().commits, 1u) << "two layers are in the command buffer";
  layer(*inner);
  EXPECT_EQ(last_dispatch().commits, 1u);
  inner->leave();
  for (int i = 0; i < 7; ++i)
    layer(*outer);
  EXPECT_EQ(last_dispatch().commits, 2u) << "the outer one counts from the last commit";
  outer->leave();
  EXPECT_EQ(last_dispatch().commits, 3u);
}

TEST_F(Batch, WithoutWaitingNeedsSomebodyAroundWhoDoes) {
  expect_error<std::logic_error>([] { entered(2, false); }, "needs a stream or a batch around it");
  auto outer = entered(8);
  auto inner = entered(8, false);
  std::promise<void> release;
  inner->encode(context, true, nullptr, [&](CommandStream& stream) {
    copy(stream);
    stream.on_completed([&](const Completion&) { release.get_future().wait(); });
  });
  inner->leave(); // would not come back if it waited
  EXPECT_EQ(last_dispatch().commits, 1u);
  release.set_value();
  outer->leave();
  EXPECT_EQ(to, from);
}

TEST_F(Batch, IsLeftByItsOwnThread) {
  auto batch = entered(2);
  expect_error<std::logic_error>([&] { batch->enter(); }, "entered already");
  std::thread([&] { expect_error<std::logic_error>([&] { batch->leave(); }, "this thread has not entered"); }).join();
  EXPECT_TRUE(batch->entered());
  batch->leave();
  EXPECT_FALSE(batch->entered());
  expect_error<std::logic_error>([&] { batch->leave(); }, "this thread has not entered");
}

TEST_F(Batch, TheOuterOneMayBeLeftFirst) {
  auto outer = entered(8), inner = entered(8);
  layer(*inner);
  outer->leave();
  EXPECT_EQ(to, from) << "what was encoded on its stream has run";
  EXPECT_EQ(LayerBatch::current(), inner.get());
  std::fill(to.begin(), to.end(), -1);
  layer(*inner); // on a stream of its own
  inner->leave();
  EXPECT_EQ(to, from);
  EXPECT_EQ(LayerBatch::current(), nullptr);
}

TEST_F(Batch, WhatIsKeptIsLetGoWhenItHasCompleted) {
  auto kept = std::make_shared<int>(1);
  auto batch = entered(8);
  batch->encode(context, true, kept, [&](CommandStream& stream) { copy(stream); });
  EXPECT_EQ(kept.use_count(), 2);
  batch->leave();
  EXPECT_EQ(kept.use_count(), 1);
}

TEST_F(Batch, AnOperationThatThrowsLeavesTheOthers) {
  auto batch = entered(8);
  layer(*batch);
  std::vector<int32_t> unused(256, -1);
  const TensorView half = tensor(context, unused, {256});
  expect_error<std::runtime_error>(
      [&] {
        batch->encode(context, true, nullptr, [&](CommandStream& stream) {
          encode_copy(stream, device, source.view(), half.view(), 1024);
          throw std::runtime_error("half way");
        });
      },
      "half way");
  EXPECT_EQ(batch->statistics().layers, 1u);
  batch->leave();
  EXPECT_EQ(to, from);
}

TEST_F(Batch, AKernelThatCannotBeHadIsNamedEveryTimeAndHarmsNothing) {
  auto batch = entered(8);
  layer(*batch);
  for (int i = 0; i < 2; ++i)
    expect_error<std::runtime_error>(
        [&] {
          batch->encode(context, true, nullptr, [&](CommandStream& stream) {
            stream.use(context.pipelines().get(PipelineCache::CAPACITY - 1, {"no_such_kernel", 1}));
          });
        },
        "kernel 'no_such_kernel' is not in the library");
  std::vector<int32_t> after(256, -1);
  const TensorView last = tensor(context, after, {256});
  batch->encode(context, true, nullptr,
                [&](CommandStream& stream) { encode_copy(stream, device, destination.view(), last.view(), 1024); });
  batch->leave();
  EXPECT_EQ(after, from);
}

TEST_F(Batch, DiscardDropsWhatIsNotCommitted) {
  auto batch = entered(8);
  layer(*batch);
  batch->discard();
  batch->leave();
  EXPECT_EQ(to[0], -1);
  EXPECT_EQ(last_dispatch().commits, 0u);
}

TEST_F(Batch, ThreadsHaveStreamsOfTheirOwn) {
  constexpr int THREADS = 4, LAYERS = 200;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < THREADS; ++t)
    threads.emplace_back([&, t] {
      std::vector<int32_t> mine(256, t), first(256, -1), second(256, -1);
      const TensorView in = tensor(context, mine, {256}), a = tensor(context, first, {256}),
                       b = tensor(context, second, {256});
      auto batch = entered(7);
      for (int i = 0; i < LAYERS; ++i) {
        const TensorView& before = i == 0 ? in : i % 2 ? a : b;
        batch->encode(context, true, nullptr, [&](CommandStream& stream) {
          encode_copy(stream, device, before.view(), (i % 2 ? b : a).view(), 1024);
        });
      }
      batch->leave();
      wrong += first != mine || second != mine || batch->statistics().commits != (LAYERS + 6) / 7;
    });
  for (std::thread& thread : threads)
    thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(Batch, ErrorsComeAtTheEndAndPoisonNothing) {
  MoeEngine& exact = engine("exact");
  std::vector<int32_t> good(256, -1);
  const TensorView bad_view = tensor(exact.context(), to, {256}), good_view = tensor(exact.context(), good, {256}),
                   in = tensor(exact.context(), from, {256});
  auto batch = entered(1);
  for (const auto& [view, bytes] : {std::pair{&bad_view, 1028u}, std::pair{&good_view, 1024u}})
    batch->encode(exact.context(), true, nullptr, [&, view = view, bytes = bytes](CommandStream& stream) {
      encode_copy(stream, exact, in.view(), view->view(), bytes);
    });
  expect_error<ExecutionError>([&] { batch->leave(); }, "gather_experts");
  EXPECT_FALSE(batch->entered());
  EXPECT_EQ(good, from) << "the layer after the failed one has run";
  batch->enter(); // and so does the batch
  std::fill(good.begin(), good.end(), -1);
  batch->encode(exact.context(), true, nullptr,
                [&](CommandStream& stream) { encode_copy(stream, exact, in.view(), good_view.view(), 1024); });
  batch->leave();
  EXPECT_EQ(good, from);
}

TEST_F(Batch, OneOfAStreamTakesOperationsOfItsContextAlone) {
  auto stream = std::make_shared<SharedStream>(context, CommandStream::Policy{.max_dispatches = 2});
  auto batch = std::make_shared<LayerBatch>(stream);
  batch->enter();
  EXPECT_FALSE(batch->encode(engine("exact").context(), true, nullptr, [](CommandStream&) { FAIL(); }));
  EXPECT_EQ(batch->statistics().passed, 1u);
  for (uint32_t i = 1; i <= 5; ++i) {
    EXPECT_TRUE(layer(*batch));
    EXPECT_EQ(last_dispatch().commits, i / 2) << "by the stream's policy";
  }
  batch->leave();
  EXPECT_EQ(last_dispatch().commits, 3u);
  stream->use("synchronize", [](CommandStream& s) { s.synchronize(); });
  EXPECT_EQ(to, from);
}

TEST_F(Batch, OneOfLayersUsesTheStreamAroundIt) {
  auto stream = std::make_shared<SharedStream>(context, CommandStream::Policy{.max_dispatches = 1});
  auto around = std::make_shared<LayerBatch>(stream);
  around->enter();
  auto batch = entered(3, false);
  for (int i = 0; i < 4; ++i)
    layer(*batch);
  EXPECT_EQ(last_dispatch().commits, 1u) << "by layers, not by the stream's policy";
  batch->leave();
  around->leave();
  EXPECT_EQ(last_dispatch().commits, 2u);
  stream->use("synchronize", [](CommandStream& s) { s.synchronize(); });
}

TEST_F(Batch, AClosedStreamIsRefused) {
  auto stream = std::make_shared<SharedStream>(context, CommandStream::Policy{});
  auto batch = std::make_shared<LayerBatch>(stream);
  batch->enter();
  layer(*batch);
  stream->close();
  stream->close();
  EXPECT_TRUE(stream->is_closed());
  EXPECT_EQ(to[0], -1) << "what was not committed is dropped";
  expect_error<std::runtime_error>([&] { layer(*batch); }, "encode: the stream is closed");
  expect_error<std::runtime_error>([&] { batch->leave(); }, "the stream is closed");
  EXPECT_EQ(LayerBatch::current(), nullptr);
}

TEST_F(Batch, AHandlerMustNotUseASharedStreamThatSomebodyWaitsFor) {
  SharedStream stream(context, {});
  std::string message;
  stream.use("encode", [&](CommandStream& s) {
    copy(s);
    s.on_completed([&](const Completion&) {
      expect_error<std::logic_error>([&] { stream.use("in_flight", [](CommandStream& s) { return s.in_flight(); }); },
                                     "in_flight: called by a completion handler");
      expect_error<std::logic_error>([&] { stream.close(); }, "close: called by a completion handler");
    });
  });
  stream.use("synchronize", [](CommandStream& s) { s.synchronize(); });
}

} // namespace
} // namespace metal_moe::testing
