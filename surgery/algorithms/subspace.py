r"""A subspace search that stops when it can prove that it has found enough.

Let ``H = X Xᵀ`` with eigenvalues ``λ₁ ≥ λ₂ ≥ …``. From a start ``Ω (m, l)`` the search makes ``V = orth(p(H) Ω)``, where ``p``
is a product of a monomial and Chebyshev polynomials that stay within ±1 on ``[0, b]`` and grow as fast as any beyond
(Rutishauser 1969). ``b`` is moved up whenever the Ritz values show that more of the spectrum may be damped.

**What is proved.** Captured is ``C = Σ_{i≤r} θᵢ`` of the Ritz values ``θ`` of ``Θ = Vᵀ H V``. The certificate is a number
``U ≥ Σ_{i≤r} λᵢ``, found in two steps.

1. *The part never looked at.* The last ``k`` columns of ``Ω`` are Gaussian and independent of the others: probes. Let
   ``P`` project onto what the other columns became, ``x ⟂ range V`` be the unit vector of largest ``s = xᵀ H x``, and
   ``g(t) = max(p(t)² − p(b)², 0)`` for ``t ≥ b``, zero below: convex, increasing, and nowhere above ``p²``. By Jensen
   ``g(s) ≤ xᵀ g(H) x ≤ ‖(I−P) p(H)‖²``. And for a fixed matrix ``M`` (given the other columns), ``‖M Ω₂‖² ≥ ‖M‖² χ²_k``,
   with a chi-squared variable of ``k`` degrees that falls below ``c`` with probability at most ``(c/2)^{k/2} / Γ(k/2+1)``.
   So ``g(s) ≤ ‖(I−P) p(H) Ω₂‖² / c`` except with that probability, :data:`FAILURE`. The right-hand side costs nothing: QR
   keeps the order of columns, so it is the trailing block of the product of the triangular factors.
2. *The part looked at.* In the basis ``[V, V⊥]``, ``H ≼ M = [[Θ, Gᵀ], [G, s·I]]`` with ``GᵀG = RᵀR`` for the residual
   ``R = H V − V Θ``; so ``Σ_{i≤r} λᵢ(H) ≤ U = Σ_{i≤r} max(λᵢ(M), s)``, eigenvalues of a ``2l × 2l`` matrix. Where there is a
   gap this is ``Σ θᵢ`` plus terms quadratic in the residual.

The failure probability is for one look; looks of one search share their probes and at most :data:`LOOKS` are paid for.

References: Halko, Martinsson, Tropp 2011, "Finding structure with randomness", arXiv:0909.4061, §4.3 and Prop. 8.6;
Kuczyński, Woźniakowski 1992, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random
start"; Fan 1949 (sums of eigenvalues); Rutishauser 1969, "Computational aspects of F. L. Bauer's simultaneous iteration
method". Departs from them: the probes ride along with the search, and the bound takes the polynomial that was applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from surgery.algorithms.products import orthonormalise

FAILURE = 1e-9
"""Probability, over the random start, that one matrix's certificate does not hold."""
LOOKS = 64
"""Steps at most, each a look at the certificate: the failure probability is shared between them."""
PROBES = 16
"""Columns of the start that are probes. Fewer make the bound looser, more make each product dearer."""
STALE = 1.2
"""Damp anew when the Ritz values have risen this much since the damped interval was chosen."""
NEAR_ZERO = 1e-3
"""Optima below this share of ‖Δ‖ count as this much when an excess is related to them."""
ROUNDING = {torch.float32: 2e-7, torch.float64: 1e-14}
"""Error allowed for in sums of squares of products, as a share of all energy: about what float32 was seen to make where
one direction holds nearly all of it, and far more than where many do."""


def excess(captured: float, upper: float) -> float:
    """Return the relative excess error that captured energy and a bound on what could be captured allow, of energy 1.

    >>> excess(0.75, 0.75)
    0.0
    """
    achieved, optimum = math.sqrt(max(1.0 - captured, 0.0)), math.sqrt(max(1.0 - upper, 0.0))
    return max(achieved - optimum, 0.0) / max(optimum, NEAR_ZERO)


@dataclass
class Damping:
    """The polynomial applied so far: ``t^plain · Π T_q(2t/b − 1)``."""

    plain: int = 0
    pieces: list[tuple[float, int]] = field(default_factory=list)

    def log_square(self, t: float) -> float:
        """Return ``log p(t)²`` for ``t`` at or above every ``b``."""
        log = self.plain * math.log(t)
        for b, degree in self.pieces:
            log += _log_cosh(degree * math.acosh(max(2.0 * t / b - 1.0, 1.0)))
        return 2.0 * log

    def largest(self, log_image: float) -> float:
        """Return the largest ``s`` with ``g(s) ≤ exp(log_image)``: see the module."""
        low = max((b for b, _ in self.pieces), default=0.0)
        target = log_image
        if low:
            base = self.log_square(low)
            target = max(base, log_image) + math.log1p(math.exp(-abs(base - log_image)))
        low, high = max(low, 1e-300), 1.0  # no eigenvalue exceeds the trace, which is 1
        for _ in range(60):
            middle = math.sqrt(low * high) if high > 4.0 * low else (low + high) / 2.0
            low, high = (low, middle) if self.log_square(middle) > target else (middle, high)
        return high


def _log_cosh(x: float) -> float:
    return x + math.log1p(math.exp(-2.0 * x)) - math.log(2.0)


class Search:
    """One search, a step at a time. ``H`` has trace 1 and may be applied differently from step to step.

    Args:
        start: ``(m, l)``; its last ``probes`` columns are Gaussian and independent of the rest.
        rank: how many eigenvalues count, at most ``l − probes``.
        probes: see the module.
    """

    def __init__(self, start: torch.Tensor, rank: int, probes: int = PROBES) -> None:
        self.rank = rank
        self.probes = probes
        self.damping = Damping()
        self.basis = start
        self.looks = 0
        self.captured = 0.0
        """Energy that the basis holds at ``rank``."""
        self.excess = math.inf
        """Certified bound on the relative excess error of the basis."""
        self._before: torch.Tensor | None = None
        self._factor = torch.eye(start.shape[1], dtype=torch.float64, device=start.device)

    def begin(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Make the first basis."""
        self.damping.plain = 1
        self._move(apply(self.basis))
        self._before = None

    def look(self, image: torch.Tensor) -> torch.Tensor:
        """Compute what the basis captures and what can be proved of it; return the Ritz values, ascending.

        Args:
            image: ``H V`` for the basis ``V``.
        """
        self.looks += 1
        rounding = ROUNDING[self.basis.dtype]
        inner = (self.basis.T @ image).double()
        inner = (inner + inner.T) / 2
        ritz: torch.Tensor = torch.linalg.eigvalsh(inner)
        leading = ritz[-self.rank :]
        self.captured = float(leading.sum())
        rest = self._unseen() + rounding * float(ritz[-1])
        self.excess = excess(self.captured, float(leading.clamp_min(rest).sum()) + rounding)
        if self.excess < 0.5:  # worth the exact bound, which is larger
            residual = image - self.basis @ inner.to(image.dtype)
            upper = _block_bound(inner, (residual.T @ residual).double(), rest, self.rank)
            self.excess = excess(self.captured, min(upper, 1.0) + rounding)
        return ritz

    def step(self, image: torch.Tensor, ritz: torch.Tensor) -> None:
        """Apply one more degree of the polynomial."""
        edge = float(ritz[self.probes])
        pieces = self.damping.pieces
        if edge <= 1e-12 * float(ritz[-1]):  # nothing to damp: the rest is zero to rounding
            self.damping.plain += 1
            self._move(image)
            self._before = None
        elif self._before is None or edge > STALE * pieces[-1][0]:
            pieces.append((edge, 1))
            self._move(image.mul_(2.0 / edge).sub_(self.basis))
        else:
            b, degree = pieces[-1]
            pieces[-1] = (b, degree + 1)
            self._move(image.mul_(4.0 / b).sub_(self.basis, alpha=2.0).sub_(self._before))

    def _move(self, columns: torch.Tensor) -> None:
        old = self.basis
        self.basis, factor = orthonormalise(columns)
        self._factor = factor @ self._factor
        if float(factor.diagonal().abs().min()) <= 1e-30:  # a dependent column: this cycle cannot be continued
            self._before = None
            return
        eye = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
        self._before = old @ torch.linalg.solve_triangular(factor, eye, upper=True).to(old.dtype)

    def _unseen(self) -> float:
        """Bound ``s``, the largest eigenvalue of ``H`` outside the basis."""
        tail = self._factor[-self.probes :, -self.probes :]
        norm = float(torch.linalg.matrix_norm(tail, 2))
        if norm == 0.0:
            return 0.0
        half = self.probes / 2
        log_c = math.log(2.0) + (math.log(FAILURE / LOOKS) + math.lgamma(half + 1.0)) / half
        return self.damping.largest(2.0 * math.log(norm) - log_c)


def _block_bound(inner: torch.Tensor, residual: torch.Tensor, rest: float, rank: int) -> float:
    """Return ``Σ_{i≤r} max(λᵢ([[Θ, Gᵀ], [G, s·I]]), s)`` with ``GᵀG = RᵀR``."""
    width = len(inner)
    values, vectors = torch.linalg.eigh(residual)
    root = values.clamp_min(0.0).sqrt()[:, None] * vectors.T
    block = torch.zeros(2 * width, 2 * width, dtype=torch.float64, device=inner.device)
    block[:width, :width] = inner
    block[width:, :width] = root
    block[width:, width:].fill_diagonal_(rest)
    return float(torch.linalg.eigvalsh(block)[-rank:].clamp_min(rest).sum())
