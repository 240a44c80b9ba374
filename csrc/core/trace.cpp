#include "trace.h"

namespace metal_moe {

DispatchTrace& last_dispatch() {
  thread_local DispatchTrace trace;
  return trace;
}

} // namespace metal_moe
