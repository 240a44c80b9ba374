#include "event.h"

#include <algorithm>

namespace metal_sim {

uint64_t EventObject::value() const {
  const std::lock_guard lock(mutex_);
  return value_;
}

void EventObject::signal(uint64_t value) {
  {
    const std::lock_guard lock(mutex_);
    value_ = std::max(value_, value);
  }
  changed_.notify_all();
}

void EventObject::wait(uint64_t value) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return value_ >= value; });
}

} // namespace metal_sim

namespace MTL {

using namespace metal_sim;

namespace {

EventObject* impl(Event* event) { return static_cast<EventObject*>(static_cast<SharedEvent*>(event)); }
const EventObject* impl(const Event* event) {
  return static_cast<const EventObject*>(static_cast<const SharedEvent*>(event));
}

} // namespace

Device* Event::device() const { return impl(this)->device; }
NS::String* Event::label() const { return impl(this)->label.get(); }
void Event::setLabel(const NS::String* label) { impl(this)->label.set(label); }
uint64_t SharedEvent::signaledValue() const { return impl(this)->value(); }
void SharedEvent::setSignaledValue(uint64_t signaledValue) { impl(this)->signal(signaledValue); }

SharedEvent* Device::newSharedEvent() { return new EventObject(static_cast<DeviceObject*>(this)); }

} // namespace MTL
