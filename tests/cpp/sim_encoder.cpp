// Misuse of encoders and command buffers, which Metal's API validation would abort on, throws and names the problem.
#include "sim_support.h"

namespace {

using namespace sim_test;

class Encoder : public testing::TestWithParam<const char*> {
protected:
  /// An encoder ready to dispatch "copy" with `left_out` not bound.
  MTL::ComputeCommandEncoder* copy_encoder(int left_out = -1) {
    commands = engine.queue->commandBuffer();
    auto* encoder = commands->computeCommandEncoder();
    encoder->setComputePipelineState(copy.get());
    if (left_out != 0)
      encoder->setBuffer(in.get(), 0, 0);
    if (left_out != 1)
      encoder->setBuffer(out.get(), 0, 1);
    if (left_out != 2)
      encoder->setBytes(&count, sizeof count, 2);
    return encoder;
  }

  const MTL::Size one{1, 1, 1};
  Engine engine{GetParam()};
  NS::SharedPtr<MTL::ComputePipelineState> copy = engine.pipeline("copy");
  NS::SharedPtr<MTL::Buffer> in = engine.buffer({5, 6, 7, 8}), out = engine.buffer(4);
  const uint32_t count = 4;
  MTL::CommandBuffer* commands = nullptr;
};

INSTANTIATE_TEST_SUITE_P(Engines, Encoder, testing::Values("native", "exact"), [](const auto& p) { return p.param; });

TEST_P(Encoder, RunsWhatIsBound) {
  auto* encoder = copy_encoder();
  encoder->setBuffer(in.get(), 4, 0);
  encoder->setBufferOffset(8, 0);
  const uint32_t two = 2;
  encoder->setBytes(&two, sizeof two, 2);
  encoder->dispatchThreadgroups({2, 1, 1}, one);
  encoder->endEncoding();
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_EQ(contents(out), (std::vector<uint32_t>{7, 8, 0, 0}));
  EXPECT_EQ(commands->error(), nullptr);
  EXPECT_GT(commands->GPUStartTime(), 0.0);
  EXPECT_GE(commands->GPUEndTime(), commands->GPUStartTime());
}

TEST_P(Encoder, ConstantsAreCopiedWhenSet) {
  uint32_t changing = 1;
  auto* encoder = copy_encoder(2);
  encoder->setBytes(&changing, sizeof changing, 2);
  changing = 4;
  encoder->dispatchThreadgroups({4, 1, 1}, one);
  encoder->endEncoding();
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_EQ(contents(out), (std::vector<uint32_t>{5, 0, 0, 0}));
}

TEST_P(Encoder, DispatchesSeeWhatThoseBeforeWrote) {
  const auto add_one = engine.pipeline("add_one");
  const auto data = engine.buffer(100);
  commands = engine.queue->commandBuffer();
  for (int i = 0; i < 2; ++i) { // two encoders, and two dispatches in each
    auto* encoder = commands->computeCommandEncoder();
    encoder->setComputePipelineState(add_one.get());
    encoder->setBuffer(data.get(), 0, 0);
    encoder->dispatchThreadgroups({100, 1, 1}, one);
    encoder->memoryBarrier(MTL::BarrierScopeBuffers);
    encoder->dispatchThreadgroups({10, 2, 5}, one);
    encoder->endEncoding();
  }
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_TRUE(all_are(contents(data), 4u));
}

TEST_P(Encoder, MissingBindingsAreNamed) {
  EXPECT_TRUE(mentions(misuse([&] { copy_encoder(0)->dispatchThreadgroups(one, one); }),
                       {"kernel 'copy'", "'in' (buffer 0) is not bound"}));
  EXPECT_TRUE(mentions(misuse([&] { copy_encoder(2)->dispatchThreadgroups(one, one); }), {"'count' (buffer 2)"}));
  auto* encoder = copy_encoder();
  encoder->setBuffer(nullptr, 0, 1);
  EXPECT_TRUE(mentions(misuse([&] { encoder->dispatchThreadgroups(one, one); }), {"'out' (buffer 1)"}));
}

TEST_P(Encoder, ANewEncoderHasNoBindings) {
  copy_encoder()->endEncoding();
  auto* encoder = commands->computeCommandEncoder();
  EXPECT_TRUE(mentions(misuse([&] { encoder->dispatchThreadgroups(one, one); }), {"no pipeline is set"}));
  encoder->setComputePipelineState(copy.get());
  EXPECT_TRUE(mentions(misuse([&] { encoder->dispatchThreadgroups(one, one); }), {"is not bound"}));
}

TEST_P(Encoder, NothingFollowsTheEnd) {
  auto* encoder = copy_encoder();
  encoder->endEncoding();
  EXPECT_TRUE(mentions(misuse([&] { encoder->setBuffer(in.get(), 0, 0); }), {"encoding has ended"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setBytes(&count, 4, 0); }), {"encoding has ended"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setComputePipelineState(copy.get()); }), {"encoding has ended"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->dispatchThreadgroups(one, one); }), {"encoding has ended"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->memoryBarrier(MTL::BarrierScopeBuffers); }), {"encoding has ended"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->endEncoding(); }), {"encoding has ended"}));
}

TEST_P(Encoder, OneEncoderAtATime) {
  copy_encoder();
  EXPECT_TRUE(mentions(misuse([&] { commands->computeCommandEncoder(); }), {"has not ended encoding"}));
  EXPECT_TRUE(mentions(misuse([&] { commands->commit(); }), {"has not ended encoding"}));
}

TEST_P(Encoder, ACommittedBufferIsClosed) {
  copy_encoder()->endEncoding();
  EXPECT_TRUE(mentions(misuse([&] { commands->waitUntilCompleted(); }), {"has not been committed"}));
  commands->commit();
  EXPECT_TRUE(mentions(misuse([&] { commands->commit(); }), {"has been committed"}));
  EXPECT_TRUE(mentions(misuse([&] { commands->enqueue(); }), {"has been enqueued"}));
  EXPECT_TRUE(mentions(misuse([&] { commands->computeCommandEncoder(); }), {"has been committed"}));
  EXPECT_TRUE(
      mentions(misuse([&] { commands->addCompletedHandler([](MTL::CommandBuffer*) {}); }), {"has been committed"}));
  commands->waitUntilCompleted();
  commands->waitUntilCompleted();
  EXPECT_EQ(commands->status(), MTL::CommandBufferStatusCompleted);
}

TEST_P(Encoder, LimitsAreChecked) {
  auto* encoder = copy_encoder();
  const std::vector<std::byte> bytes(8192);
  EXPECT_EQ(misuse([&] { encoder->setBytes(bytes.data(), 4096, 2); }), "");
  EXPECT_TRUE(mentions(misuse([&] { encoder->setBytes(bytes.data(), 4097, 2); }), {"length 4097 at index 2"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setBytes(bytes.data(), 0, 2); }), {"length 0"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setBytes(nullptr, 4, 2); }), {"null"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setBuffer(in.get(), 0, 31); }), {"index 31 is not below 31"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setBuffer(in.get(), 17, 0); }), {"offset 17"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setBufferOffset(4, 5); }), {"no buffer is bound at index 5"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setThreadgroupMemoryLength(8, 0); }), {"multiple of 16"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setThreadgroupMemoryLength(32784, 0); }), {"more than 32768"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->dispatchThreadgroups({1, 0, 1}, one); }), {"(1, 0, 1) has a zero"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->dispatchThreadgroups(one, {0, 1, 1}); }), {"has a zero"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->dispatchThreadgroups(one, {2, 513, 1}); }), {"threadsPerThreadgroup"}));
  EXPECT_TRUE(
      mentions(misuse([&] { encoder->dispatchThreadgroups({1u << 31, 1u << 31, 4}, one); }), {"threadgroupsPerGrid"}));
}

TEST_P(Encoder, MisalignedBuffersAreRefused) {
  auto* encoder = copy_encoder();
  encoder->setBuffer(in.get(), 2, 0);
  EXPECT_TRUE(mentions(misuse([&] { encoder->dispatchThreadgroups(one, one); }), {"4-byte alignment"}));
}

TEST_P(Encoder, ConstantsAreNotWritten) {
  auto* encoder = copy_encoder();
  encoder->setBytes(&count, sizeof count, 1);
  EXPECT_TRUE(mentions(misuse([&] { encoder->dispatchThreadgroups(one, one); }), {"'out' (buffer 1) is written"}));
}

TEST_P(Encoder, ThreadgroupMemoryMustHaveALength) {
  auto* encoder = copy_encoder();
  const auto barrier = engine.pipeline("neighbour_barrier");
  encoder->setComputePipelineState(barrier.get());
  EXPECT_TRUE(
      mentions(misuse([&] { encoder->dispatchThreadgroups(one, one); }), {"'memory' (threadgroup 0) has no length"}));
}

TEST_P(Encoder, ObjectsOfAnotherDeviceAreRefused) {
  Engine other(GetParam() == std::string("exact") ? "native" : "exact");
  const auto foreign = other.buffer(4);
  const auto pipeline = other.pipeline("copy");
  auto* encoder = copy_encoder();
  EXPECT_TRUE(mentions(misuse([&] { encoder->setBuffer(foreign.get(), 0, 0); }), {"another device"}));
  EXPECT_TRUE(mentions(misuse([&] { encoder->setComputePipelineState(pipeline.get()); }), {"another device"}));
}

TEST_P(Encoder, ARefusedDispatchLeavesTheOthers) {
  auto* encoder = copy_encoder();
  encoder->dispatchThreadgroups({4, 1, 1}, one);
  encoder->setBuffer(nullptr, 0, 0);
  EXPECT_NE(misuse([&] { encoder->dispatchThreadgroups(one, one); }), "");
  encoder->endEncoding();
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_EQ(contents(out), contents(in));
}

TEST_P(Encoder, WhatIsEncodedStaysAlive) {
  int freed = 0;
  uint32_t word = 9;
  auto wrapped = NS::TransferPtr(engine.device->newBuffer(&word, sizeof word, MTL::ResourceStorageModeShared,
                                                          [&](void*, NS::UInteger) { ++freed; }));
  auto* encoder = copy_encoder();
  encoder->setBuffer(wrapped.get(), 0, 0);
  encoder->dispatchThreadgroups(one, one);
  encoder->endEncoding();
  wrapped.reset();
  EXPECT_EQ(freed, 0);
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_EQ(freed, 1);
  EXPECT_EQ(words(out)[0], 9u);
}

TEST_P(Encoder, UnretainedReferencesAreTheCallersToKeep) {
  commands = engine.queue->commandBufferWithUnretainedReferences();
  EXPECT_FALSE(commands->retainedReferences());
  auto* encoder = commands->computeCommandEncoder();
  encoder->setComputePipelineState(copy.get());
  encoder->setBuffer(in.get(), 0, 0);
  EXPECT_EQ(in->retainCount(), 1u);
  EXPECT_EQ(copy->retainCount(), 1u);
  encoder->endEncoding();
}

TEST_P(Encoder, LabelsAreKept) {
  auto* encoder = copy_encoder();
  EXPECT_EQ(encoder->label(), nullptr);
  encoder->setLabel(MTLSTR("layer 3"));
  commands->setLabel(MTLSTR("model"));
  EXPECT_STREQ(encoder->label()->utf8String(), "layer 3");
  EXPECT_STREQ(commands->label()->utf8String(), "model");
  encoder->endEncoding();
}

} // namespace
