// metal_moe._core: what was measured on a device, given to its engine.
#include "gil.h"

#include "../moe/engine.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace py::literals;

namespace metal_moe::bindings {
namespace {

/// A field of an entry of a tuning table; what is not given stays as it is.
template <class T>
void read_field(const py::dict& entry, const char* name, T& value) {
  if (entry.contains(name))
    value = entry[name].cast<T>();
}

void set_tuning_table(std::string_view engine_name, const py::list& entries) {
  MoeEngine& engine = MoeEngine::get(engine_name);
  std::vector<TuningTable::Entry> table;
  for (const py::handle item : entries) {
    const auto fields = py::reinterpret_borrow<py::dict>(item);
    TuningTable::Entry entry{{}, engine.tuning()};
    // Measured thresholds say it all.
    entry.tuning.base_assignments = 0;
    entry.tuning.quantized_decode = entry.tuning.packed_decode = {};
    entry.tuning.few_rows_are_base = false;
    read_field(fields, "hidden", entry.layer.hidden);
    read_field(fields, "intermediate", entry.layer.intermediate);
    read_field(fields, "experts", entry.layer.experts);
    read_field(fields, "top_k", entry.layer.top_k);
    read_field(fields, "quantized", entry.layer.quantized);
    read_field(fields, "weight_bits", entry.layer.weight_bits);
    read_field(fields, "trellis", entry.layer.trellis);
    std::string dtype;
    read_field(fields, "dtype", dtype);
    for (Dtype one : {Dtype::Fp32, Dtype::Fp16, Dtype::Bf16})
      if (dtype == dtype_name(one))
        entry.layer.dtype = one;
    if (entry.layer.dtype == Dtype::Other)
      throw py::value_error("tuning: dtype is '" + dtype + "': must be fp32, fp16 or bf16");
    read_field(fields, "decode_tokens", entry.tuning.decode_tokens);
    read_field(fields, "prefill4_tokens", entry.tuning.prefill4_tokens);
    read_field(fields, "base_tokens", entry.tuning.base_tokens);
    read_field(fields, "row_tile_per_mean_rows", entry.tuning.row_tile_per_mean_rows);
    read_field(fields, "largest_row_tile", entry.tuning.largest_row_tile);
    table.push_back(entry);
  }
  engine.set_tuning_table(TuningTable(std::move(table)));
}

/// The thresholds that hold on a device where nothing was measured.
py::dict default_tuning(std::string_view engine_name) {
  const Tuning& tuning = MoeEngine::get(engine_name).tuning();
  return py::dict("decode_tokens"_a = tuning.decode_tokens, "prefill4_tokens"_a = tuning.prefill4_tokens,
                  "base_tokens"_a = tuning.base_tokens, "row_tile_per_mean_rows"_a = tuning.row_tile_per_mean_rows,
                  "largest_row_tile"_a = tuning.largest_row_tile);
}

/// `handler(engine, device_name)` for every engine made from here on. What it throws is shown and goes no further: the
/// engine works without.
void on_new_engine(const py::function& handler) {
  // Never freed: the interpreter may end before the last engine is made.
  auto* kept = new py::function(handler);
  MoeEngine::on_new([kept](std::string_view name, MoeEngine& engine) {
    const GilAcquire lock;
    try {
      (*kept)(name, engine.context().device_name());
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("metal_moe: a new engine");
    }
  });
}

} // namespace

void define_tuning(py::module_& m) {
  m.def("set_tuning_table", &set_tuning_table, "engine"_a, "entries"_a,
        "What was measured on the engine's device: dicts of a layer and its thresholds.");
  m.def("default_tuning", &default_tuning, "engine"_a, "The thresholds where nothing was measured.");
  m.def("on_new_engine", &on_new_engine, "handler"_a, "handler(engine, device_name) is called with every new engine.");
}

} // namespace metal_moe::bindings
