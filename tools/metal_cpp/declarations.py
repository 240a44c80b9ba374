"""The declarations of headers in the manner of metal-cpp, in one spelling, so that two headers can be compared.

Reads namespaces NS and MTL: classes with bases and public members, enumerations, aliases and free functions. Two
declarations have one spelling where they mean the same to a caller: without parameter names, default arguments, bodies,
export macros and the qualification of NS and MTL, and with template parameters numbered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

NAMESPACES = ("NS", "MTL")
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n\\]|\\.|\\\n)*", re.MULTILINE)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[A-Za-z_]\w*|\d[\w.]*|::|->|<<|&&|\|\||\[\[|\]\]|[^\s\w]')
# metal-cpp's macros: enumerations, whose name and type they turn round, and what says nothing to a caller.
ENUM_MACRO = re.compile(r"\b_(?:NS|MTL)_ENUM\(\s*(?P<type>[\w:]+)\s*,\s*(?P<name>\w+)\s*\)")
OPTIONS_MACRO = re.compile(r"\b_(?:NS|MTL)_OPTIONS\(\s*(?P<type>[\w:]+)\s*,\s*(?P<name>\w+)\s*\)")
NOISE = re.compile(
    r"\b_(?:NS|MTL)_(?:EXPORT|EXTERN|INLINE|PACKED|CONST\([^)]*\);?|VALIDATE_\w+\([^)]*\);?)|\[\[[^\]]*\]\]"
)
DROPPED = {"class", "struct", "typename", "inline", "constexpr", "virtual", "override", "friend", "final", "extern"}
FUNDAMENTAL = {"void", "bool", "char", "short", "int", "long", "float", "double", "unsigned", "signed", "const"}
# The host's compilers have no blocks: where Metal takes one, the stand-in takes what metal-cpp itself offers beside
# blocks, a std::function.
BLOCK = re.compile(r"^(?P<result>.*?)\( ?\^ ?\w* ?\) ?\((?P<parameters>.*)\)$")
# The stand-in's root class is what objc_object is on Apple.
STANDS_FOR = {"metal_sim::Counted": "objc_object"}


@dataclass
class Declarations:
    """What headers declare: kind and name -> the spelling of each declaration of that name (functions have several)."""

    found: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, name: str, spelling: str) -> None:
        self.found.setdefault((kind, name), set()).add(spelling)

    def count(self) -> int:
        """How many declarations there are."""
        return sum(len(spellings) for spellings in self.found.values())


def read(files: Iterable[Path]) -> Declarations:
    """The declarations of several headers together."""
    declarations = Declarations()
    for file in files:
        parse(file.read_text(), declarations)
    return declarations


def parse(text: str, declarations: Declarations | None = None) -> Declarations:
    """The declarations in the text of a header, added to those of others."""
    declarations = Declarations() if declarations is None else declarations
    text = DIRECTIVE.sub("", COMMENT.sub(" ", text))
    text = ENUM_MACRO.sub(r"enum \g<name> : \g<type>", text)
    text = OPTIONS_MACRO.sub(r"using \g<name> = \g<type>; enum : \g<name>", text)
    tokens = TOKEN.findall(NOISE.sub("", text))
    _Scope(declarations, "", []).read(tokens)
    return declarations


def missing(stand_in: Declarations, real: Declarations) -> list[str]:
    """Each declaration of the first that the second does not have in the same spelling."""
    problems = []
    for (kind, name), spellings in sorted(stand_in.found.items()):
        known = real.found.get((kind, name), set())
        for spelling in sorted(spellings - known):
            there = "; ".join(sorted(known)) if known else "nothing of that name"
            problems.append(f"{kind} {name}: here `{spelling}`, in metal-cpp `{there}`")
    return problems


class _Scope:
    """A namespace or class, read statement by statement."""

    def __init__(self, declarations: Declarations, name: str, parameters: list[str], in_class: bool = False):
        self.declarations = declarations
        self.name = name
        self.parameters = parameters  # of the templates around
        self.in_class = in_class
        self.is_public = not in_class

    def read(self, tokens: list[str]) -> None:
        i = 0
        while i < len(tokens):
            if self.in_class and tokens[i] in ("public", "protected", "private") and tokens[i + 1] == ":":
                self.is_public = tokens[i] == "public"
                i += 2
                continue
            head, body, i = _statement(tokens, i)
            if head:
                self.declaration(head, body)

    def declaration(self, head: list[str], body: list[str] | None) -> None:
        head, parameters = _without_template(head)
        if not head:
            return
        first = head[0]
        if first == "namespace":
            if not self.name and head[1:] and head[1] in NAMESPACES and body is not None:
                _Scope(self.declarations, head[1], []).read(body)
            elif not self.name and body is not None and len(head) == 1:
                self.read(body)
        elif not self.is_public or first == "friend" or (not self.name and "(" not in head):
            return
        elif first == "enum" and body is not None:
            self.enumeration(head, body)
        elif first in ("class", "struct") and body is not None:
            self.record(head, body, parameters)
        elif first in ("class", "struct") and "(" not in head and len(head) == 2:
            return  # a forward declaration
        elif first == "using":
            if "=" in head:
                at = head.index("=")
                self.declarations.add("alias", self.path(head[1]), self.spell(head[at + 1 :], parameters))
        elif "(" in head:
            self.function(head, parameters)
        elif self.in_class and "=" not in head:
            self.declarations.add("member", self.path(head[-1]), self.spell(head[:-1], parameters))

    def path(self, name: str) -> str:
        return f"{self.name}::{name}" if self.name else name

    def enumeration(self, head: list[str], body: list[str]) -> None:
        colon = head.index(":") if ":" in head else len(head)
        name = head[1] if colon > 1 else ""
        if name:
            self.declarations.add("enum", self.path(name), self.spell(head[colon + 1 :], []))
        next_value = 0
        for item in _split(body):
            if "=" in item:
                next_value = self.value(item[item.index("=") + 1 :])
            namespace = self.name.split("::")[0]
            self.declarations.values[f"{namespace}::{item[0]}"] = next_value
            self.declarations.add("value", self.path(item[0]), str(next_value))
            next_value += 1

    def value(self, expression: list[str]) -> int:
        known = self.declarations.values
        text = ""
        for token in expression:
            if token in ("::", *NAMESPACES):
                continue
            if re.match(r"[A-Za-z_]", token):
                constants = {"UIntegerMax": 2**64 - 1, "IntegerMax": 2**63 - 1}
                for place in dict.fromkeys((self.name.split("::")[0], *NAMESPACES)):
                    constants.setdefault(token, known.get(f"{place}::{token}"))
                if constants.get(token) is None:
                    raise ValueError(f"{self.name}: the value of {token} is not known")
                token = str(constants[token])
            text += re.sub(r"(?<=[0-9a-fA-F])[uUlL]+$", "", token) + " "
        if not re.fullmatch(r"[0-9a-fA-FxX<|&~()+ -]*", text):
            raise ValueError(f"{self.name}: `{text}` is no constant that this reads")
        return int(eval(text)) & (2**64 - 1)  # digits and operators only, see the line before

    def record(self, head: list[str], body: list[str], parameters: list[str]) -> None:
        colon = head.index(":") if ":" in head else len(head)
        names = [token for token in head[1:colon] if re.match(r"[A-Za-z_]", token)]
        path = self.path(names[-1])
        bases = [token for token in head[colon + 1 :] if token != "public"]
        self.declarations.add("class", path, f"{head[0]} : {self.spell(bases, parameters)}")
        inner = _Scope(self.declarations, path, self.parameters + parameters, in_class=True)
        inner.is_public = head[0] == "struct"
        inner.read(body)

    def function(self, head: list[str], parameters: list[str]) -> None:
        opening = head.index("(")
        if head[opening - 1] == "operator":  # operator()
            opening += 2
        closing = _closing(head, opening)
        name_at = opening - 1
        if "operator" in head[:opening]:
            name_at = head.index("operator")
        name = "".join(head[name_at:opening])
        before = head[:name_at]
        if before and before[-1] == "~":
            before, name = before[:-1], "~" + name
        if before and before[-1] == "::":
            return  # the definition of a member, which its class declares
        if name_at < opening - 1 and re.match(r"[A-Za-z_]", head[name_at + 1]):
            name = "operator " + self.spell(head[name_at + 1 : opening], parameters)
        arguments = [self.parameter(one, parameters) for one in _split(head[opening + 1 : closing])]
        after = [
            token for token in _until(head[closing + 1 :], ("=", ":")) if token in ("const", "noexcept", "&", "&&")
        ]
        result = self.spell(before, parameters)
        template = f"template<{len(parameters)}> " if parameters else ""
        spelling = f"{template}{result} {name}({', '.join(arguments)}) {' '.join(after)}".strip()
        self.declarations.add("method" if self.in_class else "function", self.path(name), re.sub(r"\s+", " ", spelling))

    def parameter(self, tokens: list[str], parameters: list[str]) -> str:
        tokens = _until(tokens, ("=",))
        block = BLOCK.match(" ".join(tokens))
        if block:
            inside = [self.parameter(one, parameters) for one in _split(TOKEN.findall(block["parameters"]))]
            result = self.spell(TOKEN.findall(block["result"]), parameters)
            return f"const std::function<{result}({', '.join(inside)})>&"
        named = re.match(r"[A-Za-z_]", tokens[-1]) and tokens[-1] not in FUNDAMENTAL
        if len(tokens) > 1 and named and tokens[-2] != "::" and set(tokens[:-1]) - {"const", "class", "struct"}:
            tokens = tokens[:-1]
        return self.spell(tokens, parameters)

    def spell(self, tokens: list[str], parameters: list[str]) -> str:
        """Tokens of a type as one text."""
        numbered = {name: f"T{i}" for i, name in enumerate(self.parameters + parameters)}
        words = [numbered.get(token, token) for token in tokens if token not in DROPPED]
        text = ""
        for word in words:
            separate = re.search(r"\w$", text) and re.match(r"\w", word)
            text += f" {word}" if separate else word
        for name, real in STANDS_FOR.items():
            text = text.replace(name, real)
        text = re.sub(r"\b(?:NS|MTL)::", "", text).replace(",", ", ")
        own = self.name.split("::")[-1]
        if self.parameters:  # inside a template its name stands for itself with its parameters
            text = text.replace(f"{own}<{', '.join(numbered[name] for name in self.parameters)}>", own)
        return text


def _statement(tokens: list[str], start: int) -> tuple[list[str], list[str] | None, int]:
    """A declaration from `start` on: what stands before its body, the body (None where it has none), and the end."""
    head: list[str] = []
    body = None
    i = start
    while i < len(tokens):
        token = tokens[i]
        if token in "([" or token == "[[":
            end = _closing(tokens, i)
            head += tokens[i : end + 1]
            i = end + 1
        elif token == "{":
            end = _closing(tokens, i)
            is_type = head and ("enum" in head or {"class", "struct", "union"} & set(_without_template(head)[0][:1]))
            is_scope = head[:1] == ["namespace"] or head[:1] == ["extern"]
            if ":" in _top_level(head) and not is_type and tokens[i - 1] not in (")", "}", "const", "noexcept"):
                head.append("{}")  # braces in a constructor's list
                i = end + 1
                continue
            if not is_type and "=" in _top_level(_without_template(head)[0]):
                i = end + 1  # the value of a constant
                continue
            body = tokens[i + 1 : end]
            i = end + 1
            if is_scope or not is_type:
                return head, body, i
        elif token == ";":
            return head, body, i + 1
        else:
            head.append(token)
            i += 1
    return head, body, i


def _closing(tokens: list[str], start: int) -> int:
    pairs = {"(": ")", "[": "]", "{": "}", "[[": "]]"}
    stack = []
    for i in range(start, len(tokens)):
        if tokens[i] in pairs:
            stack.append(pairs[tokens[i]])
        elif stack and tokens[i] == stack[-1]:
            stack.pop()
            if not stack:
                return i
    raise ValueError(f"'{tokens[start]}' is never closed: {' '.join(tokens[start : start + 20])} ...")


def _top_level(tokens: list[str]) -> list[str]:
    """The tokens outside of parentheses, and not the name of an operator."""
    result, i = [], 0
    while i < len(tokens):
        if tokens[i] == "operator":
            i = tokens.index("(", i + 2)
        if tokens[i] == "(":
            i = _closing(tokens, i)
        else:
            result.append(tokens[i])
        i += 1
    return result


def _without_template(head: list[str]) -> tuple[list[str], list[str]]:
    """A declaration without `template <...>`, and the names of its parameters."""
    if head[:1] != ["template"]:
        return head, []
    depth = 0
    for i, token in enumerate(head):
        depth += {"<": 1, ">": -1}.get(token, 0)
        if token == ">" and depth == 0:
            names = []
            for piece in _split(head[2:i]):
                words = [word for word in _until(piece, ("=",)) if re.match(r"[A-Za-z_]", word)]
                names.append(words[-1])
            return head[i + 1 :], names
    raise ValueError(f"a template without end: {' '.join(head[:20])}")


def _split(tokens: list[str]) -> list[list[str]]:
    """The pieces between commas outside of brackets of any kind."""
    pieces: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += {"(": 1, "<": 1, "[": 1, "{": 1, ")": -1, ">": -1, "]": -1, "}": -1}.get(token, 0)
        if token == "," and depth == 0:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [piece for piece in pieces if piece]


def _until(tokens: list[str], ends: tuple[str, ...]) -> list[str]:
    """The tokens before the first of `ends`, outside of angle brackets."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += {"<": 1, ">": -1}.get(token, 0)
        if token in ends and depth == 0:
            return tokens[:i]
    return tokens
