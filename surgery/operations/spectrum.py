"""``spectrum``: the singular values of every weight's delta, and what they say about the rank it needs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery import execute, numerics
from surgery.algorithms.compare import effective_rank
from surgery.algorithms.lowrank import TruncatedSVD, truncated_svd
from surgery.algorithms.noise import FloorRank, RoundingNoise, floor_rank
from surgery.checkpoint import Source
from surgery.errors import MismatchError, SurgeryError, UsageError
from surgery.operations.extract_lora import plan_extraction
from surgery.operations.extraction_measure import in_parallel, largest_first
from surgery.operations.extraction_plan import Extraction
from surgery.operations.extraction_units import Unit
from surgery.operations.pairs import Pair
from surgery.report import Table, percent
from surgery.sources.remote import expect

RANKS = (4, 8, 16, 32, 64, 128, 256)
"""Ranks whose share of the energy is shown."""


@dataclass(frozen=True, slots=True)
class SpectrumRow:
    """The spectrum of one matrix's delta."""

    name: str
    expert: int | None
    role: str
    shape: tuple[int, int]
    relative_norm: float
    """‖Δ‖ / ‖W‖ of the whole weight."""
    energy: float
    """‖Δ‖²."""
    sigma: tuple[float, ...]
    """The leading singular values, descending."""
    effective_rank: float
    """``(Σ σ²)² / Σ σ⁴``."""
    floor: FloorRank
    """How many components stand above the noise of the fine-tune's own rounding."""
    excess: float
    """Certified relative excess of the error at the depth looked at over the best possible."""

    def kept(self, rank: int) -> float | None:
        """Return the share of the energy that ``rank`` components hold; ``None`` beyond the depth looked at."""
        if rank > len(self.sigma) and len(self.sigma) < min(self.shape):
            return None
        held = math.fsum(value * value for value in self.sigma[:rank])
        return min(held / self.energy, 1.0) if self.energy else 1.0


@dataclass(frozen=True)
class SpectrumReport:
    """The spectra of all matrices that changed."""

    rows: tuple[SpectrumRow, ...]
    unchanged: int
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """Show one line a matrix."""
        columns = ("weight", "shape", "‖Δ‖/‖W‖", "σ₁", "eff. rank", "noise rank", *(f"@{rank}" for rank in RANKS))
        return Table("Spectra: share of ‖Δ‖² that ranks hold", columns, tuple(_cells(row) for row in self.rows))

    def csv(self) -> str:
        """Write one line a matrix, numbers in full."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            ["name", "expert", "rows", "columns", "relative_norm", "energy", "effective_rank", "noise_rank",
             "noise_rank_certain", *(f"kept_{rank}" for rank in RANKS)]
        )  # fmt: skip
        for row in self.rows:
            kept = [row.kept(rank) for rank in RANKS]
            writer.writerow(
                [row.name, "" if row.expert is None else row.expert, *row.shape, row.relative_norm, row.energy,
                 row.effective_rank, row.floor.rank, row.floor.certain, *("" if k is None else k for k in kept)]
            )  # fmt: skip
        return out.getvalue()

    def document(self) -> dict[str, Any]:
        """Return everything, for ``--json``."""
        return {
            "unchanged": self.unchanged,
            "matrices": [
                {
                    "name": row.name, "expert": row.expert, "role": row.role, "shape": list(row.shape),
                    "relative_norm": row.relative_norm, "energy": row.energy, "effective_rank": row.effective_rank,
                    "noise_rank": row.floor.rank, "noise_rank_certain": row.floor.certain,
                    **({"noise_rank_doubt": row.floor.why} if row.floor.why else {}),
                    "certified_excess": row.excess, "kept": {str(r): row.kept(r) for r in RANKS},
                    "sigma": list(row.sigma),
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }  # fmt: skip

    def _repr_html_(self) -> str:
        return self.table().html()


def spectrum(
    base: Source,
    tuned: Source,
    *,
    depth: int = 256,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    tolerance: float = 1e-3,
    seed: int = 0,
    jobs: int | None = None,
    progress: execute.Progress | None = None,
) -> SpectrumReport:
    """Compute the leading singular values of every weight's delta.

    Args:
        base: the checkpoint before training.
        tuned: the checkpoint after it.
        depth: how many singular values of each matrix, at most.
        target: patterns of weights to look at; all linear ones, convolutions and experts by default.
        exclude: patterns of weights to leave out.
        rename: ``OLD=NEW`` rules for the fine-tune's names.
        tolerance: certified relative excess of the error at ``depth`` over the best possible.
        seed: for random starts, which are keyed by tensor name.
        jobs: threads, each with one matrix; as many as there are cores by default.
        progress: somebody who watches.

    Returns:
        A report with ``.rows``, one a matrix, in the order of the base.

    Raises:
        UsageError: ``depth`` is out of range.
        MismatchError: the two do not belong together, or no matrix changed.
        NumericError: NaN or Inf in either.

    >>> import torch
    >>> base = {"q.weight": torch.zeros(4, 4)}
    >>> [round(s, 4) for s in spectrum(base, {"q.weight": torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))}).rows[0].sigma[:2]]
    [3.0, 2.0]
    """
    if type(depth) is not int or depth < 1:
        raise UsageError(f"--depth is a whole number from 1, not {depth!r}")
    plan = plan_extraction(
        base, tuned, rank=depth, target=target, exclude=exclude, rename=rename, tolerance=tolerance, seed=seed, jobs=jobs
    )  # fmt: skip
    if not plan.units:
        raise MismatchError("has no matrix to look at", file=plan.tuned_label)
    found: dict[str, list[SpectrumRow]] = {}
    watcher = progress or execute.Silent()

    def work(name: str) -> None:
        try:
            found[name] = _rows(plan, plan.units[name], depth)
        except SurgeryError as error:
            raise error.at(tensor=name) from None
        watcher.advance(plan.base.tensors[name].spec.nbytes + plan.tuned[name].spec.nbytes)

    expect(side[name] for name in plan.units for side in (plan.base.tensors, plan.tuned))
    watcher.start(sum(plan.base.tensors[n].spec.nbytes + plan.tuned[n].spec.nbytes for n in plan.units))
    try:
        in_parallel(largest_first(plan.base, plan.units), work, plan.settings.jobs)
    finally:
        watcher.finish()
    rows = tuple(row for name in plan.units for row in found[name])
    if not rows:
        raise MismatchError(f"no differences: all {len(plan.units)} matrices are equal", file=plan.tuned_label)
    return SpectrumReport(rows, sum(not found[name] for name in plan.units), tuple(plan.notes))


def _rows(plan: Extraction, unit: Unit, depth: int) -> list[SpectrumRow]:
    pair = plan.pair(unit.name)
    noises = [RoundingNoise(unit.matrix, pair.tuned.spec.dtype) for _ in range(unit.experts)]
    delta = pair.delta(*noises).view(unit.experts, *unit.matrix)
    rows = []
    for expert, (one, noise) in enumerate(zip(delta, noises, strict=True)):
        generator = numerics.generator(plan.settings.seed, unit.name, f"sketch {expert}")
        svd = truncated_svd(one, depth, generator, tolerance=plan.settings.tolerance)
        if svd.energy:
            rows.append(_row(pair, unit, expert, svd, noise, depth))
    numerics.release_freed_memory()
    return rows


def _row(pair: Pair, unit: Unit, expert: int, svd: TruncatedSVD, noise: RoundingNoise, depth: int) -> SpectrumRow:
    leading = TruncatedSVD(svd.left, svd.sigma[:depth], svd.right, svd.energy)
    weight = pair.weight_energy / unit.experts
    return SpectrumRow(
        unit.name, expert if unit.kind == "experts" else None, pair.role, unit.matrix,
        math.sqrt(svd.energy / weight) if weight else math.inf, svd.energy, tuple(svd.sigma[:depth].tolist()),
        effective_rank(leading, min(unit.matrix)), floor_rank(svd.sigma[:depth], svd.energy, noise), svd.excess,
    )  # fmt: skip


def _cells(row: SpectrumRow) -> tuple[str, ...]:
    name = row.name if row.expert is None else f"{row.name}[{row.expert}]"
    kept = [row.kept(rank) for rank in RANKS]
    return (
        name, f"{row.shape[0]}×{row.shape[1]}", percent(row.relative_norm), f"{row.sigma[0]:.3g}",
        f"{row.effective_rank:.1f}", _noise_rank(row),
        *("" if share is None else percent(share) for share in kept),
    )  # fmt: skip


def _noise_rank(row: SpectrumRow) -> str:
    if row.floor.rank == len(row.sigma) < min(row.shape):
        return f"{row.floor.rank}+"
    return f"{row.floor.rank}{'' if row.floor.certain else ' ?'}"
