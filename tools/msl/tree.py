"""Metal's rules that are properties of the syntax tree, as clang prints it for the `opencl` reading (clang.py).

The text is read line by line: a node has a kind, an identity, a place and a type, and its depth says whose child it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import clang
from .report import Finding

NODE = re.compile(r"^(?P<bars>[ |`-]*)(?P<kind>[A-Z]\w*) (?P<id>0x[0-9a-f]+)(?P<rest>.*)$")
BASE_CLASS = re.compile(r"^(?P<bars>[ |`-]*)(?:public|protected|private) '(?P<name>.*)'")
REDECLARED = re.compile(r"^(?: parent 0x[0-9a-f]+)?(?: prev (?P<id>0x[0-9a-f]+))?")
PLACE = re.compile(r"(?:col|line:(?P<line>\d+)|(?P<file>[^\s<>,:]+):(?P<file_line>\d+)):\d+")
RANGE = re.compile(r" <(?P<range>(?:[^<>]|<[^<>]*>)*)>(?: (?P<at>\S+:\d+))?")
TYPE = re.compile(r"'(?P<type>[^']*)'")
CALLEE = re.compile(
    r"(?:(?:Function|CXXMethod|CXXConversion) (?P<function>0x[0-9a-f]+) '|(?:->|\.)\S+ (?P<member>0x[0-9a-f]+)\b)"
)
SPACE = re.compile(r"\b(?:__global|__constant|__local|__private)\b")
FUNCTIONS = {"FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl", "CXXDestructorDecl", "CXXConversionDecl"}
TYPED = {
    *("VarDecl", "ParmVarDecl", "FieldDecl", "TypedefDecl", "TypeAliasDecl"),
    *("CXXReinterpretCastExpr", "CXXStaticCastExpr", "CXXConstCastExpr", "CStyleCastExpr"),
}
FORBIDDEN = {
    "LambdaExpr": "a lambda: Metal has them from 3.2 on",
    "GotoStmt": "goto is not supported in Metal",
    "IndirectGotoStmt": "goto is not supported in Metal",
    "GCCAsmStmt": "inline assembly is not supported in Metal",
    "MSAsmStmt": "inline assembly is not supported in Metal",
    "FileScopeAsmDecl": "inline assembly is not supported in Metal",
    "CXXNoexceptExpr": "the noexcept operator is not supported in Metal",
    "CXXTypeidExpr": "typeid is not supported in Metal",
}
# Threadgroup memory that every Apple GPU has, in bytes.
THREADGROUP_LIMIT = 32768
SIZES = {"bool": 1, "char": 1, "short": 2, "half": 2, "bfloat": 2, "__bf16": 2, "int": 4, "float": 4, "long": 8}
ELEMENT = re.compile(rf"\bu?(?P<scalar>{'|'.join(SIZES)})(?P<lanes>[234])?\b(?:.*ext_vector_type\((?P<extended>\d)\))?")


@dataclass
class Node:
    """One line of the tree."""

    depth: int
    kind: str
    identity: str
    rest: str
    file: str
    line: int

    @property
    def type(self) -> str:
        """The type as it is written."""
        match = TYPE.search(self.rest)
        return match["type"] if match else ""

    @property
    def real_type(self) -> str:
        """The type without typedefs."""
        types = re.match(r".*?'[^']*'(?::'(?P<real>[^']*)')?", self.rest)
        return (types and types["real"]) or self.type


@dataclass
class Function:
    """A function, all its declarations together."""

    name: str
    node: Node
    calls: dict[str, Node] = field(default_factory=dict)


def check(tree: str) -> list[Finding]:
    """Every broken rule outside of the prelude, each place once."""
    checker = _Checker()
    checker.run(tree)
    return sorted(set(checker.findings))


def nodes(tree: str) -> Iterator[Node]:
    """The nodes in the order of the text, each with its place: clang prints of a place only what is new."""
    file, line = "", 0
    for text in tree.splitlines():
        match = NODE.match(text)
        if match is None:
            base = BASE_CLASS.match(text)
            if base:
                yield Node(len(base["bars"]) // 2, "BaseClass", "", base["name"], file, line)
            continue
        at_file, at_line = file, line
        places = RANGE.search(match["rest"])
        if places:
            for i, place in enumerate(PLACE.finditer(f"{places['range']} {places['at'] or ''}")):
                if place["file"]:
                    file, line = place["file"], int(place["file_line"])
                elif place["line"]:
                    line = int(place["line"])
                if i == 0 or places["at"]:
                    at_file, at_line = file, line
        yield Node(len(match["bars"]) // 2, match["kind"], match["id"], match["rest"], at_file, at_line)


class _Checker:
    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.functions: dict[str, Function] = {}
        self.canonical: dict[str, str] = {}
        self.threadgroup_bytes: dict[str, int] = {}
        self.prelude = str(clang.PRELUDE)

    def report(self, node: Node, message: str) -> None:
        self.findings.append(Finding(clang.relative(node.file), node.line, message))

    def run(self, tree: str) -> None:
        ancestors: list[Node] = []
        hidden = -1  # depth of a declaration that the compiler made
        for node in nodes(tree):
            if hidden >= 0 and node.depth > hidden:
                continue
            hidden = -1
            del ancestors[node.depth :]
            ancestors.extend([node] * (node.depth - len(ancestors) + 1))
            if node.file == self.prelude or not node.file:
                continue
            if " implicit " in f"{TYPE.sub('', node.rest)} " and node.kind.endswith("Decl"):
                hidden = node.depth
                continue
            self.visit(node, ancestors)
        self.find_recursion()

    def visit(self, node: Node, ancestors: list[Node]) -> None:
        function = next((one for one in reversed(ancestors[:-1]) if one.kind in FUNCTIONS), None)
        if node.kind in FORBIDDEN:
            self.report(node, FORBIDDEN[node.kind])
        elif node.kind == "BaseClass":
            record = next(one for one in reversed(ancestors[:-1]) if one.kind.endswith("Decl"))
            self.report(record, f"derived classes are not supported in Metal: the base is '{node.rest}'")
        elif node.kind in FUNCTIONS:
            self.add_function(node)
        elif node.kind in TYPED and not spaces_named(node.type):
            self.report(node, f"a pointer or reference without an address space: '{readable(node.type)}'")
        if node.kind in TYPED and "long long" in node.real_type:
            self.report(node, "'long long' is not supported in Metal: long has 64 bits")
        self.check_bfloat(node)
        if node.kind == "VarDecl" and node.type.startswith("__local ") and not re.search(r"[*&]", node.type):
            self.check_threadgroup_variable(node, function)
        if function and node.kind in ("DeclRefExpr", "MemberExpr"):
            callee = CALLEE.search(node.rest)
            if callee and function.identity in self.canonical:
                caller = self.functions[self.canonical[function.identity]]
                caller.calls.setdefault(callee["function"] or callee["member"], node)

    def add_function(self, node: Node) -> None:
        previous = REDECLARED.match(node.rest)
        known = previous and self.canonical.get(previous["id"] or "")
        name = re.search(r"(\S+) '", node.rest)
        self.canonical[node.identity] = known or node.identity
        if not known:
            self.functions[node.identity] = Function(name[1] if name else "?", node)
        returned = node.type.split("(")[0]
        if not spaces_named(returned):
            self.report(node, f"a pointer or reference without an address space is returned: '{readable(returned)}'")

    def check_bfloat(self, node: Node) -> None:
        """Metal turns neither float nor half into bfloat by itself."""
        if not node.real_type.endswith("__bf16"):
            return
        by_itself = (
            node.kind == "ImplicitCastExpr"
            and node.rest.endswith("<FloatingCast>")
            or node.kind == "CompoundAssignOperator"
            and not re.search(r"ComputeResultTy='[^']*'(:'__bf16')", node.rest)
        )
        if by_itself:
            self.report(node, "a number becomes bfloat without being told to: write bfloat(...)")

    def check_threadgroup_variable(self, node: Node, function: Node | None) -> None:
        self.report(
            node,
            "a threadgroup variable inside a function: take threadgroup memory as a kernel argument with "
            "[[threadgroup(n)]]",
        )
        owner = function.identity if function else ""
        before = self.threadgroup_bytes.get(owner, 0)
        after = self.threadgroup_bytes[owner] = before + size_of(node.real_type)
        if before <= THREADGROUP_LIMIT < after:
            self.report(node, f"threadgroup variables of {after} bytes; an Apple GPU has {THREADGROUP_LIMIT}")

    def find_recursion(self) -> None:
        """Functions that can reach themselves. A template that calls another instance of itself does not."""
        for start, function in self.functions.items():
            path = self.path_back(start)
            if path:
                chain = " calls ".join(self.functions[one].name for one in [*path, start])
                self.report(function.node, f"recursion: {chain}")

    def path_back(self, start: str) -> list[str]:
        """The shortest chain of calls from a function to itself, without the return; empty where there is none."""
        came_from: dict[str, str] = {}
        frontier = [start]
        while frontier:
            reached = []
            for one in frontier:
                for call in self.functions[one].calls:
                    callee = self.canonical.get(call)
                    if callee == start:
                        path = [one]
                        while path[0] != start:
                            path.insert(0, came_from[path[0]])
                        return path
                    if callee and callee not in came_from:
                        came_from[callee] = one
                        reached.append(callee)
            frontier = reached
        return []


def spaces_named(type_text: str) -> bool:
    """Whether each pointer and reference of a type says where it points to."""
    without_arguments = type_text
    while (shorter := re.sub(r"<[^<>]*>", "", without_arguments)) != without_arguments:
        without_arguments = shorter
    if "(lambda at" in type_text:
        return True
    pointees = re.split(r"[*&]+", without_arguments)[:-1]
    return all(SPACE.search(pointee) for pointee in pointees)


def readable(type_text: str) -> str:
    """A type as a Metal source would have it."""
    text = re.sub(r"__generic |\s?__private$", "", type_text).strip()
    return clang.in_metals_words(text)


def size_of(type_text: str) -> int:
    """Bytes of an array of numbers or vectors; 0 where that cannot be told from the text."""
    element = ELEMENT.search(type_text)
    if element is None:
        return 0
    lanes = int(element["lanes"] or element["extended"] or 1)
    size = SIZES[element["scalar"]] * (4 if lanes == 3 else lanes)
    for dimension in re.findall(r"\[(\d+)\]", type_text):
        size *= int(dimension)
    return size
