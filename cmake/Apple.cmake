# macOS: Metal through Apple's metal-cpp, PyTorch's MPS backend, and the kernels.
#
#   METAL_CPP_DIR        folder of metal-cpp (holds Metal/Metal.hpp); default: the one that the mlx-metal package carries
#   METAL_MOE_TORCH_DIR  folder of the `torch` package; default: the one that the interpreter imports
#   METAL_MOE_METAL      OFF: embed the kernels' sources even where Metal's compiler is installed
#
# Defines the targets metal_cpp and torch_mps, and metal_moe_kernels with METAL_MOE_METALLIB (METAL_MOE_METALLIB_IS_FILE: a
# compiled library, otherwise a folder of sources); METAL_MOE_BUILD_RECORD is a Python module that says what it was built
# with.
set(METAL_CPP_DIR "" CACHE PATH "Folder of metal-cpp")
set(METAL_MOE_TORCH_DIR "" CACHE PATH "Folder of the torch package")
option(METAL_MOE_METAL "Compile the kernels at build time, where Metal's compiler is installed" ON)

if(CMAKE_OSX_DEPLOYMENT_TARGET)
  set(METAL_MOE_MINIMUM_MACOS "${CMAKE_OSX_DEPLOYMENT_TARGET}")
else()
  message(FATAL_ERROR "CMAKE_OSX_DEPLOYMENT_TARGET is not set.") # the project sets it before it begins
endif()

# A folder inside an installed Python distribution that holds `file`; empty where there is none.
function(_metal_moe_find_package_folder result distribution file)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c [[
import importlib.metadata, pathlib, sys
distribution, wanted = sys.argv[1:]
try:
    files = importlib.metadata.files(distribution) or []
except importlib.metadata.PackageNotFoundError:
    files = []
for file in files:
    if str(file).endswith(wanted):
        print(str(pathlib.Path(file.locate()).resolve())[: -len(wanted) - 1])
        break
]] ${distribution} ${file} OUTPUT_VARIABLE folder COMMAND_ERROR_IS_FATAL ANY OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()

if(NOT METAL_CPP_DIR)
  _metal_moe_find_package_folder(_found mlx-metal Metal/Metal.hpp)
  set(METAL_CPP_DIR "${_found}" CACHE PATH "Folder of metal-cpp" FORCE)
endif()
if(NOT EXISTS "${METAL_CPP_DIR}/Metal/Metal.hpp")
  message(FATAL_ERROR "metal-cpp is missing: '${METAL_CPP_DIR}/Metal/Metal.hpp' does not exist. `pip install mlx-metal` brings it, "
                      "or -DMETAL_CPP_DIR= names its folder.")
endif()
if(NOT METAL_MOE_TORCH_DIR)
  _metal_moe_find_package_folder(_found torch include/ATen/mps/MPSStream.h)
  set(METAL_MOE_TORCH_DIR "${_found}" CACHE PATH "Folder of the torch package" FORCE)
endif()
if(NOT EXISTS "${METAL_MOE_TORCH_DIR}/include/ATen/mps/MPSStream.h")
  message(FATAL_ERROR "PyTorch with its MPS headers is missing: '${METAL_MOE_TORCH_DIR}/include/ATen/mps/MPSStream.h' does not "
                      "exist. Install torch for the interpreter that builds, or name its folder with -DMETAL_MOE_TORCH_DIR=.")
endif()

add_library(metal_cpp INTERFACE)
target_include_directories(metal_cpp SYSTEM INTERFACE "${METAL_CPP_DIR}")
target_compile_features(metal_cpp INTERFACE cxx_std_20)
# Messages of the extension name its files, not folders of the machine that built it.
target_compile_options(metal_cpp INTERFACE "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=" "-ffile-prefix-map=${METAL_MOE_TORCH_DIR}/=torch/")
# Other extensions of the process may carry metal-cpp as well: each keeps its own tables.
target_compile_definitions(metal_cpp INTERFACE METALCPP_SYMBOL_VISIBILITY_HIDDEN)
target_link_libraries(metal_cpp INTERFACE "-framework Foundation" "-framework Metal" objc)

# PyTorch's C++ side, of exactly the version that the extension will be loaded with. Found by the dynamic loader beside
# the package, or already loaded: metal_moe imports torch first.
add_library(torch_mps INTERFACE)
target_include_directories(torch_mps SYSTEM INTERFACE "${METAL_MOE_TORCH_DIR}/include"
                           "${METAL_MOE_TORCH_DIR}/include/torch/csrc/api/include")
foreach(_library torch_python torch_cpu c10)
  target_link_libraries(torch_mps INTERFACE "${METAL_MOE_TORCH_DIR}/lib/lib${_library}.dylib")
endforeach()
set(METAL_MOE_TORCH_RPATH "@loader_path/../torch/lib") # from metal_moe/_core.so

# --- The kernels ---
file(GLOB _sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/kernels/*/*.metal")
file(GLOB_RECURSE _headers CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/kernels/*.h")
set(METAL_MOE_METALLIB "${PROJECT_BINARY_DIR}/metal_moe.metallib")
set(METAL_MOE_METALLIB_IS_FILE FALSE)
set(_work "${CMAKE_CURRENT_BINARY_DIR}/kernels")
file(MAKE_DIRECTORY "${_work}")

# Language 3.1 has bfloat and runs on macOS 14. Without fast math, as the sources at run time: kernels tell NaN from
# numbers. A warning is an error; a compiler that knows more warnings than ours can be given other flags.
set(METAL_MOE_METAL_WARNINGS -Wall -Wextra -Werror CACHE STRING "Warning flags of Metal's compiler")
set(_metal_flags -std=metal3.1 -O3 -fno-fast-math "-mmacosx-version-min=${METAL_MOE_MINIMUM_MACOS}" ${METAL_MOE_METAL_WARNINGS})

# Xcode 26 and later have `metal` as a stub until the Metal toolchain is downloaded: only compiling something tells.
find_program(METAL_MOE_XCRUN xcrun)
mark_as_advanced(METAL_MOE_XCRUN)
set(_metal "${METAL_MOE_XCRUN}" -sdk macosx metal)
set(_has_metal FALSE)
if(METAL_MOE_METAL AND METAL_MOE_XCRUN)
  file(WRITE "${_work}/probe.metal" "#include <metal_stdlib>\nkernel void probe(device bfloat* p [[buffer(0)]]) { p[0] = bfloat(1.0f); }\n")
  execute_process(COMMAND ${_metal} ${_metal_flags} -c "${_work}/probe.metal" -o "${_work}/probe.air" RESULT_VARIABLE _status
                  OUTPUT_VARIABLE _said ERROR_VARIABLE _said)
  if(_status EQUAL 0)
    set(_has_metal TRUE)
  endif()
elseif(METAL_MOE_METAL)
  set(_said "xcrun is not installed")
else()
  set(_said "METAL_MOE_METAL is OFF")
endif()

if(_has_metal)
  message(STATUS "Kernels: compiled by ${METAL_MOE_XCRUN} metal ${_metal_flags}")
  set(METAL_MOE_METALLIB_IS_FILE TRUE)
  set(_objects "")
  foreach(_source IN LISTS _sources)
    cmake_path(GET _source STEM _name)
    add_custom_command(
      OUTPUT "${_work}/${_name}.air"
      COMMAND ${_metal} ${_metal_flags} -I "${PROJECT_SOURCE_DIR}/kernels" -c "${_source}" -o "${_work}/${_name}.air"
      DEPENDS "${_source}" ${_headers}
      COMMENT "Compiling ${_name}.metal"
      VERBATIM)
    list(APPEND _objects "${_work}/${_name}.air")
  endforeach()
  add_custom_command(
    OUTPUT "${METAL_MOE_METALLIB}"
    COMMAND ${_metal} -o "${METAL_MOE_METALLIB}" ${_objects}
    DEPENDS ${_objects}
    COMMENT "Linking metal_moe.metallib"
    VERBATIM)
  add_custom_target(metal_moe_kernels ALL DEPENDS "${METAL_MOE_METALLIB}")
else()
  string(STRIP "${_said}" _said)
  message(STATUS "Kernels: Metal's compiler does not run (${_said}). Their sources are embedded instead and compiled when first "
                 "used, which takes seconds once. `xcodebuild -downloadComponent MetalToolchain` installs the compiler "
                 "(Xcode 26 and later; it comes with older ones).")
  set(_embed "${PROJECT_SOURCE_DIR}/cmake/metal_source.py")
  set(_texts "")
  file(MAKE_DIRECTORY "${METAL_MOE_METALLIB}")
  foreach(_source IN LISTS _sources)
    cmake_path(GET _source STEM _name)
    set(_text "${METAL_MOE_METALLIB}/${_name}.metal")
    add_custom_command(
      OUTPUT "${_text}"
      COMMAND "${Python_EXECUTABLE}" "${_embed}" --compiler "${CMAKE_CXX_COMPILER}" -I "${PROJECT_SOURCE_DIR}/kernels" "${_source}" -o
              "${_text}"
      DEPENDS "${_source}" ${_headers} "${_embed}" "${PROJECT_SOURCE_DIR}/csrc/sim/translate.py"
              "${PROJECT_SOURCE_DIR}/csrc/sim/msl_reader.py"
      COMMENT "Embedding ${_name}.metal"
      VERBATIM)
    list(APPEND _texts "${_text}")
  endforeach()
  add_custom_target(metal_moe_kernels ALL DEPENDS ${_texts})
endif()

# --- What the extension was built with, for the check when it is imported ---
file(STRINGS "${METAL_MOE_TORCH_DIR}/version.py" _version REGEX "^__version__ = ")
string(REGEX MATCH "[0-9]+\\.[0-9]+[^'\"+]*" METAL_MOE_TORCH_VERSION "${_version}")
if(NOT METAL_MOE_TORCH_VERSION)
  message(FATAL_ERROR "${METAL_MOE_TORCH_DIR}/version.py gives no version of PyTorch")
endif()
set(METAL_MOE_BUILD_RECORD "${PROJECT_BINARY_DIR}/_build.py")
file(CONFIGURE OUTPUT "${METAL_MOE_BUILD_RECORD}" CONTENT [[
"""What the extension was built with; written by CMake."""

TORCH_VERSION = "@METAL_MOE_TORCH_VERSION@"
MINIMUM_MACOS = "@METAL_MOE_MINIMUM_MACOS@"
]] @ONLY)
message(STATUS "PyTorch ${METAL_MOE_TORCH_VERSION} in ${METAL_MOE_TORCH_DIR}, metal-cpp in ${METAL_CPP_DIR}")
