"""Exact order statistics of streams, in bounded memory.

The k-th largest of non-negative floats is found digit by digit: read as integers, their bit patterns have the order of
their values. A pass counts the leading 16 bits of every value; the bucket with the k-th value is known then, and further
passes count the next bits of the values inside it. float32 takes two passes, float64 four; memory is 512 kB a bucket. A
tensor of a single block is partitioned at once.

A pass is spared where a *sample* was seen before: it gives each value a window of neighbouring bit patterns that it is
all but certain to lie in; one pass counts what is above the window and every pattern inside it. Where the window holds
one or two values, as with differences of bfloat16, which are multiples of a few steps, counting what is not below these
does. Should the value lie elsewhere, the passes above follow. What is found is exact in either case.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from surgery.algorithms.kernel import Totals
from surgery.numerics import BLOCK, scratch

_DIGIT = 16
_BINS = 1 << _DIGIT
_WIDEST = 1 << 18
"""Bit patterns in a window, at most: in float32 about 3 % of the value."""
_FEW = 2
"""Candidates that are cheaper to count one by one than a window around them."""
_MARGIN = 0.015
"""Share of all values between the one that is sought and either end of its window, as far as a sample can tell."""


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


class _Guess(Protocol):
    """Where one value probably is."""

    rank: Rank

    def observe(self, keys: np.ndarray) -> list[int]:
        """Count a block's bit patterns."""
        ...

    def value(self, counts: Sequence[int]) -> float | None:
        """Return what is sought, or ``None`` where it lies elsewhere."""
        ...


class _Candidates:
    """Counts what is at least one of a few bit patterns, and what is above it: the value is proved, or refuted."""

    def __init__(self, rank: Rank, patterns: Sequence[int]) -> None:
        self.rank = rank
        self._patterns = patterns

    def observe(self, keys: np.ndarray) -> list[int]:
        """Count from each candidate up, and above it."""
        mask = scratch("mask", keys.size, torch.bool).numpy()
        edges = [edge for pattern in self._patterns for edge in (pattern, pattern + 1)]
        return [int(np.count_nonzero(np.greater_equal(keys, np.int32(edge), out=mask))) for edge in edges]

    def value(self, counts: Sequence[int]) -> float | None:
        """Return the candidate that has fewer than ``rank`` above it, and ``rank`` with its equals."""
        for pattern, equal, above in zip(self._patterns, counts[::2], counts[1::2], strict=True):
            if above < self.rank.rank <= equal:
                return _real(pattern)
        return None


class _Window:
    """Counts the values above a run of bit patterns, and each pattern in it."""

    def __init__(self, rank: Rank, low: int, width: int) -> None:
        self.rank = rank
        self._low = low
        self._width = width
        self._counts = torch.zeros(width, dtype=torch.int64)
        """Counted where the values are, not returned block by block: integers, so their order does not matter."""
        self._lock = threading.Lock()

    def observe(self, keys: np.ndarray) -> list[int]:
        """Count inside, and return how many are above."""
        # Into working memory: fresh pages would cost more than the arithmetic.
        offsets = scratch("offsets", keys.size, torch.int32).numpy()
        mask = scratch("mask", keys.size, torch.bool).numpy()
        np.subtract(keys, np.int32(self._low), out=offsets)
        above = int(np.count_nonzero(np.greater_equal(offsets, np.int32(self._width), out=mask)))
        np.less(offsets.view(np.uint32), np.uint32(self._width), out=mask)
        inside = torch.from_numpy(np.compress(mask, offsets)).to(torch.int64)  # three times as fast as offsets[mask]
        with self._lock:
            self._counts.scatter_add_(0, inside, torch.ones_like(inside))
        return [above]

    def value(self, counts: Sequence[int]) -> float | None:
        """Return what is sought, or ``None`` where it lies elsewhere."""
        within = self.rank.rank - counts[0]
        if not 0 < within <= int(self._counts.sum()):
            return None
        offset, _ = _bin_of(within, self._counts.numpy())
        return _real(self._low + offset)


def _real(pattern: int) -> float:
    return float(np.array(pattern, dtype=np.uint32).view(np.float32))


class Order:
    """Finds values by rank, in at most :attr:`stages` passes."""

    def __init__(self, ranks: Sequence[Rank], count: int, dtype: torch.dtype) -> None:
        """Seek ``ranks`` in streams of ``count`` values each."""
        self.ranks = tuple(ranks)
        self._count = count
        self._bits = dtype.itemsize * 8
        self._at_once = count <= BLOCK
        self._guesses: list[_Guess] = []
        self.stages = 0 if not ranks else 1 if self._at_once else 1 + self._bits // _DIGIT

    @property
    def resident(self) -> int:
        """Bytes that counting takes, at most."""
        return 0 if self._at_once else len(self.ranks) * 8 * (_WIDEST + 2 * _BINS)

    @property
    def streams(self) -> list[int]:
        """Streams that are looked at."""
        return sorted({rank.stream for rank in self.ranks})

    def sample(self, values: Sequence[torch.Tensor]) -> None:
        """See some of every stream's values before the first pass."""
        if self._at_once or self._bits != 32:
            return
        sorted_by_stream = {stream: np.sort(values[stream].numpy()).view(np.int32) for stream in self.streams}
        for rank in self.ranks:
            ordered = sorted_by_stream[rank.stream]
            share = 1 - rank.rank / self._count
            first, middle, last = (
                min(max(round((share + off) * ordered.size), 0), ordered.size - 1) for off in (-_MARGIN, 0, _MARGIN)
            )
            candidates = np.unique(ordered[first : last + 1])
            if len(candidates) <= _FEW:
                self._guesses.append(_Candidates(rank, candidates.tolist()))
                continue
            low = max(int(ordered[first]), int(ordered[middle]) - _WIDEST // 2)
            self._guesses.append(_Window(rank, low, min(int(ordered[last]) - low + 1, _WIDEST)))

    def needs(self, found: Sequence[Any]) -> bool:
        """Say whether stage ``len(found)`` has to look at the values at all."""
        if self._at_once:
            return True
        return bool(self._guesses) if not found else found[0] is None

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
            return tuple(np.array(guess.observe(keys[guess.rank.stream])) for guess in self._guesses)
        level = len(found) - 1
        return tuple(self._digits(values[s], prefix, level) for s, prefix in _buckets(self._places(found)))

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Choose, for each value that is sought, the bucket it is in; at last return the values."""
        if self._at_once:
            return totals[0].tolist()
        if not found:
            values = [guess.value(counts.tolist()) for guess, counts in zip(self._guesses, totals, strict=True)]
            self._guesses.clear()
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
            keys = torch.from_numpy(np.compress((pattern >> (shift + _DIGIT)) == prefix, pattern))
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
    digit, rank = _bin_of(place.rank, counts)
    return _Place(place.stream, rank, place.prefix << _DIGIT | digit)


def _bin_of(rank: int, counts: np.ndarray) -> tuple[int, int]:
    """Find the bin that holds the ``rank``-th value from the top, and the value's rank in it."""
    above = np.cumsum(counts[::-1])  # values in the bins from the top down to each
    bins = int(np.searchsorted(above, rank))
    return len(counts) - 1 - bins, rank - (int(above[bins - 1]) if bins else 0)
