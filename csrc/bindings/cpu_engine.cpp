#include "cpu_engine.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace metal_moe::bindings {

namespace {

bool is_null = false;

} // namespace

const char* cpu_engine() {
  if (is_null)
    return "null";
  const char* wanted = std::getenv("METAL_MOE_CPU_ENGINE");
  if (!wanted)
    return "native";
  for (const char* engine : {"native", "exact"})
    if (std::strcmp(wanted, engine) == 0)
      return engine;
  return nullptr;
}

void set_cpu_engine_null(bool null) { is_null = null; }

} // namespace metal_moe::bindings
