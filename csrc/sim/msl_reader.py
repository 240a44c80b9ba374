"""Reads preprocessed Metal Shading Language: finds kernels and their instantiations, and strips what C++ does not know.

Not a compiler: it follows brackets and declarations at the top level, reads attributes and the signatures of kernels,
and leaves everything else to the C++ compiler. What it does not understand is an error with the place in the source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

# Empty headers that stand for Metal's while a source is preprocessed.
SCAN = Path(__file__).resolve().parent / "msl" / "scan"
# [[attribute]] of a kernel parameter -> what an entry point reads it from: three coordinates, which the kernel declares
# as one to three integers, or a number.
CONTEXT_COORDINATES = {
    "thread_position_in_grid": "metal_sim::thread_position_in_grid(context)",
    "threads_per_grid": "metal_sim::threads_per_grid(context)",
    "threadgroup_position_in_grid": "context.threadgroup_position_in_grid",
    "thread_position_in_threadgroup": "context.thread_position_in_threadgroup",
    "threads_per_threadgroup": "context.threads_per_threadgroup",
    "dispatch_threads_per_threadgroup": "context.threads_per_threadgroup",
    "threadgroups_per_grid": "context.threadgroups_per_grid",
}
CONTEXT_NUMBERS = {
    "thread_index_in_threadgroup": "context.thread_index_in_threadgroup",
    "thread_index_in_simdgroup": "context.thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup": "context.simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup": "context.simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup": "context.simdgroups_per_threadgroup",
    "threads_per_simdgroup": "SIMD_WIDTH",
    "thread_execution_width": "SIMD_WIDTH",
}
# Attributes that mean the same to a C++ compiler, and stay.
KEPT_ATTRIBUTES = {"maybe_unused", "nodiscard", "fallthrough", "likely", "unlikely", "noreturn", "deprecated"}
MAX_ARGUMENT_INDEX = {"buffer": 30, "threadgroup": 30}
# Types that function constants may have here -> number of their MTL::DataType.
CONSTANT_TYPES = {"float": 3, "int": 29, "uint": 33, "short": 37, "ushort": 41, "char": 45, "uchar": 49, "bool": 53}
MAX_CONSTANT_INDEX = 65535
IS_DEFINED = "is_function_constant_defined"
DEFAULT_MAX_THREADS = "1024"
# Called by kernels that begin before the kernel in front of them has ended: kernels/tiles/early_start.h.
WAIT = "wait_for_previous_kernel"
# g++ has no "unroll fully": it does for loops of at most as many rounds as it is told.
GCC_FULL_UNROLL = 16

TOKEN = re.compile(
    r"""(?P<marker>^\#[ ]*(?:line[ ]+)?(?P<line>\d+)(?:[ ]+"(?P<file>(?:[^"\\]|\\.)*)")?[^\n]*$)
      | (?P<directive>^[ \t]*\#[^\n]*$)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<newline>\n)
      | (?P<space>[ \t\r\f\v]+|/\*.*?\*/|//[^\n]*)
      | (?P<symbol>::|->|\S)""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
FLOAT_LITERAL = re.compile(r"^(?P<digits>(?:\d[\d']*\.?[\d']*|\.\d[\d']*)(?:[eE][+-]?\d+)?)(?P<suffix>h|H|bf|BF|)$")
SWIZZLE = re.compile(r"^[xyzw]{2,4}$")
PRAGMA = re.compile(r"^\s*#\s*pragma\s+(?P<text>.*\S)\s*$")
UNROLL = re.compile(r"^(?:unroll|nounroll|clang\s+loop\s+unroll|GCC\s+unroll)")
FULL_UNROLL = re.compile(r"^(?:unroll|clang\s+loop\s+unroll\(full\))$")
COUNTED_UNROLL = re.compile(r"^(?:unroll|clang\s+loop\s+unroll_count)\s*\(?\s*(?P<count>\d+)\s*\)?$")


class TranslationError(Exception):
    """A construct that the translator does not understand, with the place where it stands."""


@dataclass(frozen=True)
class Target:
    """What the output is for: an engine, and whether g++ (or clang) preprocesses and compiles it."""

    engine: str
    gcc: bool


@dataclass
class Token:
    """A piece of the preprocessed text. `text` is what the output has for it."""

    kind: str
    text: str
    file: str
    line: int

    def fail(self, message: str) -> TranslationError:
        return TranslationError(f"{self.file}:{self.line}: error: {message}")


@dataclass
class Attribute:
    """One attribute of a `[[a, b(1)]]` list: its name and the tokens between its parentheses."""

    name: str
    arguments: list[Token]
    token: Token

    @property
    def value(self) -> str:
        """The argument as text; string literals side by side are one string, without quotes."""
        if self.arguments and all(token.kind == "string" for token in self.arguments):
            return "".join(token.text[1:-1] for token in self.arguments)
        return join(self.arguments)


@dataclass
class Parameter:
    """A parameter of a kernel: its name, the one attribute that says where its value comes from, and its type."""

    name: str
    attribute: Attribute
    words: list[str] = field(default_factory=list)
    """The tokens of its type."""

    @property
    def kind(self) -> str:
        """What is bound: "threadgroup" memory, a "buffer", or a "value": `constant T&`."""
        if self.attribute.name == "threadgroup":
            return "threadgroup"
        return "value" if "&" in self.words and "constant" in self.words else "buffer"


class Waits(Enum):
    """Where a kernel waits for the kernel in front of it."""

    AT_ENTRY = "before any of its code runs"
    INSIDE = "in its body, whatever way it takes"
    PERHAPS_INSIDE = "in its body, unless it returns first or skips the call"


@dataclass
class Kernel:
    """A kernel function: template or not."""

    name: str
    parameters: list[Parameter]
    is_template: bool
    max_threads: str
    token: Token
    waits: Waits


@dataclass
class FunctionConstant:
    """A program-scope constant that pipelines set."""

    name: str
    type: str
    index: int
    required: bool = False
    """Whether it is read anywhere but in `is_function_constant_defined(name) ? name : ...`."""


@dataclass
class Instance:
    """A kernel as the library lists it: host name, and the C++ expression that names the function."""

    host_name: str
    function: str
    kernel: Kernel


@dataclass
class Source:
    """What a preprocessed source holds: the text to compile, the headers it asked for, its kernels."""

    body: str
    headers: list[str]
    instances: list[Instance] = field(default_factory=list)
    constants: list[FunctionConstant] = field(default_factory=list)


def directive(text: str, target: Target) -> str:
    """A preprocessor directive that stayed in the text, in the compiler's dialect; "" where it has no use."""
    match = PRAGMA.match(text)
    pragma = match["text"] if match else ""
    if target.engine == "cuda":
        count = re.search(r"\d+", pragma)
        if pragma.startswith("nounroll"):
            return "#pragma unroll 1"
        if FULL_UNROLL.match(pragma) or pragma.startswith("GCC unroll"):
            return "#pragma unroll" if count is None or int(count.group()) >= GCC_FULL_UNROLL else pragma[4:]
        return "" if match else text
    if pragma.startswith("METAL") or (target.engine == "exact" and UNROLL.match(pragma)):
        return ""
    if target.gcc and FULL_UNROLL.match(pragma):
        return f"#pragma GCC unroll {GCC_FULL_UNROLL}"
    if target.gcc and (counted := COUNTED_UNROLL.match(pragma)):
        return f"#pragma GCC unroll {counted['count']}"
    if target.gcc and pragma.startswith(("clang", "unroll", "nounroll")):
        return ""
    return text


def literal(text: str) -> str:
    """A number in C++: MSL has suffixes for half and bfloat, and no double, so that one without suffix is a float."""
    match = FLOAT_LITERAL.match(text)
    if not match:
        return text
    digits, suffix = match["digits"], match["suffix"].lower()
    if not re.search(r"[.eE]", digits):
        if not suffix:
            return text
        digits += ".0"
    return {"h": f"half({digits}f)", "bf": f"bfloat({digits}f)", "": f"{digits}f"}[suffix]


def tokenize(text: str, default_file: str, target: Target) -> tuple[list[Token], list[str]]:
    """Splits preprocessed text, resolves line markers, and lists the Metal headers that were included."""
    tokens: list[Token] = []
    headers: list[str] = []
    file, line = default_file, 1
    for match in TOKEN.finditer(text):
        kind, piece = match.lastgroup or "", match.group()
        if match.group("marker") is not None:
            line = int(match.group("line")) - 1
            if match.group("file") is not None:
                file = match.group("file")
                path = Path(file)
                if path.parent == SCAN and path.name not in headers:
                    headers.append(path.name)
            # Flags of the marker would tell the compiler of includes that are no more.
            text_out = f'# {match.group("line")} "{file}"'
            if target.engine == "cuda":  # compiled on another machine, where these paths say nothing
                text_out = f'#line {max(1, line + 1)} "{"/".join(Path(file).parts[-2:])}"'
            tokens.append(Token("marker", text_out, file, line))
            continue
        if match.group("directive") is not None:
            tokens.append(Token("directive", directive(piece, target), file, line))
            continue
        if kind == "number":
            piece = literal(piece)
        elif kind == "name" and SWIZZLE.match(piece) and tokens and tokens[-1].text in (".", "->"):
            places = ", ".join(str("xyzw".index(letter)) for letter in piece)
            piece = f"template swizzle<{places}>()"
        tokens.append(Token(kind, piece, file, line))
        line += piece.count("\n") if kind in ("newline", "space") else 0
    return tokens, headers


def is_code(token: Token) -> bool:
    return token.kind in ("name", "number", "string", "symbol") and token.text != ""


def matching(tokens: list[Token], start: int, opener: str, closer: str) -> int:
    """Index of the token that closes the one at `start`."""
    depth = 0
    for i in range(start, len(tokens)):
        if tokens[i].kind == "symbol":
            depth += (tokens[i].text == opener) - (tokens[i].text == closer)
            if depth == 0:
                return i
    raise tokens[start].fail(f"'{opener}' is never closed")


def matching_angle(tokens: list[Token], start: int) -> int:
    """Index of the `>` that closes the `<` at `start`; parentheses inside are passed over."""
    depth, i = 0, start
    while i < len(tokens):
        text = tokens[i].text
        if text in "([{" and tokens[i].kind == "symbol":
            i = matching(tokens, i, text, {"(": ")", "[": "]", "{": "}"}[text])
        elif text == "<":
            depth += 1
        elif text == ">":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise tokens[start].fail("'<' is never closed")


def split_commas(tokens: list[Token]) -> list[list[Token]]:
    """Splits at commas outside brackets of any kind. Empty pieces are left out."""
    pieces: list[list[Token]] = [[]]
    i = 0
    while i < len(tokens):
        text = tokens[i].text
        end = i
        if tokens[i].kind == "symbol" and text in "([{":
            end = matching(tokens, i, text, {"(": ")", "[": "]", "{": "}"}[text])
        elif text == "<":
            end = matching_angle(tokens, i)
        if text == "," and end == i:
            pieces.append([])
        else:
            pieces[-1].extend(tokens[i : end + 1])
        i = end + 1
    return [piece for piece in pieces if piece]


def join(tokens: list[Token]) -> str:
    """Tokens as one line of code."""
    text = ""
    for token in tokens:
        separate = re.search(r"\w$", text) and re.match(r"\w", token.text)
        text += (" " if separate or text.endswith(",") else "") + token.text
    return text


def waits(body: list[Token]) -> Waits:
    """Of a kernel with this body. One that calls WAIT in its own body waits there; what it calls may do so earlier."""
    depth, returns = 0, False
    found = Waits.AT_ENTRY
    for place, token in enumerate(body):
        depth += (token.text == "{") - (token.text == "}")
        returns |= token.text == "return"
        if token.text != WAIT:
            continue
        statement = depth == 1 and body[place - 1].text in ("{", "}", ";")
        if statement and not returns:
            return Waits.INSIDE
        found = Waits.PERHAPS_INSIDE
    return found


class Reader:
    """Goes through the top-level declarations of one preprocessed source."""

    def __init__(self, tokens: list[Token], headers: list[str]):
        self.tokens = tokens
        self.headers = headers
        self.kernels: dict[str, Kernel] = {}
        self.instances: list[Instance] = []
        self.constants: dict[str, FunctionConstant] = {}
        self.derived: set[str] = set()  # constants whose values follow from those
        self.end = -1  # index of the last token of the previous declaration

    def run(self) -> Source:
        attributes = self.take_attributes()
        code = [i for i, token in enumerate(self.tokens) if is_code(token)]
        declaration: list[int] = []
        place = 0
        while place < len(code):
            i = code[place]
            token = self.tokens[i]
            if token.kind == "symbol" and token.text in "({[":
                end = self.closing(code, place)
                if token.text == "{" and self.opens_namespace(declaration):
                    self.reject_nested_kernels(code[place : end + 1], attributes)
                if token.text == "{":
                    self.check_block(code[place : end + 1])
                declaration.extend(code[place : end + 1])
                place = end + 1
                if token.text == "{" and self.ends_declaration(declaration, code, place):
                    self.declaration(declaration, attributes)
                    declaration = []
                continue
            declaration.append(i)
            place += 1
            if token.text == ";" and token.kind == "symbol":
                self.declaration(declaration, attributes)
                declaration = []
        if declaration:
            raise self.tokens[declaration[0]].fail("the declaration that begins here has no end")
        body = "".join(token.text for token in self.tokens)
        return Source(body, self.headers, self.instances, list(self.constants.values()))

    def closing(self, code: list[int], place: int) -> int:
        """Place in `code` of the bracket that closes the one at `place`."""
        pairs = {"(": ")", "[": "]", "{": "}"}
        stack: list[str] = []
        for here in range(place, len(code)):
            token = self.tokens[code[here]]
            if token.kind != "symbol":
                continue
            if token.text in pairs:
                stack.append(pairs[token.text])
            elif token.text in (")", "]", "}"):
                if not stack or stack.pop() != token.text:
                    raise token.fail(f"'{token.text}' closes nothing")
                if not stack:
                    return here
        raise self.tokens[code[place]].fail(f"'{self.tokens[code[place]].text}' is never closed")

    def opens_namespace(self, declaration: list[int]) -> bool:
        return any(self.tokens[i].text == "namespace" for i in declaration)

    def ends_declaration(self, declaration: list[int], code: list[int], place: int) -> bool:
        """A block ends a function or namespace; one of a class, enum or initialiser is followed by more."""
        following = self.tokens[code[place]].text if place < len(code) else ""
        if following in (";", ",", "=", ")"):
            return False
        words = [self.tokens[i].text for i in declaration]
        head = words[: words.index("{")] if "{" in words else words
        is_type = any(word in ("struct", "class", "union", "enum") for word in head) and "(" not in head
        return not is_type

    def take_attributes(self) -> dict[int, list[Attribute]]:
        """Removes every `[[...]]` from the text, and returns them by the index of their first token."""
        tokens = self.tokens
        found: dict[int, list[Attribute]] = {}
        i = 0
        while i + 1 < len(tokens):
            if not (tokens[i].text == "[" and tokens[i + 1].text == "[" and tokens[i].kind == "symbol"):
                i += 1
                continue
            end = matching(tokens, i, "[", "]")
            inner = [token for token in tokens[i + 2 : end - 1] if is_code(token)]
            attributes = [self.read_attribute(piece) for piece in split_commas(inner)]
            if all(attribute.name.split("::")[0] in KEPT_ATTRIBUTES | {"gnu", "clang"} for attribute in attributes):
                i = end + 1
                continue
            found[i] = attributes
            # The place of the attribute list stays known through one token that prints nothing.
            tokens[i] = Token("attribute", "", tokens[i].file, tokens[i].line)
            for j in range(i + 1, end + 1):
                keep = tokens[j].kind in ("newline", "marker")
                tokens[j] = tokens[j] if keep else Token("removed", "", tokens[j].file, tokens[j].line)
            i = end + 1
        return found

    def read_attribute(self, tokens: list[Token]) -> Attribute:
        name = [token.text for token in tokens]
        if "(" in name:
            opening = name.index("(")
            return Attribute("".join(name[:opening]), tokens[opening + 1 : -1], tokens[0])
        return Attribute("".join(name), [], tokens[0])

    def attributes_in(self, first: int, last: int, attributes: dict[int, list[Attribute]]) -> list[Attribute]:
        return [one for i, found in attributes.items() if first <= i <= last for one in found]

    def reject_nested_kernels(self, block: list[int], attributes: dict[int, list[Attribute]]) -> None:
        inside = self.attributes_in(block[0], block[-1], attributes)
        for one in inside:
            if one.name in ("kernel", "host_name"):
                raise one.token.fail("a kernel must stand outside of any namespace")
        for i in block:
            if self.tokens[i].text == "kernel" and self.tokens[i].kind == "name":
                raise self.tokens[i].fail("a kernel must stand outside of any namespace")

    def check_block(self, block: list[int]) -> None:
        """Refuses `threadgroup` variables: as C++ they would be private to a thread, which no test could notice."""
        texts = [self.tokens[i].text for i in block]
        for place, i in enumerate(block):
            if texts[place] != "threadgroup" or texts[place - 1] not in (";", "{", "}", "const", "static"):
                continue
            statement = texts[place : texts.index(";", place)] if ";" in texts[place:] else texts[place:]
            declarator = statement[: statement.index("=")] if "=" in statement else statement
            if not any(symbol in declarator for symbol in ("*", "&")):
                raise self.tokens[i].fail(
                    "a threadgroup variable inside a function is not supported: take threadgroup memory as a kernel "
                    "argument with [[threadgroup(n)]]"
                )

    def declaration(self, indices: list[int], attributes: dict[int, list[Attribute]]) -> None:
        """Reads one top-level declaration, and keeps what is a kernel or an instance of one."""
        tokens = [self.tokens[i] for i in indices]
        last = indices[-1]
        # Attributes in front of the declaration belong to it.
        own = self.attributes_in(self.end + 1, last, attributes)
        self.end = last
        names = {one.name for one in own}
        is_kernel = "kernel" in names or any(token.text == "kernel" and token.kind == "name" for token in tokens)
        if tokens[0].text == "template" and len(tokens) > 1 and tokens[1].text != "<":
            if is_kernel or "host_name" in names:
                self.instance(tokens, own)
                for i in indices:
                    self.tokens[i].text = ""
            return
        if is_kernel:
            self.kernel(indices, tokens, own, attributes)
            self.read_constants(tokens)
            return
        if len(own) == 1 and own[0].name == "function_constant":
            self.function_constant(tokens, own[0])
            return
        for one in own:
            raise one.token.fail(f"attribute '{one.name}' is not supported here")
        if tokens[0].text == "constant" and any(token.text in {*self.constants, *self.derived} for token in tokens):
            self.derived_constant(tokens)
        self.read_constants(tokens)

    def function_constant(self, tokens: list[Token], attribute: Attribute) -> None:
        """`constant uint name [[function_constant(index)]];`, which becomes a macro of function_constants.h."""
        words = [token.text for token in tokens]
        if len(words) != 4 or words[0] != "constant" or words[3] != ";" or words[1] not in CONSTANT_TYPES:
            known = ", ".join(CONSTANT_TYPES)
            raise attribute.token.fail(
                f"expected 'constant TYPE name [[function_constant(index)]];' with one of the types {known}"
            )
        type_name, name = words[1:3]
        if not attribute.value.isdigit() or int(attribute.value) > MAX_CONSTANT_INDEX:
            raise attribute.token.fail(
                f"the index of function constant '{name}' is '{attribute.value}'; it must be 0..{MAX_CONSTANT_INDEX}"
            )
        index = int(attribute.value)
        for other in self.constants.values():
            if other.index == index:
                raise attribute.token.fail(f"function_constant({index}) is both '{other.name}' and '{name}'")
        tokens[0].text = "METAL_SIM_FUNCTION_CONSTANT("
        tokens[2].text = f", {name}"
        tokens[3].text = f", {len(self.constants)}, {index})"
        self.constants[name] = FunctionConstant(name, type_name, index)

    def derived_constant(self, tokens: list[Token]) -> None:
        """`constant uint name = ...;` of function constants: computed for each pipeline too."""
        words = [token.text for token in tokens]
        if len(words) < 6 or words[3] != "=" or words[1] not in CONSTANT_TYPES:
            raise tokens[0].fail(
                "a constant made of function constants must be declared as 'constant TYPE name = value;' with one of "
                f"the types {', '.join(CONSTANT_TYPES)}"
            )
        self.derived.add(words[2])
        self.read_constants(tokens)
        tokens[0].text = "METAL_SIM_DERIVED_CONSTANT("
        tokens[2].text = f", {words[2]}"
        tokens[3].text = ","
        tokens[-1].text = ")"

    def read_constants(self, tokens: list[Token]) -> None:
        """Marks function constants that a declaration reads without asking whether they are defined."""
        words = [token.text for token in tokens]
        for place, word in enumerate(words):
            if word not in self.constants or words[max(0, place - 2) : place] == [IS_DEFINED, "("]:
                continue
            if words[max(0, place - 5) : place] != [IS_DEFINED, "(", word, ")", "?"]:
                self.constants[word].required = True

    def kernel(
        self, indices: list[int], tokens: list[Token], own: list[Attribute], attributes: dict[int, list[Attribute]]
    ) -> None:
        start = 0
        is_template = tokens[0].text == "template"
        if is_template:
            start = matching_angle(tokens, 1) + 1
            if tokens[start].text == "requires":
                raise tokens[start].fail("a constrained kernel template is not supported")
        opening = next((i for i in range(start, len(tokens)) if tokens[i].text == "("), None)
        if opening is None or tokens[opening - 1].kind != "name":
            raise tokens[0].fail("expected a kernel function")
        name = tokens[opening - 1]
        if "void" not in [token.text for token in tokens[start:opening]]:
            raise name.fail(f"kernel '{name.text}' must return void")
        closing = matching(tokens, opening, "(", ")")
        if tokens[-1].text == ";":
            return  # a declaration without body: the definition says it all
        if name.text in self.kernels:
            raise name.fail(f"kernel '{name.text}' is defined twice; kernels cannot be overloaded")
        parameters = self.parameters(name.text, indices[opening + 1 : closing], indices[closing], attributes)
        inside = [one for i, found in attributes.items() if indices[opening] < i < indices[closing] for one in found]
        max_threads, host_name = DEFAULT_MAX_THREADS, ""
        for one in own:
            if one in inside or one.name == "kernel":
                continue
            if one.name == "max_total_threads_per_threadgroup":
                max_threads = one.value
            elif one.name == "host_name":
                host_name = one.value
            else:
                raise one.token.fail(f"attribute '{one.name}' of kernel '{name.text}' is not supported")
        kernel = Kernel(name.text, parameters, is_template, max_threads, name, waits(tokens[closing + 1 :]))
        self.kernels[name.text] = kernel
        if not is_template:
            self.add(Instance(host_name or name.text, name.text, kernel), name)
        elif host_name:
            raise name.fail(f"kernel template '{name.text}' has a host_name; only its instantiations can")

    def parameters(
        self, kernel: str, indices: list[int], end: int, attributes: dict[int, list[Attribute]]
    ) -> list[Parameter]:
        code = [i for i in indices if is_code(self.tokens[i])]
        result: list[Parameter] = []
        taken: dict[tuple[str, str], str] = {}
        pieces = split_commas([self.tokens[i] for i in code])
        place = 0
        for number, piece in enumerate(pieces):
            last = place + len(piece) - 1
            # Attributes stand between the parameter's last token and the comma or parenthesis after it.
            following = code[last + 1] if number + 1 < len(pieces) else end
            own = self.attributes_in(code[place], following, attributes)
            place = last + 2
            name = piece[-1]
            if name.kind != "name" or len(piece) < 2:
                raise name.fail(f"kernel '{kernel}': expected 'type name [[attribute]]'")
            if len(own) != 1:
                raise name.fail(f"kernel '{kernel}': parameter '{name.text}' needs one attribute, has {len(own)}")
            attribute = own[0]
            self.check_parameter(kernel, piece, attribute)
            if attribute.name in MAX_ARGUMENT_INDEX:
                key = (attribute.name, attribute.value)
                if key in taken:
                    index = f"{attribute.name}({attribute.value})"
                    raise attribute.token.fail(f"kernel '{kernel}': {index} is both '{taken[key]}' and '{name.text}'")
                taken[key] = name.text
            result.append(Parameter(name.text, attribute, [token.text for token in piece[:-1]]))
        return result

    def check_parameter(self, kernel: str, piece: list[Token], attribute: Attribute) -> None:
        words = [token.text for token in piece]
        where, name = attribute.token, words[-1]
        if attribute.name in CONTEXT_COORDINATES | CONTEXT_NUMBERS:
            if "*" in words or "&" in words:
                raise where.fail(f"kernel '{kernel}': '{name}' [[{attribute.name}]] must be a value")
            return
        if attribute.name not in MAX_ARGUMENT_INDEX:
            raise where.fail(f"kernel '{kernel}': attribute '{attribute.name}' of '{name}' is not supported")
        limit = MAX_ARGUMENT_INDEX[attribute.name]
        if not attribute.value.isdigit() or int(attribute.value) > limit:
            raise where.fail(
                f"kernel '{kernel}': the index of '{name}' [[{attribute.name}({attribute.value})]] must be 0..{limit}"
            )
        spaces = ("threadgroup",) if attribute.name == "threadgroup" else ("device", "constant")
        if not any(space in words for space in spaces) or words[-2] not in ("*", "&", "restrict", "__restrict"):
            raise where.fail(
                f"kernel '{kernel}': '{name}' [[{attribute.name}]] must be a pointer or reference to "
                f"{' or '.join(spaces)} memory"
            )

    def instance(self, tokens: list[Token], own: list[Attribute]) -> None:
        """`template [[host_name("n")]] [[kernel]] decltype(f<A>) f<A>;` or `... kernel void f<A>(parameters);`"""
        start = 1
        while tokens[start].text in ("kernel", "void", "decltype"):
            start = matching(tokens, start + 1, "(", ")") + 1 if tokens[start].text == "decltype" else start + 1
        name = tokens[start]
        if name.kind != "name" or tokens[start + 1].text != "<":
            raise name.fail("expected the instantiation of a kernel template: name<arguments>")
        end = matching_angle(tokens, start + 1)
        if name.text not in self.kernels or not self.kernels[name.text].is_template:
            raise name.fail(f"'{name.text}' is not a kernel template of this source")
        host_names = [one for one in own if one.name == "host_name"]
        if len(host_names) != 1:
            raise name.fail(f"the instantiation of kernel '{name.text}' needs one host_name")
        function = join(tokens[start : end + 1])
        self.add(Instance(host_names[0].value, function, self.kernels[name.text]), name)

    def add(self, instance: Instance, token: Token) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", instance.host_name):
            raise token.fail(f"host_name '{instance.host_name}' must be an identifier")
        if any(other.host_name == instance.host_name for other in self.instances):
            raise token.fail(f"two kernels are named '{instance.host_name}'")
        self.instances.append(instance)


def read(text: str, path: str, target: Target) -> Source:
    """The kernels in the preprocessed text of the source `path`, and the text that a C++ compiler takes."""
    tokens, headers = tokenize(text, path, target)
    return Reader(tokens, headers).run()
