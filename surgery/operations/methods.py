"""``methods``: what each PEFT method would cost on a model, from its header alone; and published counts, recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Source, open_checkpoint
from surgery.errors import SurgeryError
from surgery.methods.addition import File
from surgery.methods.published import PUBLISHED, Published
from surgery.methods.registry import METHODS, Method
from surgery.operations.add import model_of
from surgery.report import Table, percent
from surgery.tensor import human_bytes

_FILES: dict[File, str] = {
    "peft": "PEFT folder", "adapterhub": "AdapterHub folder", "tensors": "tensors and names", "names": "list of names",
}  # fmt: skip
_BYTES = 4
"""Of a parameter: new tensors are float32 by default."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One method on one model."""

    method: Method
    parameters: int | None
    share: float | None
    file: str
    why_not: str = ""
    """Why it does not fit the model, where it does not."""

    @property
    def nbytes(self) -> int | None:
        """Bytes of the trained parameters as float32."""
        return None if self.parameters is None else _BYTES * self.parameters


class Costs:
    """Every method on one model, with its default settings."""

    def __init__(self, label: str, total: int, rows: Sequence[Cost]) -> None:
        self.label = label
        self.total = total
        self.rows = tuple(rows)

    def table(self) -> Table:
        """Show one line a method."""
        columns = ("method", "parameters", "of model", "size", "mergeable", "when used", "becomes", "formula")
        return Table(f"{self.label}: {self.total:,} parameters", columns, tuple(map(_shown, self.rows)))

    def notes(self) -> list[str]:
        """Say which methods do not fit, and why."""
        return [f"{row.method.name} does not fit: {row.why_not}" for row in self.rows if row.why_not]

    def document(self) -> dict[str, Any]:
        """Return everything, for ``--json``."""
        return {
            "schema": "surgery.methods/1", "checkpoint": self.label, "parameters": self.total,
            "methods": [
                {
                    "name": row.method.name, "title": row.method.title, "parameters": row.parameters, "share": row.share,
                    "bytes": row.nbytes, "mergeable": row.method.mergeable, "inference": row.method.cost, "file": row.file,
                    "formula": row.method.formula, "citation": row.method.citation, "why_not": row.why_not or None,
                    "settings": {each.name: each.default for each in row.method.parameters},
                }
                for row in self.rows
            ],
        }  # fmt: skip

    def _repr_html_(self) -> str:
        return self.table().html()


def _shown(row: Cost) -> tuple[str, ...]:
    method = row.method
    settings = ", ".join(
        f"{each.name}={each.default}" for each in method.parameters if each.kind == "whole" and each.default is not None
    )
    return (
        f"{method.name} ({settings})" if settings else method.name,
        "–" if row.parameters is None else f"{row.parameters:,}",
        "–" if row.share is None else percent(row.share),
        "–" if row.nbytes is None else human_bytes(row.nbytes),
        "yes" if method.mergeable else "no", method.cost, row.file, method.formula,
    )  # fmt: skip


def methods(source: Source) -> Costs:
    """Count what each method would add to a model, with its default settings; no tensor is read.

    Counts leave out the task's head, which PEFT trains beside any method. Sizes are of float32 values.

    Args:
        source: a folder, a file, or a state dict.

    >>> import numpy
    >>> model = {f"h.0.{name}.weight": numpy.ones((8, 8), "float32") for name in ("q_proj", "v_proj")}
    >>> methods(model).rows[0].parameters
    256
    """
    checkpoint = open_checkpoint(source)
    model = model_of(checkpoint)
    rows = []
    for row in METHODS.values():
        try:
            addition = row.plan(model, (), row.settings({}))
        except SurgeryError as error:
            rows.append(Cost(row, None, None, "–", str(error)))
        else:
            share = addition.parameters / checkpoint.parameters if checkpoint.parameters else 0.0
            rows.append(Cost(row, addition.parameters, share, _FILES[addition.file]))
    return Costs(checkpoint.label, checkpoint.parameters, rows)


def published_table() -> Table:
    """Show published counts beside the exact ones."""
    rows = tuple(
        (each.table, each.method, each.printed, f"{each.exact:,}", each.formula, each.inconsistent or "–")
        for each in PUBLISHED
    )
    return Table("Published counts", ("model", "method", "printed", "exact", "formula", "inconsistent"), rows)


def published_document() -> dict[str, Any]:
    """Return published counts, for ``--json``."""

    def row(each: Published) -> dict[str, Any]:
        return {
            "model": each.table, "method": each.method, "printed": each.printed, "exact": each.exact,
            "formula": each.formula, "inconsistent": each.inconsistent or None,
        }  # fmt: skip

    return {"schema": "surgery.published/1", "counts": [row(each) for each in PUBLISHED]}
