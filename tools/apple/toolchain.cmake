# CMake toolchain: macOS on arm64 from Linux, with zig's clang and linker. tools/apple/sdk.py writes the programs that it
# names and the stubs that stand for Apple's SDK; METAL_MOE_APPLE_SDK is the folder of both.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_SYSTEM_VERSION 23) # macOS 14
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES METAL_MOE_APPLE_SDK)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)

set(CMAKE_C_COMPILER "${METAL_MOE_APPLE_SDK}/bin/cc")
set(CMAKE_CXX_COMPILER "${METAL_MOE_APPLE_SDK}/bin/c++")
set(CMAKE_OBJCXX_COMPILER "${METAL_MOE_APPLE_SDK}/bin/c++")
set(CMAKE_AR "${METAL_MOE_APPLE_SDK}/bin/ar")
set(CMAKE_RANLIB "${METAL_MOE_APPLE_SDK}/bin/ranlib")
set(CMAKE_INSTALL_NAME_TOOL true)
set(CMAKE_STRIP true)
set(CMAKE_OSX_SYSROOT "")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)

# The linker knows Objective-C's part of a file and the export trie, but no link-time optimisation.
set(CMAKE_INTERPROCEDURAL_OPTIMIZATION OFF)
