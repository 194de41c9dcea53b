"""Singular triplets as a factorisation leaves them: what they capture, what they miss, and the factors they make."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """``Δ ≈ left @ diag(sigma) @ right``, largest first.

    Args:
        left: ``(m, k)``, orthonormal columns.
        sigma: ``(k,)``, float64, descending.
        right: ``(k, n)``, orthonormal rows.
        energy: ``‖Δ‖²``, accumulated in float64.
        excess: certified for the rank asked for: ``‖Δ − Δ̂_r‖ ≤ optimum + excess · max(optimum, ‖Δ‖/1000)``. Nothing is
            certified for other ranks: there, captured energy is a lower bound of what could be captured.
        route: ``"subspace"``, ``"gram"`` or ``"lapack"``.
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor
    energy: float
    excess: float = 0.0
    route: str = "lapack"

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

    def transposed(self) -> TruncatedSVD:
        """Return the triplets of ``Δᵀ``."""
        return replace(self, left=self.right.T, right=self.left.T)

    def canonical(self) -> TruncatedSVD:
        """Choose signs: in each row of ``right`` the entry of largest magnitude is positive."""
        right = self.right
        largest = right.abs().argmax(dim=1, keepdim=True)
        sign = torch.where(right.gather(1, largest) < 0, -1.0, 1.0).to(right.dtype)
        left = (self.left * sign.T.to(self.left.dtype)).contiguous()
        return replace(self, left=left, right=(right * sign).contiguous())


def none_of(delta: torch.Tensor, rank: int, energy: float) -> TruncatedSVD:
    """Return ``rank`` triplets that capture nothing: of a zero matrix, or none at all."""
    m, n = delta.shape
    left = torch.eye(m, rank, dtype=delta.dtype, device=delta.device)
    sigma = torch.zeros(rank, dtype=torch.float64, device=delta.device)
    right = torch.eye(rank, n, dtype=delta.dtype, device=delta.device)
    return TruncatedSVD(left, sigma, right, energy, 0.0, "gram")
