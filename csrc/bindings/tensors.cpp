#include "tensors.h"

#include "dlpack.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace py = pybind11;

namespace metal_moe::bindings {

namespace {

/// DLPack's functions of torch.Tensor; null where it has none of the version known here.
const dlpack::ExchangeApi* exchange_api(const py::object& tensor_type) {
  if (!py::hasattr(tensor_type, dlpack::ATTRIBUTE))
    return nullptr;
  const py::object capsule = tensor_type.attr(dlpack::ATTRIBUTE);
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::CAPSULE))
    return nullptr;
  const auto* header = static_cast<const dlpack::Header*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::CAPSULE));
  while (header && header->major != dlpack::MAJOR_VERSION)
    header = header->previous;
  const auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  return api && api->describe ? api : nullptr;
}

/// What reading a tensor looks up, made once and never freed (the interpreter may end before the module).
struct Torch {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* element_size = PyUnicode_InternFromString("element_size");
  /// torch's dtype objects: one each, so identity is equality.
  std::array<std::pair<PyObject*, std::pair<Dtype, uint32_t>>, 5> dtypes;
  PyTypeObject* tensor_type;
  PyTypeObject* parameter_type;
  const dlpack::ExchangeApi* exchange;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto get = [&](const char* name) { return torch.attr(name).cast<py::object>().release().ptr(); };
    dtypes = {{{get("bfloat16"), {Dtype::Bf16, 2}},
               {get("float16"), {Dtype::Fp16, 2}},
               {get("float32"), {Dtype::Fp32, 4}},
               {get("int32"), {Dtype::Int32, 4}},
               {get("int64"), {Dtype::Int64, 8}}}};
    tensor_type = reinterpret_cast<PyTypeObject*>(get("Tensor"));
    parameter_type = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).release().ptr());
    exchange = exchange_api(torch.attr("Tensor"));
  }
};

/// With the interpreter's lock held. Not a function-local static: importing may let another thread run, which would
/// then wait for the static with the lock held.
const Torch& torch() {
  static const Torch* made = nullptr;
  if (!made)
    made = new Torch;
  return *made;
}

Dtype dtype_of(dlpack::DataType type) {
  if (type.lanes != 1)
    return Dtype::Other;
  const bool wide = type.bits == 32;
  if (type.code == dlpack::FLOAT)
    return wide ? Dtype::Fp32 : type.bits == 16 ? Dtype::Fp16 : Dtype::Other;
  if (type.code == dlpack::BFLOAT)
    return type.bits == 16 ? Dtype::Bf16 : Dtype::Other;
  if (type.code == dlpack::INT)
    return wide ? Dtype::Int32 : type.bits == 64 ? Dtype::Int64 : Dtype::Other;
  return Dtype::Other;
}

py::object checked(PyObject* object) {
  if (!object)
    throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

[[noreturn]] void throw_rank(const char* name, int64_t rank, const std::string& must) {
  throw py::value_error(std::string(name) + " has " + std::to_string(rank) + " dimensions: " + must);
}

uint32_t read_sizes(const py::object& sizes, const char* name, std::array<int64_t, TensorView::MAX_RANK>& into) {
  if (!PyTuple_Check(sizes.ptr()))
    throw py::type_error(std::string(name) + " must be a torch.Tensor");
  const Py_ssize_t rank = PyTuple_GET_SIZE(sizes.ptr());
  if (rank > Py_ssize_t(TensorView::MAX_RANK))
    throw_rank(name, rank, "at most " + std::to_string(TensorView::MAX_RANK) + " are supported");
  for (Py_ssize_t i = 0; i < rank; ++i) {
    into[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
    if (into[i] == -1 && PyErr_Occurred())
      throw py::error_already_set();
  }
  return static_cast<uint32_t>(rank);
}

/// describe_tensor for whatever has a tensor's attributes.
void read_attributes(py::handle tensor, const char* name, TensorView& view) {
  const Torch& attributes = torch();
  const py::object dtype = checked(PyObject_GetAttr(tensor.ptr(), attributes.dtype));
  for (const auto& [object, meaning] : attributes.dtypes)
    if (object == dtype.ptr())
      std::tie(view.dtype, view.item_size) = meaning;
  if (view.item_size == 0)
    view.item_size = checked(PyObject_CallMethodNoArgs(tensor.ptr(), attributes.element_size)).cast<uint32_t>();
  view.rank = read_sizes(checked(PyObject_GetAttr(tensor.ptr(), attributes.shape)), name, view.shape);
  read_sizes(checked(PyObject_CallMethodNoArgs(tensor.ptr(), attributes.stride)), name, view.strides);
}

} // namespace

bool describe_tensor(PyObject* tensor, TensorView& view, TensorDevice& device) {
  const Torch& known = torch();
  if (!known.exchange || (Py_TYPE(tensor) != known.tensor_type && Py_TYPE(tensor) != known.parameter_type))
    return false;
  dlpack::Tensor described;
  if (known.exchange->describe(tensor, &described) != 0) {
    PyErr_Clear(); // sparse, quantised, ...
    return false;
  }
  if (described.rank > int32_t(TensorView::MAX_RANK))
    return false;
  view.dtype = dtype_of(described.dtype);
  view.item_size = described.dtype.bits * described.dtype.lanes / 8;
  view.rank = static_cast<uint32_t>(described.rank);
  std::copy_n(described.shape, described.rank, view.shape.begin());
  std::copy_n(described.strides, described.rank, view.strides.begin());
#if !defined(__APPLE__) // where `data` is no address
  view.address = reinterpret_cast<uintptr_t>(described.data) + described.byte_offset;
#endif
  device = {described.device.type, described.device.id};
  return view.item_size != 0;
}

void locate_tensor(Context& context, PyObject* tensor, const char* name, TensorView& view) {
  uint64_t last = 0; // element furthest from the first
  for (uint32_t i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0)
      return;
    last += static_cast<uint64_t>(view.shape[i] - 1) * static_cast<uint64_t>(view.strides[i]);
  }
  locate(context, tensor, name, (last + 1) * view.item_size, view);
}

TensorView read_tensor(Context& context, py::handle tensor, const char* name, uint32_t rank, bool optional) {
  TensorView view;
  if (tensor.is_none() && optional)
    return view;
  TensorDevice device;
  if (!describe_tensor(tensor.ptr(), view, device)) {
    view = {};
    read_attributes(tensor, name, view);
  }
  if (rank != 0 && view.rank != rank)
    throw_rank(name, view.rank, "must have " + std::to_string(rank));
  locate_tensor(context, tensor.ptr(), name, view);
  return view;
}

} // namespace metal_moe::bindings
