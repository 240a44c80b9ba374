#include "cuda_stream.h"

#include "gil.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace metal_moe::bindings {

namespace {

/// Every piece of scratch begins at a multiple of it: the widest access of a kernel, and a cache line.
constexpr size_t ALIGNMENT = 128;
/// A block takes what the last operation needed in all, so that the same layer again asks PyTorch once, not once for
/// every piece.
std::atomic<size_t> last_total{0};

/// Every piece in memory of its own, of the size that was asked for: compute-sanitizer then sees accesses beyond it.
bool separate_pieces() {
  static const bool separate = std::getenv("METAL_MOE_CUDA_SEPARATE_SCRATCH") != nullptr;
  return separate;
}

/// Made once and never freed, as the interpreter may end before the module. With the lock held.
struct TorchCalls {
  PyObject* empty;
  PyObject* uint8;
  PyObject* raw_stream;
  PyObject* device;
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");

  TorchCalls() {
    const py::module_ torch = py::module_::import("torch");
    const auto get = [](const py::object& from, const char* name) {
      return py::object(from.attr(name)).release().ptr();
    };
    empty = get(torch, "empty");
    uint8 = get(torch, "uint8");
    device = get(torch, "device");
    raw_stream = get(torch.attr("_C"), "_cuda_getCurrentRawStream");
  }
};

const TorchCalls& torch_calls() {
  static const TorchCalls* made = nullptr; // not a function-local object: importing may let another thread run
  if (!made)
    made = new TorchCalls;
  return *made;
}

} // namespace

TorchScratch::~TorchScratch() {
  const GilAcquire lock;
  for (PyObject* tensor : tensors_)
    Py_DECREF(tensor);
  if (total_)
    last_total.store(total_, std::memory_order_relaxed);
}

BufferView TorchScratch::allocate(size_t bytes) {
  if (separate_pieces()) {
    add_block(std::max<size_t>(bytes, 1));
    return {blocks_.back().get(), 0};
  }
  bytes = (std::max<size_t>(bytes, 1) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  total_ += bytes;
  if (blocks_.empty() || used_ + bytes > blocks_.back()->length())
    add_block(blocks_.empty() ? std::max(bytes, last_total.load(std::memory_order_relaxed)) : bytes);
  const BufferView view{blocks_.back().get(), used_};
  used_ += bytes;
  return view;
}

void TorchScratch::add_block(size_t bytes) {
  const GilAcquire lock;
  const TorchCalls& torch = torch_calls();
  const auto call = [](PyObject* function) { return py::reinterpret_borrow<py::object>(function); };
  const py::object device = call(torch.device)("cuda", device_);
  py::object tensor = call(torch.empty)(bytes, py::arg("dtype") = py::handle(torch.uint8), py::arg("device") = device);
  const auto address = tensor.attr(py::handle(torch.data_ptr))().cast<uintptr_t>();
  blocks_.push_back(context_.wrap(reinterpret_cast<const void*>(address), bytes));
  tensors_.push_back(tensor.release().ptr());
  used_ = 0;
}

void* current_cuda_stream(int device) {
  const py::object stream = py::reinterpret_borrow<py::object>(torch_calls().raw_stream)(device);
  return reinterpret_cast<void*>(stream.cast<uintptr_t>());
}

int cuda_device_number(const std::string& engine) {
  const size_t colon = engine.find(':');
  int number = 0;
  if (colon != std::string::npos)
    std::from_chars(engine.data() + colon + 1, engine.data() + engine.size(), number);
  return number;
}

void run_on_current_stream(Context& context, const std::function<void(CommandStream&)>& encode) {
  const int device = cuda_device_number(context.engine());
  void* handle = current_cuda_stream(device);
  TorchScratch scratch(context, device);
  const GilRelease release;
  CallerStream stream(context, handle, [&](size_t bytes) { return scratch.allocate(bytes); });
  encode(*stream);
  stream.commit();
}

// PyTorch's allocator keeps it.
void release_stream_scratch(Context&) {}

} // namespace metal_moe::bindings
