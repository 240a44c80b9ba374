#include "context.h"

#if !defined(__APPLE__)
#include <metal_sim/control.h>
#endif

#include <charconv>
#include <stdexcept>

namespace metal_moe {

namespace {

std::string name_of(MTL::Device* device) {
  AutoreleaseScope scope;
  return to_string(device->name());
}

std::string first_word(const std::string& text) { return text.substr(0, text.find(' ')); }

/// What `engine` of an operation's record says.
std::string engine_of(const std::string& device_name) {
#if defined(__APPLE__)
  (void)device_name;
  return "mps";
#else
  return first_word(device_name);
#endif
}

bool is_cuda(const std::string& name) { return name == "cuda" || name.starts_with("cuda:"); }

#if !defined(__APPLE__)
NS::SharedPtr<MTL::Device> find_cuda_device(const std::string& name) {
  int ordinal = 0;
  if (const size_t colon = name.find(':'); colon != std::string::npos) {
    const char* end = name.data() + name.size();
    if (std::from_chars(name.data() + colon + 1, end, ordinal).ptr != end)
      throw std::invalid_argument("no device '" + name + "': a CUDA device is 'cuda' or 'cuda:NUMBER'");
  }
  NS::Error* error = nullptr;
  auto device = NS::TransferPtr(metal_sim::cuda_device(ordinal, &error));
  if (!device)
    throw std::runtime_error("device '" + name + "': " + describe(error));
  return device;
}
#endif

NS::SharedPtr<MTL::Device> find_device(const std::string& name) {
  AutoreleaseScope scope;
#if !defined(__APPLE__)
  if (is_cuda(name))
    return find_cuda_device(name);
  if (name == "null")
    return NS::TransferPtr(metal_sim::null_device());
#endif
#if defined(__APPLE__)
  const bool is_default = name.empty() || name == "mps";
#else
  const bool is_default = name.empty();
#endif
  if (is_default) {
    auto device = NS::TransferPtr(MTL::CreateSystemDefaultDevice());
    if (!device)
      throw std::invalid_argument("this machine has no Metal device");
    return device;
  }
  const auto devices = NS::TransferPtr(MTL::CopyAllDevices());
  std::string names;
  for (NS::UInteger i = 0; i < devices->count(); ++i) {
    auto* device = devices->object<MTL::Device>(i);
    const std::string device_name = to_string(device->name());
    if (first_word(device_name) == name)
      return NS::RetainPtr(device);
    names.append(names.empty() ? "'" : ", '").append(device_name).append("'");
  }
  throw std::invalid_argument("no device '" + name + "': this machine has " + (names.empty() ? "none" : names));
}

} // namespace

// The exact engine exists to find mistakes: scratch is poisoned on every loan there.
Context::Context(const std::string& device_name, std::string library_path)
    : device_(find_device(device_name)), name_(name_of(device_.get())), engine_(engine_of(name_)),
      library_(device_.get(), std::move(library_path)), pipelines_(library_), pool_(device_.get(), engine_ == "exact") {
  if (is_cuda(engine_))
    caller_queue_ = NS::TransferPtr(device_->newCommandQueue());
}

std::unique_ptr<CommandStream> Context::new_stream(const CommandStream::Policy& policy) {
  auto queue = NS::TransferPtr(device_->newCommandQueue());
  if (!queue)
    throw std::runtime_error("device '" + name_ + "' gives no command queue");
  return std::make_unique<CommandStream>(std::move(queue), pool_, policy);
}

NS::SharedPtr<MTL::Buffer> Context::wrap(const void* memory, size_t bytes) const {
  auto buffer = NS::TransferPtr(device_->newBuffer(memory, bytes, MTL::ResourceStorageModeShared, nullptr));
  if (!buffer)
    throw std::runtime_error("device '" + name_ + "' cannot use " + std::to_string(bytes) +
                             " bytes of host memory in place");
  return buffer;
}

StreamLease::StreamLease(Context& context) : context_(context), generation_(fork_generation()) {
  {
    std::lock_guard lock(context_.mutex_);
    if (context_.generation_ != generation_) {
      context_.idle_streams_.clear(); // of the process that this one was forked from
      context_.generation_ = generation_;
    }
    if (!context_.idle_streams_.empty()) {
      stream_ = std::move(context_.idle_streams_.back());
      context_.idle_streams_.pop_back();
      return;
    }
  }
  stream_ = context_.new_stream();
}

StreamLease::~StreamLease() {
  if (generation_ != fork_generation())
    return;
  stream_->discard();
  try {
    stream_->synchronize(); // nothing is in flight unless an exception passed by, and then its error is the second one
  } catch (const std::exception&) {
  }
  std::lock_guard lock(context_.mutex_);
  context_.idle_streams_.push_back(std::move(stream_));
}

} // namespace metal_moe
