// The engine for NVIDIA GPUs: a threadgroup is a block, a simdgroup a warp, and a dispatch one launch on a stream. On
// the stream that a command buffer was made for nothing is waited for; a queue's own command buffers run on the default
// stream and are waited for.
#include "cuda_driver.h"
#include "cuda_library.h"
#include "metal_sim/control.h"
#include "objects.h"
#include "spin.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace metal_sim {
namespace {

/// Compute capability from which on there are asynchronous copies and bfloat16 products.
constexpr int MIN_CUDA_MAJOR = 8;
/// Threadgroups of one launch in y and z: CUDA's limit. Larger grids take several launches.
constexpr uint32_t MAX_GRID_YZ = 65535;
/// Every threadgroup argument begins at a multiple of it.
constexpr uint32_t SHARED_ALIGNMENT = 16;

/// The last parameter of every entry point: see msl/cuda_entry.h.
struct LaunchGrid {
  Size3 first; // of the launch
  Size3 grid;  // of the dispatch
};

/// Calls that CUDA would refuse while some stream of the program is captured (loading code) and that no graph needs.
class OutsideCapture {
public:
  OutsideCapture() { cuda_driver().exchange_capture_mode(&mode_); }
  ~OutsideCapture() { cuda_driver().exchange_capture_mode(&mode_); }

private:
  int mode_ = CUDA_CAPTURE_RELAXED;
};

constexpr uint64_t CLOCK_LIFE = 100'000'000; // nanoseconds, of which 24 bits leave 6

class CudaEngine final : public Engine {
  struct Clock {
    explicit Clock(CudaEngine& engine) : engine(engine) {}
    ~Clock() { engine.release_time({UNKNOWN_TIME, event}); }
    Clock(const Clock&) = delete;
    Clock& operator=(const Clock&) = delete;

    CudaEngine& engine;
    CudaEvent event = nullptr;
    uint64_t start = 0; // when it was, on the host's clock
  };

public:
  explicit CudaEngine(int ordinal) {
    const CudaDriver& driver = cuda_driver();
    int count = 0, device = 0, major = 0, minor = 0;
    check_cuda(driver.device_count(&count), "number of CUDA devices");
    if (ordinal < 0 || ordinal >= count)
      throw std::runtime_error("there is no CUDA device " + std::to_string(ordinal) + ": this machine has " +
                               std::to_string(count));
    check_cuda(driver.device(&device, ordinal), "CUDA device");
    check_cuda(driver.device_attribute(&major, CUDA_COMPUTE_CAPABILITY_MAJOR, device), "compute capability");
    check_cuda(driver.device_attribute(&minor, CUDA_COMPUTE_CAPABILITY_MINOR, device), "compute capability");
    check_cuda(driver.device_attribute(&multiprocessors_, CUDA_MULTIPROCESSORS, device), "multiprocessors");
    architecture_ = major * 10 + minor;
    if (major < MIN_CUDA_MAJOR)
      throw std::runtime_error("CUDA device " + std::to_string(ordinal) + " has compute capability " +
                               std::to_string(major) + "." + std::to_string(minor) + ": " +
                               std::to_string(MIN_CUDA_MAJOR) + ".0 or later is needed");
    char name[256] = {};
    check_cuda(driver.device_name(name, int(sizeof name), device), "name of the CUDA device");
    device_name_ = name;
    check_cuda(driver.device_memory(&memory_, device), "memory of the CUDA device");
    // The one that PyTorch uses. Kept to the end: its memory may outlive everything here.
    check_cuda(driver.retain_primary_context(&context_, device), "CUDA context");
  }

  uint32_t max_threads_per_threadgroup() const override { return MAX_THREADS_PER_THREADGROUP; }
  uint32_t max_threadgroup_memory() const override { return 2 * cuda_threadgroup_bytes(architecture_); }
  const char* name() const override { return "cuda"; }
  const std::string& device_name() const { return device_name_; }
  int architecture() const { return architecture_; }

  const KernelLibrary* open_library(const std::string& path) override {
    const std::lock_guard lock(mutex_);
    auto& library = libraries_[path];
    if (!library)
      library = std::make_unique<CudaLibrary>(path);
    return &library->table();
  }

  const Kernel* specialize(const Kernel& entry, const ConstantValue* values) override {
    const std::lock_guard lock(mutex_);
    const auto [library, kernel] = find(entry);
    return library->specialize(*kernel, values);
  }

  std::string prepare(const Kernel& entry) override {
    const std::lock_guard lock(mutex_);
    const CurrentCudaContext current(context_);
    const OutsideCapture relaxed;
    CudaKernel& kernel = *find(entry).second;
    if (!kernel.function)
      load(kernel);
    return "";
  }

  std::string run(const Dispatch& dispatch, uint32_t) override {
    std::string failure = launch(dispatch, nullptr);
    if (failure.empty()) {
      const CurrentCudaContext current(context_);
      if (const CudaResult result = cuda_driver().synchronize_stream(nullptr))
        failure = std::string("kernel '") + dispatch.kernel->name + "': " + describe_cuda(result);
    }
    return failure;
  }

  std::string launch(const Dispatch& dispatch, void* stream) override {
    const auto& kernel = static_cast<const CudaKernel&>(*dispatch.kernel);
    // Parameters of an entry point: its arguments, then the grid.
    void* parameters[MAX_BUFFERS + MAX_THREADGROUP_ARGUMENTS + 1];
    void* addresses[MAX_BUFFERS + MAX_THREADGROUP_ARGUMENTS];
    uint32_t offsets[MAX_BUFFERS + MAX_THREADGROUP_ARGUMENTS];
    uint32_t shared = 0;
    for (uint32_t i = 0; i < kernel.argument_count; ++i) {
      const KernelArgument& argument = kernel.arguments[i];
      if (argument.kind == ArgumentKind::Threadgroup) {
        offsets[i] = shared;
        parameters[i] = &offsets[i];
        shared +=
            (dispatch.threadgroup_bytes[argument.index] + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
        continue;
      }
      const bool constants = (dispatch.constants >> argument.index & 1) != 0;
      if (constants != kernel.by_value[i])
        return describe(kernel, argument) + (constants ? " is a pointer, but bound to constants by setBytes"
                                                       : " is passed by value, but not bound by setBytes");
      addresses[i] = dispatch.arguments.buffers[argument.index];
      if (!constants) {
        parameters[i] = &addresses[i];
        continue;
      }
      if (dispatch.buffer_bytes[argument.index] < kernel.value_bytes[i])
        return describe(kernel, argument) + " has " + std::to_string(kernel.value_bytes[i]) + " bytes, setBytes gave " +
               std::to_string(dispatch.buffer_bytes[argument.index]);
      parameters[i] = addresses[i];
    }
    // The threadgroups of a launch may take their places before what is in front of it has ended, where that lets
    // them; they wait for its end themselves (msl/cuda_launch.h).
    CudaLaunchAttribute early_start{CUDA_LAUNCH_PROGRAMMATIC_SERIALIZATION, architecture_ >= 90, {}};
    LaunchGrid place{{0, 0, 0}, dispatch.grid};
    parameters[kernel.argument_count] = &place;
    const CurrentCudaContext current(context_);
    for (place.first.z = 0; place.first.z < dispatch.grid.z; place.first.z += MAX_GRID_YZ)
      for (place.first.y = 0; place.first.y < dispatch.grid.y; place.first.y += MAX_GRID_YZ) {
        const CudaLaunch config{{dispatch.grid.x, std::min(dispatch.grid.y - place.first.y, MAX_GRID_YZ),
                                 std::min(dispatch.grid.z - place.first.z, MAX_GRID_YZ)},
                                {dispatch.group.x, dispatch.group.y, dispatch.group.z},
                                shared,
                                stream,
                                &early_start,
                                1};
        const CudaResult result = cuda_driver().launch(&config, kernel.function, parameters, nullptr);
        // An error of earlier work on the device shows here as well: CUDA reports it to whoever calls next.
        if (result)
          return std::string("kernel '") + kernel.name + "' cannot be launched: " + describe_cuda(result);
      }
    return "";
  }

  bool has_streams() const override { return true; }
  bool tells_time() const override { return true; }

  /// An event that is reached at once, on a stream where nothing else runs, and when that was. CUDA tells the time
  /// between two events in milliseconds of 24 bits, so no event is told from one that is long ago.
  std::shared_ptr<void> clock() override {
    const std::lock_guard lock(mutex_);
    if (clock_ && nanoseconds_now() - clock_->start < CLOCK_LIFE)
      return clock_;
    const CurrentCudaContext current(context_);
    const OutsideCapture relaxed;
    const CudaDriver& driver = cuda_driver();
    auto clock = std::make_shared<Clock>(*this);
    CudaStream stream = nullptr;
    const bool made = driver.create_event(&clock->event, CUDA_EVENT_DEFAULT) == 0 &&
                      driver.create_stream(&stream, CUDA_STREAM_NON_BLOCKING) == 0 &&
                      driver.record_event(clock->event, stream) == 0 && driver.synchronize_event(clock->event) == 0;
    clock->start = nanoseconds_now();
    if (stream)
      driver.destroy_stream(stream);
    clock_ = made ? clock : nullptr;
    return clock_;
  }

  /// Events of a stream that is captured would be part of the graph, and tell nothing: unknown there.
  Time time_on(void* stream) override {
    const CurrentCudaContext current(context_);
    const CudaDriver& driver = cuda_driver();
    int capturing = 0;
    CudaEvent event = nullptr;
    if (driver.stream_is_capturing(stream, &capturing) || capturing || driver.create_event(&event, CUDA_EVENT_DEFAULT))
      return {};
    const Time time{UNKNOWN_TIME, event};
    if (driver.record_event(event, stream) == 0)
      return time;
    release_time(time);
    return {};
  }

  uint64_t nanoseconds_of(const Time& time, const void* clock) override {
    if (!time.event || !clock)
      return UNKNOWN_TIME;
    const CurrentCudaContext current(context_);
    const auto& from = *static_cast<const Clock*>(clock);
    float milliseconds = 0;
    if (cuda_driver().synchronize_event(time.event) ||
        cuda_driver().elapsed_time(&milliseconds, from.event, time.event))
      return UNKNOWN_TIME;
    return from.start + uint64_t(std::max(0.0, double(milliseconds) * 1e6));
  }

  void release_time(const Time& time) noexcept override {
    if (!time.event)
      return;
    try {
      const CurrentCudaContext current(context_);
      cuda_driver().destroy_event(time.event);
    } catch (const std::exception&) { // as in release()
    }
  }

  bool host_memory() const override { return false; }
  size_t memory_size() const override { return memory_; }

  void* allocate(size_t bytes) override {
    const CurrentCudaContext current(context_);
    CudaAddress address = 0;
    return cuda_driver().allocate(&address, bytes) ? nullptr : reinterpret_cast<void*>(address);
  }
  void release(void* memory) noexcept override {
    try {
      const CurrentCudaContext current(context_);
      cuda_driver().free(reinterpret_cast<CudaAddress>(memory));
    } catch (const std::exception&) { // the program is ending, and the driver has gone first
    }
  }
  void copy_in(void* to, const void* from, size_t bytes) override {
    const CurrentCudaContext current(context_);
    check_cuda(cuda_driver().copy_to_device(reinterpret_cast<CudaAddress>(to), from, bytes), "copy to the device");
  }

private:
  static std::string describe(const CudaKernel& kernel, const KernelArgument& argument) {
    return std::string("kernel '") + kernel.name + "': argument '" + argument.name + "' (buffer " +
           std::to_string(argument.index) + ")";
  }

  std::pair<CudaLibrary*, CudaKernel*> find(const Kernel& entry) {
    for (const auto& [path, library] : libraries_)
      if (CudaKernel* kernel = library->kernel(entry))
        return {library.get(), kernel};
    throw std::logic_error("the kernel is of no library of this device");
  }

  void load(CudaKernel& kernel) {
    const CudaDriver& driver = cuda_driver();
    std::vector<std::string> definitions = kernel.definitions;
    definitions.push_back("-DMETAL_SIM_MULTIPROCESSORS=" + std::to_string(multiprocessors_));
    CudaBinary binary = cuda_binary(*kernel.source, kernel.host_name, definitions, architecture_);
    CudaModule module = nullptr;
    CudaResult result = driver.load_module(&module, binary.image.data());
    if (result && binary.from_cache) { // a damaged file
      binary = cuda_binary(*kernel.source, kernel.host_name, definitions, architecture_, false);
      result = driver.load_module(&module, binary.image.data());
    }
    int version = 0;
    driver.driver_version(&version);
    check_cuda(result, "code that NVRTC " + nvrtc_version() + " made of kernel '" + kernel.host_name +
                           "' cannot be loaded by the driver, which knows CUDA " + std::to_string(version / 1000) +
                           "." + std::to_string(version % 1000 / 10));
    CudaFunction function = nullptr;
    int threads = 0;
    check_cuda(driver.module_function(&function, module, kernel.host_name.c_str()),
               "kernel '" + kernel.host_name + "'");
    check_cuda(driver.function_attribute(&threads, CUDA_FUNCTION_MAX_THREADS, function), "threads of a kernel");
    const auto takes_memory = [](const KernelArgument& argument) { return argument.kind == ArgumentKind::Threadgroup; };
    if (std::any_of(kernel.arguments, kernel.arguments + kernel.argument_count, takes_memory)) {
      int own = 0;
      check_cuda(driver.function_attribute(&own, CUDA_FUNCTION_SHARED_BYTES, function), "shared memory of a kernel");
      check_cuda(driver.set_function_attribute(function, CUDA_FUNCTION_MAX_DYNAMIC_SHARED_BYTES,
                                               int(max_threadgroup_memory()) - own),
                 "shared memory of a kernel");
      // Left to itself the driver may divide it so that one threadgroup fits.
      check_cuda(driver.set_function_attribute(function, CUDA_FUNCTION_SHARED_CARVEOUT, 100),
                 "shared memory of a multiprocessor");
    }
    if (driver.parameter_info)
      for (uint32_t i = 0; i < kernel.argument_count; ++i) {
        size_t offset, bytes;
        if (kernel.by_value[i] && driver.parameter_info(function, i, &offset, &bytes) == 0)
          kernel.value_bytes[i] = bytes;
      }
    kernel.max_total_threads_per_threadgroup = uint32_t(threads);
    kernel.function = function; // modules stay loaded: encoded dispatches and captured graphs point into them
  }

  CudaContext context_ = nullptr;
  std::string device_name_;
  int architecture_ = 0;
  int multiprocessors_ = 0;
  size_t memory_ = 0;
  std::mutex mutex_; // of the clock, the libraries, and compiling their kernels
  std::shared_ptr<Clock> clock_;
  std::map<std::string, std::unique_ptr<CudaLibrary>> libraries_;
};

} // namespace

MTL::Device* cuda_device(int ordinal, NS::Error** error) {
  struct Device {
    CudaEngine engine;
    DeviceObject* object;
  };
  static std::mutex mutex;
  static auto* devices = new std::map<int, std::unique_ptr<Device>>; // immortal
  const std::lock_guard lock(mutex);
  try {
    auto& device = (*devices)[ordinal];
    if (!device) {
      device.reset(new Device{CudaEngine(ordinal), nullptr});
      const std::string number = ordinal == 0 ? "" : ":" + std::to_string(ordinal);
      device->object = new DeviceObject("cuda" + number + " (" + device->engine.device_name() + ", sm_" +
                                            std::to_string(device->engine.architecture()) + ")",
                                        device->engine, false);
    }
    return device->object->retain();
  } catch (const std::exception& exception) {
    set_error(error, "MTLDeviceErrorDomain", NS::Integer(MTL::CommandBufferErrorNotPermitted), exception.what());
    return nullptr;
  }
}

std::string compile_cuda_kernel(const std::string& library, const std::string& kernel,
                                const std::map<uint32_t, uint32_t>& constants, int architecture) {
  CudaLibrary kernels(library);
  const CudaKernel* found = kernels.find(kernel);
  if (!found)
    throw std::runtime_error("kernel '" + kernel + "' is not in the library '" + library + "'");
  std::vector<ConstantValue> values(found->constant_count);
  size_t known = 0;
  for (uint32_t i = 0; i < found->constant_count; ++i)
    if (const auto value = constants.find(found->constants[i].index); value != constants.end()) {
      values[i] = {value->second, 1};
      ++known;
    }
  if (known != constants.size())
    throw std::runtime_error("kernel '" + kernel + "' has no function constant of an index given");
  return cuda_binary(*found->source, kernel, kernels.specialize(*found, values.data())->definitions, architecture)
      .image;
}

} // namespace metal_sim
