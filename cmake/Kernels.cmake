# metal_moe.metallib: the kernels, compiled for every engine and processor level of the stand-in for Metal.
#
# Each .metal source is translated to C++ (csrc/sim/translate.py) and compiled once per library; a library is one shared
# object named after its engine and level. Clang compiles the kernels where it is installed (its vectoriser knows fp16),
# whatever compiles the rest.
#
# For the cuda engine the metallib holds the translated sources.
#
#   METAL_MOE_KERNEL_COMPILER  compiler of the kernels
#   METAL_MOE_CPU_LEVELS       processor levels of the native engine
#
# Sets METAL_MOE_METALLIB, the folder, and METAL_MOE_COMPILED_LEVELS; target metal_moe_kernels builds all of it.

find_program(METAL_MOE_CLANG NAMES clang++-22 clang++-21 clang++-20 clang++-19 clang++-18 clang++-17 clang++-16 clang++-15
                                   clang++-14 clang++)
mark_as_advanced(METAL_MOE_CLANG)

set(_translator "${PROJECT_SOURCE_DIR}/csrc/sim/translate.py")
set(_msl "${PROJECT_SOURCE_DIR}/csrc/sim/msl")
set(_reader "${PROJECT_SOURCE_DIR}/csrc/sim/msl_reader.py")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_translator}")

# Whether `compiler` makes objects of kernels: `half` came to clang for x86-64 in version 15, to g++ in 12.
function(_metal_moe_compiles result compiler)
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/kernels/probe.cpp")
  file(WRITE "${probe}" "#include \"scalar.h\"\n#include <string.h>\nvoid probe(float x, half* to) { *to = half(x); }\n")
  execute_process(COMMAND "${compiler}" -std=c++20 -DMETAL_SIM_NATIVE=1 -DSIMD_WIDTH=1 -I "${_msl}" ${ARGN} -c "${probe}" -o "${probe}.o" RESULT_VARIABLE status OUTPUT_QUIET
                  ERROR_QUIET)
  if(status EQUAL 0)
    set(${result} TRUE PARENT_SCOPE)
  else()
    set(${result} FALSE PARENT_SCOPE)
  endif()
endfunction()

if(NOT METAL_MOE_KERNEL_COMPILER)
  set(_compiler "${CMAKE_CXX_COMPILER}")
  # Another target needs flags that only the C++ compiler of the build is known to have.
  if(METAL_MOE_CLANG AND NOT CMAKE_CROSSCOMPILING)
    _metal_moe_compiles(_works "${METAL_MOE_CLANG}")
    if(_works)
      set(_compiler "${METAL_MOE_CLANG}")
    endif()
  endif()
  set(METAL_MOE_KERNEL_COMPILER "${_compiler}" CACHE FILEPATH "Compiler of the kernels")
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(_levels x86-64-v2 x86-64-v3 x86-64-v4 x86-64-v4-bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(_levels arm64 arm64-bf16)
else()
  message(FATAL_ERROR "The stand-in for Metal runs on x86-64 and arm64, not on ${CMAKE_SYSTEM_PROCESSOR}.")
endif()
list(GET _levels 0 METAL_MOE_BASELINE_LEVEL)
set(METAL_MOE_CPU_LEVELS "${_levels}" CACHE STRING "Processor levels that the native engine's kernels are compiled for")

# The compiler's flags for an engine and level, as the translator has them.
function(_metal_sim_flags result engine level)
  execute_process(COMMAND "${Python_EXECUTABLE}" "${_translator}" --engine ${engine} --level ${level} --compiler
                          "${METAL_MOE_KERNEL_COMPILER}" --print-flags OUTPUT_VARIABLE flags COMMAND_ERROR_IS_FATAL ANY
                  OUTPUT_STRIP_TRAILING_WHITESPACE)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  set(${result} "${flags}" PARENT_SCOPE)
endfunction()

# metal_sim_kernel_library(target NAME <native-LEVEL|exact> SOURCES <.metal>... [LEVEL <level>] [INCLUDES <folder>...]
#                          [DIRECTORY <folder>])
#
# Target that translates and compiles the sources, and links them to DIRECTORY/NAME.so. LEVEL is the processor level of
# `exact`; the name says that of `native`.
function(metal_sim_kernel_library target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "NAME;LEVEL;DIRECTORY" "SOURCES;INCLUDES")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_NAME OR NOT arg_SOURCES)
    message(FATAL_ERROR "metal_sim_kernel_library(${target}): NAME and SOURCES are needed, nothing else: "
                        "${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(arg_NAME MATCHES "^native-(.+)$")
    set(engine native)
    set(level "${CMAKE_MATCH_1}")
    set(definitions METAL_SIM_NATIVE=1 SIMD_WIDTH=1)
  elseif(arg_NAME STREQUAL "exact")
    set(engine exact)
    set(level "${METAL_MOE_BASELINE_LEVEL}")
    set(definitions METAL_SIM_EXACT=1 SIMD_WIDTH=32)
  else()
    message(FATAL_ERROR "metal_sim_kernel_library(${target}): NAME is '${arg_NAME}', must be native-LEVEL or exact")
  endif()
  if(arg_LEVEL)
    set(level "${arg_LEVEL}")
  endif()
  if(NOT arg_DIRECTORY)
    set(arg_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}")
  endif()

  set(translate "${Python_EXECUTABLE}" "${_translator}" --engine ${engine} --level ${level} --compiler
                "${METAL_MOE_KERNEL_COMPILER}")
  _metal_sim_flags(flags ${engine} ${level})
  set(includes "")
  foreach(folder IN LISTS arg_INCLUDES)
    list(APPEND includes -I "${folder}")
  endforeach()
  set(objects "")
  foreach(source IN LISTS arg_SOURCES)
    cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}")
    cmake_path(GET source STEM name)
    set(base "${CMAKE_CURRENT_BINARY_DIR}/kernels/${target}/${name}")
    add_custom_command(
      OUTPUT "${base}.cpp"
      COMMAND ${translate} ${includes} --depfile "${base}.cpp.d" "${source}" -o "${base}.cpp"
      DEPENDS "${source}" "${_translator}" "${_reader}"
      DEPFILE "${base}.cpp.d"
      COMMENT "Translating ${name}.metal for ${arg_NAME}"
      VERBATIM)
    add_custom_command(
      OUTPUT "${base}.o"
      COMMAND "${METAL_MOE_KERNEL_COMPILER}" ${flags} -I "${_msl}" -MD -MF "${base}.o.d" -MT "${base}.o" -c "${base}.cpp" -o
              "${base}.o"
      DEPENDS "${base}.cpp"
      DEPFILE "${base}.o.d"
      COMMENT "Compiling ${name}.metal for ${arg_NAME}"
      VERBATIM)
    list(APPEND objects "${base}.o")
  endforeach()
  file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/kernels/${target}")

  add_library(${target} MODULE ${objects} "${_msl}/kernel_table.cpp")
  if(engine STREQUAL "exact")
    target_sources(${target} PRIVATE "${_msl}/exact_support.cpp")
  endif()
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  set_target_properties(
    ${target}
    PROPERTIES PREFIX ""
               SUFFIX ".so"
               OUTPUT_NAME "${arg_NAME}"
               LIBRARY_OUTPUT_DIRECTORY "${arg_DIRECTORY}"
               LINKER_LANGUAGE CXX
               CXX_VISIBILITY_PRESET hidden
               INTERPROCEDURAL_OPTIMIZATION OFF)
  target_compile_features(${target} PRIVATE cxx_std_20)
  target_compile_definitions(${target} PRIVATE ${definitions} "METAL_SIM_LEVEL=\"${level}\"")
  target_link_options(${target} PRIVATE -Wl,-z,defs -Wl,--as-needed -Wl,-z,start-stop-visibility=hidden)
  target_link_libraries(${target} PRIVATE m)
endfunction()

set(METAL_MOE_METALLIB "${PROJECT_BINARY_DIR}/metal_moe.metallib")
add_custom_target(metal_moe_kernels ALL)
file(GLOB _sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/kernels/*/*.metal")

# Levels that this compiler knows.
set(METAL_MOE_COMPILED_LEVELS "")
foreach(_level IN LISTS METAL_MOE_CPU_LEVELS)
  _metal_sim_flags(_flags native "${_level}")
  _metal_moe_compiles(_works "${METAL_MOE_KERNEL_COMPILER}" ${_flags})
  if(_works)
    list(APPEND METAL_MOE_COMPILED_LEVELS "${_level}")
  else()
    message(STATUS "Kernels: ${METAL_MOE_KERNEL_COMPILER} does not compile for ${_level}; left out")
  endif()
endforeach()
if(NOT METAL_MOE_COMPILED_LEVELS)
  message(FATAL_ERROR "${METAL_MOE_KERNEL_COMPILER} compiles kernels for none of: ${METAL_MOE_CPU_LEVELS}. "
                      "g++ 12 or clang 15 can; METAL_MOE_KERNEL_COMPILER chooses another.")
endif()
message(STATUS "Kernels: ${METAL_MOE_KERNEL_COMPILER}, levels ${METAL_MOE_COMPILED_LEVELS}")

foreach(_level IN LISTS METAL_MOE_COMPILED_LEVELS ITEMS exact)
  set(_library "${_level}")
  if(NOT _level STREQUAL "exact")
    set(_library "native-${_level}")
  endif()
  string(MAKE_C_IDENTIFIER "metal_moe_kernels_${_library}" _target)
  metal_sim_kernel_library(${_target} NAME "${_library}" SOURCES ${_sources} INCLUDES "${PROJECT_SOURCE_DIR}/kernels" DIRECTORY
                           "${METAL_MOE_METALLIB}")
  add_dependencies(metal_moe_kernels ${_target})
endforeach()

# The cuda engine compiles translated sources where it runs: they lie in the metallib as text.
file(GLOB _headers CONFIGURE_DEPENDS "${_msl}/*")
set(_texts "")
foreach(_source IN LISTS _sources)
  cmake_path(GET _source STEM _name)
  set(_text "${METAL_MOE_METALLIB}/cuda/${_name}.cu")
  add_custom_command(
    OUTPUT "${_text}"
    COMMAND "${Python_EXECUTABLE}" "${_translator}" --engine cuda --compiler "${METAL_MOE_KERNEL_COMPILER}" -I
            "${PROJECT_SOURCE_DIR}/kernels" --depfile "${CMAKE_CURRENT_BINARY_DIR}/kernels/${_name}.cu.d" "${_source}" -o "${_text}"
    DEPENDS "${_source}" "${_translator}" "${_reader}" "${PROJECT_SOURCE_DIR}/csrc/sim/cuda_source.py" ${_headers}
            "${PROJECT_SOURCE_DIR}/csrc/sim/kernel_library.h"
    DEPFILE "${CMAKE_CURRENT_BINARY_DIR}/kernels/${_name}.cu.d"
    COMMENT "Translating ${_name}.metal for cuda"
    VERBATIM)
  list(APPEND _texts "${_text}")
endforeach()
file(MAKE_DIRECTORY "${METAL_MOE_METALLIB}/cuda" "${CMAKE_CURRENT_BINARY_DIR}/kernels")
add_custom_target(metal_moe_cuda_sources DEPENDS ${_texts})
add_dependencies(metal_moe_kernels metal_moe_cuda_sources)
