#include "engine.h"

#include "formats/matrix_code.h"
#include "moe/experts.h"

#include <utility>

namespace metal_moe {

namespace {

/// Engines by name. A list that only grows: readers walk it without a lock. Never freed, as threads may still run
/// kernels while static objects are destroyed.
struct Node {
  Node(std::string engine_name, std::string path, const Node* after)
      : name(std::move(engine_name)), engine(name, std::move(path)), next(after) {}

  std::string name;
  MoeEngine engine;
  const Node* next;
};

std::atomic<Node*> engines{nullptr};
std::mutex mutex; // of making one, of the path and of the handler

std::string& library_path() {
  static auto* path = new std::string;
  return *path;
}

std::function<void(std::string_view, MoeEngine&)>& new_engine_handler() {
  static auto* handler = new std::function<void(std::string_view, MoeEngine&)>;
  return *handler;
}

Node* find_node(std::string_view name) {
  for (Node* node = engines.load(std::memory_order_acquire); node; node = const_cast<Node*>(node->next))
    if (node->name == name)
      return node;
  return nullptr;
}

} // namespace

MoeEngine::MoeEngine(const std::string& device_name, std::string path)
    : context_(device_name, std::move(path)), tuning_(tuning_for(context_.engine())) {
  tuning_.threadgroup_bytes =
      static_cast<uint32_t>(context_.device()->maxThreadgroupMemoryLength()) / tuning_.threadgroups_of_memory;
  check_kernel_table(context_.library().function_names(), context_.library().path());
  tables_.push_back(std::make_unique<const TuningTable>());
  table_.store(tables_.back().get(), std::memory_order_release);
}

void MoeEngine::set_tuning_table(TuningTable table) {
  std::lock_guard lock(tables_mutex_);
  tables_.push_back(std::make_unique<const TuningTable>(std::move(table)));
  table_.store(tables_.back().get(), std::memory_order_release);
}

MoeEngine* MoeEngine::find(std::string_view name) {
  Node* node = find_node(name);
  return node ? &node->engine : nullptr;
}

MoeEngine& MoeEngine::get(std::string_view name) {
  if (Node* node = find_node(name))
    return node->engine;
  std::unique_lock lock(mutex);
  if (Node* node = find_node(name))
    return node->engine; // another thread was first
  if (library_path().empty())
    throw std::runtime_error("no kernel library: set_library_path was not called");
  auto* node = new Node(std::string(name), library_path(), engines.load());
  engines.store(node, std::memory_order_release);
  const auto handler = new_engine_handler();
  lock.unlock();
  if (handler)
    handler(name, node->engine);
  return node->engine;
}

const Pipeline& MoeEngine::build_pipeline(KernelIndex kernel, const FunctionConstants& codes) {
  const KernelEntry& entry = kernel_table()[kernel];
  uint32_t simdgroups = kernel_simdgroups(entry);
  if (tuning_.packed_products)
    if (const uint32_t packed = packed_decode_simdgroups(entry, codes, tuning_.threadgroup_bytes))
      simdgroups = packed;
  return context_.pipelines().get(
      kernel, {entry.name.c_str(), simdgroups, coded_matrices(entry) != 0, specialized_label}, codes);
}

void MoeEngine::set_library_path(std::string path) {
  std::lock_guard lock(mutex);
  library_path() = std::move(path);
}

void MoeEngine::on_new(std::function<void(std::string_view name, MoeEngine&)> handler) {
  std::lock_guard lock(mutex);
  new_engine_handler() = std::move(handler);
}

} // namespace metal_moe
