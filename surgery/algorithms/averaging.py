"""Averages of whole models, without a base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from surgery.algorithms.kernel import Block, Kernel, Setting, weighted_sum
from surgery.errors import UsageError


def normalized(coeffs: Sequence[float], *, forgiving: bool = False) -> list[float]:
    """Divide coefficients by their sum.

    Args:
        coeffs: the coefficients.
        forgiving: return them as they are where they sum to zero, as mergekit does.

    Raises:
        UsageError: they sum to zero.
    """
    total = math.fsum(coeffs)
    if abs(total) >= 1e-8:
        return [coeff / total for coeff in coeffs]
    if forgiving:
        return list(coeffs)
    raise UsageError("the coefficients sum to zero, so they cannot be normalised", mend="pass normalize=false")


class Linear(Kernel):
    """The weighted average ``Σ cᵢ xᵢ / Σ cᵢ``, or the sum ``Σ cᵢ xᵢ`` without ``normalize``.

    Reference:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time", 2022, arXiv:2203.05482, eq. 2.
    """

    spoilt_by_nonfinite = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._coeffs = normalized(setting.coeffs) if setting.parameters["normalize"] else list(setting.coeffs)

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Sum the block."""
        return weighted_sum(block.models, self._coeffs)


class Passthrough(Kernel):
    """One model's tensor, ``s · x``: with ``s = 1`` a copy."""

    spoilt_by_nonfinite = True

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Scale the block."""
        return block.models[0].mul_(float(self.setting.parameters["scale"]))
