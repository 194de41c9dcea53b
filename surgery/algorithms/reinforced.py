"""Reinforced agent merging: elements that one model changed, and those that several did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from surgery.algorithms.kernel import Block, Kernel, Setting, Totals, weighted_sum
from surgery.algorithms.sparsify import hardshrink
from surgery.numerics import scratch


class Ram(Kernel):
    """RAM: an element that one model changed is added whole; one that several changed, as their mean.

    ``b + Σ mᵢ δᵢ / max(Σ mᵢ, 1)`` with ``mᵢ = [|δᵢ| > ε]``.

    Reference:
        "Reinforced agent merging", 2026, arXiv:2601.13572.
    """

    buffers = 3

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._epsilon = float(setting.parameters["epsilon"])

    def _changed(self, block: Block) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Return the task vectors without what is negligible, and how many models changed each element."""
        deltas = block.deltas
        count, dtype = deltas[0].numel(), deltas[0].dtype
        changers = scratch("changers", count, dtype).zero_()
        for delta in deltas:
            hardshrink(delta, self._epsilon, out=delta)
            sign = torch.sign(delta, out=scratch("sign", count, dtype))
            changers.add_(sign.abs_())
        return deltas, changers

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Sum, and divide by the number of changers."""
        assert block.base is not None
        deltas, changers = self._changed(block)
        total = weighted_sum(deltas, [1.0] * len(deltas))
        return block.base.add_(total.div_(changers.clamp_min_(1.0)))


class RamPlus(Ram):
    """RAM+, within each tensor: what model ``i`` alone changed is multiplied by ``1 + r · min(sharedᵢ / uniqueᵢ, α)``.

    ``sharedᵢ`` and ``uniqueᵢ`` count the elements that it changed with others and alone.

    Departs in mergekit: counts are divided in float32.

    Reference:
        "Reinforced agent merging", 2026, arXiv:2601.13572.
    """

    @property
    def stages(self) -> int:
        """Count in one pass."""
        return 1

    def observe(self, block: Block, found: Sequence[Any]) -> Totals:
        """Count shared and unique elements of each model."""
        deltas, changers = self._changed(block)
        alone = changers == 1
        counts = [[int(torch.count_nonzero(delta)), int(torch.count_nonzero(delta * alone))] for delta in deltas]
        return (np.array(counts, dtype=np.int64),)

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Turn counts into factors."""
        # mergekit divides counts in float32.
        changed, unique = totals[0].T.astype(np.float32 if self.setting.mergekit else np.float64)
        ratio = (changed - unique) / np.maximum(unique, unique.dtype.type(self._epsilon))
        r, alpha = (float(self.setting.parameters[name]) for name in ("r", "alpha"))
        return 1 + r * np.clip(ratio, 0, alpha)

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Sum, unique elements enlarged, and divide by the number of changers."""
        assert block.base is not None
        deltas, changers = self._changed(block)
        alone = (changers == 1).to(changers.dtype)
        for delta, factor in zip(deltas, found[0], strict=True):
            delta.mul_(alone.mul(float(factor) - 1.0).add_(1.0))
        total = weighted_sum(deltas, [1.0] * len(deltas))
        return block.base.add_(total.div_(changers.clamp_min_(1.0)))
