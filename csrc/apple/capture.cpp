#include "capture.h"

#include <stdexcept>

namespace metal_moe::apple {

void start_capture(MTL::Device* device, const std::string& path) {
  const AutoreleaseScope scope;
  MTL::CaptureManager* manager = MTL::CaptureManager::sharedCaptureManager();
  if (!manager->supportsDestination(MTL::CaptureDestinationGPUTraceDocument))
    throw std::runtime_error("capture: this process cannot write GPU captures; start it with MTL_CAPTURE_ENABLED=1");
  const auto descriptor = NS::TransferPtr(MTL::CaptureDescriptor::alloc()->init());
  descriptor->setCaptureObject(device);
  descriptor->setDestination(MTL::CaptureDestinationGPUTraceDocument);
  descriptor->setOutputURL(NS::URL::fileURLWithPath(ns_string(path.c_str())));
  NS::Error* error = nullptr;
  if (!manager->startCapture(descriptor.get(), &error))
    throw std::runtime_error("capture: '" + path + "' cannot be written: " + describe(error));
}

void stop_capture() { MTL::CaptureManager::sharedCaptureManager()->stopCapture(); }

} // namespace metal_moe::apple
