#include "trace.h"

namespace metal_moe {

const char* family_choice_name(FamilyChoice choice) {
  switch (choice) {
  case FamilyChoice::None:
    break;
  case FamilyChoice::Tokens:
    return "tokens";
  case FamilyChoice::Requested:
    return "kernel";
  case FamilyChoice::Format:
    return "format";
  }
  return "";
}

DispatchTrace& last_dispatch() {
  thread_local DispatchTrace trace;
  return trace;
}

} // namespace metal_moe
