#include "source_library.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace metal_moe {

namespace {

constexpr char DIGEST[] = "//! digest ";
constexpr char KERNEL[] = "//! kernel ";

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file)
    throw std::runtime_error("kernel source '" + path + "' cannot be read");
  return text.str();
}

/// The rest of a line that begins with `mark`, or nothing.
template <size_t N>
std::string after(const std::string& line, const char (&mark)[N]) {
  return line.starts_with(mark) ? line.substr(N - 1) : std::string();
}

/// As the kernels are compiled where the compiler is installed: language 3.1, NaN and infinity as IEEE 754 has them.
NS::SharedPtr<MTL::CompileOptions> compile_options() {
  auto options = NS::TransferPtr(MTL::CompileOptions::alloc()->init());
  options->setLanguageVersion(MTL::LanguageVersion3_1);
  options->setFastMathEnabled(false); // setMathMode came with macOS 15
  return options;
}

} // namespace

SourceLibrary::SourceLibrary(MTL::Device* device, const std::string& folder) : device_(device) {
  std::vector<std::string> paths;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().extension() == ".metal")
      paths.push_back(entry.path().string());
  std::sort(paths.begin(), paths.end());
  std::string digests;
  for (const std::string& path : paths) {
    texts_.push_back(std::make_unique<Text>(Text{path, {}}));
    std::ifstream file(path);
    for (std::string line; std::getline(file, line) && line.starts_with("//! ");) {
      digests += after(line, DIGEST);
      if (const std::string kernel = after(line, KERNEL); !kernel.empty())
        by_kernel_[kernel] = texts_.back().get();
    }
  }
  if (by_kernel_.empty())
    throw std::runtime_error("kernel library '" + folder + "' cannot be loaded: it holds no .metal source");
  archive_ = std::make_unique<PipelineArchive>(device, digests);
}

MTL::Library* SourceLibrary::library_of(const std::string& kernel) {
  const auto found = by_kernel_.find(kernel);
  if (found == by_kernel_.end())
    return nullptr;
  Text& text = *found->second;
  const std::lock_guard lock(mutex_);
  if (!text.library) {
    const AutoreleaseScope scope;
    const std::string source = read_file(text.path);
    NS::Error* error = nullptr;
    text.library = NS::TransferPtr(device_->newLibrary(ns_string(source.c_str()), compile_options().get(), &error));
    if (!text.library)
      throw std::runtime_error("kernel source '" + text.path + "' does not compile: " + describe(error));
  }
  return text.library.get();
}

NS::SharedPtr<MTL::ComputePipelineState> SourceLibrary::archived_pipeline(MTL::ComputePipelineDescriptor* descriptor) {
  return archive_->pipeline(descriptor);
}

std::vector<std::string> SourceLibrary::function_names() const {
  std::vector<std::string> names;
  for (const auto& [name, text] : by_kernel_)
    names.push_back(name);
  return names;
}

} // namespace metal_moe
