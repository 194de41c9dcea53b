"""Ranges of bytes: which requests fetch what is wanted of a file. Arithmetic alone; nothing is read here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

Range = tuple[int, int]
"""The first byte, and the one after the last."""

BRIDGE = 1 << 20
"""The widest gap that is fetched along, in bytes: a request costs about as much time as so many more bytes."""
WASTE = 0.1
"""The most that gaps may add to what is wanted."""


def union(ranges: Iterable[Range]) -> list[Range]:
    """Sort ranges and bring together what touches or overlaps; empty ones go.

    >>> union([(5, 9), (0, 3), (3, 5), (20, 20)])
    [(0, 9)]
    """
    joined: list[Range] = []
    for start, stop in sorted(one for one in ranges if one[0] < one[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def difference(wanted: Iterable[Range], had: Iterable[Range]) -> list[Range]:
    """Return what is wanted and not had.

    >>> difference([(0, 10), (20, 30)], [(2, 4), (8, 25)])
    [(0, 2), (4, 8), (25, 30)]
    """
    left: list[Range] = []
    holes = union(had)
    for start, stop in union(wanted):
        place = start
        for low, high in holes:
            if high <= place or low >= stop:
                continue
            if low > place:
                left.append((place, low))
            place = max(place, high)
        if place < stop:
            left.append((place, stop))
    return left


def requests(wanted: Iterable[Range], *, bridge: int = BRIDGE, waste: float = WASTE) -> list[Range]:
    """Join ranges into as few requests as is worth it.

    Neighbours become one. Gaps of at most ``bridge`` bytes are fetched along, the narrowest first, as long as all of
    them together add at most ``waste`` times what is wanted.

    >>> requests([(0, 100), (105, 200), (260, 300)], bridge=50, waste=0.1)
    [(0, 200), (260, 300)]
    """
    runs = union(wanted)
    budget = waste * sum(stop - start for start, stop in runs)
    gaps = sorted((after[0] - before[1], before[1]) for before, after in itertools.pairwise(runs))
    bridged: list[Range] = []
    for width, start in gaps:
        if width > bridge or width > budget:
            break
        budget -= width
        bridged.append((start, start + width))
    return union([*runs, *bridged])
