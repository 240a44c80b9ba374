// DLPack's C interface between tensor libraries (https://dmlc.github.io/dlpack, version 1), as far as it is used here:
// what a tensor is, read from the object that PyTorch has, without a Python object for each size.
//
// A type offers it as attribute __dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api"; torch.Tensor does
// from PyTorch 2.10 on.
#pragma once

#include <cstdint>

namespace metal_moe::bindings::dlpack {

constexpr const char* CAPSULE = "dlpack_exchange_api";
constexpr const char* ATTRIBUTE = "__dlpack_c_exchange_api__";
constexpr uint32_t MAJOR_VERSION = 1;

enum DeviceType : int32_t { CPU = 1, CUDA = 2, METAL = 8 };
enum TypeCode : uint8_t { INT = 0, FLOAT = 2, BFLOAT = 4 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t* shape;
  int64_t* strides; // elements
  uint64_t byte_offset;
};

struct Header {
  uint32_t major, minor;
  const Header* previous; // of an older major version, or null
};

struct ExchangeApi {
  Header header;
  void (*allocate)(); // not used here, nor are the next two
  void (*export_owned)();
  void (*import_owned)();
  /// Describes `object`, which keeps what is pointed to. 0, or -1 with a Python error.
  int (*describe)(void* object, Tensor* out);
  void (*current_stream)(); // not used here
};

} // namespace metal_moe::bindings::dlpack
