"""The only home of SVD → (B, A): truncated factorisation of a delta, and its spectrum.

For ``Δ`` of shape ``(m, n)`` the best rank-``r`` approximation in Frobenius norm is the truncated SVD
(Eckart and Young 1936), with squared error ``‖Δ‖² − Σ_{i≤r} σᵢ²``. Two routes find it:

* **Gram**: eigenvectors ``V`` of ``ΔᵀΔ`` (or ``ΔΔᵀ``, whichever is smaller), then ``ΔV``. Since ``V`` is orthonormal
  whatever the rounding, a full-rank factorisation reproduces ``Δ`` to rounding. Used for thin sides and high ranks.
* **Randomised subspace iteration** (Halko, Martinsson, Tropp 2011, "Finding structure with randomness", Algorithm
  4.4) with oversampling, Cholesky-QR and a Rayleigh–Ritz finish, repeated until the captured energy has settled.

The captured energy ``‖ΔV‖²`` for orthonormal ``V`` is exact (Pythagoras: ``‖Δ − ΔVVᵀ‖² = ‖Δ‖² − ‖ΔV‖²``), so the
error reported is the error achieved, not an estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery import numerics

GRAM_SIDE = 512
"""Short sides up to this take the Gram route at any rank: it is exact, and as fast."""
GRAM_SHARE = 0.25
"""So do ranks above this share of the short side, where a sketch would be about as large as the Gram matrix."""
CANCELLED = 1e-4
"""A residual below this share of ``‖Δ‖²`` is computed entry by entry: differences of float32 products are 1e-7 of it."""
MAX_STEPS = 12
"""Most power steps; a spectrum that has not settled by then goes the Gram route."""


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """``Δ ≈ left @ diag(sigma) @ right``, largest first.

    Args:
        left: ``(m, k)``, orthonormal columns.
        sigma: ``(k,)``, float64, descending.
        right: ``(k, n)``, orthonormal rows.
        energy: ``‖Δ‖²``, accumulated in float64.
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor
    energy: float
    excess: float = 0.0

    def captured(self, rank: int) -> float:
        """Return ``Σ_{i≤rank} σᵢ²``: the energy that the first ``rank`` components hold."""
        return min(float((self.sigma[:rank] ** 2).sum()), self.energy)

    def error(self, rank: int) -> float:
        """Return the relative error ``‖Δ − Δ_r‖ / ‖Δ‖`` of the first ``rank`` components; 0 for a zero delta."""
        if not self.energy:
            return 0.0
        return math.sqrt(max(self.energy - self.captured(rank), 0.0) / self.energy)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Split into ``B (m, r)`` and ``A (r, n)`` with √σ on both sides, in float64."""
        root = self.sigma[:rank].sqrt()
        return self.left[:, :rank].double() * root, root[:, None] * self.right[:rank].double()


def truncated_svd(
    delta: torch.Tensor, rank: int, generator: torch.Generator, *, tolerance: float = 1e-3, exact: bool = False
) -> TruncatedSVD:
    """Compute the leading ``rank`` singular triplets of ``delta``, and what came with them.

    The result holds at least ``rank`` triplets, which meet ``tolerance``; others are by-products of the search, whose captured energies are exact for themselves but may fall short of the optimum.

    Args:
        delta: ``(m, n)``, float32 or float64, finite.
        rank: how many, from 0 to ``min(m, n)``; more is clamped.
        generator: where random starts come from.
        tolerance: iterate until the relative error is within this share of what further steps would reach.

    Returns:
        Factors and the total energy. Signs are canonical: in each row of ``right`` the entry of largest magnitude is
        positive.

    Raises:
        ValueError: ``delta`` is not a matrix, or holds NaN or Inf.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> svd = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2, g)
    >>> [round(float(s), 6) for s in svd.sigma[:2]], round(svd.error(2), 6)
    ([3.0, 2.0], 0.267261)

    Reference: Halko, Martinsson, Tropp 2011, arXiv:0909.4061, Algorithm 4.4.
    """
    if delta.ndim != 2:
        raise ValueError(f"a matrix is needed, not a tensor of shape {tuple(delta.shape)}")
    energy = numerics.squared_norm(delta)
    if not math.isfinite(energy):
        raise ValueError("the matrix holds NaN or Inf")
    m, n = delta.shape
    rank = min(rank, m, n)
    if rank == 0 or energy == 0.0:
        return _nothing(delta, rank, energy)
    if m < n:
        flipped = _tall(delta.T, rank, generator, tolerance, energy)
        return _canonical(flipped.right.T, flipped.sigma, flipped.left.T, energy)
    tall = _tall(delta, rank, generator, tolerance, energy)
    return _canonical(tall.left, tall.sigma, tall.right, energy)


def working_bytes(shape: tuple[int, int], rank: int, *, exact: bool = False) -> int:
    """Return how many bytes :func:`truncated_svd` needs beside ``Δ`` itself."""
    m, n = shape
    side, width = min(m, n), min(2 * rank + 16, m, n)
    gram = 8 * m * n + 40 * side * side if side <= 4096 else 32 * side * side
    return max(gram, m * n) + 64 * width * (m + n)


def _nothing(delta: torch.Tensor, rank: int, energy: float) -> TruncatedSVD:
    m, n = delta.shape
    left = torch.eye(m, rank, dtype=delta.dtype)
    return TruncatedSVD(left, torch.zeros(rank, dtype=torch.float64), torch.eye(rank, n, dtype=delta.dtype), energy)


def _tall(delta: torch.Tensor, rank: int, generator: torch.Generator, tolerance: float, energy: float) -> TruncatedSVD:
    """Factor a matrix with at least as many rows as columns."""
    n = delta.shape[1]
    if n > GRAM_SIDE and rank <= GRAM_SHARE * n:
        right = _subspace(delta, rank, generator, tolerance, energy)
        if right is not None:
            return _rayleigh_ritz(delta, right, right.shape[1], energy)
    return _gram(delta, min(max(2 * rank, 16), n), energy)


def _gram(delta: torch.Tensor, rank: int, energy: float) -> TruncatedSVD:
    # float64 Gram matrices keep σ down to 1e-8 σ₁ apart, float32 only to 3e-4 σ₁; above 2¹² columns float64 costs too much.
    wide = delta.double() if delta.shape[1] <= 4096 else delta
    _, vectors = torch.linalg.eigh((wide.T @ wide).double())
    basis = vectors.flip(1)[:, :rank].to(wide.dtype)
    return _rayleigh_ritz(wide, basis, rank, energy)


def _subspace(
    delta: torch.Tensor, rank: int, generator: torch.Generator, tolerance: float, energy: float
) -> torch.Tensor | None:
    """Find an orthonormal basis ``(n, l)`` that holds the leading right singular vectors; ``None`` if it will not settle."""
    m, n = delta.shape
    width = min(rank + max(16, rank), n)  # twice the rank: enough to say what the next rank would bring
    sketch = torch.randn(m, width, generator=generator, dtype=delta.dtype)
    basis, before = _orthonormal(delta.T @ sketch), 0.0
    for step in range(MAX_STEPS):
        image = delta @ basis
        sigma2 = torch.linalg.eigvalsh((image.T @ image).double()).flip(0)
        captured = float(sigma2[:rank].clamp_min(0).sum())
        # The captured energy grows by a shrinking factor a step; stop when what is left cannot matter to the error.
        slack = 2 * tolerance * max(energy - captured, 1e-6 * energy)
        if step >= 2 and captured - before <= 0.25 * slack:
            return basis
        before = captured
        basis = _orthonormal(delta.T @ _orthonormal(image))
    return None


def component_products(
    delta: torch.Tensor, left: torch.Tensor, right: torch.Tensor, energy: float
) -> tuple[NDArray[np.float64], float]:
    """Return ``⟨bₖ aₖ, Δ⟩`` of every component of ``left @ right``, and ``‖Δ − left @ right‖²``.

    The second is ``‖Δ‖² − 2 Σₖ ⟨bₖ aₖ, Δ⟩ + ‖left @ right‖²``, without an ``m × n`` product; where the three cancel, and
    float32 products could not tell what is left, it is computed entry by entry.

    Args:
        delta: ``(m, n)``, float32 or float64.
        left: ``(m, r)``, of any floating dtype: the factors as they will be stored.
        right: ``(r, n)``.
        energy: ``‖Δ‖²``.
    """
    image = (delta @ right.to(delta.dtype).T).double()
    wide_left, wide_right = left.double(), right.double()
    products = (image * wide_left).sum(0)
    own = float(((wide_left.T @ wide_left) * (wide_right @ wide_right.T)).sum())
    rest = energy - 2 * float(products.sum()) + own
    if rest < CANCELLED * energy:
        rest = residual_energy(delta, left, right)
    return products.numpy(), rest


def residual_energy(delta: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """Return ``‖Δ − left @ right‖²``, computed from the factors as they will be stored.

    Args:
        delta: ``(m, n)``.
        left: ``(m, r)``, of any floating dtype.
        right: ``(r, n)``.
    """
    step = max(numerics.BLOCK * 8 // max(delta.shape[1], 1), 1)
    left, right = left.to(delta.dtype), right.to(delta.dtype)
    return sum(
        numerics.squared_norm(delta[row : row + step] - left[row : row + step] @ right)
        for row in range(0, delta.shape[0], step)
    )


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormalise columns: Cholesky-QR twice, or Householder QR where the columns are nearly dependent."""
    basis = columns
    for _ in range(2):
        scale = basis.norm(dim=0).clamp_min(torch.finfo(basis.dtype).tiny)
        basis = basis / scale
        factor, info = torch.linalg.cholesky_ex((basis.T @ basis).double())
        if info or factor.diagonal().min() < 1e-3:
            exact: torch.Tensor = torch.linalg.qr(columns)[0]
            return exact
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
        basis = basis @ inverse.T.to(basis.dtype)
    return basis


def _rayleigh_ritz(delta: torch.Tensor, basis: torch.Tensor, rank: int, energy: float) -> TruncatedSVD:
    """Turn an orthonormal right basis into singular triplets of ``Δ V Vᵀ``."""
    image = delta @ basis
    rotation = torch.linalg.eigh((image.T @ image).double())[1].flip(1)[:, :rank]
    right = (basis.double() @ rotation).T
    left = image.double() @ rotation
    sigma = left.norm(dim=0)
    order = sigma.argsort(descending=True, stable=True)
    sigma, left, right = sigma[order], left[:, order], right[order]
    return TruncatedSVD(left / sigma.clamp_min(torch.finfo(torch.float64).tiny), sigma, right, energy)


def _canonical(left: torch.Tensor, sigma: torch.Tensor, right: torch.Tensor, energy: float) -> TruncatedSVD:
    if not sigma.numel():
        return TruncatedSVD(left, sigma, right, energy)
    largest = right.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(right.gather(1, largest) < 0, -1.0, 1.0).to(right.dtype)
    return TruncatedSVD((left * sign.T.to(left.dtype)).contiguous(), sigma, (right * sign).contiguous(), energy)
