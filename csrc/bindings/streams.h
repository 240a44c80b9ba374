// CommandStream and LayerBatch as Python classes, for command_stream.py and layer_batch.py.
#pragma once

#include <pybind11/pybind11.h>

namespace metal_moe::bindings {

void define_streams(pybind11::module_& m);

} // namespace metal_moe::bindings
