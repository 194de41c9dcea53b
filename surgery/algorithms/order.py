"""Exact order statistics of streams, in bounded memory.

The k-th largest of non-negative floats is found digit by digit: read as integers, their bit patterns have the order of
their values. A pass counts the leading 16 bits of every value; the bucket with the k-th value is known then, and further
passes count the next bits of the values inside it. float32 takes two passes, float64 four; memory is 512 kB a bucket. A
tensor of a single block is partitioned at once.
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


class Order:
    """Finds values by rank, in :attr:`stages` passes."""

    def __init__(self, ranks: Sequence[Rank], count: int, dtype: torch.dtype) -> None:
        """Seek ``ranks`` in streams of ``count`` values each."""
        self.ranks = tuple(ranks)
        self._bits = dtype.itemsize * 8
        self._at_once = count <= BLOCK
        self.stages = 0 if not ranks else 1 if self._at_once else self._bits // _DIGIT

    @property
    def streams(self) -> list[int]:
        """Streams that are looked at."""
        return sorted({rank.stream for rank in self.ranks})

    def observe(self, values: Sequence[torch.Tensor], found: Sequence[Any]) -> Totals:
        """Count a block's values by their next digit.

        Args:
            values: a block of each stream by number, non-negative, flat; those not in :attr:`streams` may be anything.
            found: what earlier stages concluded.
        """
        if self._at_once:
            return (np.array([_kth_largest(values[rank.stream], rank.rank) for rank in self.ranks]),)
        level = len(found)
        return tuple(self._digits(values[s], prefix, level) for s, prefix in _buckets(self._places(found)))

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Choose, for each value that is sought, the bucket it is in; at last return the values."""
        if self._at_once:
            return totals[0].tolist()
        places = self._places(found)
        counts = dict(zip(_buckets(places), totals, strict=True))
        narrowed = [_narrowed(place, counts[place.stream, place.prefix]) for place in places]
        if len(found) + 1 < self.stages:
            return narrowed
        integer, real = (np.uint32, np.float32) if self._bits == 32 else (np.uint64, np.float64)
        return np.array([place.prefix for place in narrowed], dtype=integer).view(real).tolist()

    def values(self, found: Sequence[Any]) -> dict[Rank, float]:
        """Return what was sought, from the findings of all stages."""
        return dict(zip(self.ranks, found[self.stages - 1], strict=True)) if self.ranks else {}

    def _places(self, found: Sequence[Any]) -> list[_Place]:
        return list(found[-1]) if found else [_Place(rank.stream, rank.rank) for rank in self.ranks]

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
    return _Place(place.stream, place.rank - before, place.prefix << _DIGIT | (_BINS - 1 - bins))
