"""What happens to which tensors, told so that a model of thousands of them fits on a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.plan import natural
from surgery.report import Table
from surgery.roles import numberless
from surgery.tensor import LazyTensor, human_bytes


@dataclass(frozen=True, slots=True)
class Rule:
    """How one tensor is made."""

    what: str
    values: str = ""


def describe(whole: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> str:
    """Write parameters for people.

    >>> describe({"normalize": False}, [{"coeff": 1.0}, {"coeff": 0.25}])
    'coeff 1, 0.25; normalize false'
    """
    names = dict.fromkeys(name for own in each for name in own)
    shown = [f"{name} {', '.join(_plain(own[name]) for own in each if name in own)}" for name in names]
    return "; ".join([*shown, *(f"{name} {_plain(value)}" for name, value in whole.items())])


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}"


def rules_table(rules: Mapping[str, Rule], tensors: Mapping[str, LazyTensor]) -> Table:
    """Draw up one row for all tensors that differ by numbers in their names alone and are made in the same way."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(tensors, key=natural):
        groups.setdefault((numberless(name), rules[name].what), []).append(name)
    rows = []
    for (pattern, what), names in groups.items():
        ends = list(dict.fromkeys(rules[name].values for name in (names[0], names[-1])))
        size = sum(tensors[name].spec.nbytes for name in names)
        rows.append((pattern, what, " … ".join(ends), f"{len(names):,}", human_bytes(size)))
    return Table("What would be written", ("tensors", "how", "with", "count", "bytes"), tuple(rows))
