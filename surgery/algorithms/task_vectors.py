"""Sums of task vectors ``δᵢ = xᵢ − b``: plain, sparsified, and with conflicting signs resolved.

All of them are one kernel with two choices: how task vectors are made sparse (:mod:`surgery.algorithms.sparsify`), and
whether the elements of minority sign are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from surgery.algorithms.averaging import normalized
from surgery.algorithms.kernel import Block, Kernel, Setting, Totals, scaled, weighted_sum
from surgery.algorithms.sparsify import Bernoulli, Breadcrumbs, Magnitude, MagPrune, Sparsifier
from surgery.numerics import scratch

_LEAST_L1 = 1e-7
"""mergekit leaves task vectors alone whose L1 norm, before or after, is below this."""


class TaskArithmetic(Kernel):
    """``b + λ Σ cᵢ δᵢ``: adding skills with ``cᵢ > 0``, forgetting with ``cᵢ < 0``, analogies with both.

    Reference:
        Ilharco et al., "Editing models with task arithmetic", 2023, arXiv:2212.04089, section 2.
    """

    sparsifier: ClassVar[type[Sparsifier]] = Sparsifier
    consensus: ClassVar[bool] = False
    """Whether elements of minority sign are left out."""
    magnitudes_rescaled_by_l1: ClassVar[bool] = True
    """Whether ``rescale`` means the L1 norm in the paper's semantics too."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sparse = self.sparsifier(setting)
        self.spoilt_by_nonfinite = self.sparsifier is Sparsifier and not self.consensus
        self._normalize = bool(setting.parameters["normalize"])
        self._scale = float(setting.parameters["scale"])
        self._coeffs = list(setting.coeffs)
        if self._normalize and not self.consensus:
            self._coeffs = normalized(self._coeffs, forgiving=setting.mergekit)
        self.unit = self._sparse.unit
        wanted = bool(setting.parameters.get("rescale", False)) and min(self._sparse.densities, default=1) < 1
        self._by_l1 = wanted and (setting.mergekit or self.magnitudes_rescaled_by_l1)
        self.buffers = self._sparse.buffers + (3 if self.consensus else 0) + self._by_l1
        if self._by_l1:
            self._sparse.remember()

    @property
    def stages(self) -> int:
        """Take the sparsifier's passes, and one for L1 norms where they are kept."""
        return self._sparse.stages + self._by_l1

    @property
    def resident(self) -> int:
        """Count what the sparsifier remembers."""
        return self._sparse.resident

    def forget(self) -> None:
        """Let the sparsifier forget."""
        self._sparse.forget()

    def sample(self, block: Block) -> None:
        """Let the sparsifier guess its thresholds."""
        if self._sparse.stages:
            self._sparse.sample(block.deltas)

    def needs(self, found: Sequence[Any]) -> bool:
        """Spare what the sparsifier spares."""
        return len(found) >= self._sparse.stages or self._sparse.needs(found)

    def observe(self, block: Block, found: Sequence[Any]) -> Totals:
        """Observe for thresholds, then for L1 norms."""
        deltas = block.deltas
        if len(found) < self._sparse.stages:
            return self._sparse.observe(deltas, block.start, found)
        before = [_l1(delta) for delta in deltas]
        for model, delta in enumerate(deltas):
            self._sparse.sparsify(model, delta, block.start, found)
        return (np.array([before, [_l1(delta) for delta in deltas]]),)

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Conclude thresholds, then the factors that restore L1 norms."""
        if len(found) < self._sparse.stages:
            return self._sparse.conclude(totals, found)
        before, after = totals[0]
        kept = (before >= _LEAST_L1) & (after >= _LEAST_L1) if self.setting.mergekit else after > 0
        return np.divide(before, after, out=np.ones_like(before), where=kept)

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Add what the block's task vectors come to."""
        assert block.base is not None
        deltas = block.deltas
        for model, delta in enumerate(deltas):
            self._sparse.sparsify(model, delta, block.start, found)
            if self._by_l1 and self._sparse.densities[model] < 1:
                delta.mul_(float(found[-1][model]))
        if self.consensus:
            change = agreed_sum(deltas, self._coeffs, self._normalize, weighted=self.setting.mergekit)
            return block.base.add_(scaled(change, self._scale))
        return block.base.add_(weighted_sum(deltas, [self._scale * coeff for coeff in self._coeffs]))


def _l1(values: torch.Tensor) -> float:
    return float(torch.abs(values, out=scratch("magnitudes", values.numel(), values.dtype)).sum())


def agreed_sum(
    deltas: Sequence[torch.Tensor], coeffs: Sequence[float], normalize: bool, *, weighted: bool, least: float = 0.0
) -> torch.Tensor:
    """Return ``Σ cᵢ δᵢ [sign δᵢ = s]``, divided by ``Σ cᵢ [sign δᵢ = s]`` where ``normalize``, with ``s`` elected.

    Args:
        deltas: the models' task vectors; overwritten.
        coeffs: their coefficients.
        normalize: divide by the coefficients that took part.
        weighted: coefficients take part in the election of ``s = sign Σ δᵢ`` as well (and turn signs where negative).
        least: smallest divisor; 0: where nobody took part the result is 0.
    """
    shares = list(coeffs)
    if weighted:
        deltas = [scaled(delta, coeff) for delta, coeff in zip(deltas, coeffs, strict=True)]
        coeffs = [1.0] * len(deltas)
    elected = _elected(deltas)
    count, dtype = elected.numel(), elected.dtype
    divisor, took_part = scratch("divisor", count, dtype), scratch("took part", count, dtype)
    total = deltas[0]
    for delta, coeff, share in zip(deltas, coeffs, shares, strict=True):
        delta.mul_(elected).clamp_min_(0.0)  # |δ| where the sign is the elected one, else 0
        if normalize:
            torch.sign(delta, out=took_part)
            if delta is total:
                torch.mul(took_part, share, out=divisor)
            else:
                divisor.add_(took_part, alpha=share)  # of 0 or 1, so that a fused product is exact too
        scaled(delta, coeff)
        if delta is not total:
            total.add_(delta)
    if normalize:
        total.div_(_without_zeros(divisor, min(shares), least, spare=took_part))
    return total.mul_(elected)


def _elected(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the signs of ``Σ δᵢ`` as ±1, never 0, so that products with them are exact; sums that vanish elect +."""
    total = scratch("elected", deltas[0].numel(), deltas[0].dtype)
    if len(deltas) == 1:
        total.copy_(deltas[0])
    else:
        torch.add(deltas[0], deltas[1], out=total)
    for delta in deltas[2:]:
        total.add_(delta)
    # The sign bit of the sum before the other bits of 1: a third of the time that copysign takes.
    kind, sign, one = _PATTERNS[total.dtype]
    total.view(kind).bitwise_and_(sign).bitwise_or_(one)
    return total


_PATTERNS = {
    torch.float32: (torch.int32, -(1 << 31), 0x3F800000),
    torch.float64: (torch.int64, -(1 << 63), 0x3FF0000000000000),
}
"""The integers of a float's width, and the bit patterns of −0 and 1."""


def _without_zeros(divisor: torch.Tensor, smallest: float, least: float, spare: torch.Tensor) -> torch.Tensor:
    """Replace divisors of which nobody took part, where the sum is 0: in place."""
    if least or smallest > 0:
        return divisor.clamp_min_(least or torch.finfo(divisor.dtype).tiny)
    # 0 becomes 1. Comparing would take four times as long as these.
    nothing = torch.sign(divisor, out=spare).abs_().neg_().add_(1.0)
    return divisor.add_(nothing)


class Ties(TaskArithmetic):
    """TIES: trim to the largest, elect a sign for each element, average those that have it.

    ``b + λ Σ cᵢ δ̂ᵢ [sign δ̂ᵢ = s] / Σ cᵢ [sign δ̂ᵢ = s]`` with ``s = sign Σ δ̂ᵢ``.

    Departs from the paper: magnitudes are compared within a tensor, not over the whole model; a sum of zero elects +.
    Departs in mergekit: the election is of ``Σ cᵢ δ̂ᵢ``.

    Reference:
        Yadav et al., "TIES-merging: resolving interference when merging models", 2023, arXiv:2306.01708, algorithm 1.
    """

    sparsifier = Magnitude
    consensus = True


class DareLinear(TaskArithmetic):
    """DARE: drop elements at random, divide the rest by the share that is kept: ``b + λ Σ cᵢ mᵢ δᵢ / p``.

    Departs in mergekit: task vectors are scaled to the L1 norm they had before, not by ``1/p``.

    Reference:
        Yu et al., "Language models are super Mario: absorbing abilities from homologous models as a free lunch", 2024,
        arXiv:2311.03099, eq. 1 to 3.
    """

    sparsifier = Bernoulli
    magnitudes_rescaled_by_l1 = False


class DareTies(DareLinear):
    """DARE's dropping with the sign election of TIES.

    Departs from the paper: summed, not averaged, without ``normalize``.
    Departs in mergekit: as ``dare_linear`` and ``ties``.

    Reference:
        Yu et al., 2024, arXiv:2311.03099; Yadav et al., 2023, arXiv:2306.01708.
    """

    consensus = True


class DellaLinear(TaskArithmetic):
    """DELLA without election: drop at random, small elements of a row sooner, divide the rest by its own probability.

    Departs from the paper: ``ε`` is half the window's width, as in the authors' code.
    Departs in mergekit: task vectors are scaled to the L1 norm they had before; in tensors of three dimensions and more
    the second one is ranked.

    Reference:
        Deep et al., "DELLA-merging: reducing interference in model merging through magnitude-based sampling", 2024,
        arXiv:2406.11617, section 3.
    """

    sparsifier = MagPrune
    magnitudes_rescaled_by_l1 = False


class Della(DellaLinear):
    """DELLA: the dropping of ``della_linear``, the sign election of TIES, and a mean of those that agree.

    Departs from the paper: as ``della_linear``.
    Departs in mergekit: as ``della_linear`` and ``ties``.

    Reference:
        Deep et al., 2024, arXiv:2406.11617.
    """

    consensus = True


class BreadcrumbsSum(TaskArithmetic):
    """Model breadcrumbs: leave out the largest outliers and the small rest of each task vector, and sum.

    Reference:
        Davari and Belilovsky, "Model breadcrumbs: scaling multi-task model merging with sparse masks", 2023,
        arXiv:2312.06795, section 3.
    """

    sparsifier = Breadcrumbs


class BreadcrumbsTies(BreadcrumbsSum):
    """Model breadcrumbs with the sign election of TIES; summed, not averaged, without ``normalize``.

    Departs in mergekit: the election is of ``Σ cᵢ δ̂ᵢ``.

    Reference:
        Davari and Belilovsky, 2023, arXiv:2312.06795; Yadav et al., 2023, arXiv:2306.01708.
    """

    consensus = True
