"""Parameter settings of a recipe: scalars, gradients over layers, and choices by tensor name.

A setting is a scalar (``0.5``), a *gradient* (``[0, 0.5, 1]``: values at equal steps of ``t`` from 0 to 1, linear in
between), or a list of *conditions* (``{filter, value}``), of which the first whose filter is part of the tensor's name
decides. Where no condition fits, the next level of settings is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from surgery.formats.yaml_strict import Node

Value = float | bool | str
"""What a parameter can be."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A value, or a gradient of values, for the tensors whose names hold ``filter``."""

    values: tuple[Value, ...]
    filter: str | None = None
    gradient: bool = False
    line: int = field(default=0, compare=False)

    def fits(self, tensor: str) -> bool:
        """Say whether it decides about ``tensor``. The filter is a substring, not a pattern; ``*`` stands for all."""
        return self.filter in (None, "*") or str(self.filter) in tensor

    def at(self, t: float) -> Value:
        """Return the value at ``t``, between 0 and 1.

        >>> Condition((0.0, 1.0, 0.0), gradient=True).at(0.25)
        0.5
        """
        if not self.gradient:
            return self.values[0]
        place = t * (len(self.values) - 1)
        low = int(place)
        one, other = self.values[low], self.values[min(low + 1, len(self.values) - 1)]
        if isinstance(one, float) and isinstance(other, float):
            share = place - low
            return (1 - share) * one + share * other
        return one  # switches and words are not mixed


@dataclass(frozen=True, slots=True)
class Setting:
    """All that one place of a recipe says about one parameter."""

    conditions: tuple[Condition, ...]
    line: int = field(default=0, compare=False)

    def value(self, tensor: str, t: float) -> Value | None:
        """Return the value for a tensor; ``None`` where no condition fits it."""
        for condition in self.conditions:
            if condition.fits(tensor):
                return condition.at(t)
        return None


Settings = Mapping[str, Setting]
"""Parameter name → setting."""


def first_value(levels: Iterable[Settings], parameter: str, tensor: str, t: float) -> Value | None:
    """Return the value from the first level that decides about ``tensor``; ``None`` where none does.

    >>> special = {"weight": Setting((Condition((0.1,), filter="mlp"),))}
    >>> general = {"weight": Setting((Condition((0.9,)),))}
    >>> first_value([special, general], "weight", "layers.0.mlp.up_proj.weight", 0.0)
    0.1
    >>> first_value([special, general], "weight", "layers.0.self_attn.q_proj.weight", 0.0)
    0.9
    """
    for level in levels:
        if parameter in level:
            value = level[parameter].value(tensor, t)
            if value is not None:
                return value
    return None


def parse_settings(node: Node | None) -> dict[str, Setting]:
    """Read a ``parameters:`` mapping; an empty one is allowed.

    Raises:
        FormatError: a value that is no setting; the line is named.
    """
    if node is None or node.value is None:
        return {}
    return {name: _parse(item, name) for name, item in node.mapping("parameters").items() if item.value is not None}


def _parse(node: Node, name: str) -> Setting:
    if isinstance(node.value, dict):
        return Setting((_condition(node, name),), node.line)
    if isinstance(node.value, list) and any(isinstance(item.value, dict) for item in node.value):
        return Setting(tuple(_condition(item, name) for item in node.value), node.line)
    return Setting((_plain(node, name),), node.line)


def _condition(node: Node, name: str) -> Condition:
    fields = node.mapping(f"a condition of {name!r}", ("filter", "value"))
    if "value" not in fields:
        raise node.error(f"a condition of {name!r} has no value")
    text = fields.get("filter")
    chosen = None if text is None or text.value is None else text.text("filter")
    plain = _plain(fields["value"], name)
    return Condition(plain.values, chosen, plain.gradient, node.line)


def _plain(node: Node, name: str) -> Condition:
    if isinstance(node.value, list):
        values = tuple(_scalar(item, name) for item in node.items(f"the gradient of {name!r}"))
        return Condition(values, gradient=True, line=node.line)
    return Condition((_scalar(node, name),), line=node.line)


def _scalar(node: Node, name: str) -> Value:
    value = node.value
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        try:
            number = float(value)  # YAML 1.1 takes 1e-5 for text
        except ValueError:
            return value
        if math.isfinite(number):
            return number
    raise node.error(f"{name!r} must be a number, a list of numbers, or conditions, not {node.kind}")
