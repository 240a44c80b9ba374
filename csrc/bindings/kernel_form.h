// Quantised weights (QuantizedExperts of the Python package) as an earlier call of theirs has left them for kernels.
#pragma once

#include "tensors.h"

#include "../moe/encode_experts.h"

#include <array>

namespace metal_moe::bindings {

/// The weights of one argument, read from the object at every call: nothing of them is remembered here.
struct KernelForm {
  pybind11::object held;          // what the buffers live in; null where the argument is not quantised
  pybind11::object bias;          // the weights' own, or None
  std::array<int64_t, 3> shape{}; // [E, rows, columns]
  bool trellis = false;
  std::array<QuantizedPart*, 2> parts{}; // the one, or gate and up

  explicit operator bool() const { return static_cast<bool>(held); }
  /// Adds their memory to the parts. Errors as locate_tensor.
  void locate(Context& context, const char* name) const;
};

/// Reads the form that Python's _flat has made of `weights`, which is QuantizedExperts: as gate and up, `interleaved`
/// or not, where `second` is given, else as one part. False where it has made none, where the object's parts are others
/// since, and where a buffer is no plain tensor of `device`. With the interpreter's lock held.
bool read_kernel_form(PyObject* weights, bool interleaved, TensorDevice device, QuantizedPart& first,
                      QuantizedPart* second, KernelForm& form);

} // namespace metal_moe::bindings
