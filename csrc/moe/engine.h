// A device with everything that MoE layers need on it: the context, the checked kernel table and the tuning.
#pragma once

#include "kernel_table.h"
#include "specialization.h"
#include "tuning.h"

#include "../core/context.h"

#include <string_view>

namespace metal_moe {

class MoeEngine {
public:
  /// For tests and tools; the product uses get(). std::runtime_error where the library does not match the table.
  MoeEngine(const std::string& device_name, std::string library_path);

  /// The engine of the device `name` (see Context), made at first use with the library of set_library_path and kept for
  /// the life of the program. Thread-safe; a few nanoseconds once it exists. What failed is tried again by a later
  /// call.
  static MoeEngine& get(std::string_view name);

  /// The engine of that name where get() has made it, else null.
  static MoeEngine* find(std::string_view name);

  /// The metallib of engines made from here on.
  static void set_library_path(std::string path);

  Context& context() { return context_; }
  const Tuning& tuning() const { return tuning_; }
  /// The pipeline of a kernel, for matrices of these codes where it has any (see specialization.h).
  const Pipeline& pipeline(KernelIndex kernel, const FunctionConstants& codes = {}) {
    const Pipeline* pipeline = context_.pipelines().find(kernel, codes);
    return pipeline ? *pipeline : build_pipeline(kernel, codes);
  }

private:
  const Pipeline& build_pipeline(KernelIndex kernel, const FunctionConstants& codes);

  Context context_;
  Tuning tuning_;
};

} // namespace metal_moe
