// Devices, and how a kernel library is found, checked and asked.
#include "sim_support.h"

#include <cstdlib>
#include <fstream>

namespace {

using namespace sim_test;

/// Sets a variable of the environment for one scope.
class Variable {
public:
  Variable(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Variable() { unsetenv(name_); }

private:
  const char* name_;
};

TEST(Devices, AreNativeAndExact) {
  const auto devices = NS::TransferPtr(MTL::CopyAllDevices());
  ASSERT_EQ(devices->count(), 2u);
  EXPECT_TRUE(std::string_view(devices->object<MTL::Device>(0)->name()->utf8String()).starts_with("native ("));
  EXPECT_STREQ(devices->object<MTL::Device>(1)->name()->utf8String(), "exact");
  const auto system = NS::TransferPtr(MTL::CreateSystemDefaultDevice());
  EXPECT_EQ(system.get(), devices->object<MTL::Device>(0));
}

TEST(Devices, CountWhatTheyAllocate) {
  const auto native = device("native");
  const size_t before = native->currentAllocatedSize();
  const auto small = NS::TransferPtr(native->newBuffer(1000, MTL::ResourceStorageModeShared));
  const auto large = NS::TransferPtr(native->newBuffer(5 << 20, MTL::ResourceStorageModeShared));
  EXPECT_EQ(native->currentAllocatedSize(), before + 1000 + (5 << 20));
  EXPECT_EQ(large->allocatedSize(), size_t(5) << 20);
  uint32_t word;
  const auto wrapped = NS::TransferPtr(native->newBuffer(&word, 4, MTL::ResourceStorageModeShared, nullptr));
  EXPECT_EQ(wrapped->contents(), &word);
  EXPECT_EQ(native->currentAllocatedSize(), before + 1000 + (5 << 20));
}

TEST(Devices, RefuseImpossibleBuffers) {
  const auto native = device("native");
  EXPECT_TRUE(mentions(misuse([&] { native->newBuffer(0, MTL::ResourceStorageModeShared); }), {"length is 0"}));
  EXPECT_TRUE(mentions(misuse([&] { native->newBuffer(nullptr, 4, MTL::ResourceStorageModeShared, nullptr); }),
                       {"pointer is null"}));
  EXPECT_EQ(native->newBuffer(native->maxBufferLength() + 1, MTL::ResourceStorageModeShared), nullptr);
}

TEST(Devices, PrivateMemoryHasNoHostAddress) {
  const auto buffer = NS::TransferPtr(device("native")->newBuffer(16, MTL::ResourceStorageModePrivate));
  EXPECT_EQ(buffer->storageMode(), MTL::StorageModePrivate);
  EXPECT_EQ(buffer->contents(), nullptr);
}

TEST(Devices, ExactFillsFreshBuffersWithNan) {
  const auto buffer = NS::TransferPtr(device("exact")->newBuffer(64, MTL::ResourceStorageModeShared));
  EXPECT_TRUE(all_are(contents(buffer), 0xFFFFFFFFu));
}

TEST(Library, ListsAndFindsFunctions) {
  Engine exact("exact");
  std::vector<std::string> names;
  for (NS::UInteger i = 0; i < exact.library->functionNames()->count(); ++i)
    names.push_back(exact.library->functionNames()->object<NS::String>(i)->utf8String());
  EXPECT_NE(std::find(names.begin(), names.end(), "copy"), names.end());
  EXPECT_EQ(exact.library->newFunction(MTLSTR("no such kernel")), nullptr);
  const auto function = NS::TransferPtr(exact.library->newFunction(MTLSTR("at_most_64_threads")));
  EXPECT_STREQ(function->name()->utf8String(), "at_most_64_threads");
}

TEST(Library, PipelinesTellTheirEngine) {
  Engine exact("exact"), native("native");
  EXPECT_EQ(exact.pipeline("copy")->threadExecutionWidth(), 32u);
  EXPECT_EQ(exact.pipeline("copy")->maxTotalThreadsPerThreadgroup(), 1024u);
  EXPECT_EQ(exact.pipeline("at_most_64_threads")->maxTotalThreadsPerThreadgroup(), 64u);
  EXPECT_EQ(native.pipeline("copy")->threadExecutionWidth(), 1u);
  EXPECT_EQ(native.pipeline("copy")->maxTotalThreadsPerThreadgroup(), 1u);
}

TEST(Pipeline, DescriptorLimitsThreads) {
  Engine exact("exact");
  const auto pipeline = [&](const char* kernel, NS::UInteger threads, NS::Error** error = nullptr) {
    const auto descriptor = NS::TransferPtr(MTL::ComputePipelineDescriptor::alloc()->init());
    descriptor->setComputeFunction(NS::TransferPtr(exact.library->newFunction(str(kernel))).get());
    descriptor->setLabel(MTLSTR("a label"));
    descriptor->setMaxTotalThreadsPerThreadgroup(threads);
    return NS::TransferPtr(
        exact.device->newComputePipelineState(descriptor.get(), MTL::PipelineOptionNone, nullptr, error));
  };
  EXPECT_EQ(pipeline("copy", 96)->maxTotalThreadsPerThreadgroup(), 96u);
  EXPECT_STREQ(pipeline("copy", 96)->label()->utf8String(), "a label");
  EXPECT_EQ(pipeline("copy", 0)->maxTotalThreadsPerThreadgroup(), 1024u);
  EXPECT_EQ(pipeline("at_most_64_threads", 128)->maxTotalThreadsPerThreadgroup(), 64u);
  NS::Error* error = nullptr;
  EXPECT_FALSE(pipeline("copy", 2048, &error));
  EXPECT_TRUE(mentions(error->localizedDescription()->utf8String(), {"copy", "2048", "1024"}));
}

TEST(Library, PipelinesStayOnTheirDevice) {
  Engine exact("exact"), native("native");
  const auto function = NS::TransferPtr(exact.library->newFunction(MTLSTR("copy")));
  NS::Error* error = nullptr;
  EXPECT_EQ(native.device->newComputePipelineState(function.get(), &error), nullptr);
  EXPECT_TRUE(mentions(error->localizedDescription()->utf8String(), {"'copy' belongs to another device"}));
}

TEST(Library, ALibraryOfAnotherEngineIsRefused) {
  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  EXPECT_TRUE(mentions(load_error("native", both_engines().path() + "/exact.so"),
                       {"compiled for engine 'exact', not 'native'"}));
}

TEST(Library, ALibraryOfAnotherInterfaceIsRefused) {
  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  const Metallib metallib({"future.so"});
  EXPECT_TRUE(mentions(load_error("native", metallib.path() + "/future.so"), {"interface version"}));
}

TEST(Library, MissingFilesAreNamed) {
  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  EXPECT_TRUE(mentions(load_error("exact", "/no/such.metallib"), {"/no/such.metallib"}));
  const Metallib metallib({"exact.so", "native-another.so"});
  EXPECT_TRUE(mentions(load_error("native", metallib.path()),
                       {"no kernel library for this processor", "exact.so, native-another.so"}));
  NS::Error* error = nullptr;
  device("exact")->newLibrary(str("/no/such.metallib"), &error);
  EXPECT_EQ(error->code(), NS::Integer(MTL::LibraryErrorFileNotFound));
  EXPECT_STREQ(error->domain()->utf8String(), "MTLLibraryErrorDomain");
  EXPECT_EQ(device("exact")->newLibrary(str("/no/such.metallib"), nullptr), nullptr);
}

TEST(Library, WhatIsNoKernelLibraryIsRefused) {
  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  const Metallib metallib({});
  std::ofstream(metallib.path() + "/exact.so") << "not a shared object";
  EXPECT_TRUE(mentions(load_error("exact", metallib.path()), {"exact.so"}));
}

TEST(Library, AForcedLevelIsTakenOrRefused) {
  const auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
#if defined(__x86_64__)
  const char* level = "x86-64-v2";
#else
  const char* level = "arm64";
#endif
  {
    const Variable forced("METAL_MOE_CPU_LEVEL", level);
    EXPECT_EQ(load_error("native", both_engines().path()), "");
  }
  const Variable forced("METAL_MOE_CPU_LEVEL", "x86-64-v9");
  EXPECT_TRUE(mentions(load_error("native", both_engines().path()), {"'x86-64-v9'", "native-x86-64-v2.so"}));
  EXPECT_EQ(load_error("exact", both_engines().path()), "");
}

} // namespace
