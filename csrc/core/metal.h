// The Metal API as the core uses it (Apple's metal-cpp, or the stand-in's headers of the same names), and the two
// helpers that every user of it needs.
#pragma once

#include <Foundation/Foundation.hpp>
#include <Metal/Metal.hpp>

#include <string>

namespace metal_moe {

/// Objects that Metal returns autoreleased live until the innermost of these ends. Threads that Metal did not start
/// have no pool of their own, so every function that asks Metal for such objects opens one.
class AutoreleaseScope {
public:
  AutoreleaseScope() : pool_(NS::AutoreleasePool::alloc()->init()) {}
  ~AutoreleaseScope() { pool_->release(); }
  AutoreleaseScope(const AutoreleaseScope&) = delete;
  AutoreleaseScope& operator=(const AutoreleaseScope&) = delete;

private:
  NS::AutoreleasePool* pool_;
};

inline NS::String* ns_string(const char* text) { return NS::String::string(text, NS::UTF8StringEncoding); }

inline std::string to_string(const NS::String* text) {
  const char* bytes = text ? text->utf8String() : nullptr;
  return bytes ? bytes : "";
}

/// What Metal says of an error, or that it said nothing.
inline std::string describe(const NS::Error* error) {
  return error ? to_string(error->localizedDescription()) : std::string("no reason given");
}

} // namespace metal_moe
