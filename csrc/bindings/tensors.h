// PyTorch tensors as buffer views, read through DLPack's exchange interface or their Python attributes. Only their
// memory is the platform's affair.
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

/// Where a tensor is, as DLPack counts devices.
struct TensorDevice {
  int32_t type;
  int32_t id;
  bool operator==(const TensorDevice&) const = default;
};

/// All of a tensor but its buffer, where that takes no Python call: `view` and `device` are set, true. False for what
/// is not torch.Tensor or Parameter itself, has no strides, or where PyTorch is older than the interface. No error is
/// left.
bool describe_tensor(PyObject* tensor, TensorView& view, TensorDevice& device);

/// Adds the memory to what describe_tensor has read. Errors as read_tensor.
void locate_tensor(Context& context, PyObject* tensor, const char* name, TensorView& view);

/// Sets where the tensor's elements lie: `view.buffer`, `offset` and `address`, which may be known. `bytes`: from its
/// first element to the end of its last. host_memory.cpp (which needs no PyTorch to build) and apple/tensor_memory.mm.
void locate(Context& context, pybind11::handle tensor, const char* name, size_t bytes, TensorView& view);

} // namespace metal_moe::bindings
