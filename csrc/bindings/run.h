// How an operation of the module runs: on PyTorch's stream, or at once and to its end.
#pragma once

#include "torch_stream.h"

#include "../moe/fused_moe.h"

#include <pybind11/pybind11.h>

namespace metal_moe::bindings {

/// With the interpreter's lock held.
template <class Encode>
void run(MoeEngine& engine, const char* operation, const Encode& encode) {
  if (engine.context().runs_on_caller_streams()) {
    const ObservedOperation observed = begin_operation(engine, operation);
    run_on_current_stream(engine.context(), encode);
    return;
  }
  const pybind11::gil_scoped_release release;
  run_operation(engine, operation, encode);
}

} // namespace metal_moe::bindings
