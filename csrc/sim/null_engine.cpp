// The engine that runs nothing: what encoding, committing and waiting cost by themselves, for benchmarks.
#include "metal_sim/control.h"
#include "objects.h"

namespace metal_sim {
namespace {

class NullEngine final : public Engine {
public:
  // Everything but running is the native engine's, its libraries too.
  uint32_t max_threads_per_threadgroup() const override { return native_engine().max_threads_per_threadgroup(); }
  const char* name() const override { return native_engine().name(); }
  std::string run(const Dispatch&, uint32_t) override { return ""; }
};

} // namespace

MTL::Device* null_device() {
  static NullEngine engine;
  static auto* device = new DeviceObject("null (runs nothing)", engine, false);
  return device->retain();
}

} // namespace metal_sim
