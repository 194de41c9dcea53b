"""Exact order statistics of streams, in bounded memory.

The k-th largest of non-negative floats is found digit by digit: read as integers, their bit patterns have the order of
their values. A pass counts the leading 16 bits of every value; the bucket with the k-th value is known then, and further
passes count the next bits of the values inside it. float32 takes two passes, float64 four; memory is 512 kB a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

DIGIT = 16
_BINS = 1 << DIGIT


def passes(dtype: torch.dtype) -> int:
    """Count the passes that values of ``dtype`` take."""
    return dtype.itemsize * 8 // DIGIT


@dataclass(frozen=True, slots=True)
class Sought:
    """One value that is sought: the ``rank``-th largest (from 1) among a stream's values that begin with ``prefix``."""

    stream: int
    rank: int
    prefix: int = 0


def count(values: Sequence[torch.Tensor], sought: Sequence[Sought], level: int) -> tuple[np.ndarray, ...]:
    """Count a block's values by their next digit.

    Args:
        values: a block of each stream, non-negative, flat.
        sought: what is sought, as the previous level left it.
        level: from 0.

    Returns:
        For each of :func:`buckets` an array of counts by digit.
    """
    return tuple(_digits(values[stream], prefix, level) for stream, prefix in buckets(sought))


def buckets(sought: Sequence[Sought]) -> list[tuple[int, int]]:
    """List the distinct (stream, prefix) pairs that are counted."""
    return list(dict.fromkeys((item.stream, item.prefix) for item in sought))


def narrowed(sought: Sequence[Sought], counts: Sequence[np.ndarray]) -> list[Sought]:
    """Choose, for each value that is sought, the bucket it is in."""
    where = {bucket: number for number, bucket in enumerate(buckets(sought))}
    found = []
    for item in sought:
        counted = counts[where[item.stream, item.prefix]]
        above = np.cumsum(counted[::-1])  # values in the bins from the top down to this one
        place = int(np.searchsorted(above, item.rank))
        before = int(above[place - 1]) if place else 0
        found.append(Sought(item.stream, item.rank - before, item.prefix << DIGIT | (_BINS - 1 - place)))
    return found


def value(item: Sought, dtype: torch.dtype) -> float:
    """Return the value whose bit pattern all levels together found."""
    integer, real = (np.uint32, np.float32) if dtype == torch.float32 else (np.uint64, np.float64)
    return float(np.array(item.prefix, dtype=integer).view(real))


def _digits(values: torch.Tensor, prefix: int, level: int) -> np.ndarray:
    bits = values.dtype.itemsize * 8
    keys = values.view(torch.int32 if bits == 32 else torch.int64)
    shift = bits - DIGIT * (level + 1)
    if level:
        pattern = keys.numpy()
        inside = pattern[(pattern >> (shift + DIGIT)) == prefix]
        keys = torch.from_numpy(inside)
    digits = torch.bitwise_right_shift(keys, shift) if shift else keys
    if level:
        digits = digits & (_BINS - 1)
    return torch.bincount(digits, minlength=_BINS).numpy()
