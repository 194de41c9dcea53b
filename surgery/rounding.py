"""Honest rounding: how much of a delta survives the dtype that its weights are stored in.

Of what a merge was to add, ``Δ``, a weight of few bits takes only what its rounding leaves. Two numbers say how much: the
share of weights that changed at all, and ``‖applied − Δ‖ / ‖Δ‖`` where ``applied`` is the difference of the stored weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery import numerics
from surgery.report import Table

WORST = 5
"""Tensors that a report names."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What is added up over the elements of a weight."""

    count: int
    """Elements that ``Δ`` was to change."""
    changed: int
    """Elements whose stored bits changed."""
    ideal: float
    """``Σ Δ²``."""
    lost: float
    """``Σ (applied − Δ)²``."""
    along: float
    """``Σ W·Δ``."""
    base: float
    """``Σ W²``."""

    @classmethod
    def of(
        cls, error: torch.Tensor, base: torch.Tensor, values: torch.Tensor, changed: int, *, partial: bool = False
    ) -> Sums:
        """Add up one block.

        Args:
            error: ``applied − Δ``, float64.
            base: old values, float64.
            values: ``W + Δ`` before rounding, float64.
            changed: elements whose bits changed.
            partial: ``Δ`` may be zero in places, which then do not count.
        """
        ideal = torch.sub(values, base, out=numerics.scratch("ideal", values.numel()))
        count = int(torch.count_nonzero(ideal)) if partial else values.numel()
        return cls(count, changed, float(ideal @ ideal), float(error @ error), float(base @ ideal), float(base @ base))

    @classmethod
    def total(cls, sums: Sequence[Sums]) -> Sums:
        """Add sums up: exactly, so that their order does not matter."""
        return cls(
            sum(one.count for one in sums), sum(one.changed for one in sums), _sum(one.ideal for one in sums),
            _sum(one.lost for one in sums), _sum(one.along for one in sums), _sum(one.base for one in sums),
        )  # fmt: skip

    def as_list(self) -> list[float]:
        """Write them for a journal."""
        return [self.count, self.changed, self.ideal, self.lost, self.along, self.base]

    @classmethod
    def from_list(cls, numbers: Sequence[float]) -> Sums:
        """Read them from one."""
        return cls(int(numbers[0]), int(numbers[1]), *numbers[2:])

    def shown(self) -> dict[str, float | None]:
        """Return the two numbers; no error where there was nothing to add, or nothing finite."""
        sound = self.ideal > 0 and math.isfinite(self.ideal + self.lost)
        error = math.sqrt(self.lost / self.ideal) if sound else None
        return {
            "changed": _digits(self.changed / max(self.count, 1)),
            "error": None if error is None else _digits(error),
        }


def _sum(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return math.fsum(found) if all(map(math.isfinite, found)) else sum(found)


def _digits(value: float) -> float:
    """Keep six digits: the last bits of a sum are the machine's."""
    return float(f"{value:.6g}")


def report(sums: Mapping[str, Sums]) -> dict[str, Any]:
    """Say how much of the delta survived: over all weights, for each of them, and which are worst."""
    if not sums:
        return {}
    tensors = {name: one.shown() for name, one in sorted(sums.items())}
    worst = sorted(
        (name for name in tensors if tensors[name]["error"] is not None), key=lambda n: (-(tensors[n]["error"] or 0), n)
    )
    return {"delta_kept": {**Sums.total(list(sums.values())).shown(), "worst": worst[:WORST], "tensors": tensors}}


INSIDE, SURE = 0.35, 8.0
"""From what share of a delta on it counts as inside, and how many standard deviations that must be from chance."""


def inside(sums: Mapping[str, Sums]) -> float | None:
    """Say how much of a delta seems to be in the weights already: its projection ``⟨W, Δ⟩ / ⟨Δ, Δ⟩``, pooled over weights.

    It is near 0 for weights that know nothing of the delta and near 1 for those that it was added to, of which bfloat16
    may have rounded a part away. A weight ``W`` of ``n`` elements that has nothing to do with ``Δ`` gives 0 with a standard
    deviation of ``‖W‖ / (√n ‖Δ‖)`` if it is noise. Trained weights are not, and training moves them along themselves: taken from
    a real fine-tune, Δ has a share of 0.7 in the very base. So the shares' spread between weights counts as chance as well.
    This backs up a record; it cannot replace one.

    Returns:
        The share; ``None`` where it is small, could be chance, or does not hold for three weights of four.
    """
    sound = [one for one in sums.values() if one.ideal > 0 and math.isfinite(one.ideal + one.along + one.base)]
    if not sound:
        return None
    total = math.fsum(one.ideal for one in sound)
    share = math.fsum(one.along for one in sound) / total
    chance = math.sqrt(math.fsum(one.base / one.count * one.ideal for one in sound)) / total
    spread = math.sqrt(math.fsum((one.ideal * (one.along / one.ideal - share)) ** 2 for one in sound)) / total
    quartile = sorted(one.along / one.ideal for one in sound)[len(sound) // 4]
    return share if min(share, quartile) >= INSIDE and share >= SURE * max(chance, spread) else None


def table(kept: Mapping[str, Any]) -> Table:
    """Show the worst tensors and the whole."""
    rows = [(name, *_cells(kept["tensors"][name])) for name in kept["worst"]]
    return Table("What the dtype left of the delta", ("weight", "changed", "error"), (*rows, ("all", *_cells(kept))))


def _cells(entry: Mapping[str, float | None]) -> tuple[str, str]:
    error = entry["error"]
    return f"{100 * (entry['changed'] or 0):.3g} %", "–" if error is None else f"{100 * error:.3g} %"
