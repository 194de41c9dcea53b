"""``algorithms``: what models can be merged by. The registry, as a table; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from surgery.algorithms.registry import ALGORITHMS, Algorithm, Parameter, find
from surgery.report import Table


class AlgorithmList:
    """Rows of the registry, for people and programs."""

    def __init__(self, rows: Sequence[Algorithm]) -> None:
        self.rows = tuple(rows)

    def table(self) -> Table:
        """Show one line an algorithm."""
        return Table(
            "Merge algorithms",
            ("algorithm", "what it does", "takes", "scope", "parameters (defaults)", "from"),
            tuple(
                (row.name, row.title, row.arity, row.scope, ", ".join(map(_shown, row.parameters)), row.citation)
                for row in self.rows
            ),
        )

    def parameters(self) -> Table:
        """Show one line a parameter."""
        return Table(
            "Parameters",
            ("algorithm", "parameter", "default", "range", "meaning"),
            tuple(
                (row.name, parameter.name, _default(parameter), parameter.range, _meaning(parameter))
                for row in self.rows
                for parameter in row.parameters
            ),
        )

    def document(self) -> dict[str, Any]:
        """Return everything, for ``--json``."""
        return {"schema": "surgery.algorithms/1", "algorithms": [_document(row) for row in self.rows]}

    def _repr_html_(self) -> str:
        return self.table().html()


def algorithms(*names: str) -> AlgorithmList:
    """List the merge algorithms, or those that are named.

    Raises:
        UsageError: a name that is not known.

    >>> [row.name for row in algorithms("linear").rows]
    ['linear']
    """
    return AlgorithmList([find(name) for name in names] if names else list(ALGORITHMS.values()))


def _default(parameter: Parameter) -> str:
    value = parameter.default
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _shown(parameter: Parameter) -> str:
    return parameter.name if parameter.default is None else f"{parameter.name} {_default(parameter)}"


def _meaning(parameter: Parameter) -> str:
    return parameter.meaning + (" (one a model)" if parameter.per_model else "")


def _document(row: Algorithm) -> dict[str, Any]:
    return {
        "name": row.name, "title": row.title, "citation": row.citation, "scope": row.scope, "base": row.base,
        "models": list(row.models), "symmetric": row.symmetric, "random": row.random,
        "parameters": [
            {
                "name": parameter.name, "mergekit": parameter.recipe_name, "kind": parameter.kind,
                "default": parameter.default, "per_model": parameter.per_model, "meaning": parameter.meaning,
                "low": _bound(parameter.low), "high": _bound(parameter.high),
            }
            for parameter in row.parameters
        ],
    }  # fmt: skip


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None
