"""YAML, read strictly: a tree of plain values that knows on which line each of them stands.

PyYAML's safe loader parses; this room refuses what it lets through: keys given twice, keys that are no text,
aliases that hold themselves. Nothing is ever constructed but text, numbers, booleans and nulls.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from surgery.errors import FormatError

Scalar = str | int | float | bool | None
_KINDS = {str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "nothing",
          list: "a list", dict: "a mapping"}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One value of a document and the line it stands on."""

    value: Scalar | list[Node] | dict[str, Node]
    line: int

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return _KINDS[type(self.value)]

    def error(self, what: str, mend: str | None = None) -> FormatError:
        """Compose an error that says the line."""
        return FormatError(f"line {self.line}: {what}", mend=mend)

    def mapping(self, what: str, allowed: Collection[str] | None = None) -> dict[str, Node]:
        """Return the value as a mapping whose keys are all ``allowed``.

        Raises:
            FormatError: it is none, or has an unknown key; near matches are named.
        """
        if not isinstance(self.value, dict):
            raise self.error(f"{what} must be a mapping, not {self.kind}")
        for key, item in self.value.items():
            if allowed is not None and key not in allowed:
                raise item.error(f"unknown key {key!r} in {what}", did_you_mean(key, allowed))
        return self.value

    def items(self, what: str) -> list[Node]:
        """Return the value as a list.

        Raises:
            FormatError: it is none, or empty.
        """
        if not isinstance(self.value, list):
            raise self.error(f"{what} must be a list, not {self.kind}")
        if not self.value:
            raise self.error(f"{what} is empty")
        return self.value

    def text(self, what: str) -> str:
        """Return the value as text that is not empty.

        Raises:
            FormatError: it is none.
        """
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error(f"{what} must be text, not {self.kind if self.value != '' else 'nothing'}")
        return self.value

    def whole(self, what: str) -> int:
        """Return the value as a whole number.

        Raises:
            FormatError: it is none.
        """
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.error(f"{what} must be a whole number, not {self.kind}")
        return self.value

    def flag(self, what: str) -> bool:
        """Return the value as a boolean.

        Raises:
            FormatError: it is none.
        """
        if not isinstance(self.value, bool):
            raise self.error(f"{what} must be true or false, not {self.kind}")
        return self.value


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Name the known words that are near to an unknown one, or else all of them.

    >>> did_you_mean("paramters", ["models", "parameters"])
    "did you mean 'parameters'?"
    """
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"known are {', '.join(sorted(known))}"


def read_documents(data: bytes) -> list[Node]:
    """Parse a YAML stream into one tree a document; empty documents are left out.

    Raises:
        FormatError: malformed; the line is named.

    >>> [tree] = read_documents(b"a: 1")
    >>> tree.mapping("it")["a"].value
    1
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text") from None
    try:
        found = list(_trees(yaml.SafeLoader(text)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise FormatError(f"{where}is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise FormatError(f"is not YAML: {str(error).splitlines()[0]}") from None
    except (RecursionError, ValueError, OverflowError) as error:
        raise FormatError(f"is not YAML that a recipe could hold: {str(error).splitlines()[0]}") from None
    return [tree for tree in found if tree.value is not None]


def _trees(loader: Any) -> Iterator[Node]:
    while loader.check_node():
        yield _build(loader, loader.get_node(), {}, 1)


def _build(loader: Any, node: Any, seen: dict[int, Node | None], depth: int) -> Node:
    """Turn PyYAML's node into ours. ``seen`` keeps aliases shared, and finds those that hold themselves."""
    line = node.start_mark.line + 1
    if id(node) in seen:
        known = seen[id(node)]
        if known is None:
            raise FormatError(f"line {line}: an alias holds itself")
        return known
    if depth > 32:
        raise FormatError(f"line {line}: is nested too deeply")
    seen[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        built = Node(_build_mapping(loader, node, seen, depth), line)
    elif isinstance(node, yaml.SequenceNode):
        built = Node([_build(loader, item, seen, depth + 1) for item in node.value], line)
    else:
        built = Node(_scalar(loader, node, line), line)
    seen[id(node)] = built
    return built


def _build_mapping(loader: Any, node: Any, seen: dict[int, Node | None], depth: int) -> dict[str, Node]:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise FormatError(f"line {line}: a key must be text")
        if key.value in lines:
            raise FormatError(f"line {line}: {key.value!r} is given twice, first on line {lines[key.value]}")
        lines[key.value] = line
    loader.flatten_mapping(node)  # ``<<`` brings keys of other mappings, which those of this one override
    # An empty value has no line of its own, and a block stands below its key: the key's line serves people best.
    return {
        key.value: Node(_build(loader, value, seen, depth + 1).value, key.start_mark.line + 1)
        for key, value in node.value
    }


def _scalar(loader: Any, node: Any, line: int) -> Scalar:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "timestamp":
        return str(node.value)  # a name like 2024-01-01
    if kind not in ("str", "int", "float", "bool", "null"):
        raise FormatError(f"line {line}: the tag {node.tag} is not understood")
    value = loader.construct_object(node)
    if isinstance(value, float) and not math.isfinite(value):
        raise FormatError(f"line {line}: {node.value} is not a number to compute with")
    assert value is None or isinstance(value, str | int | float | bool)  # what these tags construct
    return value
