"""Function constants: program-scope constants that pipelines set, each with an index of its own and without a value in
the source. That none of them is a size of an array or an argument of a template is the compiler's affair (clang.py
declares them as constants whose value stands elsewhere)."""

from __future__ import annotations

from collections.abc import Iterator

from . import clang
from .clang import msl_reader
from .report import Finding

ATTRIBUTE = "function_constant"


def check(text: str, source: str) -> list[Finding]:
    """Every broken rule of function constants in a preprocessed source."""
    tokens, headers = msl_reader.tokenize(text, source, msl_reader.Target("exact", False))
    reader = msl_reader.Reader(tokens, headers)
    attributes = reader.take_attributes()
    places = [(i, one) for i, found in sorted(attributes.items()) for one in found if one.name == ATTRIBUTE]
    indices: dict[str, str] = {}
    findings = []
    for place, attribute in places:
        for message in _broken(tokens, place, attribute, indices):
            findings.append(Finding(clang.relative(attribute.token.file), attribute.token.line, message))
    return findings


def _broken(
    tokens: list[msl_reader.Token], place: int, attribute: msl_reader.Attribute, indices: dict[str, str]
) -> Iterator[str]:
    code = [i for i, token in enumerate(tokens) if msl_reader.is_code(token)]
    before = [tokens[i].text for i in code if i < place]
    after = [tokens[i].text for i in code if i > place]
    begin = max((i for i, text in enumerate(before) if text in (";", "{", "}")), default=-1) + 1
    *words, name = before[begin:] or [""]
    entry = f"function constant '{name}'"
    if before.count("{") != before.count("}") or "(" in words:
        yield f"{entry} must be a constant of the program, outside of functions and types"
        return
    if "constant" not in words:
        yield f"{entry} must be in the constant address space"
    type_words = [word for word in words if word not in ("constant", "const", "static", "extern")]
    if len(type_words) != 1 or type_words[0] not in msl_reader.CONSTANT_TYPES:
        known = ", ".join(msl_reader.CONSTANT_TYPES)
        yield f"{entry} is of type '{' '.join(type_words)}'; it must be one of {known}"
    if after[:1] != [";"]:
        yield f"{entry} has a value, which only pipelines give it"
    if not attribute.value.isdigit() or int(attribute.value) > msl_reader.MAX_CONSTANT_INDEX:
        yield f"{entry} has the index '{attribute.value}'; it must be 0 to {msl_reader.MAX_CONSTANT_INDEX}"
    elif indices.setdefault(attribute.value, name) != name:
        yield f"{ATTRIBUTE}({attribute.value}) is both '{indices[attribute.value]}' and '{name}'"
