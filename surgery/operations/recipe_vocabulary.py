"""Embeddings and output heads under another vocabulary: every row of the output is found by its token.

A model's own row of a token is its row. A token that it lacks gets the recipe's choice, else the base's row, else that
of the only model which has the token, else the average of those that do. Rows that only pad the matrix hold the mean of
all others (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from surgery import numerics
from surgery.tensor import LazyTensor, TensorSpec

Cell = tuple[int, int]
"""A row of one of the sources: its number among them, and the row's."""


@dataclass(frozen=True, slots=True)
class Run:
    """Output rows ``[start, stop)``: consecutive rows of one source, the average of some rows, or zeros."""

    start: int
    stop: int
    cells: tuple[Cell, ...]
    """One cell: the first row of a run of them. Several: one output row, their average. None: zeros."""


def runs_of(rows: Sequence[tuple[Cell, ...]]) -> tuple[Run, ...]:
    """Join output rows that are consecutive rows of one source, so that they are read at once.

    >>> runs_of([((0, 4),), ((0, 5),), ((1, 0),), ((0, 1), (1, 1)), ()])[:2]
    (Run(start=0, stop=2, cells=((0, 4),)), Run(start=2, stop=3, cells=((1, 0),)))
    """
    found: list[Run] = []
    for number, cells in enumerate(rows):
        last = found[-1] if found else None
        if last and len(cells) == len(last.cells) <= 1:
            shifted = tuple((source, row + number - last.start) for source, row in last.cells)
            if cells == shifted:
                found[-1] = Run(last.start, number + 1, last.cells)
                continue
        found.append(Run(number, number + 1, cells))
    return tuple(found)


@dataclass(slots=True, eq=False)
class Remapped:
    """A model's vocabulary matrix in the output's order of tokens.

    Args:
        sources: the matrices of all models, their rows of one width.
        runs: where the rows come from; they cover all but the padding.
        rows: with the padding.
        name: the tensor's.
    """

    sources: tuple[LazyTensor, ...]
    runs: tuple[Run, ...]
    rows: int
    name: str
    spec: TensorSpec = field(init=False)
    scratch: int = field(init=False, default=1)
    _padding: torch.Tensor | None = field(init=False, default=None)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        dtypes = {self.sources[source].spec.dtype for run in self.runs for source, _ in run.cells}
        plain = len(dtypes) == 1 and not self._padded and all(len(run.cells) <= 1 for run in self.runs)
        dtype = dtypes.pop() if plain else ("F64" if "F64" in dtypes else "F32")
        self.spec = TensorSpec(self.name, dtype, (self.rows, *self.sources[0].spec.shape[1:]))

    @property
    def _padded(self) -> bool:
        return (self.runs[-1].stop if self.runs else 0) < self.rows

    @property
    def unit(self) -> int:
        """One row."""
        width = 1
        for size in self.spec.shape[1:]:
            width *= size
        return max(width, 1)

    @property
    def resident(self) -> int:
        """What the sources hold, and a row of padding."""
        return sum(source.resident for source in self.sources) + 16 * self.unit

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Gather the rows of a range."""
        first, last = start // self.unit, stop // self.unit
        size = self.unit * self.spec.itemsize
        with numerics.deeper():
            for run in self.runs:
                low, high = max(run.start, first), min(run.stop, last)
                if low < high:
                    self._fill(run, low, high, out[(low - first) * size : (high - first) * size])
            end = self.runs[-1].stop if self.runs else 0
            for row in range(max(first, end), last):
                self._target(out[(row - first) * size : (row - first + 1) * size]).copy_(self._mean())

    def _target(self, out: memoryview) -> torch.Tensor:
        return numerics.view(self.spec, out, len(out) // self.spec.itemsize)

    def _fill(self, run: Run, low: int, high: int, out: memoryview) -> None:
        width = self.unit
        if not run.cells:
            out[:] = bytes(len(out))
        elif len(run.cells) == 1:
            ((number, row),) = run.cells
            begin, end = (row + low - run.start) * width, (row + high - run.start) * width
            if self.sources[number].spec.dtype == self.spec.dtype:
                self.sources[number].read_into(begin, end, out)
            else:
                numerics.widen(self.sources[number], begin, end, self._target(out))
        else:
            total = torch.zeros(width, dtype=torch.float64)
            for number, row in run.cells:
                values = numerics.scratch("row", width)
                total += numerics.widen(self.sources[number], row * width, (row + 1) * width, values)
            self._target(out).copy_(total / len(run.cells))

    def _mean(self) -> torch.Tensor:
        """Return the mean of all rows but the padding, read once."""
        with self._lock:
            if self._padding is None:
                total = torch.zeros(self.unit, dtype=torch.float64)
                end = self.runs[-1].stop if self.runs else 0
                step = max(numerics.BLOCK // self.unit, 1)
                for low in range(0, end, step):
                    high = min(low + step, end)
                    data = bytearray((high - low) * self.unit * self.spec.itemsize)
                    self.read_into(low * self.unit, high * self.unit, memoryview(data))
                    total += self._target(memoryview(data)).to(torch.float64).view(-1, self.unit).sum(0)
                self._padding = total / max(end, 1)
            return self._padding
