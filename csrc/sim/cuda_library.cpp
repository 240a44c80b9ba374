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

/// Sets what a kernel's description points to.
void point_into_itself(CudaKernel& kernel) {
  for (size_t i = 0; i < kernel.argument_table.size(); ++i)
    kernel.argument_table[i].name = kernel.argument_names[i].c_str();
  kernel.name = kernel.host_name.c_str();
  kernel.arguments = kernel.argument_table.data();
  kernel.argument_count = uint32_t(kernel.argument_table.size());
  kernel.value_bytes.resize(kernel.argument_table.size());
}

/// "constant INDEX TYPE required|optional NAME".
KernelConstant read_constant(const std::vector<std::string_view>& words, const std::string& name) {
  KernelConstant constant{0, 0, words[3] == "required", name.c_str()};
  std::from_chars(words[1].data(), words[1].data() + words[1].size(), constant.index);
  std::from_chars(words[2].data(), words[2].data() + words[2].size(), constant.type);
  return constant;
}

} // namespace

CudaLibrary::CudaLibrary(const std::string& path) {
  for (const fs::path& file : files_of(path)) {
    std::ifstream stream(file, std::ios::binary);
    std::ostringstream text;
    text << stream.rdbuf();
    if (!stream)
      throw std::runtime_error(file.string() + " cannot be read");
    auto source = std::make_unique<Source>();
    source->text = {file.filename().string(), text.str()};
    read(std::move(source));
  }
  for (const auto& kernel : kernels_) {
    point_into_itself(*kernel);
    pointers_.push_back(kernel.get());
  }
  table_.abi = KERNEL_LIBRARY_ABI;
  table_.engine = "cuda";
  table_.level = "source";
  table_.simd_width = CUDA_SIMD_WIDTH;
  table_.kernels = pointers_.data();
  table_.kernel_count = uint32_t(pointers_.size());
}

void CudaLibrary::read(std::unique_ptr<Source> source) {
  const std::string_view text = source->text.text;
  for (size_t place = 0; text.substr(place).starts_with(MARK);) {
    const size_t end = std::min(text.find('\n', place), text.size());
    const std::string_view line = text.substr(place, end - place);
    place = std::min(end + 1, text.size());
    const std::vector<std::string_view> words = split(line.substr(sizeof MARK - 1));
    if (words.size() == 5 && words[0] == "constant") { // in front of all kernels
      source->constant_names.push_back(std::make_unique<const std::string>(words[4]));
      source->constants.push_back(read_constant(words, *source->constant_names.back()));
      continue;
    }
    if (words.size() == 2 && words[0] == "kernel") {
      auto kernel = std::make_unique<CudaKernel>();
      kernel->host_name = words[1];
      kernel->source = &source->text;
      kernel->constants = source->constants.data();
      kernel->constant_count = uint32_t(source->constants.size());
      kernels_.push_back(std::move(kernel));
      continue;
    }
    uint32_t index = MAX_BUFFERS;
    if (words.size() == 4)
      std::from_chars(words[1].data(), words[1].data() + words[1].size(), index);
    const bool threadgroup = !words.empty() && words[0] == "threadgroup";
    if (kernels_.empty() || index >= (threadgroup ? MAX_THREADGROUP_ARGUMENTS : MAX_BUFFERS) ||
        (!threadgroup && words[0] != "buffer" && words[0] != "value"))
      throw std::runtime_error(source->text.name + ": not a source of the cuda engine: '" + std::string(line) + "'");
    CudaKernel& kernel = *kernels_.back();
    // The alignment of what a pointer points to is the compiler's knowledge: not checked.
    kernel.argument_table.push_back(
        {threadgroup ? ArgumentKind::Threadgroup : ArgumentKind::Buffer, index, 1, words[2] == "write", nullptr});
    kernel.argument_names.emplace_back(words[3]);
    kernel.by_value.push_back(words[0] == "value");
  }
  sources_.push_back(std::move(source));
}

CudaKernel* CudaLibrary::kernel(const Kernel& entry) {
  for (const auto& kernel : kernels_)
    if (kernel.get() == &entry)
      return kernel.get();
  for (const auto& [key, kernel] : specialized_)
    if (kernel.get() == &entry)
      return kernel.get();
  return nullptr;
}

const CudaKernel* CudaLibrary::specialize(const CudaKernel& kernel, const ConstantValue* values) {
  std::vector<std::string> definitions;
  for (uint32_t i = 0; i < kernel.constant_count; ++i)
    if (values[i].defined)
      definitions.push_back("-DMETAL_SIM_CONSTANT_" + std::to_string(kernel.constants[i].index) + "=" +
                            std::to_string(values[i].bits) + "u");
  if (definitions.empty())
    return &kernel;
  auto& specialized = specialized_[{&kernel, definitions}];
  if (!specialized) {
    specialized = std::make_unique<CudaKernel>(kernel);
    specialized->definitions = std::move(definitions);
    specialized->function = nullptr;
    point_into_itself(*specialized);
  }
  return specialized.get();
}

const CudaKernel* CudaLibrary::find(const std::string& name) const {
  const auto found =
      std::find_if(kernels_.begin(), kernels_.end(), [&](const auto& k) { return k->host_name == name; });
  return found == kernels_.end() ? nullptr : found->get();
}

} // namespace metal_sim
