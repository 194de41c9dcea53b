r"""A subspace search that stops when it can prove that it has found enough.

Let ``H = X Xᵀ`` with trace 1 and eigenvalues ``λ₁ ≥ λ₂ ≥ …``. The search holds an orthonormal basis ``V`` and ``H V``, and
widens it by what ``H V`` has outside of ``V`` where that matters for the leading directions (block Lanczos with full
orthogonalisation). Beside it go *probes* that nothing in the basis depends on.

**What is proved.** Captured is ``C = Σ_{i≤r} θᵢ`` of the Ritz values ``θ`` of ``Θ = Vᵀ H V``. The certificate is a number
``U ≥ Σ_{i≤r} λᵢ``, found in two steps.

1. *The part never looked at.* Let ``P`` project onto the complement of the start ``V₁ ⊆ V``, ``X' = P X`` and ``H' = X' X'ᵀ``.
   Probes are ``M Ω`` with ``M = q(H') X'`` and a Gaussian ``Ω`` of ``k`` columns that is independent of the basis. Let ``x ⟂ V``
   be the unit vector of largest ``s = xᵀ H x = xᵀ H' x``, ``p(t) = √t q(t)``, and ``b`` such that all roots of ``p`` lie in
   ``[0, b]``. Then ``g(t) = p(t)² − p(b)²`` for ``t ≥ b``, zero below, is convex, increasing, and nowhere above ``p²``, so that by
   Jensen ``g(s) ≤ xᵀ g(H') x ≤ xᵀ M Mᵀ x ≤ ‖(I − V Vᵀ) M‖²``. And for a matrix ``A`` that does not depend on ``Ω``,
   ``‖A Ω‖² ≥ ‖A‖² χ²_k``, with a chi-squared variable of ``k`` degrees that falls below ``c`` with probability at most
   ``(c/2)^{k/2} / Γ(k/2+1)``. So ``g(s) ≤ ‖(I − V Vᵀ) M Ω‖² / c`` except with that probability. ``q`` is a Chebyshev polynomial
   on ``[0, b]``, which grows as fast as any beyond; several ``b`` are tried, all of them chosen from Ritz values.
2. *The part looked at.* In the basis ``[V, V⊥]``, ``H ≼ M = [[Θ, Gᵀ], [G, s·I]]`` with ``GᵀG = RᵀR`` for the residual
   ``R = H V − V Θ``; so ``Σ_{i≤r} λᵢ(H) ≤ U = Σ_{i≤r} max(λᵢ(M), s)``, eigenvalues of a ``2l × 2l`` matrix. Where ``s < θ_r`` a
   cheaper bound often does: ``λᵢ(M)`` is an eigenvalue of ``Θ + GᵀG/(λᵢ(M) − s)``, and ``λᵢ(M) ≥ θ_r`` for ``i ≤ r``, so
   ``U ≤ Σ_{i≤r} λᵢ(Θ + GᵀG/(θ_r − s))``.

:data:`FAILURE` is shared by all that one matrix may be asked: at most :data:`EVENTS` combinations of a basis, a degree and
an edge ``b``, each of them decided without the probes.

References: Halko, Martinsson, Tropp 2011, "Finding structure with randomness", arXiv:0909.4061, §4.3 and Prop. 8.6;
Golub, Underwood 1977, "The block Lanczos method for computing eigenvalues"; Kuczyński, Woźniakowski 1992, "Estimating the
largest eigenvalue by the power and Lanczos algorithms with a random start"; Fan 1949 (sums of eigenvalues). Departs from
them: the probes see only what the start has not, which keeps them within the range of float32.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.algorithms.products import orthonormalise

FAILURE = 1e-9
"""Probability, over the random probes, that one matrix's certificate does not hold."""
EVENTS = 4096
"""Bounds that are tried at most for one matrix: the failure probability is shared between them."""
PROBES = 16
"""Columns of probes. Fewer make the bound looser, more make each product dearer."""
EDGES = (0.0, 0.15, 0.3, 0.5)
"""Where among the Ritz values, from the least one up, the edge of the damped interval is tried."""
LOWEST_EDGE = 1e-5
"""No edge lies below this share of the energy outside the start: lower ones would bring nothing."""
NARROW = 0.125
"""Nor below this share of the first edge: its polynomials could not be written in the first edge's any more."""
NEAR_ZERO = 1e-3
"""Optima below this share of ‖Δ‖ count as this much when an excess is related to them."""
ROUNDING = {torch.float32: 2e-7, torch.float64: 1e-14}
"""Error allowed for in sums of squares of products, as a share of all energy: about what float32 was seen to make where
one direction holds nearly all of it, and far more than where many do."""
HOPELESS = 0.5
"""Where even a bound that takes no residual into account leaves more excess than this, no other is tried."""
IN_REACH = 0.75
"""Probes are taken for what is missing where the certificate would hold, were nothing outside above this share of ``θ_r``."""
STUCK = 0.9
"""Probes that leave more than this share of the way to ``θ_r`` (or to where they are in reach) are not worth more steps."""


def excess(captured: float, upper: float) -> float:
    """Return the relative excess error that captured energy and a bound on what could be captured allow, of energy 1.

    >>> excess(0.75, 0.75)
    0.0
    """
    achieved, optimum = math.sqrt(max(1.0 - captured, 0.0)), math.sqrt(max(1.0 - upper, 0.0))
    return max(achieved - optimum, 0.0) / max(optimum, NEAR_ZERO)


class Search:
    """One search, a step at a time: :meth:`take` the images of what is :meth:`pending`, :meth:`look`, :meth:`widen`.

    Args:
        start: ``V₁ (m, l)``, orthonormal, ``l ≥ rank``.
        probes: ``(m, k)``: ``X Ω`` for a Gaussian ``Ω`` that is independent of ``start``; or ``H P Ω``, with ``plain`` 1.
        rank: how many eigenvalues count.
        tolerance: the excess that is good enough.
        plain: the power of ``t`` in ``p(t) = t^plain · T_q(2t/b − 1)``.
    """

    def __init__(
        self, start: torch.Tensor, probes: torch.Tensor, rank: int, tolerance: float, plain: float = 0.5
    ) -> None:
        self.rank = rank
        self.tolerance = tolerance
        self.basis = start
        self.ritz = np.zeros(0)
        """Ritz values, ascending."""
        self.vectors = torch.zeros(0)
        """Their vectors in the basis, float64."""
        self.captured = 0.0
        """Energy that the basis holds at ``rank``."""
        self.excess = math.inf
        """Certified bound on the relative excess error of the basis."""
        self.sharp = False
        """Whether the bound on what was never looked at is good enough: probes then rest."""
        self.stuck = False
        """Whether the last probes made it hardly better."""
        self._rest = 1.0
        self._rounding = ROUNDING[start.dtype]
        self._first = start
        self._fresh = start
        self._images = start[:, :0]
        self._plain = plain
        self._probes = [self._outside_start(probes)]
        self._edge = 0.0

    @property
    def width(self) -> int:
        """Columns of the basis."""
        return self.basis.shape[1]

    @property
    def fresh(self) -> int:
        """How many of the pending columns belong to the basis; the rest are probes."""
        return self._fresh.shape[1]

    def pending(self) -> torch.Tensor:
        """Return the columns ``Y`` of which ``H Y`` is to be given to :meth:`take`: new ones of the basis, then probes."""
        return self._fresh if self.sharp else torch.cat([self._fresh, self._probes[-1]], 1)

    def take(self, image: torch.Tensor) -> None:
        """Take ``H Y`` for the pending columns."""
        if self.fresh:
            self._images = torch.cat([self._images, image[:, : self.fresh]], 1)
            self._rayleigh_ritz()
        if not self.sharp:
            self._damp(self._outside_start(image[:, self.fresh :]))
        self._fresh = self.basis[:, :0]

    def look(self) -> None:
        """Compute what the basis captures and what can be proved of it, cheaply; see :meth:`look_closely`."""
        before = self._rest
        leading = self.ritz[-self.rank :]
        self.captured = float(leading.sum())
        if not self.sharp:
            self._rest = min(self._unseen() + self._rounding * float(self.ritz[-1]), before)
            self.sharp = self._rest <= IN_REACH * leading[0]
        goal = leading[0] if self._rest > leading[0] else IN_REACH * leading[0]
        self.stuck = self._rest - goal > STUCK * (before - goal)
        self.excess = self._excess(float(np.maximum(leading, self._rest).sum()))
        if self.excess < HOPELESS:
            self.excess = self._excess(self._quick_bound(self._rest)) if self._rest < leading[0] else math.inf

    def look_closely(self) -> None:
        """Improve the certificate by the sharper bound, where that could settle it."""
        leading = self.ritz[-self.rank :]
        if self._excess(float(np.maximum(leading, self._rest).sum())) <= self.tolerance:
            self.excess = min(self.excess, self._excess(self._bound(self._rest)))

    def lacks_probes(self) -> bool:
        """Say whether better probes alone would let the certificate hold, and the last ones were any better."""
        if self.sharp or self.stuck:
            return False
        return self._excess(self._quick_bound(IN_REACH * float(self.ritz[-self.rank]))) <= self.tolerance

    def widen(self, columns: int) -> bool:
        """Add what ``H`` makes of the leading Ritz vectors outside the basis; ``False`` where rounding leaves nothing to add."""
        residual = self._residual @ self.vectors[:, -columns:].to(self.basis.dtype)
        fresh, _ = orthonormalise(residual)
        for _ in range(2):
            fresh, _ = orthonormalise(fresh - self.basis @ (self.basis.T @ fresh))
        overlap = float((self.basis.T @ fresh).abs().max())
        if not overlap < 1e-4:
            return False
        self._fresh = fresh
        self.basis = torch.cat([self.basis, fresh], 1)
        return True

    def leading(self, count: int) -> torch.Tensor:
        """Return the leading Ritz vectors ``(m, count)``, largest first."""
        return self.basis @ self.vectors[:, -count:].flip(1).to(self.basis.dtype)

    def _outside_start(self, columns: torch.Tensor) -> torch.Tensor:
        return columns - self._first @ (self._first.T @ columns)

    def _damp(self, moved: torch.Tensor) -> None:
        """Take ``H'`` of the last probes, and make the next of the recurrence of Chebyshev polynomials."""
        if not self._edge:
            outside = max(1.0 - float(self.ritz.sum()), self._rounding)
            self._edge = max(float(self.ritz[0]), LOWEST_EDGE * outside)
            self._probes.append(moved.mul_(2.0 / self._edge).sub_(self._probes[-1]))
        else:
            moved = moved.mul_(4.0 / self._edge).sub_(self._probes[-1], alpha=2.0)
            self._probes.append(moved.sub_(self._probes[-2]))

    def _rayleigh_ritz(self) -> None:
        inner = self.basis.T @ self._images
        self._residual = self._images - self.basis @ inner
        self._square = (self._residual.T @ self._residual).double()
        inner = inner.double()
        values, self.vectors = torch.linalg.eigh((inner + inner.T) / 2)
        self.ritz = values.cpu().numpy()

    def _unseen(self) -> float:
        """Bound ``s``, the largest eigenvalue of ``H`` outside the basis."""
        probes = torch.cat(self._probes, 1)
        probes = probes - self.basis @ (self.basis.T @ probes)
        wide = probes.double()
        count, degree = self._probes[0].shape[1], len(self._probes) - 1
        inner = (wide.T @ wide).view(degree + 1, count, degree + 1, count).cpu().numpy()
        if not np.isfinite(inner).all():
            return 1.0
        half = count / 2
        log_c = math.log(2.0) + (math.log(FAILURE / EVENTS) + math.lgamma(half + 1.0)) / half
        edges = {max(float(self.ritz[int(place * (len(self.ritz) - 1))]), NARROW * self._edge) for place in EDGES}
        return min(self._reach(inner, edge, degree, log_c) for edge in edges)

    def _reach(self, inner: NDArray[np.float64], edge: float, degree: int, log_c: float) -> float:
        """Return the largest ``s`` with ``g(s) ≤ ‖(I − V Vᵀ) M Ω‖² / c`` for one edge."""
        weights = rescaled_chebyshev(degree, self._edge / edge)
        square = float(np.linalg.eigvalsh(np.einsum("i,iajb,j->ab", weights, inner, weights))[-1])
        if square <= 0.0:
            return edge
        base, image = self._log_square(edge, edge, degree), math.log(square) - log_c
        target = max(base, image) + math.log1p(math.exp(-abs(base - image)))
        low, high = edge, 1.0  # no eigenvalue exceeds the trace, which is 1
        for _ in range(60):
            middle = math.sqrt(low * high) if high > 4.0 * low else (low + high) / 2.0
            low, high = (low, middle) if self._log_square(middle, edge, degree) > target else (middle, high)
        return high

    def _log_square(self, t: float, edge: float, degree: int) -> float:
        """Return ``log p(t)²`` for ``t`` at or above the edge."""
        x = degree * math.acosh(max(2.0 * t / edge - 1.0, 1.0))
        return 2.0 * (self._plain * math.log(t) + x + math.log1p(math.exp(-2.0 * x)) - math.log(2.0))

    def _excess(self, upper: float) -> float:
        return excess(self.captured, min(upper, 1.0) + self._rounding)

    def _bound(self, rest: float) -> float:
        """Return ``Σ_{i≤r} max(λᵢ([[Θ, Gᵀ], [G, s·I]]), s)`` with ``GᵀG = RᵀR``."""
        width = self.width
        values, vectors = torch.linalg.eigh(self._rotated)
        block = torch.zeros(2 * width, 2 * width, dtype=torch.float64, device=values.device)
        block[:width, :width] = torch.diag(torch.as_tensor(self.ritz, device=values.device))
        block[width:, :width] = values.clamp_min(0.0).sqrt()[:, None] * vectors.T
        block[width:, width:].fill_diagonal_(rest)
        return float(torch.linalg.eigvalsh(block)[-self.rank :].clamp_min(rest).sum())

    def _quick_bound(self, rest: float) -> float:
        """Return ``Σ_{i≤r} λᵢ(Θ + GᵀG/(θ_r − s))``."""
        inner = self._rotated / (float(self.ritz[-self.rank]) - rest)
        inner.diagonal().add_(torch.as_tensor(self.ritz, device=inner.device))
        return float(torch.linalg.eigvalsh(inner)[-self.rank :].sum())

    @property
    def _rotated(self) -> torch.Tensor:
        """``GᵀG`` in the basis of Ritz vectors."""
        return self.vectors.T @ self._square @ self.vectors


def rescaled_chebyshev(degree: int, ratio: float) -> NDArray[np.float64]:
    """Return the coefficients of ``T_degree(ratio·(y + 1) − 1)`` in the Chebyshev polynomials of ``y``.

    >>> rescaled_chebyshev(2, 1.0).tolist()
    [0.0, 0.0, 1.0]
    """
    chebyshev = np.polynomial.chebyshev
    before, last = np.array([1.0]), np.array([ratio - 1.0, ratio])
    for _ in range(degree - 1):
        before, last = last, chebyshev.chebsub(2.0 * chebyshev.chebmul([ratio - 1.0, ratio], last), before)
    return last
