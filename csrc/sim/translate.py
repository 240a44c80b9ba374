#!/usr/bin/env python3
"""Translates a Metal Shading Language source into C++ for an engine of the stand-in.

    python csrc/sim/translate.py --engine native --level x86-64-v4 -I kernels kernels/moe/route.metal -o route.cpp

The source is preprocessed by the host compiler, with empty headers for metal_stdlib and its friends. In what is left,
attributes are read and removed, explicit instantiations of kernels are read and removed, and an entry point is written
for each kernel: it takes the arguments that the engine bound and calls the kernel for one thread. The kernel's own text
stays as it was, with the preprocessor's line markers, so that the compiler's messages name the `.metal` file.

Compile the result with `-I csrc/sim/msl` and the same macros (`--print-flags` lists all flags); link the objects of a
library with those of msl/kernel_table.cpp and, for `exact`, msl/exact_support.cpp (cmake/Kernels.cmake does).

The result for `cuda` is one self-contained text, headers included, that the engine compiles with NVRTC where it runs:
cuda_source.py says how it is made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import cuda_source
from msl_reader import (
    CONSTANT_TYPES,
    CONTEXT_COORDINATES,
    CONTEXT_NUMBERS,
    SCAN,
    FunctionConstant,
    Instance,
    Source,
    Target,
    TranslationError,
    Waits,
    read,
)

METAL_VERSION = 310
SIMD_WIDTH = {"native": 1, "exact": 32, "cuda": 32}
# Compiler flags of a processor level, beyond the engine's.
LEVEL_FLAGS = {
    "x86-64-v2": ["-march=x86-64-v2"],
    "x86-64-v3": ["-march=x86-64-v3"],
    "x86-64-v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "x86-64-v4-bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
    "arm64": ["-march=armv8-a"],
    "arm64-bf16": ["-march=armv8.2-a+fp16+bf16+dotprod"],
    "generic": [],
}


def constant_table(constants: list[FunctionConstant]) -> str:
    """C++ of the list of a source's function constants, which all its kernels have."""
    lines = [
        f'    {{{one.index}, {CONSTANT_TYPES[one.type]}, {int(one.required)}, "{one.name}"}},\n' for one in constants
    ]
    table = f"const metal_sim::KernelConstant constant_table[] = {{\n{''.join(lines)}}};"
    return f"\nnamespace {{\n{table}\n}} // namespace\n" if constants else ""


def entry_point(number: int, instance: Instance, constants: int) -> str:
    """C++ of one kernel's entry point, argument table and registration. `constants`: how many its source has."""
    call, table = [], []
    for place, parameter in enumerate(instance.kernel.parameters):
        attribute = parameter.attribute
        if attribute.name in CONTEXT_COORDINATES:
            call.append(f"P::coordinates<{place}>({CONTEXT_COORDINATES[attribute.name]})")
        elif attribute.name in CONTEXT_NUMBERS:
            call.append(f"P::number<{place}>({CONTEXT_NUMBERS[attribute.name]})")
        else:
            bound = "buffers" if attribute.name == "buffer" else "threadgroup"
            kind = "Buffer" if attribute.name == "buffer" else "Threadgroup"
            call.append(f"P::bind<{place}>(arguments.{bound}[{attribute.value}])")
            table.append(
                f"    Parameters{number}::describe<{place}>(metal_sim::ArgumentKind::{kind}, {attribute.value}, "
                f'"{parameter.name}"),\n'
            )
    arguments = ",\n                ".join(call)
    values = "  metal_sim::constant_values = arguments.constants;\n" if constants else ""
    before = after = ""
    if instance.kernel.waits is not Waits.AT_ENTRY:
        before, after = (f"  METAL_SIM_WORK_AHEAD({ahead});\n" for ahead in ("true", "false"))
    constant_list = "constant_table" if constants else "nullptr"
    listing, count = "nullptr", len(table)
    declared = ""
    if table:
        listing = f"arguments{number}"
        declared = f"const metal_sim::KernelArgument {listing}[] = {{\n{''.join(table)}}};\n"
    return f"""
namespace {{
using Parameters{number} = metal_sim::Parameters<decltype(&{instance.function})>;
METAL_SIM_UNCHECKED void entry{number}([[maybe_unused]] const metal_sim::KernelArguments& arguments,
                                       [[maybe_unused]] const metal_sim::ThreadContext& context) {{
  using P [[maybe_unused]] = Parameters{number};
{values}{before}  {instance.function}({arguments});
{after}}}
{declared}}} // namespace
METAL_SIM_KERNEL({instance.host_name}, entry{number}, {listing}, {count}, {instance.kernel.max_threads},
                 {constant_list}, {constants})
"""


def emit(source: Source, path: str, output: str) -> str:
    """The C++ translation unit."""
    includes = "".join(f"#include <{name}>\n" for name in source.headers if name.startswith("metal_"))
    count = len(source.constants)
    entries = constant_table(source.constants)
    entries += "".join(entry_point(number, instance, count) for number, instance in enumerate(source.instances))
    return f"""// Translated from {path} by translate.py.
#include <metal_stdlib>
{includes}#include <keywords.h>
// Headers offer more than one source uses.
#pragma GCC diagnostic ignored "-Wunused-function"
#if defined(__clang__)
#pragma GCC diagnostic ignored "-Wunused-const-variable"
#endif
namespace {{
{source.body}
}} // namespace
# 1 "{output}"
#include <entry.h>
{entries}"""


def engine_macros(engine: str) -> list[str]:
    macros = [
        f"-D__METAL_VERSION__={METAL_VERSION}",
        f"-DMETAL_SIM_{engine.upper()}=1",
        f"-DSIMD_WIDTH={SIMD_WIDTH[engine]}",
    ]
    if engine == "cuda":  # known where the kernels are compiled for a GPU, after the preprocessor has been here
        macros += ["-DTHREADGROUP_BYTES=METAL_SIM_THREADGROUP_BYTES", "-DTHREADGROUP_PAD_BYTES=0"]
    return macros


def is_gcc(compiler: str) -> bool:
    command = [compiler, "-dM", "-E", "-x", "c++", "/dev/null"]
    return "__clang__" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_flags(compiler: str, engine: str, level: str) -> list[str]:
    """All flags that compile a translated source, without include paths."""
    gcc = is_gcc(compiler)
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fsigned-char"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", *LEVEL_FLAGS[level], *engine_macros(engine)]
    if engine == "native":
        # Vectors wider than the level's registers are split by the compiler; their ABI matters to nobody here.
        # g++ takes three times as long with -O3 where 512 bits are four registers; the oldest processors pay instead.
        optimization = "-O2" if gcc and level == "x86-64-v2" else "-O3"
        flags += [optimization, "-ffp-contract=fast", "-Wno-psabi"]
        # g++ 12 calls what its own AVX-512 header leaves undefined uninitialised; `exact` is compiled with the warning.
        return [*flags, "-Wno-uninitialized", "-Wno-maybe-uninitialized"] if gcc else flags
    # `exact` rounds every operation as a GPU would, and reports every memory access to the engine.
    flags += ["-O1", "-ffp-contract=off", "-fsanitize=thread"]
    if gcc:
        return [*flags, "-fexcess-precision=16", "--param=tsan-instrument-func-entry-exit=0"]
    return [*flags, "-mllvm", "-tsan-instrument-func-entry-exit=0"]


def preprocess(arguments: argparse.Namespace) -> str:
    command = [arguments.compiler, "-E", "-x", "c++", "-std=c++20", *LEVEL_FLAGS[arguments.level]]
    command += [*engine_macros(arguments.engine), "-I", str(SCAN)]
    for folder in arguments.include:
        command += ["-I", folder]
    command += [f"-D{macro}" for macro in arguments.define]
    if arguments.depfile:
        command += ["-MD", "-MF", arguments.depfile, "-MT", arguments.output]
    result = subprocess.run([*command, arguments.source], capture_output=True, text=True)
    if result.returncode:
        raise TranslationError(result.stderr.strip())
    return result.stdout


def translate(text: str, path: str, output: str, target: Target) -> str:
    """C++ for the preprocessed text of the source `path`."""
    source = read(text, path, target)
    return cuda_source.emit(source, Path(path).name) if target.engine == "cuda" else emit(source, path, output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="a .metal file")
    parser.add_argument("-o", "--output", help="the C++ file to write")
    parser.add_argument("--engine", choices=sorted(SIMD_WIDTH), required=True)
    parser.add_argument("--level", choices=sorted(LEVEL_FLAGS), default="generic", help="processor level")
    parser.add_argument("--compiler", default="c++", help="preprocesses the source, and compiles the result later")
    parser.add_argument("-I", "--include", action="append", default=[], metavar="FOLDER")
    parser.add_argument("-D", "--define", action="append", default=[], metavar="MACRO")
    parser.add_argument("--depfile", help="write the source's dependencies for make or ninja")
    parser.add_argument("--print-flags", action="store_true", help="print the flags that compile the result, and end")
    arguments = parser.parse_args()
    if arguments.print_flags:
        if arguments.engine == "cuda":
            parser.error("--print-flags: the cuda engine compiles with flags of its own (csrc/sim/cuda_compiler.cpp)")
        print(" ".join(compile_flags(arguments.compiler, arguments.engine, arguments.level)))
        return 0
    if not arguments.source or not arguments.output:
        parser.error("a source and --output are needed")
    try:
        target = Target(arguments.engine, is_gcc(arguments.compiler))
        code = translate(preprocess(arguments), arguments.source, arguments.output, target)
    except TranslationError as error:
        print(error, file=sys.stderr)
        return 1
    Path(arguments.output).write_text(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
