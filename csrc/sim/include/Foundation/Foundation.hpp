// The part of metal-cpp's Foundation that the core uses, for machines without Metal.
//
// Names, signatures and ownership are metal-cpp's: what `alloc`, `new...` and `copy...` return belongs to the caller,
// everything else is autoreleased or owned by the object asked. As on Apple a message to a null pointer is harmless
// for `retain`, `release` and `autorelease` only through SharedPtr; do not rely on it elsewhere.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

namespace metal_sim {

/// What every object begins with (objc_object's part): a reference count that starts at 1, owned by the creator.
class Counted {
public:
  void add_reference() noexcept { references_.fetch_add(1, std::memory_order_relaxed); }
  void drop_reference() noexcept {
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1)
      delete this;
  }
  uint32_t references() const noexcept { return references_.load(std::memory_order_relaxed); }

protected:
  Counted() = default;
  virtual ~Counted() = default;
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

private:
  std::atomic<uint32_t> references_{1};
};

/// Leaves one reference to the innermost autorelease pool of this thread, or to the thread's end where there is none.
void autorelease(Counted* object);

} // namespace metal_sim

namespace NS {

using TimeInterval = double;
using Integer = std::intptr_t;
using UInteger = std::uintptr_t;

constexpr Integer IntegerMax = INTPTR_MAX;
constexpr UInteger UIntegerMax = UINTPTR_MAX;

class Object;
class String;

template <class Class, class Base = Object>
class Referencing : public Base {
public:
  Class* retain() {
    this->add_reference();
    return static_cast<Class*>(this);
  }
  void release() { this->drop_reference(); }
  Class* autorelease() {
    metal_sim::autorelease(this);
    return static_cast<Class*>(this);
  }
  UInteger retainCount() const { return this->references(); }
};

/// For classes whose objects never change: a copy is the object itself, owned once more.
template <class Class, class Base = Object>
class Copying : public Referencing<Class, Base> {
public:
  Class* copy() const { return const_cast<Copying*>(this)->retain(); }
};

class Object : public Referencing<Object, metal_sim::Counted> {
public:
  UInteger hash() const;
  bool isEqual(const Object* object) const;
  String* description() const;

protected:
  Object() = default;
  ~Object() override = default;
  virtual std::string describe() const;
};

enum StringEncoding : UInteger { ASCIIStringEncoding = 1, UTF8StringEncoding = 4 };

class String : public Copying<String> {
public:
  static String* string();
  static String* string(const String* other);
  static String* string(const char* text, StringEncoding encoding);
  static String* alloc();
  String* init();
  String* init(const String* other);
  String* init(const char* text, StringEncoding encoding);

  /// UTF-16 code units.
  UInteger length() const;
  UInteger lengthOfBytes(StringEncoding encoding) const;
  const char* utf8String() const;
  const char* cString(StringEncoding encoding) const;
  bool isEqualToString(const String* other) const;
  String* stringByAppendingString(const String* other) const;

protected:
  String() = default;
};

class Array : public Copying<Array> {
public:
  static Array* array();
  static Array* array(const Object* object);
  static Array* array(const Object* const* objects, UInteger count);

  template <class Class = Object>
  Class* object(UInteger index) const {
    return static_cast<Class*>(at(index));
  }
  UInteger count() const;

protected:
  Array() = default;

private:
  Object* at(UInteger index) const;
};

struct Range {
  static Range Make(UInteger loc, UInteger len) { return {loc, len}; }
  Range(UInteger loc, UInteger len) : location(loc), length(len) {}

  bool Equal(const Range& range) const { return location == range.location && length == range.length; }
  bool LocationInRange(UInteger loc) const { return loc >= location && loc - location < length; }
  UInteger Max() const { return location + length; }

  UInteger location;
  UInteger length;
};

class Data : public Copying<Data> {
public:
  void* mutableBytes() const;
  UInteger length() const;

protected:
  Data() = default;
};

using ErrorDomain = String*;

class Error : public Copying<Error> {
public:
  Integer code() const;
  ErrorDomain domain() const;
  String* localizedDescription() const;

protected:
  Error() = default;
};

/// Pools of one thread nest. `release` and `drain` both end a pool, and every pool inside it.
class AutoreleasePool : public Object {
public:
  static AutoreleasePool* alloc();
  AutoreleasePool* init();
  void drain();
  void addObject(Object* object);
  static void showPools();

protected:
  AutoreleasePool() = default;
};

template <class Class>
class SharedPtr {
public:
  SharedPtr() = default;
  SharedPtr(std::nullptr_t) noexcept {}
  SharedPtr(const SharedPtr& other) noexcept : object_(retained(other.object_)) {}
  SharedPtr(SharedPtr&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  template <class Other>
  SharedPtr(const SharedPtr<Other>& other, std::enable_if_t<std::is_convertible_v<Other*, Class*>>* = nullptr) noexcept
      : object_(retained(static_cast<Class*>(other.get()))) {}
  template <class Other>
  SharedPtr(SharedPtr<Other>&& other, std::enable_if_t<std::is_convertible_v<Other*, Class*>>* = nullptr) noexcept
      : object_(other.get()) {
    other.detach();
  }
  ~SharedPtr() { reset(); }

  SharedPtr& operator=(const SharedPtr& other) { return take(SharedPtr(other)); }
  SharedPtr& operator=(SharedPtr&& other) { return take(SharedPtr(std::move(other))); }
  template <class Other>
  std::enable_if_t<std::is_convertible_v<Other*, Class*>, SharedPtr&> operator=(const SharedPtr<Other>& other) {
    return take(SharedPtr(other));
  }
  template <class Other>
  std::enable_if_t<std::is_convertible_v<Other*, Class*>, SharedPtr&> operator=(SharedPtr<Other>&& other) {
    return take(SharedPtr(std::move(other)));
  }

  Class* get() const { return object_; }
  Class* operator->() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }
  void reset() {
    if (Class* object = std::exchange(object_, nullptr))
      object->release();
  }
  /// Forgets the object without releasing it.
  void detach() { object_ = nullptr; }

private:
  SharedPtr& take(SharedPtr other) {
    std::swap(object_, other.object_);
    return *this;
  }
  static Class* retained(Class* object) {
    if (object)
      object->retain();
    return object;
  }
  template <class Other>
  friend SharedPtr<Other> RetainPtr(Other* object);
  template <class Other>
  friend SharedPtr<Other> TransferPtr(Other* object);

  Class* object_ = nullptr;
};

/// Shares an object that somebody else owns.
template <class Class>
SharedPtr<Class> RetainPtr(Class* object) {
  SharedPtr<Class> pointer;
  pointer.object_ = SharedPtr<Class>::retained(object);
  return pointer;
}

/// Takes over a reference that the caller owns (the result of `new...`, `alloc` or `copy...`).
template <class Class>
SharedPtr<Class> TransferPtr(Class* object) {
  SharedPtr<Class> pointer;
  pointer.object_ = object;
  return pointer;
}

} // namespace NS

// Outside of NS, as in metal-cpp: code in a namespace with an operator== of its own must say `using ::operator==`.
template <class Left, class Right>
bool operator==(const NS::SharedPtr<Left>& left, const NS::SharedPtr<Right>& right) {
  return left.get() == right.get();
}

template <class Left, class Right>
bool operator!=(const NS::SharedPtr<Left>& left, const NS::SharedPtr<Right>& right) {
  return left.get() != right.get();
}

namespace metal_sim {
/// The one immortal string of a literal's text.
NS::String* constant_string(const char* text);
} // namespace metal_sim

/// An NS::String* from a string literal; never released.
#define MTLSTR(literal) metal_sim::constant_string("" literal "")
