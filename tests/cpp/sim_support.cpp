#include "sim_support.h"

#include <cstdlib>
#include <stdexcept>

namespace sim_test {

namespace fs = std::filesystem;

Metallib::Metallib(const std::vector<std::string>& files) {
  std::string pattern = (fs::temp_directory_path() / "sim_test.XXXXXX").string();
  if (!mkdtemp(pattern.data()))
    throw std::runtime_error("mkdtemp " + pattern);
  path_ = pattern;
  for (const std::string& file : files)
    fs::copy_file(SIM_TEST_KERNELS, path_ / file);
}

Metallib::~Metallib() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

const Metallib& both_engines() {
  static const Metallib metallib({"exact.so", "native-x86-64-v2.so", "native-arm64.so"});
  return metallib;
}

NS::SharedPtr<MTL::Device> device(const char* engine) {
  const auto devices = NS::TransferPtr(MTL::CopyAllDevices());
  for (NS::UInteger i = 0; i < devices->count(); ++i) {
    auto* candidate = devices->object<MTL::Device>(i);
    if (std::string(candidate->name()->utf8String()).starts_with(engine))
      return NS::RetainPtr(candidate);
  }
  throw std::runtime_error(std::string("no device ") + engine);
}

std::string load_error(const char* engine, const std::string& path) {
  NS::Error* error = nullptr;
  const auto library = NS::TransferPtr(device(engine)->newLibrary(str(path), &error));
  EXPECT_EQ(bool(library), error == nullptr);
  return error ? error->localizedDescription()->utf8String() : "";
}

Engine::Engine(NS::SharedPtr<MTL::Device> on) : device(std::move(on)) {
  NS::Error* error = nullptr;
  library = NS::TransferPtr(device->newLibrary(str(both_engines().path()), &error));
  if (!library)
    throw std::runtime_error(error->localizedDescription()->utf8String());
  queue = NS::TransferPtr(device->newCommandQueue());
}

NS::SharedPtr<MTL::ComputePipelineState> Engine::pipeline(const char* kernel) {
  const auto function = NS::TransferPtr(library->newFunction(str(kernel)));
  if (!function)
    throw std::runtime_error(std::string("no kernel ") + kernel);
  NS::Error* error = nullptr;
  return NS::TransferPtr(device->newComputePipelineState(function.get(), &error));
}

NS::SharedPtr<MTL::Buffer> Engine::buffer(const std::vector<uint32_t>& words) {
  return NS::TransferPtr(
      device->newBuffer(words.data(), words.size() * sizeof(uint32_t), MTL::ResourceStorageModeShared));
}

NS::SharedPtr<MTL::Buffer> Engine::buffer(size_t words) { return buffer(std::vector<uint32_t>(words, 0)); }

std::string Engine::run(const char* kernel, const std::vector<MTL::Buffer*>& buffers, MTL::Size grid, MTL::Size group,
                        bool threadgroup_memory) {
  const auto state = pipeline(kernel);
  auto* commands = queue->commandBuffer();
  auto* encoder = commands->computeCommandEncoder();
  encoder->setComputePipelineState(state.get());
  for (size_t i = 0; i < buffers.size(); ++i)
    encoder->setBuffer(buffers[i], 0, i);
  if (threadgroup_memory)
    encoder->setThreadgroupMemoryLength(group.width * group.height * group.depth * sizeof(uint32_t), 0);
  encoder->dispatchThreadgroups(grid, group);
  encoder->endEncoding();
  commands->commit();
  commands->waitUntilCompleted();
  NS::Error* error = commands->error();
  EXPECT_EQ(commands->status(), error ? MTL::CommandBufferStatusError : MTL::CommandBufferStatusCompleted);
  return error ? error->localizedDescription()->utf8String() : "";
}

std::vector<uint32_t> contents(const NS::SharedPtr<MTL::Buffer>& buffer) {
  return {words(buffer), words(buffer) + buffer->length() / sizeof(uint32_t)};
}

std::string misuse(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

testing::AssertionResult mentions(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    if (text.find(part) == std::string::npos)
      return testing::AssertionFailure() << "no '" << part << "' in '" << text << "'";
  }
  return testing::AssertionSuccess();
}

testing::AssertionResult all_are(const std::vector<uint32_t>& values, uint32_t value) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] != value)
      return testing::AssertionFailure() << "element " << i << " of " << values.size() << " is " << values[i];
  }
  return values.empty() ? testing::AssertionFailure() << "no values" : testing::AssertionSuccess();
}

} // namespace sim_test
