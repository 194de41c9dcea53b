r"""Rank rules: how many components of each delta's spectrum are worth their bytes.

Deltas ``l`` with singular values ``σ_{l,1} ≥ σ_{l,2} ≥ …``, of which a component costs ``c_l`` bytes. Keeping ``r_l`` of each
leaves the squared error ``E(r) = Σ_l Σ_{j>r_l} σ²_{l,j}`` (Eckart and Young 1936; errors of different tensors add).

* :func:`by_energy`: in each delta, the fewest components that hold a share of its energy.
* :func:`by_error`: the fewest bytes for a total relative error.
* :func:`by_budget`: the least error for a number of bytes.

The last two walk down one threshold ``t`` on the *rate* ``ρ_{l,j} = σ²_{l,j} / c_l``.

**Theorem.** For every ``t > 0`` the ranks ``r_l(t) = #{j: ρ_{l,j} > t}`` have the least error of all ranks that cost no more.
*Proof.* ``r(t)`` minimises the Lagrangian ``E(r) + t·Σ r_l c_l`` term by term. For any ``r'`` that costs no more than
``r(t)``: ``E(r') ≥ E(r(t)) + t·(cost(r(t)) − cost(r')) ≥ E(r(t))``. ∎

Between two thresholds the greedy fill is within one component of the optimum: filling the gap with a fraction of the first
component that does not fit would be a lower bound (the fractional knapsack, Dantzig 1957). Components that only come
together (``--rank-multiple``, experts that share a rank) are one item: their rates fall too, so all of this holds.

Nothing here knows matrices, names or files.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of one delta's spectrum, and what keeping of it costs.

    Args:
        squares: ``(k,)``, the leading ``σ²``, descending, float64; ``k`` may be less than ``limit``.
        energy: ``‖Δ‖² ≥ Σ squares``.
        cost: bytes a component.
        limit: the largest rank to consider.
        multiple: components come in runs of so many; the last run may be shorter.
    """

    squares: NDArray[np.float64]
    energy: float
    cost: int
    limit: int
    multiple: int = 1

    def left(self, rank: int) -> float:
        """Return the squared error that ``rank`` components leave."""
        return max(self.energy - float(self.squares[:rank].sum()), 0.0)

    def next_rank(self, rank: int) -> int:
        """Return the rank after one more item."""
        return min(rank + self.multiple, self.limit)

    def rate(self, rank: int) -> float:
        """Return what a byte of the item after ``rank`` components brings; 0 where nothing is known or left."""
        following = self.next_rank(rank)
        if following == rank or rank >= len(self.squares):
            return 0.0
        return float(self.squares[rank:following].sum()) / ((following - rank) * self.cost)

    def open_at(self, rank: int) -> bool:
        """Say whether a rule that chose ``rank`` might choose more if more of the spectrum were known."""
        return self.next_rank(rank) > len(self.squares) and len(self.squares) < self.limit and self.energy > 0


def by_energy(spectrum: Spectrum, share: float) -> int:
    """Return the least rank that holds ``share`` of a delta's energy, or all that is known.

    >>> by_energy(Spectrum(np.array([9.0, 4.0, 1.0]), 14.0, 1, 3), 0.9)
    2
    """
    rank, wanted = 0, share * spectrum.energy
    held = 0.0
    while held < wanted and rank < min(spectrum.limit, len(spectrum.squares)):
        following = spectrum.next_rank(rank)
        held += float(spectrum.squares[rank:following].sum())
        rank = following
    return rank


def by_error(
    spectra: Sequence[Spectrum], error: float, *, fixed: float = 0.0, energy: float | None = None
) -> list[int]:
    """Return the cheapest ranks whose total relative error is at most ``error``, or all that is known.

    Args:
        spectra: one a delta.
        error: ``√(E / ‖Δ‖²)`` over all deltas.
        fixed: squared error outside of ``spectra``, which no rank mends.
        energy: ``‖Δ‖²`` of everything; of ``spectra`` by default.

    >>> by_error([Spectrum(np.array([9.0, 1.0]), 10.0, 1, 2), Spectrum(np.array([4.0, 1.0]), 5.0, 1, 2)], 0.4)
    [1, 1]
    """
    total = math.fsum(s.energy for s in spectra) if energy is None else energy
    ranks = [0] * len(spectra)
    left = fixed + math.fsum(s.energy for s in spectra)
    for number, following, gain in _items(spectra):
        if left <= error * error * total:
            break
        ranks[number] = following
        left -= gain
    return ranks


def by_budget(spectra: Sequence[Spectrum], budget: int) -> list[int]:
    """Return the ranks of least total error that cost at most ``budget`` bytes.

    Exactly optimal at every budget that a threshold reaches, otherwise within one component. Equal ranks, and equal
    shares of energy, are tried as well, and the best of the three is returned.

    >>> by_budget([Spectrum(np.array([9.0, 1.0]), 10.0, 2, 2), Spectrum(np.array([4.0, 1.0]), 5.0, 1, 2)], 4)
    [1, 2]
    """
    candidates = [_greedy(spectra, budget), uniform(spectra, budget), _equal_shares(spectra, budget)]
    return min(candidates, key=lambda ranks: total_left(spectra, ranks))


def total_left(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    """Return the squared error that ``ranks`` leave."""
    return math.fsum(s.left(rank) for s, rank in zip(spectra, ranks, strict=True))


def total_cost(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> int:
    """Return the bytes that ``ranks`` cost."""
    return sum(s.cost * rank for s, rank in zip(spectra, ranks, strict=True))


def uniform(spectra: Sequence[Spectrum], budget: int) -> list[int]:
    """Return the largest equal rank that fits, clamped to each delta's own."""

    def ranks_at(rank: int) -> list[int]:
        return [min(rank, s.limit, _known(s)) for s in spectra]

    multiple = max((s.multiple for s in spectra), default=1)
    low, high = 0, -(-max((s.limit for s in spectra), default=0) // multiple)
    while low < high:
        middle = (low + high + 1) // 2
        if total_cost(spectra, ranks_at(middle * multiple)) <= budget:
            low = middle
        else:
            high = middle - 1
    return ranks_at(low * multiple)


def _known(spectrum: Spectrum) -> int:
    """Return the largest whole item that is known."""
    known = len(spectrum.squares)
    return known if known >= spectrum.limit else known - known % spectrum.multiple


def _equal_shares(spectra: Sequence[Spectrum], budget: int) -> list[int]:
    """Return the ranks of the largest share of energy, held by every delta, that fit."""
    shares = sorted({s.left(rank) / s.energy for s in spectra if s.energy for rank in _ranks(s)}, reverse=True)
    low, high = 0, len(shares)
    best = [0] * len(spectra)
    while low < high:
        middle = (low + high) // 2
        # A hair above the breakpoint, so that the rank which defines it is enough.
        ranks = [by_energy(s, (1 - shares[middle]) * (1 - 1e-12)) for s in spectra]
        if total_cost(spectra, ranks) <= budget:
            best, low = ranks, middle + 1
        else:
            high = middle
    return best


def _ranks(spectrum: Spectrum) -> Iterator[int]:
    rank = 0
    while rank < _known(spectrum):
        rank = spectrum.next_rank(rank)
        yield rank


def _greedy(spectra: Sequence[Spectrum], budget: int) -> list[int]:
    """Take items by falling rate; one that does not fit closes its delta, and smaller ones go on filling."""
    ranks, closed, spent = [0] * len(spectra), set[int](), 0
    for number, following, _ in _items(spectra):
        cost = (following - ranks[number]) * spectra[number].cost
        if number not in closed and spent + cost <= budget:
            ranks[number], spent = following, spent + cost
        else:
            closed.add(number)
    return ranks


def _items(spectra: Sequence[Spectrum]) -> Iterator[tuple[int, int, float]]:
    """Yield (delta, rank after, energy gained) by falling rate, within each delta in order; ties in order of the deltas."""
    heap = [(-s.rate(0), number, 0) for number, s in enumerate(spectra) if s.rate(0) > 0]
    heapq.heapify(heap)
    while heap:
        _, number, rank = heapq.heappop(heap)
        spectrum = spectra[number]
        following = spectrum.next_rank(rank)
        if following > len(spectrum.squares):
            continue  # no whole item is known
        yield number, following, float(spectrum.squares[rank:following].sum())
        if spectrum.rate(following) > 0:
            heapq.heappush(heap, (-spectrum.rate(following), number, following))
