#include "cuda_driver.h"

#include <cstdlib>
#include <dlfcn.h>
#include <mutex>
#include <stdexcept>

namespace metal_sim {
namespace {

constexpr char DRIVER_VARIABLE[] = "METAL_MOE_CUDA_DRIVER";

CudaDriver load() {
  const char* forced = std::getenv(DRIVER_VARIABLE);
  const std::string file = forced && *forced ? forced : "libcuda.so.1";
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL); // never closed
  if (!library)
    throw std::runtime_error("the CUDA driver cannot be loaded (" + std::string(dlerror()) +
                             "): the cuda engine needs an NVIDIA GPU and its driver");
  const auto find = [&](auto& function, const char* name, bool optional = false) {
    void* symbol = dlsym(library, name);
    if (!symbol && !optional)
      throw std::runtime_error("the CUDA driver '" + file + "' has no function " + name + ": it is too old");
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
  CudaDriver driver{};
  find(driver.init, "cuInit");
  find(driver.driver_version, "cuDriverGetVersion");
  find(driver.device_count, "cuDeviceGetCount");
  find(driver.device, "cuDeviceGet");
  find(driver.device_name, "cuDeviceGetName");
  find(driver.device_attribute, "cuDeviceGetAttribute");
  find(driver.device_memory, "cuDeviceTotalMem_v2");
  find(driver.retain_primary_context, "cuDevicePrimaryCtxRetain");
  find(driver.current_context, "cuCtxGetCurrent");
  find(driver.push_context, "cuCtxPushCurrent_v2");
  find(driver.pop_context, "cuCtxPopCurrent_v2");
  find(driver.load_module, "cuModuleLoadData");
  find(driver.module_function, "cuModuleGetFunction");
  find(driver.function_attribute, "cuFuncGetAttribute");
  find(driver.set_function_attribute, "cuFuncSetAttribute");
  find(driver.launch, "cuLaunchKernelEx");
  find(driver.synchronize_stream, "cuStreamSynchronize");
  find(driver.allocate, "cuMemAlloc_v2");
  find(driver.free, "cuMemFree_v2");
  find(driver.copy_to_device, "cuMemcpyHtoD_v2");
  find(driver.exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
  find(driver.stream_is_capturing, "cuStreamIsCapturing");
  find(driver.create_stream, "cuStreamCreate");
  find(driver.destroy_stream, "cuStreamDestroy_v2");
  find(driver.create_event, "cuEventCreate");
  find(driver.destroy_event, "cuEventDestroy_v2");
  find(driver.record_event, "cuEventRecord");
  find(driver.synchronize_event, "cuEventSynchronize");
  find(driver.elapsed_time, "cuEventElapsedTime");
  find(driver.error_name, "cuGetErrorName");
  find(driver.error_text, "cuGetErrorString");
  find(driver.parameter_info, "cuFuncGetParamInfo", true);
  return driver;
}

std::string describe(const CudaDriver& driver, CudaResult result) {
  const char *name = nullptr, *text = nullptr;
  driver.error_name(result, &name);
  driver.error_text(result, &text);
  return std::string(name ? name : "error " + std::to_string(result)) + (text ? std::string(": ") + text : "");
}

} // namespace

const CudaDriver& cuda_driver() {
  // Tried again by a later call where it failed: a static that throws stays uninitialised.
  static const CudaDriver driver = [] {
    CudaDriver loaded = load();
    if (const CudaResult result = loaded.init(0))
      throw std::runtime_error("the CUDA driver cannot be initialised: " + describe(loaded, result));
    return loaded;
  }();
  return driver;
}

std::string describe_cuda(CudaResult result) { return describe(cuda_driver(), result); }

void check_cuda(CudaResult result, const std::string& what) {
  if (result)
    throw std::runtime_error(what + ": " + describe_cuda(result));
}

CurrentCudaContext::CurrentCudaContext(CudaContext context) {
  CudaContext current = nullptr;
  check_cuda(cuda_driver().current_context(&current), "the thread's CUDA context");
  if (current == context)
    return;
  check_cuda(cuda_driver().push_context(context), "the device's CUDA context");
  pushed_ = true;
}

CurrentCudaContext::~CurrentCudaContext() {
  CudaContext popped;
  if (pushed_)
    cuda_driver().pop_context(&popped);
}

} // namespace metal_sim
