// What tests of the stand-in share: a metallib of the hand-written kernels, and short ways to run one.
#pragma once

#include "Metal/Metal.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

namespace sim_test {

/// A directory that looks like a metallib, with copies of the hand-written kernel library under the given names.
class Metallib {
public:
  explicit Metallib(const std::vector<std::string>& files);
  ~Metallib();
  std::string path() const { return path_.string(); }

private:
  std::filesystem::path path_;
};

/// Both engines' libraries, made once.
const Metallib& both_engines();

/// An autoreleased string.
inline NS::String* str(const std::string& text) { return NS::String::string(text.c_str(), NS::UTF8StringEncoding); }

NS::SharedPtr<MTL::Device> device(const char* engine);

/// The error text of loading, "" where it succeeds.
std::string load_error(const char* engine, const std::string& path);

/// Device, library and queue of one engine, and an autorelease pool for the test.
class Engine {
public:
  explicit Engine(const char* name) : Engine(sim_test::device(name)) {}
  explicit Engine(NS::SharedPtr<MTL::Device> device);

  NS::SharedPtr<MTL::ComputePipelineState> pipeline(const char* kernel);
  NS::SharedPtr<MTL::Buffer> buffer(const std::vector<uint32_t>& words);
  NS::SharedPtr<MTL::Buffer> buffer(size_t words);

  /// Binds buffers 0, 1, ..., gives 4 bytes of threadgroup memory per thread where `threadgroup_memory`, dispatches,
  /// waits. Returns the error text, "" where there is none.
  std::string run(const char* kernel, const std::vector<MTL::Buffer*>& buffers, MTL::Size grid, MTL::Size group,
                  bool threadgroup_memory = false);

private:
  NS::SharedPtr<NS::AutoreleasePool> pool_ = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());

public:
  NS::SharedPtr<MTL::Device> device;
  NS::SharedPtr<MTL::Library> library;
  NS::SharedPtr<MTL::CommandQueue> queue;
};

inline uint32_t* words(const NS::SharedPtr<MTL::Buffer>& buffer) { return static_cast<uint32_t*>(buffer->contents()); }

std::vector<uint32_t> contents(const NS::SharedPtr<MTL::Buffer>& buffer);

/// The message of the std::logic_error that `call` throws, "" where it throws none.
std::string misuse(const std::function<void()>& call);

/// Whether `text` holds every one of `parts`.
testing::AssertionResult mentions(const std::string& text, std::initializer_list<const char*> parts);

/// Whether there are values, all of them `value`.
testing::AssertionResult all_are(const std::vector<uint32_t>& values, uint32_t value);

} // namespace sim_test
