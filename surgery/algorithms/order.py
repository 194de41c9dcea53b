"""Exact order statistics of streams, in bounded memory.

The k-th largest of non-negative floats is found digit by digit: read as integers, their bit patterns have the order of
their values. A pass counts the leading 16 bits of every value; the bucket with the k-th value is known then, and further
passes count the next bits of the values inside it. float32 takes two passes, float64 four; memory is 512 kB a bucket. A
tensor of a single block is partitioned at once.

A pass is spared where a *sample* was seen before: it gives each value a window of neighbouring bit patterns that it is
all but certain to lie in; one pass counts what is above the window and every pattern inside it. Should the value lie
elsewhere, the passes above follow. What is found is exact in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from surgery.algorithms.kernel import Totals
from surgery.numerics import BLOCK

_DIGIT = 16
_BINS = 1 << _DIGIT
_WIDTH = 1 << 18
"""Bit patterns in a window: in float32 about 3 % of the value."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The ``rank``-th largest (from 1) of the values of one stream."""

    stream: int
    rank: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value is sought: as the ``rank``-th largest among those that begin with ``prefix``."""

    stream: int
    rank: int
    prefix: int = 0


class _Window:
    """Counts the values above a run of bit patterns, and each pattern in it."""

    def __init__(self, rank: Rank, low: int) -> None:
        self.rank = rank
        self.low = low
        self.counts = torch.zeros(_WIDTH, dtype=torch.int64)
        """Counted where the values are, not returned block by block: integers, so their order does not matter."""

    def observe(self, keys: np.ndarray) -> int:
        """Count inside, and return how many are above."""
        offsets = keys - np.int32(self.low)
        inside = torch.from_numpy(offsets[offsets.view(np.uint32) < np.uint32(_WIDTH)]).to(torch.int64)
        self.counts.scatter_add_(0, inside, torch.ones_like(inside))
        return int(np.count_nonzero(keys >= np.int32(self.low + _WIDTH)))

    def value(self, above: int) -> float | None:
        """Return what is sought, or ``None`` where it lies elsewhere."""
        within = self.rank.rank - above
        if not 0 < within <= int(self.counts.sum()):
            return None
        found = _narrowed(_Place(self.rank.stream, within), self.counts.numpy())
        return float(np.array(self.low + (found.prefix & (_WIDTH - 1)), dtype=np.uint32).view(np.float32))


class Order:
    """Finds values by rank, in at most :attr:`stages` passes."""

    def __init__(self, ranks: Sequence[Rank], count: int, dtype: torch.dtype) -> None:
        """Seek ``ranks`` in streams of ``count`` values each."""
        self.ranks = tuple(ranks)
        self._count = count
        self._bits = dtype.itemsize * 8
        self._at_once = count <= BLOCK
        self._windows: list[_Window] = []
        self.stages = 0 if not ranks else 1 if self._at_once else 1 + self._bits // _DIGIT

    @property
    def streams(self) -> list[int]:
        """Streams that are looked at."""
        return sorted({rank.stream for rank in self.ranks})

    def sample(self, values: Sequence[torch.Tensor]) -> None:
        """See some of every stream's values before the first pass."""
        if self._at_once or self._bits != 32:
            return
        for rank in self.ranks:
            sampled = values[rank.stream]
            place = round(rank.rank / self._count * sampled.numel())
            middle = _kth_largest(sampled, min(max(place, 1), sampled.numel()))
            pattern = int(np.float32(middle).view(np.int32))
            low = min(max(pattern - _WIDTH // 2, 0), (1 << 31) - 1 - _WIDTH)
            self._windows.append(_Window(rank, low))

    def needs(self, found: Sequence[Any]) -> bool:
        """Say whether stage ``len(found)`` has to look at the values at all."""
        if self._at_once:
            return True
        return bool(self._windows) if not found else found[0] is None

    def observe(self, values: Sequence[torch.Tensor], found: Sequence[Any]) -> Totals:
        """Count a block's values by their next digit.

        Args:
            values: a block of each stream by number, non-negative, flat; those not in :attr:`streams` may be anything.
            found: what earlier stages concluded.
        """
        if self._at_once:
            return (np.array([_kth_largest(values[rank.stream], rank.rank) for rank in self.ranks]),)
        if not found:
            keys = {stream: values[stream].view(torch.int32).numpy() for stream in self.streams}
            return (np.array([window.observe(keys[window.rank.stream]) for window in self._windows]),)
        level = len(found) - 1
        return tuple(self._digits(values[s], prefix, level) for s, prefix in _buckets(self._places(found)))

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Choose, for each value that is sought, the bucket it is in; at last return the values."""
        if self._at_once:
            return totals[0].tolist()
        if not found:
            values = [window.value(int(above)) for window, above in zip(self._windows, totals[0], strict=True)]
            self._windows.clear()
            return None if None in values else values
        places = self._places(found)
        counts = dict(zip(_buckets(places), totals, strict=True))
        narrowed = [_narrowed(place, counts[place.stream, place.prefix]) for place in places]
        if len(found) + 1 < self.stages:
            return narrowed
        integer, real = (np.uint32, np.float32) if self._bits == 32 else (np.uint64, np.float64)
        return np.array([place.prefix for place in narrowed], dtype=integer).view(real).tolist()

    def values(self, found: Sequence[Any]) -> dict[Rank, float]:
        """Return what was sought, from the findings of all stages."""
        if not self.ranks:
            return {}
        last = found[0] if found[0] is not None else found[self.stages - 1]
        return dict(zip(self.ranks, last, strict=True))

    def _places(self, found: Sequence[Any]) -> list[_Place]:
        return list(found[-1]) if len(found) > 1 else [_Place(rank.stream, rank.rank) for rank in self.ranks]

    def _digits(self, values: torch.Tensor, prefix: int, level: int) -> np.ndarray:
        keys = values.view(torch.int32 if self._bits == 32 else torch.int64)
        shift = self._bits - _DIGIT * (level + 1)
        if level:
            pattern = keys.numpy()
            keys = torch.from_numpy(pattern[(pattern >> (shift + _DIGIT)) == prefix])
        digits = torch.bitwise_right_shift(keys, shift) if shift else keys
        if level:
            digits = digits & (_BINS - 1)
        return torch.bincount(digits, minlength=_BINS).numpy()


def _kth_largest(values: torch.Tensor, rank: int) -> float:
    place = values.numel() - rank
    return float(np.partition(values.numpy(), place)[place])


def _buckets(places: Sequence[_Place]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((place.stream, place.prefix) for place in places))


def _narrowed(place: _Place, counts: np.ndarray) -> _Place:
    above = np.cumsum(counts[::-1])  # values in the bins from the top down to each
    bins = int(np.searchsorted(above, place.rank))
    before = int(above[bins - 1]) if bins else 0
    return _Place(place.stream, place.rank - before, place.prefix << _DIGIT | (len(counts) - 1 - bins))
