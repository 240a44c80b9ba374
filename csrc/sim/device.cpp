// Devices and the buffers they allocate.
#include "command_queue.h"
#include "objects.h"
#include "processor.h"

#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

namespace metal_sim {
namespace {

std::string native_name() {
  if (const std::string level = forced_level(); !level.empty())
    return "native (" + level + ")";
  for (const ProcessorLevel& level : processor_levels()) {
    if (level.supported)
      return std::string("native (") + level.name + ")";
  }
  return "native";
}

size_t physical_memory() { return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)); }

/// From this size on memory comes in huge pages: weights are read once per call, and a 4 KiB page costs a table walk
/// every 4 KiB.
constexpr size_t HUGE_PAGE = size_t(2) << 20;
constexpr size_t CACHE_LINE = 64;

/// Behind a buffer of a checked device: an access past its end hits no other buffer.
constexpr size_t GUARD = 4096;

void* allocate(size_t length) {
  const size_t alignment = length >= HUGE_PAGE ? HUGE_PAGE : CACHE_LINE;
  const size_t rounded = (length + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
  if (memory && length >= HUGE_PAGE)
    madvise(memory, rounded, MADV_HUGEPAGE);
  return memory;
}

const BufferObject* impl(const MTL::Resource* buffer) { return static_cast<const BufferObject*>(buffer); }
DeviceObject* impl(MTL::Device* device) { return static_cast<DeviceObject*>(device); }
const DeviceObject* impl(const MTL::Device* device) { return static_cast<const DeviceObject*>(device); }

} // namespace

DeviceObject* native_device() {
  static auto* device = new DeviceObject(native_name(), native_engine(), false);
  return device;
}

DeviceObject* exact_device() {
  static auto* device = new DeviceObject("exact", exact_engine(), true);
  return device;
}

BufferObject::BufferObject(DeviceObject* device, void* contents, size_t length, MTL::ResourceOptions options,
                           Deallocator deallocator, size_t allocated)
    : device(device), contents(contents), length(length), options(options), deallocator(std::move(deallocator)),
      allocated(allocated) {
  device->allocated.fetch_add(allocated, std::memory_order_relaxed);
}

BufferObject::~BufferObject() {
  device->allocated.fetch_sub(allocated, std::memory_order_relaxed);
  if (deallocator)
    deallocator(contents, length);
}

} // namespace metal_sim

namespace MTL {

using namespace metal_sim;

Device* CreateSystemDefaultDevice() { return native_device()->retain(); }

NS::Array* CopyAllDevices() {
  const NS::Object* devices[] = {native_device(), exact_device()};
  return new ArrayObject(devices, 2);
}

NS::String* Device::name() const { return metal_sim::string(impl(this)->name); }
uint64_t Device::registryID() const { return reinterpret_cast<uint64_t>(this); }
bool Device::hasUnifiedMemory() const { return impl(this)->engine.host_memory(); }
NS::UInteger Device::maxBufferLength() const {
  const Engine& engine = impl(this)->engine;
  return engine.host_memory() ? physical_memory() : engine.memory_size();
}
NS::UInteger Device::maxThreadgroupMemoryLength() const { return impl(this)->engine.max_threadgroup_memory(); }
NS::UInteger Device::currentAllocatedSize() const { return impl(this)->allocated.load(std::memory_order_relaxed); }
uint64_t Device::recommendedMaxWorkingSetSize() const { return maxBufferLength(); }

Size Device::maxThreadsPerThreadgroup() const {
  const uint32_t threads = impl(this)->engine.max_threads_per_threadgroup();
  return {threads, threads, threads};
}

Buffer* Device::newBuffer(NS::UInteger length, ResourceOptions options) {
  if (length == 0)
    misuse("Device::newBuffer", "length is 0");
  if (length > maxBufferLength())
    return nullptr;
  Engine& engine = impl(this)->engine;
  if (!engine.host_memory()) {
    void* memory = engine.allocate(length);
    return memory ? new BufferObject(
                        impl(this), memory, length, options,
                        [&engine](void* contents, NS::UInteger) { engine.release(contents); }, length)
                  : nullptr;
  }
  const bool checked = impl(this)->checked;
  void* memory = allocate(length + (checked ? GUARD : 0));
  if (!memory)
    return nullptr;
  if (checked)
    std::memset(memory, 0xFF, length);
  return new BufferObject(
      impl(this), memory, length, options, [](void* contents, NS::UInteger) { std::free(contents); }, length);
}

Buffer* Device::newBuffer(const void* pointer, NS::UInteger length, ResourceOptions options) {
  Buffer* buffer = newBuffer(length, options);
  if (buffer && !impl(this)->engine.host_memory())
    impl(this)->engine.copy_in(impl(buffer)->contents, pointer, length);
  else if (buffer)
    std::memcpy(impl(buffer)->contents, pointer, length);
  return buffer;
}

Buffer* Device::newBuffer(const void* pointer, NS::UInteger length, ResourceOptions options,
                          const std::function<void(void*, NS::UInteger)>& deallocator) {
  if (length == 0 || !pointer)
    misuse("Device::newBuffer", pointer ? "length is 0" : "pointer is null");
  return new BufferObject(impl(this), const_cast<void*>(pointer), length, options, deallocator, 0);
}

Library* Device::newLibrary(const NS::String* filepath, NS::Error** error) {
  return load_library(impl(this), text_of(filepath), error);
}

CommandQueue* Device::newCommandQueue() { return newCommandQueue(64); } // Metal's default
CommandQueue* Device::newCommandQueue(NS::UInteger) { return new QueueObject(impl(this)); }

NS::UInteger Allocation::allocatedSize() const {
  const auto* buffer = dynamic_cast<const BufferObject*>(this);
  return buffer ? buffer->allocated : 0;
}

Device* Resource::device() const { return impl(this)->device; }
NS::String* Resource::label() const { return impl(this)->label.get(); }
void Resource::setLabel(const NS::String* label) { static_cast<BufferObject*>(this)->label.set(label); }
ResourceOptions Resource::resourceOptions() const { return impl(this)->options; }
StorageMode Resource::storageMode() const { return StorageMode(impl(this)->options >> 4 & 0xF); }

// As on Apple: memory of the device alone has no address for the host.
void* Buffer::contents() {
  const bool of_host = storageMode() != StorageModePrivate && impl(this)->device->engine.host_memory();
  return of_host ? impl(this)->contents : nullptr;
}
NS::UInteger Buffer::length() const { return impl(this)->length; }

} // namespace MTL
