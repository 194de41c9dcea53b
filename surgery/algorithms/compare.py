"""Statistics of the difference between two tensors, accumulated block by block in float64.

Nothing here knows where blocks come from, or what a model is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from surgery import numerics
from surgery.algorithms.lowrank import TruncatedSVD

SMALL_TABLE = 64
"""Below this many rows no common shrink can be told from training."""


@dataclass
class Moments:
    """Sums over pairs ``(a, b)`` of one tensor's elements, with ``δ = b − a``."""

    count: int = 0
    changed: int = 0
    """Elements whose values differ."""
    largest: float = 0.0
    """max |δ|."""
    a_energy: float = 0.0
    """Σ a²."""
    b_energy: float = 0.0
    """Σ b²."""
    product: float = 0.0
    """Σ a·b."""
    energy: float = 0.0
    """Σ δ²."""
    nonfinite: int = 0
    """Elements that are NaN or infinite on either side; they take no part in the sums."""
    same: bool = True
    """Whether all bits are the same: NaN equals itself, and −0 differs from 0."""

    def update(self, a: torch.Tensor, b: torch.Tensor, delta: torch.Tensor) -> None:
        """Add a block: float64, flat; ``delta`` is overwritten with ``b − a``."""
        torch.sub(b, a, out=delta)
        self.count += a.numel()
        self.same = self.same and torch.equal(a.view(torch.int64), b.view(torch.int64))
        if not math.isfinite(float(delta.sum())):
            bad = ~(torch.isfinite(a) & torch.isfinite(b))
            self.nonfinite += int(bad.sum())
            a, b = a.masked_fill(bad, 0.0), b.masked_fill(bad, 0.0)
            delta.copy_(b - a)
        low, high = delta.aminmax() if delta.numel() else (torch.zeros(1), torch.zeros(1))
        self.largest = max(self.largest, -float(low), float(high))
        self.changed += int(torch.count_nonzero(delta))
        self.a_energy += float(a @ a)
        self.b_energy += float(b @ b)
        self.product += float(a @ b)
        self.energy += float(delta @ delta)

    @property
    def relative_norm(self) -> float:
        """‖b − a‖ / ‖a‖; infinite where ``a`` is zero and ``b`` is not."""
        if not self.energy:
            return 0.0
        return math.sqrt(self.energy / self.a_energy) if self.a_energy else math.inf

    @property
    def cosine(self) -> float:
        """⟨a, b⟩ / (‖a‖ ‖b‖); 1 where both are zero, 0 where one is."""
        if not self.a_energy or not self.b_energy:
            return float(self.a_energy == self.b_energy)
        return max(-1.0, min(1.0, self.product / math.sqrt(self.a_energy) / math.sqrt(self.b_energy)))


class RowMoments:
    """Sums over each row ``w`` of a matrix and its change ``δ``.

    Products go to reused memory and sums to their final place: a small result kept after each large temporary would
    pin the C library's heap block by block.
    """

    def __init__(self, rows: int) -> None:
        """Make room for ``rows`` rows."""
        self._sums = torch.zeros(3, rows, dtype=torch.float64)
        self._seen = 0

    def update(self, old: torch.Tensor, delta: torch.Tensor) -> None:
        """Add the next rows: ``(count, width)``, float32 or float64."""
        product = numerics.scratch("row product", old.numel(), old.dtype).view(old.shape)
        row_sums = numerics.scratch("row sums", len(old), old.dtype)
        place = self._sums[:, self._seen : self._seen + len(old)]
        for target, (left, right) in zip(place, ((old, old), (old, delta), (delta, delta)), strict=True):
            torch.sum(torch.mul(left, right, out=product), 1, out=row_sums)
            target.copy_(row_sums)
        self._seen += len(old)

    def trained(self, dtype: str) -> tuple[torch.Tensor, float, torch.Tensor]:
        """Return the trained rows' numbers, the common shrink, and every row's ‖δ‖²; see :func:`trained_rows`."""
        weight, product, energy = self._sums
        rows, shrink = trained_rows(weight, product, energy, dtype)
        return rows, shrink, energy


def trained_rows(
    weight: torch.Tensor, product: torch.Tensor, energy: torch.Tensor, dtype: str
) -> tuple[torch.Tensor, float]:
    r"""Tell the rows that training moved from those that weight decay shrank.

    Decay multiplies every row by the same ``1 + c``, ``c < 0``; ``c`` is the median over rows of ``⟨δ, w⟩/⟨w, w⟩``. A row
    was trained if what remains, ``‖δ − c·w‖``, exceeds both the shrink itself, ``|c|·‖w‖``, and rounding in ``dtype``.

    Args:
        weight: ``(rows,)``, ``⟨w, w⟩``.
        product: ``(rows,)``, ``⟨w, δ⟩``.
        energy: ``(rows,)``, ``⟨δ, δ⟩``.
        dtype: the checkpoint's, whose rounding bounds what can be seen.

    Returns:
        Row numbers, ascending, and ``c`` (0 where no common shrink is seen).

    >>> w = torch.ones(100); d = -1e-4 * w; d[7] = 0.5
    >>> rows, shrink = trained_rows(w, d, d * d, "F32")
    >>> rows.tolist(), round(shrink, 6)
    ([7], -0.0001)
    """
    shrink = 0.0
    if len(weight) >= SMALL_TABLE:
        shrink = float((product / weight.clamp_min(torch.finfo(torch.float64).tiny)).median())
    rest = (energy - 2 * shrink * product + shrink * shrink * weight).clamp_min(0)
    bound = max(abs(shrink), torch.finfo(numerics.DTYPES[dtype]).eps) if shrink else 0.0
    moved = rest > (bound * bound) * weight
    return torch.from_numpy(np.flatnonzero(moved.numpy())), shrink


def effective_rank(svd: TruncatedSVD, side: int) -> float:
    r"""Return the participation ratio ``(Σ σ²)² / Σ σ⁴``: how many equal directions would hold the energy like this.

    Args:
        svd: the leading triplets; the energy beyond them is taken to be spread evenly over the rest.
        side: the shorter side of the matrix.

    >>> g = torch.Generator().manual_seed(0)
    >>> from surgery.algorithms.lowrank import truncated_svd
    >>> round(effective_rank(truncated_svd(torch.eye(8), 8, g), 8), 6)
    8.0
    """
    if not svd.energy:
        return 0.0
    squares = svd.sigma**2
    rest = max(svd.energy - float(squares.sum()), 0.0)
    left = max(side - len(squares), 1)
    return svd.energy**2 / (float((squares**2).sum()) + rest * rest / left)
