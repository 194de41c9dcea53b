"""SCE: select, calculate, erase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from surgery.algorithms.kernel import Block, Kernel, Setting, Totals
from surgery.algorithms.order import Order, Rank
from surgery.algorithms.sparsify import below, hardshrink
from surgery.algorithms.task_vectors import agreed_sum
from surgery.numerics import scratch


class Sce(Kernel):
    """SCE: select elements that vary between models, calculate weights from their energy, erase minority signs.

    Of the elements whose variance over the models is not zero the ``density`` of greatest variance is kept (and those
    that equal the least of them). Weights are ``wᵢ = Σ δ̂ᵢ² / Σⱼ Σ δ̂ⱼ²``; the merged change is
    ``Σ wᵢ δ̂ᵢ [sign δ̂ᵢ = s] / Σ wᵢ [sign δ̂ᵢ = s]`` with ``s = sign Σ δ̂ᵢ``.

    Departs in mergekit: weights are all equal where mean squares sum to less than 1e-6, as those of most fine-tunes do,
    and divisors below 1e-6 count as 1e-6.

    Reference:
        Wan et al., "FuseChat: knowledge fusion of chat models", 2024, arXiv:2408.07990, section 3.3.
    """

    buffers = 4

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._density = float(setting.parameters["density"])

    @property
    def stages(self) -> int:
        """Take a pass to count what varies, those of a threshold of variances, and one for energies."""
        return (1 + Order([Rank(0, 1)], self.setting.numel, self.setting.dtype).stages if self._selects else 0) + 1

    @property
    def _selects(self) -> bool:
        return 0 < self._density < 1

    def _order(self, varying: int) -> Order | None:
        """Seek the least variance that is kept; ``None``: nothing is."""
        rank = int(self._density * varying)
        return Order([Rank(0, rank)], self.setting.numel, self.setting.dtype) if rank else None

    def needs(self, found: Sequence[Any]) -> bool:
        """Spare the passes of thresholds that are not there, or are known."""
        if not 0 < len(found) < self.stages - 1:
            return True
        order = self._order(found[0])
        return order is not None and order.needs(found[1:])

    def observe(self, block: Block, found: Sequence[Any]) -> Totals:
        """Count what varies, then variances, then sum squares."""
        deltas = block.deltas
        if len(found) < self.stages - 1:
            variance = _variance(deltas)
            if not found:
                return (np.array([int(torch.count_nonzero(variance))]),)
            order = self._order(found[0])
            assert order is not None  # else the pass is spared
            return order.observe([variance], found[1:])
        self._select(deltas, found)
        wide = scratch("wide", deltas[0].numel())
        return (np.array([float(torch.dot(wide.copy_(delta), wide)) for delta in deltas]),)

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Narrow the threshold down, then turn energies into weights."""
        if len(found) < self.stages - 1:
            if not found:
                return int(totals[0][0])
            order = self._order(found[0])
            assert order is not None  # else the pass is spared
            return order.conclude(totals, found[1:])
        (energies,) = totals
        mean = energies.sum() / self.setting.numel
        if mean < 1e-6 if self.setting.mergekit else mean == 0:
            return np.full(len(energies), 1 / len(energies))
        return energies / energies.sum()

    def _select(self, deltas: Sequence[torch.Tensor], found: Sequence[Any]) -> None:
        if self._density >= 1:
            return
        order = self._order(found[0]) if self._selects else None
        if order is None:
            for delta in deltas:
                delta.zero_()
            return
        (least,) = order.values(found[1:]).values()
        kept = _variance(deltas)
        hardshrink(kept, below(least, kept.dtype), out=kept)
        kept.sign_()
        for delta in deltas:
            delta.mul_(kept)

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Add the weighted mean of those that agree."""
        assert block.base is not None
        deltas = block.deltas
        self._select(deltas, found)
        weights = [float(weight) for weight in found[-1]]
        least = 1e-6 if self.setting.mergekit else 0.0
        return block.base.add_(agreed_sum(deltas, weights, normalize=True, weighted=False, least=least))


def _variance(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the variance over models of each element."""
    count, dtype = deltas[0].numel(), deltas[0].dtype
    mean = scratch("mean", count, dtype).copy_(deltas[0])
    for delta in deltas[1:]:
        mean.add_(delta)
    mean.div_(len(deltas))
    total = scratch("variance", count, dtype).zero_()
    for delta in deltas:
        off = torch.sub(delta, mean, out=scratch("off", count, dtype))
        total.add_(off.mul_(off))
    return total.div_(len(deltas))
