// The objects behind Foundation.hpp, and how the stand-in makes them.
#pragma once

#include "Foundation/Foundation.hpp"

#include <string>
#include <string_view>
#include <vector>

namespace metal_sim {

class StringObject final : public NS::String {
public:
  StringObject() = default;
  explicit StringObject(std::string text) : text(std::move(text)) {}

  std::string text;

private:
  std::string describe() const override { return text; }
};

class ArrayObject final : public NS::Array {
public:
  /// Retains the objects.
  ArrayObject(const NS::Object* const* objects, size_t count);
  ~ArrayObject() override;

  std::vector<NS::Object*> objects;
};

class DataObject final : public NS::Data {
public:
  explicit DataObject(std::vector<std::byte> bytes) : bytes(std::move(bytes)) {}

  mutable std::vector<std::byte> bytes;
};

class ErrorObject final : public NS::Error {
public:
  ErrorObject(const char* domain, NS::Integer code, std::string text);

  const NS::Integer code_;
  NS::String* const domain_; // immortal
  const NS::SharedPtr<StringObject> description_;

private:
  std::string describe() const override { return description_->text; }
};

/// An autoreleased string.
NS::String* string(std::string text);

/// The text of a string that a caller passed: "" for null.
std::string text_of(const NS::String* string);

/// A label as Metal's objects keep it: a copy of the caller's string, null where none was set.
class Label {
public:
  void set(const NS::String* label);
  NS::String* get() const { return label_.get(); }

private:
  NS::SharedPtr<NS::String> label_;
};

/// Stores an autoreleased error where the caller asked for one.
void set_error(NS::Error** error, const char* domain, NS::Integer code, std::string text);

/// What Metal's API validation would abort on: throws std::logic_error("<call>: <problem>").
[[noreturn]] void misuse(const char* call, const std::string& problem);

} // namespace metal_sim
