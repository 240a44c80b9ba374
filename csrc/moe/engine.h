// A device with everything that MoE layers need on it: the context, the checked kernel table and the tuning.
#pragma once

#include "kernel_table.h"
#include "specialization.h"
#include "tuning.h"

#include "../core/context.h"

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

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

  /// Called with every engine that get() makes from here on and the name it was asked for, by the thread that made it
  /// and without a lock held; other threads may use the engine meanwhile.
  static void on_new(std::function<void(std::string_view name, MoeEngine&)> handler);

  Context& context() { return context_; }
  /// What holds on this device where nothing was measured.
  const Tuning& tuning() const { return tuning_; }
  /// What was measured on this device for layers like this one; null where nothing was. It stays valid for the life of
  /// the engine.
  const Tuning* measured(const TunedLayer& layer) const { return tuning_table()->find(layer); }
  /// The one or the other.
  const Tuning& tuning(const TunedLayer& layer) const {
    const Tuning* tuning = measured(layer);
    return tuning ? *tuning : tuning_;
  }
  /// What measured() looks in; another one after each set_tuning_table.
  const TuningTable* tuning_table() const { return table_.load(std::memory_order_acquire); }
  /// Takes effect for the next operation; one that is being encoded may use either table. Thread-safe.
  void set_tuning_table(TuningTable table);
  /// The pipeline of a kernel, for matrices of these codes where it has any (see specialization.h).
  const Pipeline& pipeline(KernelIndex kernel, const FunctionConstants& codes = {}) {
    const Pipeline* pipeline = context_.pipelines().find(kernel, codes);
    return pipeline ? *pipeline : build_pipeline(kernel, codes);
  }

private:
  const Pipeline& build_pipeline(KernelIndex kernel, const FunctionConstants& codes);

  Context context_;
  Tuning tuning_;
  // Every table that was ever set: a reader holds no lock, and tables are set a few times in a program's life.
  std::vector<std::unique_ptr<const TuningTable>> tables_;
  std::mutex tables_mutex_;
  std::atomic<const TuningTable*> table_;
};

} // namespace metal_moe
