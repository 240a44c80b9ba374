// uint2, packed_float3, ...: declared in whatever namespace includes this.

#define METAL_SIM_VECTOR_NAMES(T)                                                                                      \
  using T##2 = metal::vec<T, 2>;                                                                                       \
  using T##3 = metal::vec<T, 3>;                                                                                       \
  using T##4 = metal::vec<T, 4>;                                                                                       \
  using packed_##T##2 = metal::packed_vec<T, 2>;                                                                       \
  using packed_##T##3 = metal::packed_vec<T, 3>;                                                                       \
  using packed_##T##4 = metal::packed_vec<T, 4>;
METAL_SIM_VECTOR_NAMES(bool)
METAL_SIM_VECTOR_NAMES(char)
METAL_SIM_VECTOR_NAMES(uchar)
METAL_SIM_VECTOR_NAMES(short)
METAL_SIM_VECTOR_NAMES(ushort)
METAL_SIM_VECTOR_NAMES(int)
METAL_SIM_VECTOR_NAMES(uint)
METAL_SIM_VECTOR_NAMES(long)
METAL_SIM_VECTOR_NAMES(ulong)
METAL_SIM_VECTOR_NAMES(half)
METAL_SIM_VECTOR_NAMES(bfloat)
METAL_SIM_VECTOR_NAMES(float)
#undef METAL_SIM_VECTOR_NAMES
