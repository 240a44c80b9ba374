// metal_moe._core: the operations on PyTorch's tensors, for the package's Python code, which validates arguments. On
// CPU tensors an operation runs to its end, on CUDA and MPS tensors it is encoded on PyTorch's current stream; each
// without the interpreter's lock.
#include "experts_call.h"
#include "gil.h"
#include "known_calls.h"
#include "run.h"
#include "streams.h"
#include "tensors.h"

#include "../core/engine_controls.h"
#include "../moe/encode_trellis.h"
#include "moe/group.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace py::literals;

namespace metal_moe::bindings {
namespace {

/// `value` of an enumeration whose last member is `last`.
template <class Enum>
Enum enumerator(const char* name, int value, Enum last) {
  if (value < 0 || value > static_cast<int>(last))
    throw py::value_error(std::string(name) + " is " + std::to_string(value) + ": must be 0 to " +
                          std::to_string(static_cast<int>(last)));
  return static_cast<Enum>(value);
}

RoutingOptions routing_options(int scoring, uint32_t groups, uint32_t topk_groups, int group_score, bool renormalize,
                               std::optional<float> renormalize_epsilon, float scale) {
  const auto checked_scoring = enumerator("scoring", scoring, ROUTE_TOPK_SOFTMAX);
  return {checked_scoring,
          groups,
          topk_groups,
          enumerator("group_score", group_score, ROUTE_GROUP_TOP2_SUM),
          renormalize,
          renormalize_epsilon.value_or(default_renormalize_epsilon(checked_scoring)),
          scale};
}

/// The buffers of a part, from place `first` of a list.
QuantizedPart read_part(Context& context, const py::sequence& tensors, size_t first, const char* name) {
  QuantizedPart part;
  for (TensorView* view : {&part.codes, &part.scales, &part.biases})
    *view = read_tensor(context, py::object(tensors[first++]), name, 1);
  part.table = read_tensor(context, py::object(tensors[first]), name, 2);
  return part;
}

/// Weights: a list of one dense tensor, or of four or eight buffers of one or two quantised parts.
void read_weights(Context& context, py::handle weights, const char* name, TensorView& dense, QuantizedPart& first,
                  QuantizedPart* second, bool optional = false) {
  if (!PyList_Check(weights.ptr()) && !PyTuple_Check(weights.ptr())) {
    dense = read_tensor(context, weights, name, 3, optional);
    return;
  }
  const auto tensors = py::reinterpret_borrow<py::sequence>(weights);
  if (tensors.size() == 1) {
    dense = read_tensor(context, py::object(tensors[0]), name, 3);
    return;
  }
  if (tensors.size() != 4 && !(second && tensors.size() == 8))
    throw py::value_error(std::string(name) + " has " + std::to_string(tensors.size()) + " tensors: must have 1, 4" +
                          (second ? " or 8" : ""));
  first = read_part(context, tensors, 0, name);
  if (tensors.size() == 8)
    *second = read_part(context, tensors, 4, name);
}

/// Of gate, up and down; 0 where a part has none. See matrix_code().
using MatrixCodes = std::optional<std::array<uint32_t, 3>>;

/// The arguments of the experts that fused_experts and fused_moe share. `family` must outlive the layer.
ExpertsLayer experts_layer(Context& context, py::handle w1, py::handle w2, py::handle b1, py::handle b2,
                           py::handle shared_w1, py::handle shared_w2, py::handle shared_weights, int activation,
                           bool interleaved, float alpha, float limit, bool fp32_acc,
                           const std::optional<std::string>& family, int64_t intermediate, bool trellis_w1,
                           bool trellis_w2, const MatrixCodes& codes, int64_t shared_intermediate) {
  ExpertsLayer layer;
  read_weights(context, w1, "w1", layer.w1, layer.gate, &layer.up);
  read_weights(context, w2, "w2", layer.w2, layer.down, nullptr);
  layer.intermediate = size_argument("intermediate size of w2", intermediate);
  read_weights(context, shared_w1, "shared_w1", layer.shared_w1, layer.shared_gate, &layer.shared_up, true);
  read_weights(context, shared_w2, "shared_w2", layer.shared_w2, layer.shared_down, nullptr, true);
  layer.shared_intermediate = size_argument("intermediate size of shared_w2", shared_intermediate);
  layer.trellis_gate_up = trellis_w1;
  layer.trellis_down = trellis_w2;
  if (codes && specialization_enabled()) {
    layer.gate.code = (*codes)[0];
    layer.up.code = (*codes)[1];
    layer.down.code = (*codes)[2];
  }
  layer.bias1 = read_tensor(context, b1, "w1_bias", 2, true);
  layer.bias2 = read_tensor(context, b2, "w2_bias", 2, true);
  layer.shared_weights = read_tensor(context, shared_weights, "shared_weights", 2, true);
  layer.activation = enumerator("activation", activation, ACTIVATION_SWIGLU_CLAMP);
  layer.interleaved = interleaved;
  layer.alpha = alpha;
  layer.limit = limit;
  layer.fp32_accumulation = fp32_acc;
  if (family)
    layer.family = *family;
  return layer;
}

void fused_topk(std::string_view engine_name, py::handle logits, py::handle bias, py::handle weights_out,
                py::handle ids_out, int scoring, uint32_t groups, uint32_t topk_groups, int group_score,
                bool renormalize, std::optional<float> renormalize_epsilon, float scale) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  Context& context = engine.context();
  const TensorView logits_view = read_tensor(context, logits, "router_logits", 2);
  const TensorView bias_view = read_tensor(context, bias, "correction_bias", 1, true);
  const TensorView weights = read_tensor(context, weights_out, "weights", 2);
  const TensorView ids = read_tensor(context, ids_out, "ids", 2);
  const auto options =
      routing_options(scoring, groups, topk_groups, group_score, renormalize, renormalize_epsilon, scale);
  run(engine, "fused_topk", keeping(logits, bias, weights_out, ids_out), [&](CommandStream& stream) {
    encode_route(stream, engine, logits_view, bias_view, size_argument("top_k", ids.shape[1]), options, weights.view(),
                 ids.view());
  });
}

void group_tokens(std::string_view engine_name, py::handle ids, int64_t experts, int64_t shared, int64_t row_tile,
                  py::handle offsets_out, py::handle sorted_out, py::handle inverse_out, py::handle tiles_out) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  Context& context = engine.context();
  const TensorView ids_tensor = read_tensor(context, ids, "topk_ids", 2);
  const TensorView offsets = read_tensor(context, offsets_out, "offsets", 1);
  const TensorView sorted = read_tensor(context, sorted_out, "sorted_rows", 1);
  const TensorView inverse = read_tensor(context, inverse_out, "inverse", 1);
  const TensorView tiles = read_tensor(context, tiles_out, "tiles", 2);
  const GroupTables tables{offsets.view(), sorted.view(), inverse.view(), tiles.view(),
                           size_argument("number of tiles", tiles.shape[0])};
  run(engine, "group_tokens", keeping(ids, offsets_out, sorted_out, inverse_out, tiles_out),
      [&](CommandStream& stream) {
        encode_group(stream, engine, ids_view(ids_tensor), size_argument("tokens of topk_ids", ids_tensor.shape[0]),
                     size_argument("top_k of topk_ids", ids_tensor.shape[1]), size_argument("num_experts", experts),
                     size_argument("shared_experts", shared), size_argument("row_tile", row_tile), tables);
      });
}

void pad_groups(std::string_view engine_name, py::handle offsets, py::handle sorted, py::handle padded_out) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  Context& context = engine.context();
  const TensorView offsets_view = read_tensor(context, offsets, "offsets", 1);
  const TensorView sorted_view = read_tensor(context, sorted, "sorted_rows", 1);
  const TensorView padded = read_tensor(context, padded_out, "padded", 2);
  run(engine, "pad_groups", keeping(offsets, sorted, padded_out), [&](CommandStream& stream) {
    encode_pad_groups(stream, engine, offsets_view.view(), sorted_view.view(),
                      size_argument("experts of padded", padded.shape[0]),
                      size_argument("capacity of padded", padded.shape[1]), padded.view());
  });
}

void fused_experts(std::string_view engine_name, py::handle x, py::handle w1, py::handle w2, py::handle topk_weights,
                   py::handle topk_ids, py::handle out, py::handle b1, py::handle b2, py::handle shared_w1,
                   py::handle shared_w2, py::handle shared_weights, int activation, bool interleaved, float alpha,
                   float limit, bool fp32_acc, const std::optional<std::string>& family, int64_t intermediate,
                   bool trellis_w1, bool trellis_w2, const MatrixCodes& codes, int64_t shared_intermediate) {
  ExpertsCall call;
  call.engine = &MoeEngine::get(engine_name);
  Context& context = call.engine->context();
  call.x = read_tensor(context, x, "hidden_states", 2);
  call.layer =
      experts_layer(context, w1, w2, b1, b2, shared_w1, shared_w2, shared_weights, activation, interleaved, alpha,
                    limit, fp32_acc, family, intermediate, trellis_w1, trellis_w2, codes, shared_intermediate);
  call.weights = read_tensor(context, topk_weights, "topk_weights", 2);
  call.ids = read_tensor(context, topk_ids, "topk_ids", 2);
  const std::array tensors = {x.ptr(),  w1.ptr(), w2.ptr(),        topk_weights.ptr(), topk_ids.ptr(),
                              b1.ptr(), b2.ptr(), shared_w1.ptr(), shared_w2.ptr(),    shared_weights.ptr()};
  run_experts(call, *packing_of(call), tensors, out);
}

void fused_moe(std::string_view engine_name, py::handle x, py::handle w1, py::handle w2, py::handle logits,
               py::handle bias, py::handle out, int64_t top_k, int scoring, uint32_t groups, uint32_t topk_groups,
               int group_score, bool renormalize, std::optional<float> renormalize_epsilon, float scale, py::handle b1,
               py::handle b2, py::handle shared_w1, py::handle shared_w2, py::handle shared_weights, int activation,
               bool interleaved, float alpha, float limit, bool fp32_acc, const std::optional<std::string>& family,
               int64_t intermediate, bool trellis_w1, bool trellis_w2, const MatrixCodes& codes,
               int64_t shared_intermediate) {
  ExpertsCall call;
  call.engine = &MoeEngine::get(engine_name);
  Context& context = call.engine->context();
  call.x = read_tensor(context, x, "hidden_states", 2);
  call.layer =
      experts_layer(context, w1, w2, b1, b2, shared_w1, shared_w2, shared_weights, activation, interleaved, alpha,
                    limit, fp32_acc, family, intermediate, trellis_w1, trellis_w2, codes, shared_intermediate);
  call.routed = true;
  call.logits = read_tensor(context, logits, "router_logits", 2);
  call.correction_bias = read_tensor(context, bias, "correction_bias", 1, true);
  call.top_k = size_argument("top_k", top_k);
  call.routing = routing_options(scoring, groups, topk_groups, group_score, renormalize, renormalize_epsilon, scale);
  const std::array tensors = {x.ptr(),  w1.ptr(), w2.ptr(),        logits.ptr(),    bias.ptr(),
                              b1.ptr(), b2.ptr(), shared_w1.ptr(), shared_w2.ptr(), shared_weights.ptr()};
  run_experts(call, *packing_of(call), tensors, out);
}

void gather_experts(std::string_view engine_name, py::handle weights, py::handle ids, py::handle out) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  Context& context = engine.context();
  const TensorView weights_view = read_tensor(context, weights, "weights", 0);
  const TensorView ids_tensor = read_tensor(context, ids, "expert_ids", 1);
  const TensorView out_view = read_tensor(context, out, "out", 0);
  if (weights_view.rank == 0)
    throw py::value_error("weights has 0 dimensions: must have at least 1");
  run(engine, "gather_experts", keeping(weights, ids, out),
      [&](CommandStream& stream) { encode_gather(stream, engine, weights_view, ids_tensor, out_view); });
}

void dequantize_trellis(std::string_view engine_name, py::handle codes, py::handle suh, py::handle svh, py::handle out,
                        int64_t half_bits, int64_t codebook) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  Context& context = engine.context();
  const TensorView codes_view = read_tensor(context, codes, "codes", 3);
  const TensorView suh_view = read_tensor(context, suh, "suh", 2);
  const TensorView svh_view = read_tensor(context, svh, "svh", 2);
  const TensorView out_view = read_tensor(context, out, "out", 3);
  run_to_end(engine, "dequantize_trellis", [&](CommandStream& stream) {
    encode_dequantize_trellis(stream, engine, codes_view, suh_view, svh_view, size_argument("half_bits", half_bits),
                              size_argument("codebook", codebook), out_view);
  });
}

void viterbi(std::string_view engine_name, py::handle values, py::handle table, py::handle states_out,
             int64_t half_bits) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  Context& context = engine.context();
  const TensorView values_view = read_tensor(context, values, "values", 2);
  const TensorView table_view = read_tensor(context, table, "table", 1);
  const TensorView states = read_tensor(context, states_out, "states", 2);
  run_to_end(engine, "viterbi", [&](CommandStream& stream) {
    encode_viterbi(stream, engine, values_view, table_view, size_argument("half_bits", half_bits), states);
  });
}

std::pair<std::string, uint32_t> select(int64_t batch_size, bool use_fp32_acc, Bits gate_bits, Bits up_bits,
                                        Bits down_bits, const std::optional<std::string>& engine_name) {
  const Tuning* measured =
      engine_name ? MoeEngine::get(*engine_name).measured(layer_of_bits(gate_bits, up_bits, down_bits)) : nullptr;
  const Selection selection =
      select_moe_kernel(batch_size, use_fp32_acc, gate_bits, up_bits, down_bits, measured ? *measured : Tuning{});
  return {selection.name, selection.tile_n};
}

py::list kernels(std::string_view engine_name) {
  MoeEngine::get(engine_name); // the library is checked against the table
  py::list list;
  for (const KernelEntry& entry : kernel_table()) {
    const bool expert = entry.variant != nullptr;
    list.append(py::dict("name"_a = entry.name, "family"_a = expert ? family_name(entry.variant->family, false) : "",
                         "stage"_a = stage_name(entry.stage),
                         "format"_a = !expert           ? ""
                                      : entry.quantized ? "quantized"
                                                        : "dense",
                         "dtype"_a = dtype_name(entry.dtype),
                         "accumulation"_a = !expert                   ? ""
                                            : entry.fp32_accumulation ? "fp32"
                                                                      : "fp16",
                         "row_tile"_a = expert ? entry.variant->row_tile : 0,
                         "tile_n"_a = expert ? entry.variant->tile_n : 0, "coded_matrices"_a = coded_matrices(entry)));
  }
  return list;
}

py::dict last_dispatch_dict() {
  const DispatchTrace& trace = last_dispatch();
  py::list names;
  for (uint32_t i = 0; i < std::min(trace.dispatches, DispatchTrace::MAX_KERNELS); ++i)
    names.append(trace.kernels[i]);
  return py::dict("operation"_a = trace.operation, "engine"_a = trace.engine, "family"_a = trace.family,
                  "chosen_by"_a = family_choice_name(trace.choice), "kernels"_a = names,
                  "dispatches"_a = trace.dispatches, "commits"_a = trace.commits, "row_tile"_a = trace.row_tile,
                  "tile_n"_a = trace.tile_n, "vectorized"_a = trace.vectorized,
                  "specialization"_a = layer_name(trace.family, trace.activation, trace.codes),
                  "layer_batch"_a = trace.layer_batch);
}

py::list profile_kernels(const Profile& profile) {
  py::list list;
  for (const Profile::Kernel& kernel : profile.kernels())
    list.append(py::dict("engine"_a = kernel.engine, "family"_a = kernel.family, "kernel"_a = kernel.kernel,
                         "dispatches"_a = kernel.dispatches, "timed"_a = kernel.timed, "bytes"_a = kernel.bytes,
                         "total_ns"_a = kernel.total_ns, "least_ns"_a = kernel.least_ns, "most_ns"_a = kernel.most_ns,
                         "encode_ns"_a = kernel.encode_ns));
  return list;
}

py::dict counters() {
  const Counts counts = read_counters();
  constexpr auto first = static_cast<uint32_t>(Counter::Fallbacks);
  py::dict result, fallbacks;
  for (uint32_t i = 0; i < first; ++i)
    result[counter_name(static_cast<Counter>(i))] = counts[i];
  for (uint32_t i = first; i < COUNTERS; ++i)
    fallbacks[fallback_name(static_cast<Fallback>(i - first))] = counts[i];
  result["fallbacks"] = fallbacks;
  return result;
}

/// A fallback of the package's Python code: a copy of an argument where `copies`.
void count_fallback(std::string_view reason, bool copies) {
  for (uint32_t i = 0; i < static_cast<uint32_t>(Fallback::Count); ++i)
    if (reason == fallback_name(static_cast<Fallback>(i))) {
      count(static_cast<Fallback>(i));
      count(Counter::Copies, copies);
      return;
    }
  throw py::value_error("reason is '" + std::string(reason) + "': no fallback has that name");
}

py::dict device_info(std::string_view engine_name) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  return py::dict("name"_a = engine.context().device_name(), "engine"_a = engine.context().engine(),
                  "simd_width"_a = engine.pipeline(ROUTE_KERNEL).simd_width,
                  "library"_a = engine.context().library().path(), "kernels"_a = kernel_table().size(),
                  "num_threads"_a = num_threads());
}

py::dict pool_stats(std::string_view engine_name) {
  const BufferPool::Statistics s = MoeEngine::get(engine_name).context().pool().statistics();
  return py::dict("hits"_a = s.hits, "misses"_a = s.misses, "trimmed"_a = s.trimmed, "bytes_in_use"_a = s.bytes_in_use,
                  "bytes_idle"_a = s.bytes_idle, "high_water"_a = s.high_water, "buffers_in_use"_a = s.buffers_in_use,
                  "buffers_idle"_a = s.buffers_idle);
}

size_t pool_trim(std::string_view engine_name) {
  Context& context = MoeEngine::get(engine_name).context();
  release_stream_scratch(context);
  return context.pool().trim();
}

void checked_set_num_threads(int threads) {
  if (threads < 1)
    throw py::value_error("threads is " + std::to_string(threads) + ": must be at least 1");
  set_num_threads(threads);
}

} // namespace

void define_linear(py::module_& m); // linear.cpp
void define_tuning(py::module_& m); // tuning.cpp
#if defined(__APPLE__)
void define_apple(py::module_& m); // apple/module.mm
#endif

PYBIND11_MODULE(_core, m) {
  m.doc() = "Kernels and command encoding of metal_moe. Use the package metal_moe, which validates arguments.";
  m.def("fused_topk", &fused_topk, "engine"_a, "logits"_a, "bias"_a, "weights_out"_a, "ids_out"_a, "scoring"_a,
        "groups"_a, "topk_groups"_a, "group_score"_a, "renormalize"_a, "renormalize_epsilon"_a, "scale"_a,
        "Routes logits [T, E] into weights_out fp32 [T, k] and ids_out int32 [T, k], both contiguous.");
  m.def("group_tokens", &group_tokens, "engine"_a, "ids"_a, "experts"_a, "shared"_a, "row_tile"_a, "offsets_out"_a,
        "sorted_out"_a, "inverse_out"_a, "tiles_out"_a,
        "Sorts the assignments ids [T, k] by expert: offsets [E + shared + 1], sorted rows and inverse [T * (k + "
        "shared)], tiles [n, 4], all int32 and contiguous.");
  m.def("pad_groups", &pad_groups, "engine"_a, "offsets"_a, "sorted"_a, "padded_out"_a,
        "Sorted rows as padded_out int32 [E, capacity], -1 where an expert has fewer.");
  m.def("fused_experts", &fused_experts, "engine"_a, "x"_a, "w1"_a, "w2"_a, "topk_weights"_a, "topk_ids"_a, "out"_a,
        "b1"_a, "b2"_a, "shared_w1"_a, "shared_w2"_a, "shared_weights"_a, "activation"_a, "interleaved"_a, "alpha"_a,
        "limit"_a, "fp32_acc"_a, "family"_a, "intermediate"_a = 0, "trellis_w1"_a = false, "trellis_w2"_a = false,
        "codes"_a = py::none(), "shared_intermediate"_a = 0, "The experts of a layer: out [T, H] from x [T, H].");
  m.def("fused_moe", &fused_moe, "engine"_a, "x"_a, "w1"_a, "w2"_a, "logits"_a, "bias"_a, "out"_a, "top_k"_a,
        "scoring"_a, "groups"_a, "topk_groups"_a, "group_score"_a, "renormalize"_a, "renormalize_epsilon"_a, "scale"_a,
        "b1"_a, "b2"_a, "shared_w1"_a, "shared_w2"_a, "shared_weights"_a, "activation"_a, "interleaved"_a, "alpha"_a,
        "limit"_a, "fp32_acc"_a, "family"_a, "intermediate"_a = 0, "trellis_w1"_a = false, "trellis_w2"_a = false,
        "codes"_a = py::none(), "shared_intermediate"_a = 0, "Routing and experts of a layer in one command buffer.");
  m.def("gather_experts", &gather_experts, "engine"_a, "weights"_a, "ids"_a, "out"_a,
        "out [n, ...] = weights [E, ...] of the experts ids [n]; zeros where an id is out of range.");
  m.def("dequantize_trellis", &dequantize_trellis, "engine"_a, "codes"_a, "suh"_a, "svh"_a, "out"_a, "half_bits"_a,
        "codebook"_a, "out fp32 [n, rows, columns] of trellis codes int32 [n, columns / 16, words], sizes padded.");
  m.def("viterbi", &viterbi, "engine"_a, "values"_a, "table"_a, "states_out"_a, "half_bits"_a,
        "Closed walks, states_out int32 [n, 256], near values fp32 [n, 256]; table fp32 [65536]: values of states.");
  m.def("select_moe_kernel", &select, "batch_size"_a, "use_fp32_acc"_a, "gate_bits"_a = py::none(),
        "up_bits"_a = py::none(), "down_bits"_a = py::none(), "engine"_a = py::none(),
        "(name, tile_n) of what was measured on the engine's device, else of the published selection.");
  m.def("name_format", &name_format, "number"_a, "name"_a, "Makes a format of weights known, for kernels' names.");
  m.def("matrix_code", &checked_matrix_code, "format"_a, "half_bits"_a, "group_size"_a, "codebook"_a, "scale_type"_a,
        "aligned"_a, "How matrices with these fields of a record are stored, in a number for kernels; 0: in none.");
  m.def("enable_specialization", &enable_specialization, "enabled"_a);
  m.def("specialization_enabled", &specialization_enabled);
  m.def("kernels", &kernels, "engine"_a, "The kernel table, checked against the engine's library.");
  m.def("last_dispatch", &last_dispatch_dict, "What this thread's last operation ran.");
  m.def("counters", &counters, "What was done since the last reset_counters, in numbers.");
  m.def("reset_counters", &reset_counters);
  m.def("count_fallback", &count_fallback, "reason"_a, "copies"_a = false, "Counts a fallback, and a copy with it.");
  py::class_<Profile>(m, "Profile", "Time and bytes by kernel, from its creation to stop().")
      .def(py::init<>())
      .def("stop", &Profile::stop)
      .def("kernels", &profile_kernels);
  m.def("collect", &collect, py::call_guard<GilRelease>(), "Waits for times that devices have yet to tell.");
  m.def("start_log", &start_log, "Dispatches and commits as lines on stderr.");
  m.def("start_trace", &start_trace, "path"_a, "Writes a Chrome trace from now on.");
  m.def("stop_log_and_trace", &stop_log_and_trace, py::call_guard<GilRelease>());
  m.def("device_info", &device_info, "engine"_a);
  m.def("pool_stats", &pool_stats, "engine"_a, "Scratch buffers: counts and bytes.");
  m.def("pool_trim", &pool_trim, "engine"_a, "Frees idle scratch buffers; returns the bytes freed.");
  m.def(
      "set_library_path", [](std::string path) { MoeEngine::set_library_path(std::move(path)); }, "path"_a,
      "The metallib that engines load; before their first use.");
  m.def("set_num_threads", &checked_set_num_threads, "threads"_a, "Threads of the native engine.");
  m.def("get_num_threads", &num_threads);
  m.def("set_nvrtc_path", &set_nvrtc_path, "path"_a, "A file to load NVRTC from, where none is loaded yet.");
  m.def(
      "compile_cuda_kernel",
      [](const std::string& library, const std::string& kernel, int architecture,
         const std::map<uint32_t, uint32_t>& constants) {
        std::string image;
        {
          const GilRelease release;
          image = compile_cuda_kernel(library, kernel, constants, architecture);
        }
        return py::bytes(image);
      },
      "library"_a, "kernel"_a, "architecture"_a, "constants"_a = std::map<uint32_t, uint32_t>(),
      "The cubin of a kernel for compute capability `architecture` (90: sm_90), function constants by index.");
  m.def("set_exact_seed", &set_exact_seed, "seed"_a, "Seed of the exact engine's schedule.");
  define_known_calls(m);
  define_linear(m);
  define_streams(m);
  define_tuning(m);
#if defined(__APPLE__)
  define_apple(m);
#endif
}

} // namespace metal_moe::bindings
