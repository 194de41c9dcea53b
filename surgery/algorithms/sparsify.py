"""Sparsifiers: which elements of a task vector are kept, and what they are multiplied with.

*Equal magnitudes at a threshold stay together*: an element is kept if any choice of the wanted number of elements could
keep it, so that the result depends neither on a sort's whims nor on where a tensor is cut. Differences of bfloat16
numbers are often equal; then somewhat more than ``density`` is kept. The TIES authors' code does the same; mergekit
keeps the wanted number, by an order that its sort leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from surgery.algorithms.kernel import Setting, Totals
from surgery.algorithms.order import Order, Rank
from surgery.errors import UsageError
from surgery.numerics import scratch


class Sparsifier:
    """Keeps all."""

    unit = 1

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.densities = tuple(float(value) for value in setting.per_model.get("density", ()))

    @property
    def stages(self) -> int:
        """Count the passes it needs before it can sparsify."""
        return 0

    def sample(self, deltas: Sequence[torch.Tensor]) -> None:
        """See some elements before the first stage."""

    def needs(self, found: Sequence[Any]) -> bool:
        """Say whether stage ``len(found)`` has to look at the tensor."""
        return True

    def observe(self, deltas: Sequence[torch.Tensor], start: int, found: Sequence[Any]) -> Totals:
        """Return what a block adds to stage ``len(found)``; deltas must not change."""
        raise NotImplementedError

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Turn a stage's sums into its finding."""
        raise NotImplementedError

    def sparsify(self, model: int, delta: torch.Tensor, start: int, found: Sequence[Any]) -> None:
        """Sparsify one model's block, in place."""


class Magnitude(Sparsifier):
    """Keep the largest: the ``density · n`` elements of greatest magnitude, and those that equal the least of them."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._windows = [self.window(density, model) for model, density in enumerate(self.densities)]
        ranks = [
            Rank(model, rank)
            for model, window in enumerate(self._windows)
            if window and window[0] <= window[1]
            for rank in (window if window[0] > 1 else window[1:])
            if rank < setting.numel
        ]
        self._order = Order(ranks, setting.numel, setting.dtype)

    def window(self, density: float, model: int) -> tuple[int, int] | None:
        """Return the ranks (from 1, by falling magnitude) of the first and the last element kept; ``None``: keep all."""
        return None if density >= 1 else (1, max(1, int(density * self.setting.numel)) if density > 0 else 0)

    @property
    def stages(self) -> int:
        """Take the passes that thresholds take, if any is needed."""
        return self._order.stages

    def observe(self, deltas: Sequence[torch.Tensor], start: int, found: Sequence[Any]) -> Totals:
        """Count magnitudes."""
        return self._order.observe(self._magnitudes(deltas), found)

    def sample(self, deltas: Sequence[torch.Tensor]) -> None:
        """Guess where thresholds are."""
        self._order.sample(self._magnitudes(deltas))

    def needs(self, found: Sequence[Any]) -> bool:
        """Look again only where a guess was wrong."""
        return self._order.needs(found)

    def _magnitudes(self, deltas: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = list(deltas)
        for model in self._order.streams:
            delta = deltas[model]
            found[model] = torch.abs(delta, out=scratch(f"|δ| {model}", delta.numel(), delta.dtype))
        return found

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Narrow the thresholds down."""
        return self._order.conclude(totals, found)

    def sparsify(self, model: int, delta: torch.Tensor, start: int, found: Sequence[Any]) -> None:
        """Zero what lies outside of the window's magnitudes."""
        window = self._windows[model]
        if window is None:
            return
        if window[0] > window[1]:
            delta.zero_()
            return
        limits = self._order.values(found)
        greatest, least = limits.get(Rank(model, window[0])), limits.get(Rank(model, window[1]))
        if greatest is not None and window[0] > 1:
            kept = scratch("kept", delta.numel(), delta.dtype)
            delta.sub_(hardshrink(delta, greatest, out=kept))  # what is greater goes
        if least:
            hardshrink(delta, below(least, delta.dtype), out=delta)


class Breadcrumbs(Magnitude):
    """Keep the middle: drop the ``γ · n`` largest, then the smallest until ``density · n`` remain.

    Where ``density + γ > 1``, fewer of the largest are dropped, so that ``density`` is kept.
    """

    def window(self, density: float, model: int) -> tuple[int, int] | None:
        """Return the ranks of the first and the last element kept."""
        count = self.setting.numel
        kept = int(density * count)
        top = min(int(float(self.setting.per_model["gamma"][model]) * count), count - kept)
        return None if density >= 1 else (top + 1, top + kept)


class Bernoulli(Sparsifier):
    """Keep each element with probability ``density``, whatever its magnitude."""

    def sparsify(self, model: int, delta: torch.Tensor, start: int, found: Sequence[Any]) -> None:
        """Zero what the draw drops; divide the rest by ``density`` where the paper's rescaling is asked for."""
        density = self.densities[model]
        if density >= 1:
            return
        if density <= 0:
            delta.zero_()
            return
        words = self.setting.words(model, start, delta.numel())
        _keep(delta, words < np.uint32(min(round(density * 2**32), 2**32 - 1)))
        if self.setting.parameters["rescale"] and not self.setting.mergekit:
            delta.mul_(1 / density)


class MagPrune(Sparsifier):
    """Keep each element with a probability that grows with its rank in its row, from ``density − ε`` to ``density + ε``."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        shape = setting.shape
        self._epsilons = tuple(float(value) for value in setting.per_model["epsilon"])
        for density, epsilon in zip(self.densities, self._epsilons, strict=True):
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                raise UsageError(f"density ± epsilon must lie between 0 and 1, not at {density:g} ± {epsilon:g}")
        # mergekit ranks along the second dimension, whatever the number of dimensions.
        along_second = setting.mergekit and len(shape) > 2
        self._ranked = shape[1] if along_second else setting.row
        self.unit = max(math.prod(shape[1:]), 1) if along_second else setting.row

    def sparsify(self, model: int, delta: torch.Tensor, start: int, found: Sequence[Any]) -> None:
        """Zero what the draw drops; divide the rest by its probability where the paper's rescaling is asked for."""
        density, epsilon = self.densities[model], self._epsilons[model]
        if density >= 1:
            return
        if density <= 0:
            delta.zero_()
            return
        length, dtype = self._ranked, delta.dtype
        inner = self.unit // length
        rows = delta.view(-1, length, inner).transpose(1, 2).reshape(-1, length)
        span = torch.arange(length, dtype=torch.float64).mul_(2 * epsilon / (length - 1)) if length > 1 else epsilon
        by_rank = (torch.zeros(length, dtype=torch.float64) + (density - epsilon) + span).to(dtype)
        chance = scratch("chance", delta.numel(), dtype).view(rows.shape)
        chance.scatter_(1, _places(rows), by_rank.expand(rows.shape))
        chance = chance.view(-1, inner, length).transpose(1, 2).reshape(-1)
        words = self.setting.words(model, start, delta.numel())
        uniform = scratch("uniform", delta.numel(), dtype).numpy()
        np.multiply(words, 2.0**-32, out=uniform, casting="same_kind")
        _keep(delta, uniform < chance.numpy())
        if self.setting.parameters["rescale"] and not self.setting.mergekit:
            delta.div_(chance)


def _places(rows: torch.Tensor) -> torch.Tensor:
    """Return the columns of each row by rising magnitude; of equal magnitudes the one to the left is first.

    Magnitude and column are sorted as one integer: NumPy sorts those six times faster than torch sorts with indices, and
    no two are equal. float64 magnitudes do not leave room for that.
    """
    if rows.dtype != torch.float32:
        return torch.argsort(rows.abs(), dim=1, stable=True)
    keys = scratch("keys", rows.numel(), torch.int64).view(rows.shape)
    keys.copy_(rows.view(torch.int32)).bitwise_and_(0x7FFFFFFF).bitwise_left_shift_(32)  # without the sign
    keys.bitwise_or_(torch.arange(rows.shape[1]))
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_((1 << 32) - 1)


def _keep(delta: torch.Tensor, mask: np.ndarray) -> None:
    values = delta.numpy()
    np.multiply(values, mask, out=values)


def below(value: float, dtype: torch.dtype) -> float:
    """Return the next smaller number of the dtype."""
    kind = np.float32 if dtype == torch.float32 else np.float64
    return float(np.nextafter(kind(value), kind(0)))


def hardshrink(values: torch.Tensor, limit: float, out: torch.Tensor) -> torch.Tensor:
    """Zero what is not greater in magnitude than ``limit``: a quarter of the time that comparing and masking takes."""
    shrunk: torch.Tensor = torch.ops.aten.hardshrink.out(values, limit, out=out)
    return shrunk
