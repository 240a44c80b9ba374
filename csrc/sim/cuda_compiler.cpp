#include "cuda_compiler.h"

#include "metal_sim/control.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <dlfcn.h>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <unistd.h>
#include <vector>

namespace metal_sim {
namespace {

namespace fs = std::filesystem;

constexpr char NVRTC_VARIABLE[] = "METAL_MOE_NVRTC";
constexpr size_t HASH_DIGITS = 32;

// Sonames of the versions that know C++20, newest first.
constexpr std::array NVRTC_NAMES = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so",
                                    "/usr/local/cuda/lib64/libnvrtc.so"};

/// The functions of NVRTC that are called, as documented by NVIDIA.
struct Nvrtc {
  using Program = void*;
  int (*version)(int* major, int* minor);
  int (*create)(Program* program, const char* source, const char* name, int headers, const char* const* header_texts,
                const char* const* header_names);
  int (*compile)(Program program, int options, const char* const* option);
  int (*log_size)(Program program, size_t* bytes);
  int (*log)(Program program, char* text);
  int (*cubin_size)(Program program, size_t* bytes);
  int (*cubin)(Program program, char* image);
  int (*destroy)(Program* program);
  const char* (*error_text)(int result);
};

std::mutex path_mutex;
std::string& preferred_path() {
  static auto* path = new std::string;
  return *path;
}

void* open_nvrtc() {
  std::vector<std::string> tried;
  const auto open = [&](const std::string& file, int flags) {
    void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | flags);
    if (!library && !(flags & RTLD_NOLOAD))
      tried.push_back(file);
    return library;
  };
  if (const char* forced = std::getenv(NVRTC_VARIABLE); forced && *forced) {
    if (void* library = open(forced, 0))
      return library;
    throw std::runtime_error(std::string(NVRTC_VARIABLE) + " is '" + forced +
                             "', which cannot be loaded: " + dlerror());
  }
  // What the program has loaded already fits its driver.
  for (const char* name : NVRTC_NAMES)
    if (void* library = open(name, RTLD_NOLOAD))
      return library;
  {
    const std::lock_guard lock(path_mutex);
    if (!preferred_path().empty())
      if (void* library = open(preferred_path(), 0))
        return library;
  }
  for (const char* name : NVRTC_NAMES)
    if (void* library = open(name, 0))
      return library;
  std::string text;
  for (const std::string& file : tried)
    text += (text.empty() ? "" : ", ") + file;
  throw std::runtime_error("NVRTC, which compiles kernels for NVIDIA GPUs, is not found (tried " + text +
                           "): install PyTorch for CUDA or the package nvidia-cuda-nvrtc, or name its library with " +
                           NVRTC_VARIABLE);
}

/// NVRTC asks for its second library by name, which only the loader's own places answer: load it from beside the first.
void load_builtins(void* nvrtc_function) {
  Dl_info info;
  if (!dladdr(nvrtc_function, &info) || !info.dli_fname)
    return;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(fs::path(info.dli_fname).parent_path(), error))
    if (entry.path().filename().string().starts_with("libnvrtc-builtins.so."))
      dlopen(entry.path().c_str(), RTLD_NOW | RTLD_LOCAL); // where it fails NVRTC says so
}

Nvrtc load_nvrtc() {
  void* library = open_nvrtc();
  const auto find = [&](auto& function, const char* name) {
    void* symbol = dlsym(library, name);
    if (!symbol)
      throw std::runtime_error(std::string("NVRTC has no function ") + name + ": version 12 or later is needed");
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
  Nvrtc nvrtc{};
  find(nvrtc.version, "nvrtcVersion");
  find(nvrtc.create, "nvrtcCreateProgram");
  find(nvrtc.compile, "nvrtcCompileProgram");
  find(nvrtc.log_size, "nvrtcGetProgramLogSize");
  find(nvrtc.log, "nvrtcGetProgramLog");
  find(nvrtc.cubin_size, "nvrtcGetCUBINSize");
  find(nvrtc.cubin, "nvrtcGetCUBIN");
  find(nvrtc.destroy, "nvrtcDestroyProgram");
  find(nvrtc.error_text, "nvrtcGetErrorString");
  load_builtins(reinterpret_cast<void*>(nvrtc.version));
  return nvrtc;
}

const Nvrtc& nvrtc() {
  static const Nvrtc loaded = load_nvrtc();
  return loaded;
}

std::vector<std::string> compiler_options(const std::string& kernel, int architecture) {
  return {
      // With the warpgroup instructions, which only this architecture has.
      "--gpu-architecture=sm_" + std::to_string(architecture) + (architecture == 90 ? "a" : ""),
      "--std=c++20",
      "--device-as-default-execution-space", // the sources say nothing of host and device
      "--device-int128",
      "--generate-line-info", // names lines of the .metal source in profilers and checkers; costs no time
      "-D__METAL_VERSION__=310",
      "-DMETAL_SIM_CUDA=1",
      "-DSIMD_WIDTH=32",
      "-DMETAL_SIM_THREADGROUP_BYTES=" + std::to_string(cuda_threadgroup_bytes(architecture)),
      "-DMETAL_SIM_ENTRY_" + kernel,
  };
}

std::string compile(const CudaSource& source, const std::string& kernel, const std::vector<std::string>& options) {
  const Nvrtc& compiler = nvrtc();
  const auto check = [&](int result, const char* call) {
    if (result)
      throw std::runtime_error(std::string(call) + ": " + compiler.error_text(result));
  };
  struct Program {
    const Nvrtc& compiler;
    void* handle = nullptr;
    ~Program() { compiler.destroy(&handle); }
  } program{compiler};
  check(compiler.create(&program.handle, source.text.c_str(), source.name.c_str(), 0, nullptr, nullptr),
        "nvrtcCreateProgram");
  std::vector<const char*> arguments;
  for (const std::string& option : options)
    arguments.push_back(option.c_str());
  if (const int result = compiler.compile(program.handle, int(arguments.size()), arguments.data())) {
    size_t bytes = 0;
    compiler.log_size(program.handle, &bytes);
    std::string log(bytes, '\0');
    if (bytes)
      compiler.log(program.handle, log.data());
    throw std::runtime_error("NVRTC " + nvrtc_version() + " does not compile kernel '" + kernel + "' of " +
                             source.name + " with " + options.front() + ": " + compiler.error_text(result) + "\n" +
                             log.c_str());
  }
  size_t bytes = 0;
  check(compiler.cubin_size(program.handle, &bytes), "nvrtcGetCUBINSize");
  std::string image(bytes, '\0');
  check(compiler.cubin(program.handle, image.data()), "nvrtcGetCUBIN");
  return image;
}

/// FNV-1a over 128 bits: files of one user's cache are told apart and damage is seen, nobody is kept out.
std::string hash(const std::string& text) {
  __extension__ using Word = unsigned __int128;
  constexpr Word prime = Word(1) << 88 | 0x13B;
  Word value = Word(0x6C62272E07BB0142) << 64 | 0x62B821756295C58D;
  for (const unsigned char byte : text)
    value = (value ^ byte) * prime;
  std::string digits; // HASH_DIGITS of them
  for (int shift = 124; shift >= 0; shift -= 4)
    digits += "0123456789abcdef"[unsigned(value >> shift) & 15];
  return digits;
}

/// Empty where the user has no home.
fs::path cache_directory() {
  const char* base = std::getenv("XDG_CACHE_HOME");
  if (base && *base == '/')
    return fs::path(base) / "metal_moe" / "cuda";
  const char* home = std::getenv("HOME");
  return home && *home ? fs::path(home) / ".cache" / "metal_moe" / "cuda" : fs::path();
}

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (file)
    text << file.rdbuf();
  return text.str();
}

/// What a file of the cache holds: an image, then its hash. Empty where there is no such file, or it is damaged.
std::string read_image(const fs::path& path) {
  std::string image = read_file(path);
  if (image.size() <= HASH_DIGITS)
    return {};
  const std::string digits = image.substr(image.size() - HASH_DIGITS);
  image.resize(image.size() - HASH_DIGITS);
  return hash(image) == digits ? image : std::string();
}

/// Under a name of its own first: other processes see the whole file or none.
void write_file(const fs::path& path, const std::string& contents) {
  static std::atomic<unsigned> counter;
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
  const fs::path temporary = path.string() + "." + std::to_string(getpid()) + "." + std::to_string(counter++) + ".tmp";
  std::ofstream file(temporary, std::ios::binary);
  file.write(contents.data(), std::streamsize(contents.size()));
  file.close();
  if (file)
    fs::rename(temporary, path, error);
  if (!file || error)
    fs::remove(temporary, error);
}

} // namespace

uint32_t cuda_threadgroup_bytes(int architecture) {
  // Shared memory of a multiprocessor in KiB, the least of all where unknown; each block takes one more than it asks
  // for.
  uint32_t shared = 100;
  switch (architecture) {
  case 80:
  case 87:
    shared = 164;
    break;
  case 90:
  case 100:
  case 103:
    shared = 228;
  }
  return (shared / 2 - 1) << 10;
}

std::string nvrtc_version() {
  int major = 0, minor = 0;
  nvrtc().version(&major, &minor);
  return std::to_string(major) + "." + std::to_string(minor);
}

CudaBinary cuda_binary(const CudaSource& source, const std::string& kernel, const std::vector<std::string>& definitions,
                       int architecture, bool use_cache) {
  std::vector<std::string> options = compiler_options(kernel, architecture);
  options.insert(options.end(), definitions.begin(), definitions.end());
  std::string key = nvrtc_version() + '\0' + source.text;
  for (const std::string& option : options)
    key += '\0' + option;
  const fs::path directory = cache_directory();
  const fs::path file = directory / (hash(key) + ".cubin");
  if (use_cache && !directory.empty())
    if (std::string image = read_image(file); !image.empty())
      return {std::move(image), true};
  CudaBinary binary{compile(source, kernel, options), false};
  if (!directory.empty())
    write_file(file, binary.image + hash(binary.image));
  return binary;
}

void set_nvrtc_path(const std::string& path) {
  const std::lock_guard lock(path_mutex);
  preferred_path() = path;
}

} // namespace metal_sim
