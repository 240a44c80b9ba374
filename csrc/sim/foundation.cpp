#include "foundation.h"

#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>

namespace metal_sim {

ArrayObject::ArrayObject(const NS::Object* const* list, size_t count) {
  objects.reserve(count);
  for (size_t i = 0; i < count; ++i)
    objects.push_back(const_cast<NS::Object*>(list[i])->retain());
}

ArrayObject::~ArrayObject() {
  for (NS::Object* object : objects)
    object->release();
}

ErrorObject::ErrorObject(const char* domain, NS::Integer code, std::string text)
    : code_(code), domain_(constant_string(domain)), description_(NS::TransferPtr(new StringObject(std::move(text)))) {}

NS::String* string(std::string text) { return (new StringObject(std::move(text)))->autorelease(); }

std::string text_of(const NS::String* string) { return string ? string->utf8String() : ""; }

void Label::set(const NS::String* label) {
  label_ = label ? NS::TransferPtr<NS::String>(new StringObject(text_of(label))) : nullptr;
}

void set_error(NS::Error** error, const char* domain, NS::Integer code, std::string text) {
  if (error)
    *error = (new ErrorObject(domain, code, std::move(text)))->autorelease();
}

void misuse(const char* call, const std::string& problem) {
  throw std::logic_error(std::string(call) + ": " + problem);
}

NS::String* constant_string(const char* text) {
  static std::mutex mutex;
  static auto* strings = new std::map<std::string, StringObject*, std::less<>>; // immortal, as its strings are
  const std::lock_guard lock(mutex);
  if (const auto found = strings->find(std::string_view(text)); found != strings->end())
    return found->second;
  return strings->emplace(text, new StringObject(text)).first->second;
}

} // namespace metal_sim

namespace NS {

using metal_sim::ArrayObject;
using metal_sim::ErrorObject;
using metal_sim::StringObject;

namespace {

const std::string& text(const String* string) { return static_cast<const StringObject*>(string)->text; }

StringObject* checked(String* string) { return static_cast<StringObject*>(string); }

} // namespace

UInteger Object::hash() const {
  if (const auto* string = dynamic_cast<const StringObject*>(this))
    return std::hash<std::string>()(string->text);
  return reinterpret_cast<UInteger>(this);
}

bool Object::isEqual(const Object* object) const {
  if (this == object)
    return true;
  const auto* left = dynamic_cast<const StringObject*>(this);
  const auto* right = dynamic_cast<const StringObject*>(object);
  return left && right && left->text == right->text;
}

String* Object::description() const { return metal_sim::string(describe()); }

std::string Object::describe() const { return "object"; }

String* String::string() { return metal_sim::string(""); }
String* String::string(const String* other) { return metal_sim::string(text(other)); }
String* String::string(const char* text, StringEncoding) { return metal_sim::string(text); }
String* String::alloc() { return new StringObject; }
String* String::init() { return this; }

String* String::init(const String* other) {
  checked(this)->text = text(other);
  return this;
}

String* String::init(const char* text, StringEncoding) {
  checked(this)->text = text;
  return this;
}

UInteger String::length() const {
  UInteger units = 0;
  for (const unsigned char byte : text(this)) {
    if ((byte & 0xC0) != 0x80)       // not a continuation byte: begins a code point
      units += byte >= 0xF0 ? 2 : 1; // four-byte sequences are surrogate pairs in UTF-16
  }
  return units;
}

UInteger String::lengthOfBytes(StringEncoding) const { return text(this).size(); }
const char* String::utf8String() const { return text(this).c_str(); }
const char* String::cString(StringEncoding) const { return text(this).c_str(); }
bool String::isEqualToString(const String* other) const { return other && text(this) == text(other); }

String* String::stringByAppendingString(const String* other) const {
  return metal_sim::string(text(this) + text(other));
}

Array* Array::array() { return array(nullptr, 0); }
Array* Array::array(const Object* object) { return array(&object, 1); }

Array* Array::array(const Object* const* objects, UInteger count) {
  return (new ArrayObject(objects, count))->autorelease();
}

UInteger Array::count() const { return static_cast<const ArrayObject*>(this)->objects.size(); }

Object* Array::at(UInteger index) const {
  const auto& objects = static_cast<const ArrayObject*>(this)->objects;
  if (index >= objects.size())
    metal_sim::misuse("Array::object",
                      "index " + std::to_string(index) + " beyond count " + std::to_string(objects.size()));
  return objects[index];
}

void* Data::mutableBytes() const { return static_cast<const metal_sim::DataObject*>(this)->bytes.data(); }
UInteger Data::length() const { return static_cast<const metal_sim::DataObject*>(this)->bytes.size(); }

Integer Error::code() const { return static_cast<const ErrorObject*>(this)->code_; }
ErrorDomain Error::domain() const { return static_cast<const ErrorObject*>(this)->domain_; }
String* Error::localizedDescription() const { return static_cast<const ErrorObject*>(this)->description_.get(); }

} // namespace NS
