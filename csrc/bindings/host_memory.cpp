#include "tensors.h"

#include <string>

namespace py = pybind11;

namespace metal_moe::bindings {

namespace {

uintptr_t address_of(py::handle tensor) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* const pointer = PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr);
  if (!pointer)
    throw py::error_already_set();
  const auto address = static_cast<uintptr_t>(PyLong_AsSize_t(py::reinterpret_steal<py::object>(pointer).ptr()));
  if (address == static_cast<uintptr_t>(-1) && PyErr_Occurred())
    throw py::error_already_set();
  return address;
}

} // namespace

// The memory itself, wrapped in place.
void locate(Context& context, py::handle tensor, const char* name, size_t bytes, TensorView& view) {
  if (view.address == 0)
    view.address = address_of(tensor);
  if (view.address == 0) // no memory behind it: fake and meta tensors
    throw py::value_error(std::string(name) + " has no memory to compute with");
  view.buffer = context.wrap(reinterpret_cast<const void*>(view.address), bytes);
}

} // namespace metal_moe::bindings
