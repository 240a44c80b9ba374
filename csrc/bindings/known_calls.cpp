#include "known_calls.h"

#include "cpu_engine.h"
#include "dlpack.h"
#include "experts_call.h"
#include "kernel_form.h"
#include "run.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace metal_moe::bindings {

namespace {

constexpr size_t MAX_PARAMETERS = 32;

/// A reference that is kept for ever: what it refers to outlives the module.
PyObject* keep(const py::object& object) { return py::object(object).release().ptr(); }

/// What must see a call as an operator of PyTorch, or must see its arguments: nothing of that may be on. The same list
/// as _is_direct in python/metal_moe/_operator.py, which says why.
struct Modes {
  std::array<PyObject*, 2> stack_sizes; // functions that return 0 where there is none
  std::array<PyObject*, 2> current;     // functions that return None where there is none
  PyObject* profiler;                   // a module's dictionary
  PyObject* is_profiling = PyUnicode_InternFromString("_is_profiler_enabled");
  PyObject* is_grad_enabled;

  Modes() {
    const py::module_ core = py::module_::import("torch._C");
    stack_sizes = {keep(core.attr("_len_torch_dispatch_stack")), keep(core.attr("_len_torch_function_stack"))};
    current = {keep(py::module_::import("torch._C._functorch").attr("peek_interpreter_stack")),
               keep(core.attr("_get_tracing_state"))};
    profiler = keep(py::module_::import("torch.autograd.profiler").attr("__dict__"));
    is_grad_enabled = keep(core.attr("is_grad_enabled"));
  }

  /// Python's answer to `function()`; errors are the caller's.
  static py::object ask(PyObject* function) {
    PyObject* answer = PyObject_CallNoArgs(function);
    if (!answer)
      throw py::error_already_set();
    return py::reinterpret_steal<py::object>(answer);
  }

  bool none_active() const {
    for (PyObject* function : stack_sizes)
      if (PyLong_AsLong(ask(function).ptr()) != 0)
        return false;
    for (PyObject* function : current)
      if (!ask(function).is_none())
        return false;
    return PyDict_GetItemWithError(profiler, is_profiling) == Py_False;
  }
  bool gradients() const { return ask(is_grad_enabled).ptr() != Py_False; }
};

/// A public function's parameters, and what a call gives for them.
class Parameters {
public:
  using Values = std::array<PyObject*, MAX_PARAMETERS>;

  Parameters(const py::tuple& names, const py::tuple& defaults, size_t positional, const py::dict& choices)
      : positional_(positional) {
    if (names.size() > MAX_PARAMETERS || defaults.size() > names.size() || positional > names.size())
      throw py::value_error("names, defaults and positional do not belong together");
    for (const auto& name : names) {
      PyObject* text = keep(py::reinterpret_borrow<py::object>(name));
      PyUnicode_InternInPlace(&text);
      names_.push_back(text);
      choices_.push_back(choices.contains(name) ? keep(choices[name]) : nullptr);
    }
    defaults_.assign(names.size() - defaults.size(), nullptr);
    for (const auto& value : defaults)
      defaults_.push_back(keep(py::reinterpret_borrow<py::object>(value)));
  }

  size_t place(const char* name) const {
    for (size_t i = 0; i < names_.size(); ++i)
      if (PyUnicode_CompareWithASCIIString(names_[i], name) == 0)
        return i;
    throw py::value_error(std::string("no parameter ") + name);
  }

  /// False where the call does not fit: an argument missing, twice, or unknown.
  bool bind(PyObject* const* arguments, size_t count, PyObject* keywords, Values& values) const {
    if (count > positional_)
      return false;
    std::copy(defaults_.begin(), defaults_.end(), values.begin());
    std::copy_n(arguments, count, values.begin());
    const size_t named = keywords ? static_cast<size_t>(PyTuple_GET_SIZE(keywords)) : 0;
    for (size_t i = 0; i < named; ++i) {
      const size_t place = place_of(PyTuple_GET_ITEM(keywords, Py_ssize_t(i)));
      if (place == names_.size() || place < count)
        return false;
      values[place] = arguments[count + i];
    }
    return std::find(values.begin(), values.begin() + names_.size(), nullptr) == values.begin() + names_.size();
  }

  /// The values that bind() has set.
  std::span<PyObject* const> given(const Values& values) const { return {values.data(), names_.size()}; }

  /// {text: number} of a parameter, or null.
  PyObject* choices(size_t place) const { return choices_[place]; }

private:
  /// Names in calls are interned: the same text is the same object.
  size_t place_of(PyObject* name) const {
    return static_cast<size_t>(std::find(names_.begin(), names_.end(), name) - names_.begin());
  }

  std::vector<PyObject*> names_;
  std::vector<PyObject*> defaults_; // null: none
  std::vector<PyObject*> choices_;
  size_t positional_;
};

/// Turns Python's arguments into a call's, one after another; `failed()` once one is not of the only type that needs no
/// further look.
class Reader {
public:
  Reader(const Parameters& parameters, const Parameters::Values& values, bool gradients)
      : parameters_(parameters), values_(values), gradients_(gradients) {}

  bool failed() const { return failed_; }
  TensorDevice device() const { return device_; }

  void tensor(size_t place, uint32_t rank, TensorView& view) { tensor(values_[place], rank, view); }
  void tensor(PyObject* tensor, uint32_t rank, TensorView& view) {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    if (failed_)
      return;
    TensorDevice device;
    if (!describe_tensor(tensor, view, device) || view.rank != rank || (has_device_ && device != device_)) {
      failed_ = true;
      return;
    }
    device_ = device;
    has_device_ = true;
    // Memory that holds the negated values, and gradients that nobody would compute.
    failed_ = is_true(PyObject_CallMethodNoArgs(tensor, is_neg)) ||
              (gradients_ && is_true(PyObject_GetAttr(tensor, requires_grad)));
  }
  void optional_tensor(size_t place, uint32_t rank, TensorView& view) {
    if (values_[place] != Py_None)
      tensor(place, rank, view);
  }
  /// Weights [E, rows, columns], dense or of `quantized`'s type; a call without `second` has one part, not gate and up.
  void weights(size_t place, PyObject* quantized, bool interleaved, TensorView& dense, QuantizedPart& first,
               QuantizedPart* second, KernelForm& form) {
    PyObject* weights = values_[place];
    if (reinterpret_cast<PyObject*>(Py_TYPE(weights)) != quantized)
      return tensor(weights, 3, dense);
    failed_ = failed_ || !read_kernel_form(weights, interleaved, device_, first, second, form);
  }
  /// The bias of `form`'s own, or the argument; Python refuses both at once.
  void bias(size_t place, const KernelForm& form, TensorView& view) {
    if (!form || form.bias.is_none())
      return optional_tensor(place, 2, view);
    failed_ |= values_[place] != Py_None;
    tensor(form.bias.ptr(), 2, view);
  }
  void fail() { failed_ = true; }
  bool boolean(size_t place) {
    failed_ |= !PyBool_Check(values_[place]);
    return values_[place] == Py_True;
  }
  float number(size_t place) {
    if (!PyFloat_CheckExact(values_[place])) {
      failed_ = true;
      return 0;
    }
    const double given = PyFloat_AS_DOUBLE(values_[place]);
    const auto value = static_cast<float>(given);
    // Python's limits are about the double: where they could tell the two apart, it shall look.
    failed_ |= value != given && (value == 0 || !std::isfinite(value));
    return value;
  }
  uint32_t integer(size_t place) {
    const long long value = PyLong_CheckExact(values_[place]) ? PyLong_AsLongLong(values_[place]) : -1;
    if (value < 0 || value > int64_t(UINT32_MAX)) {
      PyErr_Clear();
      failed_ = true;
      return 0;
    }
    return static_cast<uint32_t>(value);
  }
  template <class Enum>
  Enum choice(size_t place) {
    PyObject* table = parameters_.choices(place);
    PyObject* number =
        table && PyUnicode_CheckExact(values_[place]) ? PyDict_GetItemWithError(table, values_[place]) : nullptr;
    failed_ |= !number;
    return static_cast<Enum>(number ? PyLong_AsLong(number) : 0);
  }
  std::optional<std::string_view> text(size_t place) {
    if (values_[place] == Py_None)
      return {};
    Py_ssize_t bytes = 0;
    const char* text = PyUnicode_CheckExact(values_[place]) ? PyUnicode_AsUTF8AndSize(values_[place], &bytes) : nullptr;
    if (!text) {
      PyErr_Clear();
      failed_ = true;
      return {};
    }
    return std::string_view(text, static_cast<size_t>(bytes));
  }
  /// A number that Python lets pass above 0 alone.
  float positive_number(size_t place) {
    const float value = number(place);
    failed_ |= !(value > 0); // one that is 0 in fp32 only may have been let pass before
    return value;
  }
  bool is_none(size_t place) const { return values_[place] == Py_None; }

private:
  static bool is_true(PyObject* answer) {
    if (!answer)
      throw py::error_already_set();
    Py_DECREF(answer);
    return answer == Py_True; // immortal, or at least never gone
  }

  const Parameters& parameters_;
  const Parameters::Values& values_;
  const bool gradients_;
  bool failed_ = false;
  bool has_device_ = false;
  TensorDevice device_{};
};

/// Quantised ones of a call's weights.
struct KernelForms {
  KernelForm w1, w2, shared_w1, shared_w2;

  bool any() const { return w1 || w2 || shared_w1 || shared_w2; }
  /// What is to live while the call runs.
  std::array<PyObject*, 6> objects() const {
    return {w1.held.ptr(), w1.bias.ptr(), w2.held.ptr(), w2.bias.ptr(), shared_w1.held.ptr(), shared_w2.held.ptr()};
  }
};

/// Sizes of weights, dense or of `form`.
std::array<int64_t, 3> sizes(const TensorView& dense, const KernelForm& form) {
  return form ? form.shape : std::array<int64_t, 3>{dense.shape[0], dense.shape[1], dense.shape[2]};
}

/// Of gate, up or down of routed and shared experts, which one dispatch reads.
uint32_t common_code(const QuantizedPart& part, const QuantizedPart& shared) {
  return part.code == shared.code ? part.code : 0;
}

/// Adds to a layer whose weights and biases are set what follows from their forms. False where Python must look: what
/// it checks of quantised weights at every call, and what it computes at every call.
bool complete(const KernelForms& forms, const TensorView& x, ExpertsLayer& layer) {
  const bool shared = layer.shared_w1.item_size || forms.shared_w1;
  layer.trellis_gate_up = forms.w1.trellis;
  layer.trellis_down = forms.w2.trellis;
  if ((forms.w1.trellis || forms.w2.trellis) && (shared || layer.shared_weights.item_size))
    return false; // Python runs them apart
  if (shared && (bool(forms.w1) != bool(forms.shared_w1) || bool(forms.w2) != bool(forms.shared_w2)))
    return false; // dense beside quantised experts: Python wraps them
  for (const KernelForm* form : {&forms.shared_w1, &forms.shared_w2})
    if (*form && (form->trellis || !form->bias.is_none()))
      return false;
  for (const TensorView* bias : {&layer.bias1, &layer.bias2})
    if (bias->item_size && bias->dtype != x.dtype)
      return false;
  const auto fit = [&](const std::array<int64_t, 3>& w1, const std::array<int64_t, 3>& w2) {
    const int64_t rows = layer.activation == ACTIVATION_RELU2 ? w2[2] : 2 * w2[2];
    return w1[0] == w2[0] && w1[1] == rows && w1[2] == x.shape[1] && w2[1] == x.shape[1];
  };
  const auto w2 = sizes(layer.w2, forms.w2);
  if (!fit(sizes(layer.w1, forms.w1), w2))
    return false;
  layer.intermediate = static_cast<uint32_t>(w2[2]);
  if (shared) {
    const auto shared_w2 = sizes(layer.shared_w2, forms.shared_w2);
    if (!fit(sizes(layer.shared_w1, forms.shared_w1), shared_w2))
      return false;
    layer.shared_intermediate = static_cast<uint32_t>(shared_w2[2]);
    layer.gate.code = common_code(layer.gate, layer.shared_gate);
    layer.up.code = common_code(layer.up, layer.shared_up);
    layer.down.code = common_code(layer.down, layer.shared_down);
  }
  return true;
}

/// The engine that has computed tensors of that device, null where Python must choose one.
MoeEngine* engine_of(TensorDevice device) {
  if (device.type == dlpack::CPU) {
    const char* name = cpu_engine();
    return name ? MoeEngine::find(name) : nullptr;
  }
  if (device.type == dlpack::METAL)
    return MoeEngine::find("mps");
  static std::array<MoeEngine*, 16> cuda{};
  if (device.type != dlpack::CUDA || device.id < 0 || device.id >= int32_t(cuda.size()))
    return nullptr;
  MoeEngine*& engine = cuda[static_cast<size_t>(device.id)];
  if (!engine) // not made here: Python prepares NVRTC before
    engine = MoeEngine::find(device.id == 0 ? "cuda" : "cuda:" + std::to_string(device.id));
  return engine;
}

class KnownCall {
public:
  KnownCall(const std::string& operation, Parameters parameters, const py::object& quantized)
      : parameters_(std::move(parameters)), routed_(operation == "fused_moe"), quantized_(keep(quantized)) {
    if (!routed_ && operation != "fused_experts")
      throw py::value_error("operation is '" + operation + "': must be 'fused_experts' or 'fused_moe'");
    const auto place = [&](const char* name) { return parameters_.place(name); };
    at_ = {place("hidden_states"), place("w1"),          place("w2"),        place("w1_bias"),
           place("w2_bias"),       place("shared_w1"),   place("shared_w2"), place("shared_weights"),
           place("activation"),    place("interleaved"), place("alpha"),     place("limit"),
           place("use_fp32_acc"),  place("kernel")};
    if (routed_)
      routing_at_ = {place("router_logits"),
                     place("top_k"),
                     place("scoring"),
                     place("correction_bias"),
                     place("num_expert_group"),
                     place("topk_group"),
                     place("group_score"),
                     place("renormalize"),
                     place("renormalize_epsilon"),
                     place("routed_scaling_factor")};
    else
      given_at_ = {place("topk_weights"), place("topk_ids")};
    const py::module_ torch = py::module_::import("torch");
    empty_like_ = keep(torch.attr("empty_like"));
    contiguous_ = keep(torch.attr("contiguous_format"));
    memory_format_ = keep(py::make_tuple("memory_format"));
  }

  /// The result, or None.
  py::object operator()(PyObject* const* arguments, size_t count, PyObject* keywords) const {
    Parameters::Values values;
    if (!modes_.none_active() || !parameters_.bind(arguments, count, keywords, values))
      return py::none();
    ExpertsCall call;
    KernelForms forms;
    Reader reader(parameters_, values, modes_.gradients());
    read(reader, call, forms);
    if (reader.failed() || !(call.engine = engine_of(reader.device())))
      return py::none();
    std::shared_ptr<const ExpertsPacking> packing = find_packing(call);
    if (!packing || packing->plan.shape.tokens == 0)
      return py::none();

    Context& context = call.engine->context();
    const auto locate = [&](size_t place, const char* name, TensorView& view) {
      if (view.item_size)
        locate_tensor(context, values[place], name, view);
    };
    const auto locate_weights = [&](size_t place, const char* name, const KernelForm& form, TensorView& dense) {
      form ? form.locate(context, name) : locate(place, name, dense);
    };
    const auto locate_bias = [&](size_t place, const char* name, const KernelForm& form, TensorView& view) {
      if (form && !form.bias.is_none())
        locate_tensor(context, form.bias.ptr(), name, view);
      else
        locate(place, name, view);
    };
    locate(at_.x, "hidden_states", call.x);
    if (forms.any() && !rows_aligned(call.x))
      return py::none(); // Python copies them
    locate_weights(at_.w1, "w1", forms.w1, call.layer.w1);
    locate_weights(at_.w2, "w2", forms.w2, call.layer.w2);
    locate_bias(at_.bias1, "w1_bias", forms.w1, call.layer.bias1);
    locate_bias(at_.bias2, "w2_bias", forms.w2, call.layer.bias2);
    locate_weights(at_.shared_w1, "shared_w1", forms.shared_w1, call.layer.shared_w1);
    locate_weights(at_.shared_w2, "shared_w2", forms.shared_w2, call.layer.shared_w2);
    locate(at_.shared_weights, "shared_weights", call.layer.shared_weights);
    if (routed_) {
      locate(routing_at_.logits, "router_logits", call.logits);
      locate(routing_at_.correction_bias, "correction_bias", call.correction_bias);
    } else {
      locate(given_at_.weights, "topk_weights", call.weights);
      locate(given_at_.ids, "topk_ids", call.ids);
    }
    if (packing->codes != call.layer.codes())
      packing = packing_of(call);
    py::object out = empty_like(values[at_.x]);
    // Beside the arguments: quantised weights may be given other parts while the call runs.
    std::array<PyObject*, MAX_PARAMETERS + 6> kept;
    const auto given = parameters_.given(values);
    const auto objects = forms.objects();
    const auto end = std::copy(objects.begin(), objects.end(), std::copy(given.begin(), given.end(), kept.begin()));
    run_experts(call, *packing, {kept.begin(), end}, out);
    return out;
  }

private:
  void read(Reader& reader, ExpertsCall& call, KernelForms& forms) const {
    ExpertsLayer& layer = call.layer;
    layer.activation = reader.choice<Activation>(at_.activation);
    layer.interleaved = reader.boolean(at_.interleaved);
    reader.tensor(at_.x, 2, call.x);
    const auto weights = [&](size_t place, TensorView& dense, QuantizedPart& first, QuantizedPart* second,
                             KernelForm& form) {
      reader.weights(place, quantized_, layer.interleaved, dense, first, second, form);
    };
    const bool gated = layer.activation != ACTIVATION_RELU2;
    weights(at_.w1, layer.w1, layer.gate, gated ? &layer.up : nullptr, forms.w1);
    weights(at_.w2, layer.w2, layer.down, nullptr, forms.w2);
    reader.bias(at_.bias1, forms.w1, layer.bias1);
    reader.bias(at_.bias2, forms.w2, layer.bias2);
    if (!reader.is_none(at_.shared_w1))
      weights(at_.shared_w1, layer.shared_w1, layer.shared_gate, gated ? &layer.shared_up : nullptr, forms.shared_w1);
    if (!reader.is_none(at_.shared_w2))
      weights(at_.shared_w2, layer.shared_w2, layer.shared_down, nullptr, forms.shared_w2);
    reader.optional_tensor(at_.shared_weights, 2, layer.shared_weights);
    layer.alpha = reader.number(at_.alpha);
    layer.limit = reader.positive_number(at_.limit);
    layer.fp32_accumulation = reader.boolean(at_.fp32_accumulation);
    layer.family = reader.text(at_.kernel);
    if (forms.any() && !reader.failed() && !complete(forms, call.x, layer))
      reader.fail();
    call.routed = routed_;
    if (!routed_) {
      reader.tensor(given_at_.weights, 2, call.weights);
      reader.tensor(given_at_.ids, 2, call.ids);
      return;
    }
    reader.tensor(routing_at_.logits, 2, call.logits);
    reader.optional_tensor(routing_at_.correction_bias, 1, call.correction_bias);
    call.top_k = reader.integer(routing_at_.top_k);
    RoutingOptions& routing = call.routing;
    routing.scoring = reader.choice<RouteScoring>(routing_at_.scoring);
    routing.groups = reader.integer(routing_at_.groups);
    routing.topk_groups = reader.integer(routing_at_.topk_groups);
    routing.group_score = reader.choice<RouteGroupScore>(routing_at_.group_score);
    routing.renormalize = reader.boolean(routing_at_.renormalize);
    routing.renormalize_epsilon = reader.is_none(routing_at_.renormalize_epsilon)
                                      ? default_renormalize_epsilon(routing.scoring)
                                      : reader.number(routing_at_.renormalize_epsilon);
    routing.scale = reader.number(routing_at_.scale);
  }

  static bool rows_aligned(const TensorView& x) {
    const auto row_bytes = static_cast<uint64_t>(x.strides[0]) * x.item_size;
    return x.address % VECTOR_BYTES == 0 && (x.shape[0] <= 1 || row_bytes % VECTOR_BYTES == 0);
  }

  py::object empty_like(PyObject* tensor) const {
    PyObject* const arguments[] = {tensor, contiguous_};
    PyObject* made = PyObject_Vectorcall(empty_like_, arguments, 1, memory_format_);
    if (!made)
      throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }

  const Parameters parameters_;
  const bool routed_;
  PyObject* const quantized_; // the type
  const Modes modes_;
  struct {
    size_t x, w1, w2, bias1, bias2, shared_w1, shared_w2, shared_weights;
    size_t activation, interleaved, alpha, limit, fp32_accumulation, kernel;
  } at_;
  struct {
    size_t weights, ids;
  } given_at_;
  struct {
    size_t logits, top_k, scoring, correction_bias, groups, topk_groups, group_score, renormalize, renormalize_epsilon,
        scale;
  } routing_at_;
  PyObject* empty_like_;
  PyObject* contiguous_;
  PyObject* memory_format_; // a tuple of one name
};

constexpr const char* CAPSULE = "metal_moe.known_call";

PyObject* call_known(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords) {
  try {
    const auto& known = *static_cast<const KnownCall*>(PyCapsule_GetPointer(self, CAPSULE));
    return known(arguments, static_cast<size_t>(count), keywords).release().ptr();
  } catch (...) {
    py::detail::try_translate_exceptions(); // as functions of the module do
    return nullptr;
  }
}

/// Not pybind11's own: its way to a function with keywords takes as long as all of the rest.
py::object known_call(const std::string& operation, const py::tuple& names, const py::tuple& defaults,
                      size_t positional, const py::dict& choices, const py::object& quantized) {
  static PyMethodDef definition = {"known_call",
                                   reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_known)),
                                   METH_FASTCALL | METH_KEYWORDS, nullptr};
  auto* known = new KnownCall(operation, Parameters(names, defaults, positional, choices), quantized); // kept for ever
  const py::capsule self(known, CAPSULE);
  PyObject* function = PyCFunction_New(&definition, self.ptr());
  if (!function)
    throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

} // namespace

void define_known_calls(py::module_& m) {
  using namespace py::literals;
  m.def("known_call", &known_call, "operation"_a, "names"_a, "defaults"_a, "positional"_a, "choices"_a, "quantized"_a,
        "A function that runs calls like earlier ones, and returns None for others.");
  m.def("known_call_count", &packing_count, "How many kinds of calls are known.");
  m.def("cpu_engine", &cpu_engine, "The engine of CPU tensors; None where METAL_MOE_CPU_ENGINE names none.");
  m.def("set_cpu_engine_null", &set_cpu_engine_null, "null"_a,
        "For benchmarks: whether kernels of CPU tensors are left out.");
}

} // namespace metal_moe::bindings
