"""Writes the text of a translated source for the `cuda` engine: one file that NVRTC compiles without any other.

It begins with what the engine must know before it compiles anything, one comment line each:

    //! constant INDEX TYPE required|optional NAME    a function constant, of every kernel; TYPE: its MTL::DataType
    //! kernel NAME                    a kernel; the lines up to the next one are its arguments, in order
    //! buffer INDEX read|write ARG    memory of the device, bound with setBuffer
    //! value INDEX read ARG           a constant, bound with setBytes and passed by value
    //! threadgroup INDEX write ARG    threadgroup memory

An entry point is compiled where METAL_SIM_ENTRY_<NAME> or METAL_SIM_ALL_ENTRIES is defined: the engine compiles each
kernel alone, when it is first used. A function constant has the value METAL_SIM_CONSTANT_<INDEX>, 32 bits, where that
is defined.
"""

from __future__ import annotations

import re
from pathlib import Path

from msl_reader import (
    CONSTANT_TYPES,
    CONTEXT_COORDINATES,
    CONTEXT_NUMBERS,
    FunctionConstant,
    Instance,
    Parameter,
    Source,
    Waits,
)

MSL = Path(__file__).resolve().parent / "msl"
INCLUDE = re.compile(r'^\s*#\s*include\s+["<](?P<name>[^">]+)[">]')
PRAGMA_ONCE = re.compile(r"^\s*#\s*pragma\s+once\b")
# Included wherever they are named, not once.
REPEATED = {"vector_names.h"}


def inline(path: Path, seen: set[Path]) -> str:
    """The text of a header with the headers that it includes in their places, each once.

    A name that is no file of MSL's folder stays: it stands in a part that METAL_SIM_CUDA leaves out.
    """
    seen.add(path)
    lines = [f'#line 1 "msl/{path.name}"']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = INCLUDE.match(line)
        target = (path.parent / match["name"]).resolve() if match else None
        if PRAGMA_ONCE.match(line):
            lines.append("")
        elif target is None or not target.is_file():
            lines.append(line)
        elif target not in seen or target.name in REPEATED:
            lines += [inline(target, seen), f'#line {number + 1} "msl/{path.name}"']
        else:
            lines.append("")
    return "\n".join(lines)


def bound(instance: Instance) -> list[Parameter]:
    return [one for one in instance.kernel.parameters if one.attribute.name in ("buffer", "threadgroup")]


def description(instance: Instance) -> str:
    """The comment lines of one kernel."""
    lines = [f"//! kernel {instance.host_name}"]
    for parameter in bound(instance):
        read_only = "const" in parameter.words or "constant" in parameter.words
        access = "read" if read_only else "write"
        lines.append(f"//! {parameter.kind} {parameter.attribute.value} {access} {parameter.name}")
    return "\n".join(lines)


def constant_description(constant: FunctionConstant) -> str:
    need = "required" if constant.required else "optional"
    return f"//! constant {constant.index} {CONSTANT_TYPES[constant.type]} {need} {constant.name}\n"


def constant_default(constant: FunctionConstant) -> str:
    """What a function constant is where the engine does not define it."""
    macro = f"METAL_SIM_CONSTANT_{constant.index}"
    return f"""#ifdef {macro}
#define {macro}_IS_DEFINED true
#else
#define {macro} 0
#define {macro}_IS_DEFINED false
#endif
"""


def launch_bounds(instance: Instance, body: str) -> str:
    """What the compiler is told of a kernel's threadgroups: threads and, where the source has a constant (template)
    KERNEL_least_threadgroups, how many a multiprocessor is to run at a time. It then takes all registers that these
    leave it; otherwise fewer, and instructions wait for each other."""
    kernel = instance.kernel
    least = f"{kernel.name}_least_threadgroups"
    if not re.search(rf"\b{least}\b", body):
        return kernel.max_threads
    return f"{kernel.max_threads}, {least}{instance.function.removeprefix(kernel.name)}"


def entry_point(number: int, instance: Instance, body: str) -> str:
    """The kernel that the GPU runs: unpacks its parameters and calls the translated function for one thread."""
    parameters, call = [], []
    for place, parameter in enumerate(instance.kernel.parameters):
        attribute = parameter.attribute
        own_type = f"Parameters{number}::Type<{place}>"
        if attribute.name in CONTEXT_COORDINATES:
            call.append(f"P::coordinates<{place}>({CONTEXT_COORDINATES[attribute.name]})")
        elif attribute.name in CONTEXT_NUMBERS:
            call.append(f"P::number<{place}>({CONTEXT_NUMBERS[attribute.name]})")
        elif parameter.kind == "threadgroup":
            parameters.append(f"uint32_t argument{place}")
            call.append(f"P::bind<{place}>(metal_sim::cuda_threadgroup_memory(argument{place}))")
        else:
            by_value = "const __grid_constant__ " if parameter.kind == "value" else ""
            parameters.append(f"{by_value}metal_sim::EntryParameter<{own_type}>::type argument{place}")
            call.append(f"argument{place}")
    parameters.append("const __grid_constant__ metal_sim::LaunchGrid launch")
    name = instance.host_name
    wait = "\n  metal_sim::wait_for_previous_kernel();"
    at_entry = wait if instance.kernel.waits is Waits.AT_ENTRY else ""
    # What comes after a kernel that has not waited would not wait for what came before it.
    at_end = wait if instance.kernel.waits is Waits.PERHAPS_INSIDE else ""
    separator = ",\n    "
    return f"""
#if defined(METAL_SIM_ENTRY_{name}) || defined(METAL_SIM_ALL_ENTRIES)
namespace metal_sim_kernels {{
using Parameters{number} = metal_sim::Parameters<decltype(&{instance.function})>;
extern "C" __global__ void __launch_bounds__({launch_bounds(instance, body)}) {name}(
    {separator.join(parameters)}) {{
  using P [[maybe_unused]] = Parameters{number};{at_entry}
  [[maybe_unused]] const metal_sim::ThreadContext context = metal_sim::cuda_context(launch);
  {instance.function}({separator.join(call)});{at_end}
}}
}} // namespace metal_sim_kernels
#endif
"""


def emit(source: Source, name: str) -> str:
    """The whole text for the source file `name`."""
    seen: set[Path] = set()
    wanted = ["metal_stdlib", *(header for header in source.headers if header.startswith("metal_"))]
    prelude = "\n".join(inline(MSL / header, seen) for header in dict.fromkeys(wanted) if MSL / header not in seen)
    keywords, entry = inline(MSL / "keywords.h", seen), inline(MSL / "entry.h", seen)
    descriptions = "".join(constant_description(one) for one in source.constants)
    descriptions += "\n".join(description(instance) for instance in source.instances)
    constants = "".join(constant_default(one) for one in source.constants)
    entries = "".join(entry_point(number, instance, source.body) for number, instance in enumerate(source.instances))
    return f"""{descriptions}
// Translated from {name} by translate.py.
{prelude}
{constants}{keywords}
namespace metal_sim_kernels {{
{source.body}
}} // namespace metal_sim_kernels
{entry}
#line 1 "{name} (entry points)"
{entries}"""
