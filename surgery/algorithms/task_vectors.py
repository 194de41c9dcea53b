"""Sums of task vectors ``δᵢ = xᵢ − b``, plain and sparsified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgery.algorithms.averaging import normalized
from surgery.algorithms.kernel import Block, Kernel, Setting, weighted_sum


class TaskArithmetic(Kernel):
    """``b + λ Σ cᵢ δᵢ``: adding skills with ``cᵢ > 0``, forgetting with ``cᵢ < 0``, analogies with both.

    Reference:
        Ilharco et al., "Editing models with task arithmetic", 2023, arXiv:2212.04089, section 2.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        coeffs = normalized(setting.coeffs) if setting.parameters["normalize"] else setting.coeffs
        self._coeffs = [float(setting.parameters["scale"]) * coeff for coeff in coeffs]

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Add the block's task vectors to the base."""
        assert block.base is not None
        return block.base.add_(weighted_sum(block.deltas, self._coeffs))
