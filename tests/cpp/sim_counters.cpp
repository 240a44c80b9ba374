// Counter sample buffers: times of encoders, and what is refused.
#include "sim_support.h"

#include <chrono>
#include <thread>

namespace {

NS::SharedPtr<MTL::CounterSampleBuffer> samples(MTL::Device* device, NS::UInteger count) {
  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  const auto descriptor = NS::TransferPtr(MTL::CounterSampleBufferDescriptor::alloc()->init());
  descriptor->setCounterSet(device->counterSets()->object<MTL::CounterSet>(0));
  descriptor->setSampleCount(count);
  NS::Error* error = nullptr;
  return NS::TransferPtr(device->newCounterSampleBuffer(descriptor.get(), &error));
}

std::vector<uint64_t> times(MTL::CounterSampleBuffer* buffer, NS::UInteger first, NS::UInteger count) {
  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  const NS::Data* data = buffer->resolveCounterRange(NS::Range(first, count));
  EXPECT_EQ(data->length(), count * sizeof(MTL::CounterResultTimestamp));
  const auto* results = static_cast<const MTL::CounterResultTimestamp*>(data->mutableBytes());
  std::vector<uint64_t> list;
  for (NS::UInteger i = 0; i < count; ++i)
    list.push_back(results[i].timestamp);
  return list;
}

MTL::ComputeCommandEncoder* encoder(MTL::CommandBuffer* commands, MTL::CounterSampleBuffer* buffer, NS::UInteger start,
                                    NS::UInteger end) {
  auto* pass = MTL::ComputePassDescriptor::computePassDescriptor();
  auto* attachment = pass->sampleBufferAttachments()->object(0);
  attachment->setSampleBuffer(buffer);
  attachment->setStartOfEncoderSampleIndex(start);
  attachment->setEndOfEncoderSampleIndex(end);
  return commands->computeCommandEncoder(pass);
}

struct Counters : ::testing::Test {
  NS::SharedPtr<NS::AutoreleasePool> pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  NS::SharedPtr<MTL::Device> device = NS::TransferPtr(MTL::CreateSystemDefaultDevice());
  NS::SharedPtr<MTL::CommandQueue> queue = NS::TransferPtr(device->newCommandQueue());
};

TEST_F(Counters, EncodersAreTimedInOrderOfExecution) {
  ASSERT_TRUE(device->supportsCounterSampling(MTL::CounterSamplingPointAtStageBoundary));
  EXPECT_FALSE(device->supportsCounterSampling(MTL::CounterSamplingPointAtDispatchBoundary));
  EXPECT_STREQ(device->counterSets()->object<MTL::CounterSet>(0)->name()->utf8String(), "timestamp");
  const auto buffer = samples(device.get(), 6);
  ASSERT_TRUE(buffer);
  MTL::CommandBuffer* commands = queue->commandBuffer();
  encoder(commands, buffer.get(), 2, 3)->endEncoding();
  encoder(commands, buffer.get(), 0, MTL::CounterDontSample)->endEncoding();
  MTL::Timestamp host = 0, gpu = 0;
  device->sampleTimestamps(&host, &gpu);
  EXPECT_EQ(host, gpu);
  EXPECT_EQ(times(buffer.get(), 0, 6), std::vector<uint64_t>(6, MTL::CounterErrorValue)); // nothing has run
  commands->commit();
  commands->waitUntilCompleted();
  const auto taken = times(buffer.get(), 0, 6);
  EXPECT_LE(host, taken[2]);
  EXPECT_LE(taken[2], taken[3]);
  EXPECT_LE(taken[3], taken[0]);
  for (const size_t never : {1, 4, 5})
    EXPECT_EQ(taken[never], MTL::CounterErrorValue);
  EXPECT_EQ(times(buffer.get(), 3, 1), std::vector<uint64_t>{taken[3]});
  device->sampleTimestamps(&host, &gpu);
  EXPECT_LE(taken[0], host);
}

TEST_F(Counters, AWaitForAnEventIsInNoEncoder) {
  const auto buffer = samples(device.get(), 4);
  const auto event = NS::TransferPtr(device->newSharedEvent());
  MTL::CommandBuffer* commands = queue->commandBuffer();
  encoder(commands, buffer.get(), 0, 1)->endEncoding();
  commands->encodeWait(event.get(), 1);
  encoder(commands, buffer.get(), 2, 3)->endEncoding();
  commands->commit();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  MTL::Timestamp host = 0, gpu = 0;
  device->sampleTimestamps(&host, &gpu);
  event->setSignaledValue(1);
  commands->waitUntilCompleted();
  const auto taken = times(buffer.get(), 0, 4);
  EXPECT_LE(taken[1], taken[2]);
  EXPECT_LE(host, taken[2]);
}

TEST_F(Counters, RefusesWhatMetalRefuses) {
  EXPECT_FALSE(samples(device.get(), 0));
  EXPECT_FALSE(samples(device.get(), 4097)); // 32 KiB of samples
  EXPECT_TRUE(samples(device.get(), 4096));
  const auto buffer = samples(device.get(), 2);
  EXPECT_THROW(buffer->resolveCounterRange(NS::Range(1, 2)), std::logic_error);
  MTL::CommandBuffer* commands = queue->commandBuffer();
  EXPECT_THROW(encoder(commands, buffer.get(), 0, 2), std::logic_error);
  encoder(commands, nullptr, 0, 7)->endEncoding(); // nothing to sample
}

} // namespace
