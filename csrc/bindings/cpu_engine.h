// Which engine computes CPU tensors.
#pragma once

namespace metal_moe::bindings {

/// "native", or what METAL_MOE_CPU_ENGINE names; read on every call so that a test can change it. Null where the
/// variable names no engine for users. With the interpreter's lock held, under which Python changes its environment.
const char* cpu_engine();

/// For benchmarks: from here on CPU tensors go to the device that runs nothing (Context: "null"), or again to an
/// engine.
void set_cpu_engine_null(bool null);

} // namespace metal_moe::bindings
