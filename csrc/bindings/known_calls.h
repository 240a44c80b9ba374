// Calls of fused_experts and fused_moe that need no Python: those like an earlier one.
#pragma once

#include <pybind11/pybind11.h>

namespace metal_moe::bindings {

/// `known_call(operation, names, defaults, positional, choices, quantized)` makes a function that takes the arguments
/// of the public function of that name and returns its result, where an earlier call with tensors of the same types,
/// shapes, strides, dtypes and device and the same other arguments was checked; otherwise None, and nothing has
/// happened.
///
///   names       of the parameters, in order
///   defaults    of the last parameters
///   positional  how many parameters may be given by position
///   choices     {parameter: {text: number}} of those whose text stands for a number
///   quantized   the type that may stand in place of a tensor of weights (kernel_form.h)
void define_known_calls(pybind11::module_& m);

} // namespace metal_moe::bindings
