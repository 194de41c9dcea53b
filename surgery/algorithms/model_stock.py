"""Model Stock: how far to go from the base to the average, from the angles between fine-tunes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from surgery.algorithms.interpolation import inner_products
from surgery.algorithms.kernel import Block, Kernel, Setting, Totals, weighted_sum
from surgery.numerics import scratch


class ModelStock(Kernel):
    """``b + t · mean δᵢ`` with ``t = N c / (1 + (N − 1) c)`` and ``c`` the mean cosine between task vectors.

    Where ``1 + (N − 1) c`` vanishes, ``t = 0``. With ``filter_wise`` each filter (first dimension) has its own ``t``.

    Departs in mergekit: products of norms below 1e-6 count as 1e-6, which makes fine-tunes of small tensors look
    orthogonal; filters are the last dimension.

    Reference:
        Jang, Yun and Han, "Model stock: all we need is just a few fine-tuned models", 2024, arXiv:2403.19522, eq. 7.
    """

    buffers = 8

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._by_filter = bool(setting.parameters["filter_wise"]) and len(setting.shape) > 1
        filters = setting.row if setting.mergekit else max(math.prod(setting.shape[1:]), 1)
        self.unit = filters if self._by_filter else 1

    @property
    def stages(self) -> int:
        """Take a pass for angles, unless every filter has its own."""
        return 0 if self._by_filter else 1

    def observe(self, block: Block, found: Sequence[Any]) -> Totals:
        """Add inner products."""
        return (inner_products(block.deltas),)

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Turn angles into the ratio ``t``."""
        return float(self._ratio(totals[0]))

    def _ratio(self, products: np.ndarray) -> np.ndarray:
        """Return ``t`` from ``⟨δᵢ, δⱼ⟩`` of shape ``(N, N, …)``."""
        count = len(products)
        norms = np.sqrt(products[range(count), range(count)])
        cosines = []
        for i in range(count):
            for j in range(i + 1, count):
                size = norms[i] * norms[j]
                size = np.maximum(size, 1e-6 if self.setting.mergekit else np.finfo(np.float64).tiny)
                cosines.append(np.clip(products[i, j] / size, -1, 1))
        cosine = np.mean(cosines, axis=0)
        divisor = 1 + (count - 1) * cosine
        singular = np.abs(divisor) < 1e-6
        ratio: np.ndarray = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))
        return ratio

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Go from the base towards the average."""
        assert block.base is not None
        deltas = block.deltas
        if not self._by_filter:
            return block.base.add_(weighted_sum(deltas, [found[0] / len(deltas)] * len(deltas)))
        count, size = len(deltas), deltas[0].numel()
        wide = [scratch(f"wide {k}", size).copy_(delta).view(-1, self.unit) for k, delta in enumerate(deltas)]
        product = scratch("product", size).view(-1, self.unit)
        products = np.empty((count, count, size // self.unit))
        for i in range(count):
            for j in range(i + 1):
                products[i, j] = products[j, i] = torch.mul(wide[i], wide[j], out=product).sum(1).numpy()
        ratio = torch.from_numpy(self._ratio(products) / count).to(deltas[0].dtype)
        total = weighted_sum(deltas, [1.0] * count).view(-1, self.unit).mul_(ratio.view(-1, 1))
        return block.base.add_(total.view(-1))
