"""Rank rules as a person gives them: one of ``rank``, ``energy``, ``error``, ``budget``, and what bounds them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.algorithms.ranks import Spectrum, by_budget, by_energy, by_error, total_left, uniform
from surgery.errors import UsageError
from surgery.tensor import human_bytes, parse_bytes

FIRST_DEPTH = 16
"""Components that rules without a rank look at first; where they use all of them, twice as many come next."""


@dataclass(frozen=True, slots=True)
class RankRule:
    """How ranks are chosen; see :func:`surgery.extract_lora` for what each field means."""

    rank: int | None = None
    full: bool = False
    energy: float | None = None
    error: float | None = None
    budget: int | None = None
    noise_floor: bool = False
    max_rank: int | None = None
    multiple: int = 1
    portable: bool = False
    """Every factor is padded with zeros to one rank."""

    @property
    def name(self) -> str:
        """What tables and records call it."""
        if self.rank is not None:
            return str(self.rank)
        if self.full:
            return "full"
        if self.energy is not None:
            return f"energy {self.energy:g}"
        if self.error is not None:
            return f"error {self.error:g}"
        return f"budget {human_bytes(self.budget)}" if self.budget is not None else "noise floor"

    @property
    def slug(self) -> str:
        """What file names call it."""
        return f"r{self.rank}" if self.rank is not None else self.name.replace(" ", "")

    def limit(self, limit: int) -> int:
        """Clamp a matrix's own largest rank to what the rule allows."""
        bounds = [bound for bound in (self.rank, self.max_rank) if bound is not None]
        return min([limit, *bounds])

    def first_depth(self, limit: int) -> int:
        """Return the components to look at first."""
        if self.rank is not None or self.full:
            return self.limit(limit)
        return min(self.limit(limit), max(FIRST_DEPTH, self.multiple))

    def choose(self, spectra: Sequence[Spectrum], *, budget: int = 0, fixed: float = 0.0, energy: float) -> list[int]:
        """Choose the rank of every group.

        Args:
            spectra: one a group, as far as they are known.
            budget: bytes for all factors, where the rule has a budget.
            fixed: squared error that no rank mends.
            energy: ‖Δ‖² of everything.
        """
        if self.energy is not None:
            return [by_energy(s, self.energy) for s in spectra]
        if self.error is not None:
            cheapest = by_error(spectra, self.error, fixed=fixed, energy=energy)
            return self._evenly(spectra, self.error**2 * energy - fixed) if self.portable else cheapest
        if self.budget is not None:
            return uniform(spectra, budget) if self.portable else by_budget(spectra, budget)
        return [min(s.limit, len(s.squares)) for s in spectra]

    def _evenly(self, spectra: Sequence[Spectrum], left: float) -> list[int]:
        """Return the least equal rank that leaves no more than ``left``: padding would make unequal ones cost as much."""
        for rank in range(0, max((s.limit for s in spectra), default=0) + 1, self.multiple):
            ranks = [min(rank, s.limit, len(s.squares)) for s in spectra]
            if total_left(spectra, ranks) <= left:
                return ranks
        return [min(s.limit, len(s.squares)) for s in spectra]

    def spectrum(self, squares: np.ndarray, energy: float, cost: int, limit: int) -> Spectrum:
        """Describe a group to the rules."""
        return Spectrum(squares, energy, cost, self.limit(limit), self.multiple)


def parse_rule(
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | str | None = None,
    noise_floor: bool = False,
    max_rank: int | None = None,
    rank_multiple: int = 1,
    portable: bool = False,
    model_bytes: int = 0,
) -> RankRule:
    """Check what was asked for.

    Args:
        rank: a number, ``"full"``, or ``None``: 8 where nothing else says what to do.
        energy: share of each delta's energy to keep.
        error: total relative error to reach.
        budget: bytes, ``"50MB"``, or ``"1%"`` of the model.
        noise_floor: drop what the fine-tune's own rounding cannot tell from zero.
        max_rank: largest rank.
        rank_multiple: ranks are multiples of this, but for a matrix that has no more.
        portable: pad to one rank.
        model_bytes: what a percentage is of.

    Raises:
        UsageError: two rules, or a number out of range.
    """
    given = {"rank": rank, "energy": energy, "error": error, "budget": budget}
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} are different rules for the rank", mend="give one of them")
    for name, share in (("energy", energy), ("error", error)):
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"--{name} is a share between 0 and 1, not {share:g}")
    for name, count in (("max-rank", max_rank), ("rank-multiple", rank_multiple)):
        if count is not None and (type(count) is not int or count < 1):
            raise UsageError(f"--{name} is a whole number from 1, not {count!r}")
    if rank is not None and rank != "full" and (type(rank) is not int or rank < 1):
        raise UsageError(f"rank must be a whole number from 1, or 'full', not {rank!r}")
    if max_rank is not None and max_rank < rank_multiple:
        raise UsageError(f"--max-rank {max_rank} leaves no room for --rank-multiple {rank_multiple}")
    if type(rank) is int and rank % rank_multiple:
        raise UsageError(f"--rank {rank} is no multiple of --rank-multiple {rank_multiple}")
    if not named and not noise_floor:
        rank = 8
    return RankRule(
        rank=None if rank == "full" or rank is None else int(rank),
        full=rank == "full", energy=energy, error=error,
        budget=None if budget is None else _bytes(budget, model_bytes),
        noise_floor=noise_floor, max_rank=max_rank, multiple=rank_multiple, portable=portable,
    )  # fmt: skip


def _bytes(budget: int | str, model_bytes: int) -> int:
    if isinstance(budget, int):
        found: int | None = budget
    elif share := re.fullmatch(r"(\d{1,3}(?:\.\d{1,15})?)\s*%", budget):
        found = int(float(share[1]) / 100 * model_bytes)
    else:
        found = parse_bytes(budget)
    if found is None or found < 1:
        raise UsageError(f"--budget is a size like 50MB, or a share of the model like 1%, not {budget!r}")
    return found
