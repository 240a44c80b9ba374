#include "streams.h"

#include "gil.h"
#include "run.h"

#include <pybind11/stl.h>

#include <thread>

namespace py = pybind11;
using namespace py::literals;

namespace metal_moe::bindings {
namespace {

/// Every call that may wait does so without the interpreter's lock, which completion handlers take.
class PyStream {
  template <class Use>
  auto use(const char* operation, const Use& function) {
    const GilRelease release;
    return stream_->use(operation, function);
  }

public:
  PyStream(std::string_view engine, uint32_t max_in_flight, uint32_t max_dispatches, size_t max_bytes)
      : stream_(std::make_shared<SharedStream>(MoeEngine::get(engine).context(),
                                               CommandStream::Policy{.max_dispatches = max_dispatches,
                                                                     .max_bytes = max_bytes,
                                                                     .max_in_flight = max_in_flight})) {}

  ~PyStream() {
    if (!stream_)
      return;
    if (stream_->is_handling()) {
      // A handler has let go of the stream's last reference: nobody waits for himself.
      std::thread([stream = std::move(stream_)] { stream->close(); }).detach();
      return;
    }
    const GilRelease release;
    stream_.reset();
  }
  PyStream(const PyStream&) = delete;
  PyStream& operator=(const PyStream&) = delete;

  std::shared_ptr<LayerBatch> batch() const { return std::make_shared<LayerBatch>(stream_); }

  void commit() {
    use("commit", [](CommandStream& stream) { stream.commit(); });
  }
  void synchronize() {
    use("synchronize", [](CommandStream& stream) { stream.synchronize(); });
  }
  void check() {
    use("check", [](CommandStream& stream) { stream.check(); });
  }
  uint32_t cancel() {
    return use("cancel", [](CommandStream& stream) {
      const uint32_t dropped = stream.pending_dispatches();
      stream.discard();
      return dropped;
    });
  }
  void end_encoder() {
    use("end_encoder", [](CommandStream& stream) { stream.end_encoder(); });
  }
  uint32_t in_flight() {
    return use("in_flight", [](CommandStream& stream) { return stream.in_flight(); });
  }
  uint32_t pending_dispatches() {
    return use("pending_dispatches", [](CommandStream& stream) { return stream.pending_dispatches(); });
  }

  void on_completed(py::function handler) {
    PyObject* const function = handler.ptr();
    auto kept = keep_alive({}, function);
    use("on_completed", [&](CommandStream& stream) {
      stream.on_completed([kept = std::move(kept), function](const Completion& completion) {
        const GilAcquire lock;
        try {
          py::reinterpret_borrow<py::object>(function)(
              completion.gpu_start, completion.gpu_end,
              completion.error.empty() ? py::object(py::none()) : py::object(py::str(completion.error)));
        } catch (const py::error_already_set& error) {
          throw std::runtime_error(error.what()); // as text: Python's own may not outlive the lock
        }
      });
    });
  }

  void close() {
    const GilRelease release;
    stream_->close();
  }
  bool closed() const {
    const GilRelease release;
    return stream_->is_closed();
  }

private:
  std::shared_ptr<SharedStream> stream_;
};

void check_thread(const LayerBatch& batch, const char* operation) {
  for (const LayerBatch* entered = LayerBatch::current(); entered; entered = entered->outer())
    if (entered == &batch)
      return;
  throw std::runtime_error(std::string(operation) + ": this thread has not entered the batch");
}

} // namespace

void define_streams(py::module_& m) {
  py::class_<LayerBatch, std::shared_ptr<LayerBatch>>(m, "LayerBatch")
      .def(py::init<uint32_t, bool>(), "layers"_a, "waits"_a)
      .def("enter", &LayerBatch::enter)
      .def("leave", &LayerBatch::leave, py::call_guard<GilRelease>())
      .def(
          "commit",
          [](LayerBatch& batch) {
            check_thread(batch, "commit");
            batch.commit();
          },
          py::call_guard<GilRelease>())
      .def(
          "synchronize",
          [](LayerBatch& batch) {
            check_thread(batch, "synchronize");
            batch.synchronize();
          },
          py::call_guard<GilRelease>())
      .def(
          "discard",
          [](LayerBatch& batch) {
            check_thread(batch, "cancel");
            batch.discard();
          },
          py::call_guard<GilRelease>())
      .def_property_readonly("entered", &LayerBatch::entered)
      .def_property_readonly("statistics", [](const LayerBatch& batch) {
        const LayerBatch::Statistics& s = batch.statistics();
        return py::dict("layers"_a = s.layers, "operations"_a = s.operations, "commits"_a = s.commits,
                        "passed"_a = s.passed);
      });
  py::class_<PyStream>(m, "CommandStream")
      .def(py::init<std::string_view, uint32_t, uint32_t, size_t>(), "engine"_a, "max_in_flight"_a, "max_dispatches"_a,
           "max_bytes"_a)
      .def("batch", &PyStream::batch, "Redirects the operations of the thread that enters it to this stream.")
      .def("commit", &PyStream::commit)
      .def("synchronize", &PyStream::synchronize)
      .def("check", &PyStream::check)
      .def("cancel", &PyStream::cancel)
      .def("end_encoder", &PyStream::end_encoder)
      .def("on_completed", &PyStream::on_completed, "handler"_a)
      .def("close", &PyStream::close)
      .def_property_readonly("closed", &PyStream::closed)
      .def_property_readonly("in_flight", &PyStream::in_flight)
      .def_property_readonly("pending_dispatches", &PyStream::pending_dispatches);
  m.def("settle_batch", &settle_batch, "Waits for what this thread's batch has encoded.");
  m.def(
      "runs_on_caller_streams",
      [](std::string_view engine) { return MoeEngine::get(engine).context().runs_on_caller_streams(); }, "engine"_a,
      "Whether operations run on PyTorch's streams.");
}

} // namespace metal_moe::bindings
