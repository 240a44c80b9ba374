// PyTorch's MPS stream as the sources here use it: its headers are Objective-C++, and its objects are metal-cpp's.
#pragma once

#include "../core/metal.h"

#include <ATen/mps/MPSStream.h>

#include <dispatch/dispatch.h>

#include <exception>

namespace metal_moe::apple {

/// The object of metal-cpp that is the Objective-C object `object`: one and the same.
template <class Class, class Id>
Class* metal_object(Id object) {
  return static_cast<Class*>((__bridge void*)object);
}

/// Runs `function` on the stream's serial queue, where alone its encoder and command buffer may be used, and returns
/// when it has run. What it throws is thrown here: no exception passes through the queue.
template <class Function>
void on_queue(at::mps::MPSStream* stream, Function& function) {
  struct Call {
    Function& function;
    std::exception_ptr error;
  } call{function, nullptr};
  dispatch_sync_f(stream->queue(), &call, [](void* argument) {
    auto& call = *static_cast<Call*>(argument);
    const AutoreleaseScope scope;
    try {
      call.function();
    } catch (...) {
      call.error = std::current_exception();
    }
  });
  if (call.error)
    std::rethrow_exception(call.error);
}

} // namespace metal_moe::apple
