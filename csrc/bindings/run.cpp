#include "run.h"

#include "gil.h"

#include <vector>

namespace py = pybind11;

namespace metal_moe::bindings {

std::shared_ptr<void> keep_alive(std::span<PyObject* const> objects, PyObject* another) {
  auto* kept = new std::vector<PyObject*>;
  std::shared_ptr<void> owner(kept, [](std::vector<PyObject*>* let_go) {
    if (!Py_IsInitialized())
      return; // nobody is left to give them to
    const GilAcquire lock;
    for (PyObject* object : *let_go)
      Py_DECREF(object);
    delete let_go;
  });
  kept->reserve(objects.size() + 1);
  const auto keep = [&](PyObject* object) {
    if (!object || object == Py_None)
      return;
    Py_INCREF(object);
    kept->push_back(object);
  };
  for (PyObject* object : objects)
    keep(object);
  keep(another);
  return owner;
}

void settle_batch() {
  LayerBatch* batch = LayerBatch::current();
  if (!batch)
    return;
  const GilRelease release;
  batch->synchronize();
}

} // namespace metal_moe::bindings
