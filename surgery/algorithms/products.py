"""Products of one matrix with skinny blocks, in a chosen precision, on the device where the matrix lies.

A factorisation spends nearly all of its time here. The matrix is seen with its short side first, as ``X (m, n)``,
``m ≤ n``, whichever way it is stored, so that the blocks that must be made orthonormal are short.
"""

from __future__ import annotations

import math

import torch

from surgery import numerics

ROWS = 256
"""Rows of a block that is widened to float64, and of a tile of a Gram matrix."""
WELL_CONDITIONED = 1e-3
"""Cholesky-QR twice is orthonormal to rounding while the first factor's diagonal stays above this (√ε of float32)."""


class Products:
    """``X V``, ``Xᵀ V`` and ``X Xᵀ`` for ``X = Δ / ‖Δ‖`` with its short side first.

    Args:
        delta: ``(m, n)`` or ``(n, m)``, float32 or float64.
        dtype: what to multiply and accumulate in; float64 products of a float32 matrix widen it block by block.
        norm: ``‖Δ‖``; dividing by it keeps squares of squares in range.
    """

    def __init__(self, delta: torch.Tensor, dtype: torch.dtype, norm: float) -> None:
        self.matrix = delta if delta.shape[0] <= delta.shape[1] else delta.T
        self.dtype = dtype
        self.scale = 1.0 / norm
        self.short, self.long = self.matrix.shape

    def transposed_times(self, block: torch.Tensor) -> torch.Tensor:
        """Return ``Xᵀ V`` for ``V (m, l)``: valid until this thread's next product."""
        out = self._room("long block", self.long, block.shape[1])
        if self.matrix.dtype == self.dtype:
            return torch.mm(self.matrix.T, block, out=out).mul_(self.scale)
        out.zero_()
        for start in range(0, self.short, ROWS):
            rows = self._widened(start)
            out.addmm_(rows.T, block[start : start + ROWS])
        return out.mul_(self.scale)

    def times(self, block: torch.Tensor) -> torch.Tensor:
        """Return ``X W`` for ``W (n, l)``."""
        if self.matrix.dtype == self.dtype:
            return torch.mm(self.matrix, block).mul_(self.scale)
        out = block.new_empty(self.short, block.shape[1])
        for start in range(0, self.short, ROWS):
            torch.mm(self._widened(start), block, out=out[start : start + ROWS])
        return out.mul_(self.scale)

    def squared_times(self, block: torch.Tensor) -> torch.Tensor:
        """Return ``X (Xᵀ V)``."""
        return self.times(self.transposed_times(block))

    def gram(self) -> torch.Tensor:
        """Return ``X Xᵀ``, each pair of rows once: halves of halves, so that most of it is large products."""
        out = torch.empty(self.short, self.short, dtype=self.dtype, device=self.matrix.device)
        if self.matrix.dtype == self.dtype:
            self._gram_of_rows(out, 0, self.short)
        else:
            self._gram_widened(out)
        return out

    def _gram_of_rows(self, out: torch.Tensor, low: int, high: int) -> None:
        if high - low <= ROWS:
            rows = self.matrix[low:high]
            out[low:high, low:high] = torch.mm(rows, rows.T).mul_(self.scale * self.scale)
            return
        middle = (low + high) // 2
        self._gram_of_rows(out, low, middle)
        self._gram_of_rows(out, middle, high)
        tile = torch.mm(self.matrix[middle:high], self.matrix[low:middle].T).mul_(self.scale * self.scale)
        out[middle:high, low:middle] = tile
        out[low:middle, middle:high] = tile.T

    def _gram_widened(self, out: torch.Tensor) -> None:
        for low in range(0, self.short, ROWS):
            left = self._widened(low, "left rows")
            for other in range(0, low + 1, ROWS):
                tile = torch.mm(left, self._widened(other).T).mul_(self.scale * self.scale)
                out[low : low + ROWS, other : other + ROWS] = tile
                if other != low:
                    out[other : other + ROWS, low : low + ROWS] = tile.T

    def folded(self, width: int, generator: torch.Generator) -> torch.Tensor:
        """Return ``X S (m, width)``, whose columns are sums of the columns of ``X`` with random signs.

        On average ``X S Sᵀ Xᵀ`` is ``X Xᵀ``, and it costs no multiplications: a good place to start a search from, and
        nothing that could be relied on.

        Args:
            width: columns of the result.
            generator: of the signs, on the CPU.

        Reference: Charikar, Chen, Farach-Colton 2002, "Finding frequent items in data streams" (the count sketch).
        """
        signs = torch.randint(0, 2, (self.long,), generator=generator).to(self.matrix.device, self.matrix.dtype)
        signs = signs.mul_(2.0 * self.scale).sub_(self.scale)[:, None]
        rows = self.matrix.T  # summed in the order in which they are stored
        out = torch.zeros(width, self.short, dtype=self.matrix.dtype, device=self.matrix.device)
        if not rows.is_contiguous():
            out = out.T.contiguous().T
        for start in range(0, self.long, width):
            part = rows[start : start + width]
            out[: len(part)].addcmul_(part, signs[start : start + width])
        return out.T.to(self.dtype)

    def _widened(self, start: int, role: str = "rows") -> torch.Tensor:
        rows = self.matrix[start : start + ROWS]
        return self._room(role, *rows.shape).copy_(rows)

    def _room(self, role: str, rows: int, columns: int) -> torch.Tensor:
        if self.matrix.device.type != "cpu":
            return torch.empty(rows, columns, dtype=self.dtype, device=self.matrix.device)
        return numerics.scratch(role, rows * columns, self.dtype).view(rows, columns)


def orthonormalise(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``Q, R`` with ``columns = Q R``, ``Q`` orthonormal and ``R`` upper triangular in float64.

    Cholesky-QR twice; Householder's where the columns are nearly dependent. Either way the first ``j`` columns of ``Q``
    span what the first ``j`` columns given span (or contain it, where those are dependent).

    Args:
        columns: ``(m, l)``, ``l ≤ m``.

    >>> q, r = orthonormalise(torch.tensor([[3.0, 1.0], [4.0, 2.0]]))
    >>> bool(torch.allclose(q.double() @ r, torch.tensor([[3.0, 1.0], [4.0, 2.0]]).double(), atol=1e-6))
    True

    Reference: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015, "Roundoff error analysis of the CholeskyQR2 algorithm".
    """
    basis, total = columns, None
    for _ in range(2):
        scale = basis.norm(dim=0).clamp_min(torch.finfo(basis.dtype).tiny)
        basis = basis / scale
        factor, info = torch.linalg.cholesky_ex((basis.T @ basis).double())
        if int(info) or float(factor.diagonal().min()) < WELL_CONDITIONED:
            q, r = torch.linalg.qr(columns)
            return q, r.double()
        eye = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
        basis = basis @ torch.linalg.solve_triangular(factor, eye, upper=False).T.to(basis.dtype)
        step = factor.T * scale.double()
        total = step if total is None else step @ total
    assert total is not None
    return basis, total


def gram_share(short: int) -> float:
    """Return the share of ``m²n`` multiplications that :meth:`Products.gram` makes by leaving out mirrored tiles."""
    tiles = math.ceil(short / ROWS)
    return (tiles + 1) / (2 * tiles)
