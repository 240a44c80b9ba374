"""The argument tables of kernels: what a parameter is bound to, how many of each there may be, and which types Metal
wants of its inputs. Reads the preprocessed source, with attributes; types in general are the compiler's affair."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import clang
from .clang import msl_reader
from .report import Finding

# Metal's argument tables: kind -> number of entries.
TABLES = {"buffer": 31, "texture": 128, "sampler": 16, "threadgroup": 31}
# Inputs of a kernel. Those of one set have one type (Metal's specification, "Attributes for kernel function input
# arguments"); positions and sizes may be scalars or vectors, vectors of one length in a kernel.
SAME_TYPE = [
    ("thread_position_in_grid", "threads_per_grid"),
    ("thread_position_in_threadgroup", "threads_per_threadgroup", "dispatch_threads_per_threadgroup"),
    (
        *("thread_index_in_simdgroup", "threads_per_simdgroup", "thread_execution_width"),
        *("simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup", "dispatch_simdgroups_per_threadgroup"),
        *("quadgroup_index_in_threadgroup", "quadgroups_per_threadgroup", "dispatch_quadgroups_per_threadgroup"),
    ),
]
# Two names of one thing, which no kernel may use both.
ALIASES = ("threads_per_simdgroup", "thread_execution_width")
COORDINATES = {*SAME_TYPE[0], *SAME_TYPE[1], "threadgroup_position_in_grid", "threadgroups_per_grid"}
NUMBERS = {*SAME_TYPE[2], "thread_index_in_threadgroup", "thread_index_in_quadgroup"}
INTEGERS = re.compile(r"^(?:metal::)?(?P<element>uint|ushort)(?P<length>[23]?)$")
ARRAY = re.compile(r"\barray<.*,(?P<count>\d+)u?>$")


@dataclass
class Parameter:
    """A parameter of a kernel: its type, its name, and the attributes that say what it is."""

    type: str
    token: msl_reader.Token
    attributes: list[msl_reader.Attribute]

    @property
    def name(self) -> str:
        return self.token.text

    @property
    def attribute(self) -> msl_reader.Attribute:
        return self.attributes[0]


@dataclass
class Kernel:
    """A kernel function. A template has no name in the library: its instances do."""

    token: msl_reader.Token
    is_template: bool
    has_host_name: bool
    parameters: list[Parameter]


@dataclass
class Kernels:
    """The kernel functions of a source, and the names that a library has for them."""

    functions: list[Kernel]
    names: list[tuple[str, msl_reader.Token]]


def read(text: str, source: str) -> Kernels:
    """The kernels of a preprocessed source."""
    tokens, headers = msl_reader.tokenize(text, source, msl_reader.Target("exact", False))
    reader = msl_reader.Reader(tokens, headers)
    attributes = reader.take_attributes()
    functions = list(_functions(reader, attributes))
    names = [(one.value, one.token) for found in attributes.values() for one in found if one.name == "host_name"]
    names += [(one.token.text, one.token) for one in functions if not one.is_template and not one.has_host_name]
    return Kernels(functions, sorted(names, key=lambda name: (name[1].file, name[1].line)))


def check(kernels: Kernels) -> list[Finding]:
    """Every broken rule of kernel parameters."""
    return [finding for one in kernels.functions for finding in _check(one.token.text, one.parameters)]


def finding_at(token: msl_reader.Token, message: str) -> Finding:
    """A finding where a token stands."""
    return Finding(clang.relative(token.file), token.line, message)


def _functions(reader: msl_reader.Reader, attributes: dict[int, list[msl_reader.Attribute]]) -> Iterator[Kernel]:
    tokens = reader.tokens
    code = [i for i, token in enumerate(tokens) if msl_reader.is_code(token)]
    start = place = depth = 0  # `start`: where the declaration begins
    while place < len(code):
        text = tokens[code[place]].text
        depth += {"{": 1, "}": -1}.get(text, 0)
        if depth == 0 and text in "};":
            start = place + 1
        if depth == 0 and text == "(" and place and tokens[code[place - 1]].kind == "name":
            end = code.index(msl_reader.matching(tokens, code[place], "(", ")"), place)
            first = code[start - 1] + 1 if start else 0
            own = {one.name for i, found in attributes.items() if first <= i < code[place] for one in found}
            words = {tokens[i].text for i in code[start:place]}
            if "kernel" in words | own and "decltype" not in words | {tokens[code[place - 1]].text}:
                parameters = _parameters(reader, attributes, code[place + 1 : end], code[end])
                yield Kernel(tokens[code[place - 1]], "template" in words, "host_name" in own, parameters)
            place = end
        place += 1


def _parameters(
    reader: msl_reader.Reader, attributes: dict[int, list[msl_reader.Attribute]], code: list[int], end: int
) -> list[Parameter]:
    pieces = msl_reader.split_commas([reader.tokens[i] for i in code])
    result, place = [], 0
    for number, piece in enumerate(pieces):
        last = place + len(piece) - 1
        following = code[last + 1] if number + 1 < len(pieces) else end
        own = [one for i, found in attributes.items() if code[place] <= i < following for one in found]
        place = last + 2
        type_text = msl_reader.join([token for token in piece[:-1] if token.text != "const"])
        result.append(Parameter(type_text, piece[-1], own))
    return result


def _check(kernel: str, parameters: list[Parameter]) -> Iterator[Finding]:
    for parameter in parameters:
        if len(parameter.attributes) != 1:
            message = f"parameter '{parameter.name}' needs one attribute, has {len(parameter.attributes)}"
            yield finding_at(parameter.token, f"kernel '{kernel}': {message}")
    bound = [one for one in parameters if len(one.attributes) == 1]
    yield from _check_tables(kernel, [one for one in bound if one.attribute.name in TABLES])
    yield from _check_inputs(kernel, [one for one in bound if one.attribute.name not in TABLES])


def _check_tables(kernel: str, parameters: list[Parameter]) -> Iterator[Finding]:
    taken: dict[tuple[str, int], str] = {}
    for parameter in parameters:
        attribute = parameter.attribute
        entry = f"kernel '{kernel}': '{parameter.name}' [[{attribute.name}({attribute.value})]]"
        if not attribute.value.isdigit():
            yield finding_at(attribute.token, f"{entry} has an index that is no number")
            continue
        array = ARRAY.search(parameter.type.replace(" ", ""))
        first, count, limit = int(attribute.value), int(array["count"]) if array else 1, TABLES[attribute.name]
        if first + count > limit:
            table = f"Metal's table of {limit} {attribute.name} arguments, 0..{limit - 1}"
            yield finding_at(attribute.token, f"{entry} is beyond {table}")
        others = [
            (index, taken.setdefault((attribute.name, index), parameter.name)) for index in range(first, first + count)
        ]
        for index, other in [one for one in others if one[1] != parameter.name][:1]:
            message = f"kernel '{kernel}': {attribute.name}({index}) is both '{other}' and '{parameter.name}'"
            yield finding_at(attribute.token, message)
        spaces = {"buffer": {"device", "constant"}, "threadgroup": {"threadgroup"}}.get(attribute.name)
        words = set(re.findall(r"\w+|[*&]", parameter.type))
        if spaces and not (words & spaces and words & {"*", "&"}):
            memory = f"must be a pointer or reference to {' or '.join(sorted(spaces, reverse=True))} memory"
            yield finding_at(attribute.token, f"{entry} {memory}")


def _check_inputs(kernel: str, parameters: list[Parameter]) -> Iterator[Finding]:
    inputs: dict[str, Parameter] = {}
    for parameter in parameters:
        attribute = parameter.attribute
        entry = f"kernel '{kernel}': '{parameter.name}' [[{attribute.name}]]"
        integers = INTEGERS.match(parameter.type)
        if attribute.name not in COORDINATES | NUMBERS:
            yield finding_at(attribute.token, f"{entry} has an attribute that is not one of a kernel's inputs")
        elif not integers or (attribute.name in NUMBERS and integers["length"]):
            vectors = "" if attribute.name in NUMBERS else ", or a vector of two or three of them"
            yield finding_at(attribute.token, f"{entry} is {parameter.type}; it must be uint or ushort{vectors}")
        else:
            inputs[attribute.name] = parameter
    for names in SAME_TYPE:
        yield from _check_equal(kernel, [inputs[name] for name in names if name in inputs], "have one type", str)
    vectors = [inputs[name] for name in inputs if name in COORDINATES and inputs[name].type[-1] in "23"]
    yield from _check_equal(kernel, vectors, "have the same number of components", lambda type_text: type_text[-1])
    position, index = inputs.get("thread_position_in_threadgroup"), inputs.get("thread_index_in_threadgroup")
    if position and index and position.type.startswith("uint") and index.type != "uint":
        message = f"kernel '{kernel}': '{index.name}' must be uint, as '{position.name}' is {position.type}"
        yield finding_at(index.attribute.token, message)
    if all(name in inputs for name in ALIASES):
        message = f"kernel '{kernel}': [[{ALIASES[0]}]] and [[{ALIASES[1]}]] are one input, which it may have once"
        yield finding_at(inputs[ALIASES[1]].attribute.token, message)


def _check_equal(kernel: str, inputs: list[Parameter], rule: str, key: Callable[[str], str]) -> Iterator[Finding]:
    for other in inputs[1:]:
        first = inputs[0]
        if key(other.type) != key(first.type):
            yield finding_at(
                other.attribute.token,
                f"kernel '{kernel}': [[{first.attribute.name}]] and [[{other.attribute.name}]] must {rule}, and "
                f"'{first.name}' is {first.type}, '{other.name}' is {other.type}",
            )
