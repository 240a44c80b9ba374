// GPU captures: a document that Xcode opens, of all that the device is given meanwhile.
#pragma once

#include "../core/metal.h"

#include <string>

namespace metal_moe::apple {

/// Starts writing a capture of the device to `path`. std::runtime_error with Metal's reason: captures not enabled
/// (MTL_CAPTURE_ENABLED=1 must be set when the process starts), one in progress, a file in the way.
void start_capture(MTL::Device* device, const std::string& path);

/// Ends it; the document is complete when this returns.
void stop_capture();

} // namespace metal_moe::apple
