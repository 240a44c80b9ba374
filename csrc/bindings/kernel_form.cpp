#include "kernel_form.h"

#include "../moe/specialization.h"

namespace py = pybind11;

namespace metal_moe::bindings {

namespace {

/// Fields of KernelForm in python/metal_moe/formats/quantized_experts.py.
enum Field : Py_ssize_t { PARTS, SHAPE, BUFFERS, CODES, TRELLIS };

/// Of a part, in the order of its buffers.
std::array<TensorView*, 4> views(QuantizedPart& part) { return {&part.codes, &part.scales, &part.biases, &part.table}; }

py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (!value)
    throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

/// Whether the values of the dictionary `parts` are the elements of the tuple `known`.
bool same_parts(PyObject* parts, PyObject* known) {
  if (!PyDict_CheckExact(parts) || PyDict_GET_SIZE(parts) != PyTuple_GET_SIZE(known))
    return false;
  Py_ssize_t place = 0, index = 0;
  PyObject *name, *part;
  while (PyDict_Next(parts, &place, &name, &part))
    if (part != PyTuple_GET_ITEM(known, index++))
      return false;
  return true;
}

} // namespace

bool read_kernel_form(PyObject* weights, bool interleaved, TensorDevice device, QuantizedPart& first,
                      QuantizedPart* second, KernelForm& form) {
  static PyObject* const kernel_forms = PyUnicode_InternFromString("kernel_forms");
  static PyObject* const parts = PyUnicode_InternFromString("parts");
  static PyObject* const bias = PyUnicode_InternFromString("bias");
  // (as gate and up, interleaved)
  static const std::array<PyObject*, 3> keys = {py::make_tuple(false, false).release().ptr(),
                                                py::make_tuple(true, false).release().ptr(),
                                                py::make_tuple(true, true).release().ptr()};
  const py::object forms = attribute(weights, kernel_forms);
  if (!PyDict_Check(forms.ptr()))
    return false;
  PyObject* found = PyDict_GetItemWithError(forms.ptr(), keys[second ? 1 + interleaved : 0]);
  if (!found)
    return false;
  form.held = py::reinterpret_borrow<py::object>(found);
  if (!same_parts(attribute(weights, parts).ptr(), PyTuple_GET_ITEM(found, PARTS)))
    return false;
  form.trellis = PyTuple_GET_ITEM(found, TRELLIS) == Py_True;
  form.bias = attribute(weights, bias);
  for (size_t i = 0; i < form.shape.size(); ++i)
    form.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(PyTuple_GET_ITEM(found, SHAPE), Py_ssize_t(i)));
  form.parts = {&first, second};
  Py_ssize_t place = 0, index = 0;
  for (QuantizedPart* part : form.parts) {
    if (!part)
      continue;
    for (TensorView* view : views(*part)) {
      TensorDevice where;
      if (!describe_tensor(PyList_GET_ITEM(PyTuple_GET_ITEM(found, BUFFERS), place++), *view, where) || where != device)
        return false;
    }
    if (specialization_enabled())
      part->code = static_cast<uint32_t>(PyLong_AsLong(PyList_GET_ITEM(PyTuple_GET_ITEM(found, CODES), index++)));
  }
  return true;
}

void KernelForm::locate(Context& context, const char* name) const {
  PyObject* const buffers = PyTuple_GET_ITEM(held.ptr(), BUFFERS);
  Py_ssize_t place = 0;
  for (QuantizedPart* part : parts)
    if (part)
      for (TensorView* view : views(*part))
        locate_tensor(context, PyList_GET_ITEM(buffers, place++), name, *view);
}

} // namespace metal_moe::bindings
