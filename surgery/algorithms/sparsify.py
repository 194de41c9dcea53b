"""Sparsifiers: which elements of a task vector are kept, and what they are multiplied with.

*Equal magnitudes at a threshold stay together*: an element is kept if any choice of the wanted number of elements could
keep it, so that the result depends neither on a sort's whims nor on where a tensor is cut. Differences of bfloat16
numbers are often equal; then somewhat more than ``density`` is kept. The TIES authors' code does the same; mergekit
keeps the wanted number, by an order that its sort leaves open.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from surgery.algorithms.kernel import Setting, Totals
from surgery.algorithms.order import Order, Rank
from surgery.errors import UsageError
from surgery.numerics import scratch

_REMEMBERED = 128 << 20
"""Bytes of one tensor's draws that are remembered, at most; more are drawn twice."""


class Sparsifier:
    """Keeps all."""

    unit = 1
    buffers = 0
    """Working buffers of a block's size that it needs."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.densities = tuple(float(value) for value in setting.per_model.get("density", ()))

    @property
    def stages(self) -> int:
        """Count the passes it needs before it can sparsify."""
        return 0

    @property
    def resident(self) -> int:
        """Bytes that it may remember of the whole tensor."""
        return 0

    def remember(self) -> None:
        """Be told that a tensor will be sparsified twice over."""

    def forget(self) -> None:
        """Let go of what it remembers."""

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
        self.buffers = len(self.densities) + 3  # magnitudes, and what counting takes

    @property
    def resident(self) -> int:
        """Count what thresholds take."""
        return self._order.resident

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


class Bits:
    """A bit an element of one tensor, from a pass over it to the making of its last block."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._bits: np.ndarray | None = None
        self._known = 0
        self._given_up = False
        self._lock = threading.Lock()

    def put(self, start: int, mask: np.ndarray) -> None:
        """Keep the bits of some elements. Where a block begins within a byte, all are given up."""
        with self._lock:
            if self._given_up or start % 8:
                self.clear()
                return
            if self._bits is None:
                self._bits = np.zeros(-(-self._count // 8), np.uint8)
            packed = np.packbits(mask)
            self._bits[start // 8 : start // 8 + len(packed)] = packed
            self._known += len(mask)

    def get(self, start: int, count: int) -> np.ndarray | None:
        """Return the bits of some elements as a mask; ``None`` where not all of the tensor's were kept."""
        bits = self._bits
        if bits is None or self._known < self._count:
            return None
        within = start % 8
        return np.unpackbits(bits[start // 8 : -(-(start + count) // 8)])[within : within + count].view(np.bool_)

    def clear(self) -> None:
        """Let go of them, for good."""
        self._given_up, self._bits = True, None


class Drawn(Sparsifier):
    """Keeps what a draw says."""

    buffers = 2  # words and mask

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._by_chance = bool(setting.parameters["rescale"]) and not setting.mergekit
        """Whether what is kept is divided by its chance to be."""
        self._remembered: dict[int, Bits] = {}

    @property
    def resident(self) -> int:
        """Count a bit an element."""
        return -(-self.setting.numel // 8) * len(self._remembered)

    def remember(self) -> None:
        """Remember what is drawn from now on, unless it is too much."""
        drawing = [model for model, density in enumerate(self.densities) if 0 < density < 1]
        if len(drawing) * self.setting.numel <= 8 * _REMEMBERED:
            self._remembered = {model: Bits(self.setting.numel) for model in drawing}

    def forget(self) -> None:
        """Draw again from now on: the same."""
        for bits in self._remembered.values():
            bits.clear()

    def sparsify(self, model: int, delta: torch.Tensor, start: int, found: Sequence[Any]) -> None:
        """Zero what the draw drops; divide the rest by its chance where the paper's rescaling is asked for."""
        density = self.densities[model]
        if density >= 1:
            return
        if density <= 0:
            delta.zero_()
            return
        bits = self._remembered.get(model)
        mask = bits.get(start, delta.numel()) if bits else None
        if mask is not None:
            _keep(delta, mask)
            return
        words = self.setting.words(model, start, delta.numel())
        mask, chance = self.draw(model, delta, words)
        if bits:
            bits.put(start, mask)
        _keep(delta, mask)
        if self._by_chance:
            delta.div_(chance)

    def draw(self, model: int, delta: torch.Tensor, words: np.ndarray) -> tuple[np.ndarray, Any]:
        """Return which elements of a block are kept, and their chances (as far as somebody will ask for them)."""
        raise NotImplementedError


class Bernoulli(Drawn):
    """Keep each element with probability ``density``, whatever its magnitude."""

    def draw(self, model: int, delta: torch.Tensor, words: np.ndarray) -> tuple[np.ndarray, Any]:
        """Compare with one threshold."""
        density = self.densities[model]
        mask = scratch("mask", delta.numel(), torch.bool).numpy()
        return np.less(words, np.uint32(min(round(density * 2**32), 2**32 - 1)), out=mask), density


class MagPrune(Drawn):
    """Keep each element with a probability that grows with its rank in its row, from ``density − ε`` to ``density + ε``.

    Of equal magnitudes, the one to the left has the lower rank where probabilities are asked for. Where they are not,
    all of them are kept as the last of them is: that needs a row sorted, not the places of its elements.
    """

    buffers = 8

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

    def draw(self, model: int, delta: torch.Tensor, words: np.ndarray) -> tuple[np.ndarray, Any]:
        """Compare each element's draw with its chance, or the other way round its magnitude with what its draw allows."""
        length = self._ranked
        inner = self.unit // length
        rows = delta.view(-1, length, inner).transpose(1, 2).reshape(-1, length)
        if not self._by_chance and length > 1 and inner == 1:
            return self._above_limits(model, rows, words), None
        chance = self._chances(model, rows).view(-1, inner, length).transpose(1, 2).reshape(-1)
        uniform = scratch("uniform", delta.numel(), delta.dtype).numpy()
        np.multiply(words, 2.0**-32, out=uniform, casting="same_kind")
        mask = scratch("mask", delta.numel(), torch.bool).numpy()
        return np.less(uniform, chance.numpy(), out=mask), chance

    def _chances(self, model: int, rows: torch.Tensor) -> torch.Tensor:
        length, dtype = self._ranked, rows.dtype
        density, epsilon = self.densities[model], self._epsilons[model]
        span = torch.arange(length, dtype=torch.float64).mul_(2 * epsilon / (length - 1)) if length > 1 else epsilon
        by_rank = (torch.zeros(length, dtype=torch.float64) + (density - epsilon) + span).to(dtype)
        chance = scratch("chance", rows.numel(), dtype).view(rows.shape)
        return chance.scatter_(1, _places(rows), by_rank.expand(rows.shape))

    def _above_limits(self, model: int, rows: torch.Tensor, words: np.ndarray) -> np.ndarray:
        """Hold magnitudes against the least that is kept by each draw.

        ``u < p − ε + 2ε r / (n − 1)`` is ``r > (u − p + ε)(n − 1) / 2ε``: an element is kept where its magnitude is
        at least that of the first rank above this in its row. Above the last rank there is infinity.
        """
        count, length = rows.shape
        least, width = self.densities[model] - self._epsilons[model], 2 * self._epsilons[model]
        ordered = scratch("ordered", count * (length + 1), rows.dtype).view(count, length + 1)
        magnitudes = torch.abs(rows, out=scratch("magnitudes", rows.numel(), rows.dtype).view(rows.shape))
        ordered[:, length] = math.inf
        # Bit patterns of positive numbers have their order, and integers are sorted faster.
        integers = torch.int32 if rows.dtype == torch.float32 else torch.int64
        ordered[:, :length].copy_(magnitudes).view(integers).numpy().sort(axis=1)
        signed = np.bitwise_xor(words, np.uint32(1 << 31)).view(np.int32)  # u − ½, in units of 2⁻³²
        first = scratch("first", rows.numel(), rows.dtype).copy_(torch.from_numpy(signed))
        per_rank = (length - 1) / width
        first.mul_(per_rank * 2.0**-32).add_((0.5 - least) * per_rank + 1).clamp_(0, length)
        ranks = scratch("ranks", rows.numel(), torch.int64).copy_(first).view(rows.shape)
        limits = torch.gather(ordered, 1, ranks, out=first.view(rows.shape))
        mask: np.ndarray = scratch("mask", rows.numel(), torch.bool).numpy()
        np.greater_equal(magnitudes.view(-1).numpy(), limits.view(-1).numpy(), out=mask)
        return mask


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
