// How an operation of the module runs: in the thread's batch, on PyTorch's stream, or at once and to its end.
#pragma once

#include "gil.h"
#include "torch_stream.h"

#include "../core/layer_batch.h"
#include "../moe/fused_moe.h"

#include <pybind11/pybind11.h>

#include <memory>
#include <span>

namespace metal_moe::bindings {

/// References to Python objects, for work that runs later: let go on any thread. With the interpreter's lock held. Null
/// pointers and None are skipped.
std::shared_ptr<void> keep_alive(std::span<PyObject* const> objects, PyObject* another = nullptr);

/// For `keep` of run().
template <class... Handles>
auto keeping(const Handles&... handles) {
  return [=] {
    PyObject* const objects[] = {handles.ptr()...};
    return keep_alive(objects);
  };
}

/// Waits for what the calling thread's batch has encoded, if there is one: its results are there when this returns.
/// With the interpreter's lock held. ExecutionError where something of it failed.
void settle_batch();

/// Outside of any batch.
template <class Encode>
void run_at_once(MoeEngine& engine, const Encode& encode) {
  if (engine.context().runs_on_caller_streams()) {
    run_on_current_stream(engine.context(), encode);
    return;
  }
  const GilRelease release;
  StreamLease stream(engine.context());
  encode(*stream);
  stream->synchronize();
}

/// With the interpreter's lock held. `keep()`: keep_alive of all tensors that the operation reads and writes.
/// `is_layer`: whether it ends a layer, as batches count them.
template <class Keep, class Encode>
void run(MoeEngine& engine, const char* operation, const Keep& keep, const Encode& encode, bool is_layer = false) {
  engine.context().check_process();
  const ObservedOperation observed = begin_operation(engine, operation);
  if (LayerBatch* batch = LayerBatch::current()) [[unlikely]] {
    std::shared_ptr<void> kept = keep();
    const GilRelease release;
    last_dispatch().layer_batch = "encoded";
    if (batch->encode(engine.context(), is_layer, std::move(kept), encode))
      return;
    last_dispatch().layer_batch = "passed";
    count(Fallback::PassedBatch);
  }
  run_at_once(engine, encode);
}

/// For operations whose results are read at once: after what the thread's batch holds, and not in it.
template <class Encode>
void run_to_end(MoeEngine& engine, const char* operation, const Encode& encode) {
  engine.context().check_process();
  settle_batch();
  const ObservedOperation observed = begin_operation(engine, operation);
  run_at_once(engine, encode);
}

} // namespace metal_moe::bindings
