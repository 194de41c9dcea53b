"""SCE: select, calculate, erase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from surgery.algorithms import order
from surgery.algorithms.kernel import Block, Kernel, Setting, Totals
from surgery.algorithms.order import Sought
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
        """Take the passes of a threshold of variances, and one for energies."""
        return (order.passes(self.setting.dtype) if 0 < self._density < 1 else 0) + 1

    def observe(self, block: Block, found: Sequence[Any]) -> Totals:
        """Count variances, then sum squares."""
        deltas = block.deltas
        if len(found) < self.stages - 1:
            sought = found[-1] if found else [Sought(0, 0)]
            variance = _variance(deltas)
            counts = order.count([variance], sought, len(found))
            return counts if found else (*counts, np.array([int(torch.count_nonzero(variance))]))
        self._select(deltas, found)
        wide = scratch("wide", deltas[0].numel())
        return (np.array([float(torch.dot(wide.copy_(delta), wide)) for delta in deltas]),)

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Narrow the threshold down, then turn energies into weights."""
        if len(found) < self.stages - 1:
            if found:
                return order.narrowed(found[-1], totals)
            rank = int(self._density * int(totals[-1][0]))
            return order.narrowed([Sought(0, rank)], totals[:-1]) if rank else []
        (energies,) = totals
        mean = energies.sum() / self.setting.numel
        if mean < 1e-6 if self.setting.mergekit else mean == 0:
            return np.full(len(energies), 1 / len(energies))
        return energies / energies.sum()

    def _select(self, deltas: Sequence[torch.Tensor], found: Sequence[Any]) -> None:
        if self._density >= 1:
            return
        levels = order.passes(self.setting.dtype)
        if self._density <= 0 or not found[levels - 1]:
            for delta in deltas:
                delta.zero_()
            return
        least = below(order.value(found[levels - 1][0], deltas[0].dtype), deltas[0].dtype)
        kept = _variance(deltas)
        hardshrink(kept, least, out=kept)
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
