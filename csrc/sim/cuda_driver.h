// The functions of the CUDA driver that the engine calls, found in libcuda.so.1 at run time: nothing of CUDA is needed
// to build. Names, signatures and numbers are those of NVIDIA's documented driver interface.
#pragma once

#include <cstddef>
#include <string>

namespace metal_sim {

using CudaResult = int; // 0: success
using CudaContext = void*;
using CudaModule = void*;
using CudaFunction = void*;
using CudaStream = void*; // null: the default stream
using CudaEvent = void*;
using CudaAddress = unsigned long long;

constexpr int CUDA_MULTIPROCESSORS = 16; // CUdevice_attribute
constexpr int CUDA_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int CUDA_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int CUDA_FUNCTION_MAX_THREADS = 0;  // CUfunction_attribute
constexpr int CUDA_FUNCTION_SHARED_BYTES = 1; // of the kernel itself
constexpr int CUDA_FUNCTION_MAX_DYNAMIC_SHARED_BYTES = 8;
constexpr int CUDA_FUNCTION_SHARED_CARVEOUT = 9; // percent of the memory that shared memory and L1 cache divide
constexpr int CUDA_CAPTURE_RELAXED = 2;          // CUstreamCaptureMode
constexpr unsigned CUDA_EVENT_DEFAULT = 0;       // CUevent_flags
constexpr unsigned CUDA_STREAM_NON_BLOCKING = 1; // CUstream_flags

/// CUlaunchAttribute: a number and a union of 64 bytes.
struct CudaLaunchAttribute {
  alignas(8) int id;
  alignas(8) int value;
  char rest[60];
};
constexpr int CUDA_LAUNCH_PROGRAMMATIC_SERIALIZATION = 6; // CUlaunchAttributeID

/// CUlaunchConfig.
struct CudaLaunch {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  CudaStream stream;
  CudaLaunchAttribute* attributes;
  unsigned attribute_count;
};

struct CudaDriver {
  CudaResult (*init)(unsigned flags);
  CudaResult (*driver_version)(int* version);
  CudaResult (*device_count)(int* count);
  CudaResult (*device)(int* device, int ordinal);
  CudaResult (*device_name)(char* name, int length, int device);
  CudaResult (*device_attribute)(int* value, int attribute, int device);
  CudaResult (*device_memory)(size_t* bytes, int device);
  CudaResult (*retain_primary_context)(CudaContext* context, int device);
  CudaResult (*current_context)(CudaContext* context);
  CudaResult (*push_context)(CudaContext context);
  CudaResult (*pop_context)(CudaContext* context);
  CudaResult (*load_module)(CudaModule* module, const void* image);
  CudaResult (*module_function)(CudaFunction* function, CudaModule module, const char* name);
  CudaResult (*function_attribute)(int* value, int attribute, CudaFunction function);
  CudaResult (*set_function_attribute)(CudaFunction function, int attribute, int value);
  CudaResult (*launch)(const CudaLaunch* launch, CudaFunction function, void** parameters, void** extra);
  CudaResult (*synchronize_stream)(CudaStream stream);
  CudaResult (*allocate)(CudaAddress* address, size_t bytes);
  CudaResult (*free)(CudaAddress address);
  CudaResult (*copy_to_device)(CudaAddress to, const void* from, size_t bytes);
  CudaResult (*exchange_capture_mode)(int* mode);
  CudaResult (*stream_is_capturing)(CudaStream stream, int* status);
  CudaResult (*create_stream)(CudaStream* stream, unsigned flags);
  CudaResult (*destroy_stream)(CudaStream stream);
  CudaResult (*create_event)(CudaEvent* event, unsigned flags);
  CudaResult (*destroy_event)(CudaEvent event);
  CudaResult (*record_event)(CudaEvent event, CudaStream stream);
  CudaResult (*synchronize_event)(CudaEvent event);
  CudaResult (*elapsed_time)(float* milliseconds, CudaEvent start, CudaEvent end);
  CudaResult (*error_name)(CudaResult result, const char** name);
  CudaResult (*error_text)(CudaResult result, const char** text);
  /// Null before driver 12.4.
  CudaResult (*parameter_info)(CudaFunction function, size_t index, size_t* offset, size_t* bytes);
};

/// The driver, initialised. std::runtime_error where the machine has none; METAL_MOE_CUDA_DRIVER names another file.
const CudaDriver& cuda_driver();

/// "CUDA_ERROR_...: what it means".
std::string describe_cuda(CudaResult result);

/// std::runtime_error "what: CUDA_ERROR_..." where `result` is no success.
void check_cuda(CudaResult result, const std::string& what);

/// Makes a context current on this thread for its own lifetime. Costs one query where it is current already, as it is
/// on threads where PyTorch has used the device.
class CurrentCudaContext {
public:
  explicit CurrentCudaContext(CudaContext context);
  ~CurrentCudaContext();
  CurrentCudaContext(const CurrentCudaContext&) = delete;
  CurrentCudaContext& operator=(const CurrentCudaContext&) = delete;

private:
  bool pushed_ = false;
};

} // namespace metal_sim
