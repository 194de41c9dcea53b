"""``diff`` of two exact deltas of one base: from their manifests alone, or by the values that they restore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint, Source, open_checkpoint
from surgery.errors import MismatchError
from surgery.exact import Delta, open_delta
from surgery.formats.delta_manifest import Change
from surgery.operations.merge_delta import DeltaSource, Restoration
from surgery.report import Table
from surgery.roles import role_of
from surgery.tensor import human_bytes

SAME, BOTH, ONLY_A, ONLY_B, NEITHER = (
    "changed alike",
    "changed differently",
    "changed by A",
    "changed by B",
    "unchanged",
)
"""What two deltas can make of a tensor; one that only one of the fine-tunes has counts as changed by that side."""


@dataclass(frozen=True, slots=True)
class PairRow:
    """One tensor of either fine-tune."""

    name: str
    role: str
    status: str
    bytes_a: int
    bytes_b: int


@dataclass(frozen=True)
class DeltaComparison:
    """What two deltas of one base have in common."""

    a: str
    b: str
    base: str
    rows: tuple[PairRow, ...]

    @property
    def identical(self) -> bool:
        """Whether both restore the same."""
        return all(row.status in (SAME, NEITHER) for row in self.rows)

    def verdict(self) -> str:
        """Say it in one line."""
        if self.identical:
            return "the same fine-tune"
        counts = Counter(row.status for row in self.rows)
        return ", ".join(
            f"{counts[status]:,} {status}" for status in (BOTH, ONLY_A, ONLY_B, SAME, NEITHER) if counts[status]
        )

    def table(self, *, by_tensor: bool = False) -> Table:
        """Count by kind of tensor, or list them."""
        if by_tensor:
            rows = tuple((r.name, r.status, human_bytes(r.bytes_a), human_bytes(r.bytes_b)) for r in self.rows)
            return Table("All tensors", ("tensor", "status", "bytes in A", "bytes in B"), rows)
        groups: dict[str, list[PairRow]] = {}
        for row in self.rows:
            groups.setdefault(row.role, []).append(row)
        lines = tuple(_line(role, rows) for role, rows in (*groups.items(), ("all", list(self.rows))))
        return Table(
            "What the deltas change", ("kind", BOTH, ONLY_A, ONLY_B, SAME, NEITHER, "bytes in A", "bytes in B"), lines
        )

    def document(self) -> dict[str, Any]:
        """Return the facts for ``--json``."""
        return {
            "schema": "surgery.diff-deltas/1", "a": self.a, "b": self.b, "base": self.base, "identical": self.identical,
            "counts": dict(Counter(row.status for row in self.rows)),
            "tensors": [{"name": r.name, "kind": r.role, "status": r.status, "bytes_a": r.bytes_a, "bytes_b": r.bytes_b}
                        for r in self.rows],
        }  # fmt: skip


def _line(title: str, rows: list[PairRow]) -> tuple[str, ...]:
    counts = Counter(row.status for row in rows)
    sizes = human_bytes(sum(row.bytes_a for row in rows)), human_bytes(sum(row.bytes_b for row in rows))
    return (title, *(f"{counts[status]:,}" for status in (BOTH, ONLY_A, ONLY_B, SAME, NEITHER)), *sizes)


def compare_deltas(a: DeltaSource, b: DeltaSource) -> DeltaComparison:
    """Compare two exact deltas of one base by the fingerprints in their manifests; no block is read.

    Raises:
        MismatchError: their bases differ.

    >>> import numpy, surgery
    >>> base, one, two = ({"w": numpy.float32([value]), "v": numpy.float32([0])} for value in (1, 2, 3))
    >>> compare_deltas(surgery.extract_delta(base, one), surgery.extract_delta(base, two)).verdict()
    '1 changed differently, 1 unchanged'
    """
    first, second = open_delta(a), open_delta(b)
    _check_same_base(first, second)
    return DeltaComparison(first.label, second.label, first.manifest.base.name, tuple(_rows(first, second)))


def _check_same_base(first: Delta, second: Delta) -> None:
    one, two = first.manifest.base.tensors, second.manifest.base.tensors
    for name in sorted(one.keys() | two.keys()):
        if name not in one or name not in two or one[name].fingerprint != two[name].fingerprint:
            raise MismatchError(f"is not the same in the base of {first.label}: only deltas of one base are compared",
                                file=second.label, tensor=name)  # fmt: skip


def _rows(first: Delta, second: Delta) -> Iterator[PairRow]:
    ours, theirs = first.manifest.changes, second.manifest.changes
    for name in sorted(ours.keys() | theirs.keys()):
        one, two = ours.get(name), theirs.get(name)
        spec = (one or two).tuned.spec  # type: ignore[union-attr]  # it is in one of them
        yield PairRow(name, role_of(spec), _status(one, two), _cost(one), _cost(two))


def _status(one: Change | None, two: Change | None) -> str:
    if one is None or two is None:
        return ONLY_B if one is None else ONLY_A
    changed = [not (change.base == change.tuned.spec.name and not change.blocks) for change in (one, two)]
    if one.tuned.fingerprint == two.tuned.fingerprint:
        return SAME if any(changed) else NEITHER
    return BOTH if all(changed) else ONLY_A if changed[0] else ONLY_B


def _cost(change: Change | None) -> int:
    return 0 if change is None else sum(block.size for block in change.stored)


class Pair:
    """The fine-tunes of two deltas of one base, restored lazily, to be compared by their values."""

    def __init__(self, base: Source, a: DeltaSource, b: DeltaSource) -> None:
        checkpoint = open_checkpoint(base)
        self._works = [Restoration(checkpoint, open_delta(each), reverse=False) for each in (a, b)]

    def sides(self) -> tuple[Checkpoint, Checkpoint]:
        """Return both."""
        first, second = (work.checkpoint() for work in self._works)
        return first, second

    def prove(self) -> None:
        """Hold the base against both deltas' records.

        Raises:
            MismatchError: by tensor.
        """
        for work in self._works:
            work.prove_source()
