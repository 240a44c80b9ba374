#include "cuda_library.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string_view>

namespace metal_sim {
namespace {

namespace fs = std::filesystem;

constexpr uint32_t CUDA_SIMD_WIDTH = 32;
constexpr char MARK[] = "//! "; // what cuda_source.py begins its descriptions with

std::vector<fs::path> files_of(const fs::path& path) {
  if (fs::is_regular_file(path))
    return {path};
  std::vector<fs::path> files;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(path / "cuda", error))
    if (entry.path().extension() == ".cu")
      files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  if (files.empty())
    throw std::runtime_error("no kernels for the cuda engine: " + (path / "cuda").string() + " holds no .cu file");
  return files;
}

std::vector<std::string_view> split(std::string_view line) {
  std::vector<std::string_view> words;
  while (!line.empty()) {
    const size_t end = std::min(line.find(' '), line.size());
    if (end > 0)
      words.push_back(line.substr(0, end));
    line.remove_prefix(std::min(end + 1, line.size()));
  }
  return words;
}

} // namespace

CudaLibrary::CudaLibrary(const std::string& path) {
  for (const fs::path& file : files_of(path)) {
    std::ifstream stream(file, std::ios::binary);
    std::ostringstream text;
    text << stream.rdbuf();
    if (!stream)
      throw std::runtime_error(file.string() + " cannot be read");
    auto source = std::make_unique<CudaSource>();
    source->name = file.filename().string();
    source->text = text.str();
    read(std::move(source));
  }
  for (const auto& kernel : kernels_) {
    for (size_t i = 0; i < kernel->argument_table.size(); ++i)
      kernel->argument_table[i].name = kernel->argument_names[i].c_str();
    kernel->name = kernel->host_name.c_str();
    kernel->arguments = kernel->argument_table.data();
    kernel->argument_count = uint32_t(kernel->argument_table.size());
    kernel->value_bytes.resize(kernel->argument_table.size());
    pointers_.push_back(kernel.get());
  }
  table_.abi = KERNEL_LIBRARY_ABI;
  table_.engine = "cuda";
  table_.level = "source";
  table_.simd_width = CUDA_SIMD_WIDTH;
  table_.kernels = pointers_.data();
  table_.kernel_count = uint32_t(pointers_.size());
}

void CudaLibrary::read(std::unique_ptr<CudaSource> source) {
  const std::string_view text = source->text;
  for (size_t place = 0; text.substr(place).starts_with(MARK);) {
    const size_t end = std::min(text.find('\n', place), text.size());
    const std::string_view line = text.substr(place, end - place);
    place = std::min(end + 1, text.size());
    const std::vector<std::string_view> words = split(line.substr(sizeof MARK - 1));
    if (words.size() == 2 && words[0] == "kernel") {
      auto kernel = std::make_unique<CudaKernel>();
      kernel->host_name = words[1];
      kernel->source = source.get();
      kernels_.push_back(std::move(kernel));
      continue;
    }
    uint32_t index = MAX_BUFFERS;
    if (words.size() == 4)
      std::from_chars(words[1].data(), words[1].data() + words[1].size(), index);
    const bool threadgroup = !words.empty() && words[0] == "threadgroup";
    if (kernels_.empty() || index >= (threadgroup ? MAX_THREADGROUP_ARGUMENTS : MAX_BUFFERS) ||
        (!threadgroup && words[0] != "buffer" && words[0] != "value"))
      throw std::runtime_error(source->name + ": not a source of the cuda engine: '" + std::string(line) + "'");
    CudaKernel& kernel = *kernels_.back();
    // The alignment of what a pointer points to is the compiler's knowledge: not checked.
    kernel.argument_table.push_back(
        {threadgroup ? ArgumentKind::Threadgroup : ArgumentKind::Buffer, index, 1, words[2] == "write", nullptr});
    kernel.argument_names.emplace_back(words[3]);
    kernel.by_value.push_back(words[0] == "value");
  }
  sources_.push_back(std::move(source));
}

CudaKernel& CudaLibrary::kernel(const Kernel& entry) {
  const auto found = std::find_if(kernels_.begin(), kernels_.end(), [&](const auto& k) { return k.get() == &entry; });
  if (found == kernels_.end())
    throw std::logic_error("the kernel is not of this library");
  return **found;
}

const CudaKernel* CudaLibrary::find(const std::string& name) const {
  const auto found =
      std::find_if(kernels_.begin(), kernels_.end(), [&](const auto& k) { return k->host_name == name; });
  return found == kernels_.end() ? nullptr : found->get();
}

} // namespace metal_sim
