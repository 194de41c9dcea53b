"""Arcee Fusion: take over only what matters most of a fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from surgery.algorithms.kernel import Block, Kernel, Setting, Totals
from surgery.algorithms.order import Order, Rank
from surgery.algorithms.sparsify import below, hardshrink
from surgery.numerics import scratch

_QUARTILES = (0.25, 0.5, 0.75)
_EPS = 1e-8


class ArceeFusion(Kernel):
    """Take the elements over whose importance stands out: ``b + δ [I ≥ median + 1.5 (Q₃ − Q₁)]``.

    ``I = |δ| · KL(softmax(x) ‖ softmax(b))``, softmax over a row. Quartiles are exact, at the index ``⌊q (n − 1)⌋``.

    Departs in mergekit: none in exact arithmetic; mergekit estimates quartiles of more than 10⁶ elements from a random
    sample, so that its results differ from run to run.

    Reference:
        Arcee AI, mergekit 0.1.5, ``arcee_fusion``.
    """

    buffers = 10

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.unit = setting.row
        count = setting.numel
        self._quartiles = [Rank(0, count - int(q * (count - 1))) for q in _QUARTILES]
        self._order = Order(self._quartiles, count, setting.dtype)
        self._divergence = np.full(count // self.unit, np.nan)
        """KL of each row: made in the first pass, which every later one follows."""

    @property
    def stages(self) -> int:
        """Take the passes of the quartiles."""
        return self._order.stages

    def needs(self, found: Sequence[Any]) -> bool:
        """Spare the pass that a sample would have been for."""
        return self._order.needs(found)

    def observe(self, block: Block, found: Sequence[Any]) -> Totals:
        """Count importances."""
        assert block.base is not None
        if np.isnan(self._divergence[block.start // self.unit]):
            first = block.start // self.unit
            divergence = _divergence(block.models[0].view(-1, self.unit), block.base.view(-1, self.unit))
            self._divergence[first : first + len(divergence)] = divergence.numpy()
        return self._order.observe([self._importance(block.deltas[0], block.start)], found)

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Narrow the quartiles down."""
        return self._order.conclude(totals, found)

    def _importance(self, delta: torch.Tensor, start: int) -> torch.Tensor:
        importance = torch.abs(delta, out=scratch("importance", delta.numel(), delta.dtype)).view(-1, self.unit)
        first = start // self.unit
        rows = torch.from_numpy(self._divergence[first : first + importance.shape[0]]).to(delta.dtype)
        return importance.mul_(rows.view(-1, 1)).view(-1)

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Add what is important."""
        assert block.base is not None
        (delta,) = block.deltas
        values = self._order.values(found)
        first, median, third = (values[rank] for rank in self._quartiles)
        threshold = median + 1.5 * (third - first)
        importance = self._importance(delta, block.start)
        if threshold > 0:
            hardshrink(importance, below(threshold, delta.dtype), out=importance)
            delta.mul_(importance.sign_())
        return block.base.add_(delta)


def _divergence(rows: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return ``Σ p log(p / q)`` of each row in float64, never below 0: rounding alone could take it there."""
    p = torch.softmax(rows, dim=-1, dtype=torch.float64).add_(_EPS)
    q = torch.softmax(base, dim=-1, dtype=torch.float64).add_(_EPS)
    return p.mul(torch.log(p / q)).sum(-1).clamp_min_(0.0)
