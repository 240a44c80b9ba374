// PyTorch tensors as buffer views, read through their Python attributes. Only their memory is the platform's affair.
#pragma once

#include "../core/context.h"
#include "../moe/types.h"

#include <pybind11/pybind11.h>

namespace metal_moe::bindings {

/// The tensor's memory, wrapped in place. Rank must be `rank` (0: any). None, where `optional`, and tensors without
/// elements give a view without a buffer. TypeError, ValueError naming `name` where it is no tensor or of another rank.
/// The caller keeps the tensor alive while kernels use it.
TensorView read_tensor(Context& context, pybind11::handle tensor, const char* name, uint32_t rank,
                       bool optional = false);

/// Sets where the tensor's elements lie: `view.buffer`, `offset` and `address`. `bytes`: from its first element to the
/// end of its last. host_memory.cpp (which needs no PyTorch to build) and apple/tensor_memory.mm.
void locate(Context& context, pybind11::handle tensor, const char* name, size_t bytes, TensorView& view);

} // namespace metal_moe::bindings
