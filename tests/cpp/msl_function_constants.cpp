// Function constants on engines whose kernels are compiled before there are pipelines: each dispatch has the values of
// its own pipeline.
#include "msl_support.h"

#include <thread>

namespace metal_sim::testing {
namespace {

class FunctionConstants : public Kernels {
protected:
  /// Constant values by index, each of 4 bytes or, for bool, of one.
  struct Value {
    NS::UInteger index;
    MTL::DataType type;
    const void* value;
  };

  /// The function with values, or null and what Metal says.
  NS::SharedPtr<MTL::Function> function(const char* name, const std::vector<Value>& given,
                                        std::string* text = nullptr) {
    const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
    const auto values = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
    for (const Value& one : given)
      values->setConstantValue(one.value, one.type, one.index);
    NS::Error* error = nullptr;
    auto made =
        NS::TransferPtr(library()->newFunction(NS::String::string(name, NS::UTF8StringEncoding), values.get(), &error));
    EXPECT_EQ(bool(made), error == nullptr);
    if (text)
      *text = error ? error->localizedDescription()->utf8String() : "";
    return made;
  }

  NS::SharedPtr<MTL::ComputePipelineState> pipeline(const std::vector<Value>& given) {
    const auto made = function("combine_constants", given);
    return NS::TransferPtr(device()->newComputePipelineState(made.get(), static_cast<NS::Error**>(nullptr)));
  }

  /// out[3 * i ...] of `count` threadgroups of one thread, once for each pipeline.
  std::vector<std::vector<int32_t>> results(const std::vector<MTL::ComputePipelineState*>& pipelines, uint32_t count) {
    const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
    std::vector<std::vector<int32_t>> all(pipelines.size(), std::vector<int32_t>(3 * count));
    std::vector<NS::SharedPtr<MTL::Buffer>> buffers;
    MTL::CommandBuffer* commands = queue()->commandBuffer();
    MTL::ComputeCommandEncoder* encoder = commands->computeCommandEncoder();
    for (size_t i = 0; i < pipelines.size(); ++i) {
      buffers.push_back(NS::TransferPtr(device()->newBuffer(all[i].data(), all[i].size() * sizeof(int32_t),
                                                            MTL::ResourceStorageModeShared, nullptr)));
      encoder->setComputePipelineState(pipelines[i]);
      encoder->setBuffer(buffers.back().get(), 0, 0);
      encoder->dispatchThreadgroups({count, 1, 1}, {1, 1, 1});
    }
    encoder->endEncoding();
    commands->commit();
    commands->waitUntilCompleted();
    EXPECT_EQ(commands->error(), nullptr);
    return all;
  }

  static std::vector<int32_t> expected(uint32_t count, int factor, int added, bool negated, float scaled) {
    std::vector<int32_t> values;
    for (uint32_t i = 0; i < count; ++i) {
      const int value = factor * int(i) + added;
      values.insert(values.end(), {negated ? -value : value, int(scaled * 4), factor * factor * 7});
    }
    return values;
  }
};

INSTANTIATE_TEST_SUITE_P(Engines, FunctionConstants, ::testing::ValuesIn(targets()), name_of);

TEST_P(FunctionConstants, PipelinesSetThem) {
  const uint32_t factor = 3;
  const int32_t offset = -20;
  const bool negate = true;
  const float scale = 2.75f;
  const auto set = pipeline({{2, MTL::DataTypeUInt, &factor},
                             {7, MTL::DataTypeInt, &offset},
                             {0, MTL::DataTypeBool, &negate},
                             {65535, MTL::DataTypeFloat, &scale},
                             {9, MTL::DataTypeInt, &offset}}); // of no constant: ignored
  EXPECT_EQ(results({set.get()}, 40)[0], expected(40, 3, -20, true, 2.75f));
}

TEST_P(FunctionConstants, WhatIsUndefinedHasTheDefaultOfItsGuard) {
  const uint32_t factor = 5;
  const auto some = pipeline({{2, MTL::DataTypeUInt, &factor}});
  EXPECT_EQ(results({some.get()}, 40)[0], expected(40, 5, -1, false, 0.5f));
}

TEST_P(FunctionConstants, DispatchesOfOneCommandBufferHaveTheirOwn) {
  std::vector<NS::SharedPtr<MTL::ComputePipelineState>> pipelines;
  std::vector<MTL::ComputePipelineState*> sequence;
  for (uint32_t factor = 1; factor <= 4; ++factor)
    pipelines.push_back(pipeline({{2, MTL::DataTypeUInt, &factor}}));
  for (uint32_t i = 0; i < 24; ++i)
    sequence.push_back(pipelines[i % 4].get());
  const auto all = results(sequence, 64);
  for (uint32_t i = 0; i < 24; ++i)
    EXPECT_EQ(all[i], expected(64, int(i % 4) + 1, -1, false, 0.5f));
}

TEST_P(FunctionConstants, ThreadsRunPipelinesSideBySide) {
  std::vector<std::thread> workers;
  for (uint32_t factor = 1; factor <= 4; ++factor)
    workers.emplace_back([this, factor] {
      const auto own = pipeline({{2, MTL::DataTypeUInt, &factor}});
      for (int round = 0; round < 50; ++round)
        EXPECT_EQ(results({own.get()}, 500)[0], expected(500, int(factor), -1, false, 0.5f));
    });
  for (std::thread& worker : workers)
    worker.join();
}

TEST_P(FunctionConstants, WrongOnesAreNamed) {
  const uint32_t factor = 1;
  const auto contains = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  std::string text;
  EXPECT_FALSE(function("combine_constants", {}, &text));
  EXPECT_TRUE(contains(text, "'combine_constants': function constant 'FACTOR' (index 2) has no value")) << text;
  EXPECT_FALSE(function("combine_constants", {{2, MTL::DataTypeInt, &factor}}, &text));
  EXPECT_TRUE(contains(text, "'FACTOR' (index 2) has type 33 (MTLDataType), the value given has type 29")) << text;
  EXPECT_FALSE(function("no_such_kernel", {}, &text));
  EXPECT_TRUE(contains(text, "'no_such_kernel' is not in the library")) << text;
  const auto values = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
  EXPECT_THROW(values->setConstantValue(nullptr, MTL::DataTypeUInt, 2), std::logic_error);
  EXPECT_THROW(values->setConstantValue(&factor, MTL::DataType(4), 2), std::logic_error); // float2

  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  const auto plain = NS::TransferPtr(library()->newFunction(MTLSTR("combine_constants")));
  ASSERT_TRUE(plain);
  NS::Error* error = nullptr;
  EXPECT_EQ(device()->newComputePipelineState(plain.get(), &error), nullptr);
  ASSERT_NE(error, nullptr);
  EXPECT_TRUE(contains(error->localizedDescription()->utf8String(), "'combine_constants' has function constants"));
}

TEST_P(FunctionConstants, ResetForgetsThem) {
  const uint32_t factor = 2;
  const auto values = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
  values->setConstantValue(&factor, MTL::DataTypeUInt, 2);
  const auto made = [&] {
    return NS::TransferPtr(library()->newFunction(MTLSTR("combine_constants"), values.get(), nullptr));
  };
  EXPECT_TRUE(made());
  values->reset();
  EXPECT_FALSE(made());
}

} // namespace
} // namespace metal_sim::testing
