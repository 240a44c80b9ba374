#include "tensors.h"

#include <tuple>
#include <utility>

namespace py = pybind11;

namespace metal_moe::bindings {

namespace {

/// What reading a tensor looks up, made once and never freed (the interpreter may end before the module).
struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* element_size = PyUnicode_InternFromString("element_size");
  /// torch's dtype objects: one each, so identity is equality.
  std::array<std::pair<PyObject*, std::pair<Dtype, uint32_t>>, 5> dtypes;

  Names() {
    const py::module_ torch = py::module_::import("torch");
    const auto get = [&](const char* name) { return torch.attr(name).cast<py::object>().release().ptr(); };
    dtypes = {{{get("bfloat16"), {Dtype::Bf16, 2}},
               {get("float16"), {Dtype::Fp16, 2}},
               {get("float32"), {Dtype::Fp32, 4}},
               {get("int32"), {Dtype::Int32, 4}},
               {get("int64"), {Dtype::Int64, 8}}}};
  }
};

/// With the interpreter's lock held. Not a function-local static: importing may let another thread run, which would
/// then wait for the static with the lock held.
const Names& names() {
  static const Names* made = nullptr;
  if (!made)
    made = new Names;
  return *made;
}

py::object checked(PyObject* object) {
  if (!object)
    throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

uint32_t read_sizes(const py::object& sizes, const char* name, std::array<int64_t, TensorView::MAX_RANK>& into) {
  if (!PyTuple_Check(sizes.ptr()))
    throw py::type_error(std::string(name) + " must be a torch.Tensor");
  const Py_ssize_t rank = PyTuple_GET_SIZE(sizes.ptr());
  if (rank > Py_ssize_t(TensorView::MAX_RANK))
    throw py::value_error(std::string(name) + " has " + std::to_string(rank) + " dimensions: at most " +
                          std::to_string(TensorView::MAX_RANK) + " are supported");
  for (Py_ssize_t i = 0; i < rank; ++i) {
    into[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
    if (into[i] == -1 && PyErr_Occurred())
      throw py::error_already_set();
  }
  return static_cast<uint32_t>(rank);
}

} // namespace

TensorView read_tensor(Context& context, py::handle tensor, const char* name, uint32_t rank, bool optional) {
  TensorView view;
  if (tensor.is_none() && optional)
    return view;
  const Names& attributes = names();
  const py::object dtype = checked(PyObject_GetAttr(tensor.ptr(), attributes.dtype));
  for (const auto& [object, meaning] : attributes.dtypes)
    if (object == dtype.ptr())
      std::tie(view.dtype, view.item_size) = meaning;
  if (view.item_size == 0)
    view.item_size = checked(PyObject_CallMethodNoArgs(tensor.ptr(), attributes.element_size)).cast<uint32_t>();

  view.rank = read_sizes(checked(PyObject_GetAttr(tensor.ptr(), attributes.shape)), name, view.shape);
  if (rank != 0 && view.rank != rank)
    throw py::value_error(std::string(name) + " has " + std::to_string(view.rank) + " dimensions: must have " +
                          std::to_string(rank));
  read_sizes(checked(PyObject_CallMethodNoArgs(tensor.ptr(), attributes.stride)), name, view.strides);

  uint64_t last = 0; // element furthest from the first
  for (uint32_t i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0)
      return view;
    last += static_cast<uint64_t>(view.shape[i] - 1) * static_cast<uint64_t>(view.strides[i]);
  }
  locate(context, tensor, name, (last + 1) * view.item_size, view);
  return view;
}

} // namespace metal_moe::bindings
