// Runs the kernels of tests/kernels on the exact engine and on the native engine at every processor level, with memory
// of vectors bound in place.
#pragma once

#include <Foundation/Foundation.hpp>
#include <Metal/Metal.hpp>

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace metal_sim::testing {

// g++ 12 for arm64 has _Float16 in C only.
#if defined(__aarch64__) && !defined(__clang__) && __GNUC__ < 13
using Half = __fp16;
#else
using Half = _Float16;
#endif

/// An engine, and for `native` a processor level.
struct Target {
  std::string engine, level;
};

inline std::vector<Target> targets() {
  std::vector<Target> all{{"exact", ""}};
  std::string levels = METAL_SIM_TEST_LEVELS;
  for (size_t end; !levels.empty(); levels.erase(0, end == std::string::npos ? end : end + 1)) {
    end = levels.find(',');
    all.push_back({"native", levels.substr(0, end)});
  }
  return all;
}

inline std::string name_of(const ::testing::TestParamInfo<Target>& info) {
  std::string name = info.param.engine + "_" + info.param.level;
  for (char& c : name)
    c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
}

/// Memory of the test for one argument.
struct Binding {
  void* memory;
  size_t bytes;
};

template <typename T>
Binding bind(std::vector<T>& values) {
  return {values.data(), values.size() * sizeof(T)};
}
template <typename T>
Binding bind(T& value) {
  return {&value, sizeof(T)};
}

class Kernels : public ::testing::TestWithParam<Target> {
protected:
  void SetUp() override {
    const Target& target = GetParam();
    if (!target.level.empty())
      setenv("METAL_MOE_CPU_LEVEL", target.level.c_str(), 1);
    const auto devices = NS::TransferPtr(MTL::CopyAllDevices());
    for (NS::UInteger i = 0; i < devices->count(); ++i) {
      auto* device = static_cast<MTL::Device*>(devices->object(i));
      if (std::string(device->name()->utf8String()).rfind(target.engine, 0) == 0)
        device_ = NS::RetainPtr(device);
    }
    ASSERT_TRUE(device_);
    NS::Error* error = nullptr;
    library_ = NS::TransferPtr(
        device_->newLibrary(NS::String::string(METAL_SIM_TEST_KERNELS, NS::UTF8StringEncoding), &error));
    unsetenv("METAL_MOE_CPU_LEVEL");
    if (!library_ && std::string(error->localizedDescription()->utf8String()).find("does not run") != std::string::npos)
      GTEST_SKIP() << error->localizedDescription()->utf8String();
    ASSERT_TRUE(library_) << error->localizedDescription()->utf8String();
    queue_ = NS::TransferPtr(device_->newCommandQueue());
  }

  bool exact() const { return GetParam().engine == "exact"; }
  uint32_t width() const { return exact() ? 32 : 1; }
  MTL::Device* device() const { return device_.get(); }
  MTL::Library* library() const { return library_.get(); }
  MTL::CommandQueue* queue() const { return queue_.get(); }

  /// Runs a kernel; buffer i is `buffers[i]`, threadgroup argument i has `threadgroup[i]` bytes. "" or the error.
  std::string run(const char* name, std::vector<Binding> buffers, MTL::Size groups = {1, 1, 1},
                  MTL::Size threads = {1, 1, 1}, std::vector<uint32_t> threadgroup = {}) {
    const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
    NS::Error* error = nullptr;
    const auto function = NS::TransferPtr(library_->newFunction(NS::String::string(name, NS::UTF8StringEncoding)));
    if (!function)
      return std::string("no kernel ") + name;
    const auto pipeline = NS::TransferPtr(device_->newComputePipelineState(function.get(), &error));
    MTL::CommandBuffer* commands = queue_->commandBuffer();
    MTL::ComputeCommandEncoder* encoder = commands->computeCommandEncoder();
    encoder->setComputePipelineState(pipeline.get());
    std::vector<NS::SharedPtr<MTL::Buffer>> bound;
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (!buffers[i].memory)
        continue;
      bound.push_back(NS::TransferPtr(
          device_->newBuffer(buffers[i].memory, buffers[i].bytes, MTL::ResourceStorageModeShared, nullptr)));
      encoder->setBuffer(bound.back().get(), 0, i);
    }
    for (size_t i = 0; i < threadgroup.size(); ++i)
      encoder->setThreadgroupMemoryLength((threadgroup[i] + 15) / 16 * 16, i);
    encoder->dispatchThreadgroups(groups, threads);
    encoder->endEncoding();
    commands->commit();
    commands->waitUntilCompleted();
    return commands->error() ? commands->error()->localizedDescription()->utf8String() : "";
  }

private:
  NS::SharedPtr<MTL::Device> device_;
  NS::SharedPtr<MTL::Library> library_;
  NS::SharedPtr<MTL::CommandQueue> queue_;
};

} // namespace metal_sim::testing
