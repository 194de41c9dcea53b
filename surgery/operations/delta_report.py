"""What an exact delta says about itself: tables and facts from its manifest alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.exact import Delta
from surgery.formats.delta_manifest import Change
from surgery.report import Table, join_shown
from surgery.roles import role_of
from surgery.tensor import human_bytes, human_count


@dataclass(frozen=True, slots=True)
class DeltaRow:
    """How one tensor of the fine-tune is kept."""

    name: str
    role: str
    how: str
    """``unchanged``, ``new`` (without a base), ``low-rank`` (predicted, and the rest), or the coding that most of its blocks have."""
    elements: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits an element."""
        return 8 * self.nbytes / max(self.elements, 1)


@dataclass(frozen=True)
class DeltaInfo:
    """Facts about an exact delta."""

    label: str
    base: str
    task: str
    reversible: bool
    nbytes: int
    """Of the file."""
    back_bytes: int
    """Of the base's tensors that are stored whole for the way back."""
    rows: tuple[DeltaRow, ...]
    notes: Sequence[str] = ()

    @property
    def parameters(self) -> int:
        """Elements of the fine-tune."""
        return sum(row.elements for row in self.rows)

    @property
    def bits(self) -> float:
        """Bits an element of the fine-tune, everything in the file counted."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def facts(self) -> list[tuple[str, str]]:
        """List what people ask first."""
        return [
            ("exact delta", f"{self.base} → {self.task}"),
            ("restores", "either from the other" if self.reversible else "the fine-tune from the base"),
            ("elements", f"{human_count(self.parameters)} in {len(self.rows):,} tensors"),
            ("bytes", f"{human_bytes(self.nbytes)}, {self.bits:.3g} bits an element"),
        ]

    def by_role(self) -> Table:
        """Say for each kind of tensor what was chosen and what it costs."""
        groups: dict[str, list[DeltaRow]] = {}
        for row in self.rows:
            groups.setdefault(row.role, []).append(row)
        lines = [_line(role, rows) for role, rows in groups.items()]
        return Table("What the delta holds", _COLUMNS, (*lines, _line("all", self.rows)))

    def all_tensors(self) -> Table:
        """List every tensor."""
        return Table("All tensors", _COLUMNS, tuple(_line(row.name, [row]) for row in self.rows))

    def document(self, *, tensors: bool = False) -> dict[str, Any]:
        """Return the facts for ``--json``."""
        kinds: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            kind = kinds.setdefault(row.role, {"tensors": Counter(), "elements": 0, "bytes": 0})
            kind["tensors"][row.how] += 1
            kind["elements"] += row.elements
            kind["bytes"] += row.nbytes
        listed = [
            {"name": row.name, "kind": row.role, "stored_as": row.how, "elements": row.elements, "bytes": row.nbytes}
            for row in self.rows
        ]
        return {
            "schema": "surgery.delta-info/1", "delta": self.label, "base": self.base, "task": self.task,
            "reversible": self.reversible, "tensors": len(self.rows), "elements": self.parameters, "bytes": self.nbytes,
            "bits_per_weight": self.bits, "back_bytes": self.back_bytes, "kinds": kinds, "notes": list(self.notes),
            **({"list": listed} if tensors else {}),
        }  # fmt: skip

    def _repr_html_(self) -> str:
        return Table(self.label, ("fact", "value"), tuple(self.facts())).html() + self.by_role().html()


_COLUMNS = ("kind", "stored as", "tensors", "elements", "bytes", "bits/weight")


def _line(title: str, rows: Sequence[DeltaRow]) -> tuple[str, ...]:
    ways = Counter(row.how for row in rows)
    how = ", ".join(f"{count:,} {way}" for way, count in ways.most_common())
    elements, nbytes = sum(row.elements for row in rows), sum(row.nbytes for row in rows)
    bits = 8 * nbytes / max(elements, 1)
    return (title, how, f"{len(rows):,}", human_count(elements), human_bytes(nbytes), f"{bits:.3f}")


def describe(delta: Delta) -> DeltaInfo:
    """Describe a delta; no coded block is read."""
    manifest = delta.manifest
    rows = tuple(
        DeltaRow(name, role_of(change.tuned.spec), _how(change), change.tuned.spec.numel,
                 sum(block.size for block in change.stored))
        for name, change in manifest.changes.items()
    )  # fmt: skip
    back = sum(block.size for blocks in manifest.back.values() for block in blocks)
    used = {change.base for change in manifest.changes.values()}
    gone = sorted(name for name in manifest.base.tensors if name not in used and name not in manifest.changes)
    notes = [f"the base's, and not in the fine-tune: {join_shown(gone)}"] if gone else []
    return DeltaInfo(
        delta.label, manifest.base.name, manifest.task.name, manifest.reversible, delta.nbytes, back, rows, notes
    )


def _how(change: Change) -> str:
    if change.base is None:
        return "new"
    if change.prediction is not None:
        return "low-rank"
    codings = Counter(block.coding for block in change.blocks)
    return codings.most_common(1)[0][0] if codings else "unchanged"
