"""Interpolation on spheres. The result lies in the span of the inputs: its coefficients follow from inner products.

One pass gathers the inner products of all inputs in float64; what is a loop over tensors elsewhere (Karcher's iteration)
is a loop over a few numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from surgery.algorithms.averaging import normalized
from surgery.algorithms.kernel import Block, Kernel, Setting, Totals, weighted_sum
from surgery.errors import UsageError
from surgery.numerics import scratch

_SMALLEST_SINE = 1e-7
"""Below this, slerp and lerp agree to float64's precision, and the angle of parallel tensors is rounding alone."""


_WIDE = 1 << 15
"""Elements widened at a time: two such runs of float64 stay in a core's cache."""


def inner_products(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Return all ``⟨xᵢ, xⱼ⟩``, accumulated in float64."""
    found = np.zeros((len(tensors), len(tensors)))
    for start in range(0, tensors[0].numel(), _WIDE):
        runs = [tensor[start : start + _WIDE] for tensor in tensors]
        wide = [scratch(f"wide {k}", run.numel()).copy_(run) for k, run in enumerate(runs)]
        for i, a in enumerate(wide):
            for j, b in enumerate(wide[: i + 1]):
                found[i, j] += float(torch.dot(a, b))
    return found + np.tril(found, -1).T


class Spanned(Kernel):
    """An algorithm whose result is ``Σ aᵢ xᵢ``, or with a base ``b + Σ aᵢ δᵢ``, with ``a`` from inner products."""

    buffers = 4  # the widened runs of sixteen models

    @property
    def stages(self) -> int:
        """Gather inner products in one pass."""
        return 1

    def observe(self, block: Block, found: Sequence[Any]) -> Totals:
        """Add the block's inner products."""
        return (inner_products(block.models if block.base is None else block.deltas),)

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Solve for the coefficients."""
        return self.coefficients(totals[0])

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Sum the block with the coefficients found."""
        if block.base is None:
            return weighted_sum(block.models, found[0])
        return block.base.add_(weighted_sum(block.deltas, found[0]))

    def coefficients(self, products: np.ndarray) -> list[float]:
        """Return ``a`` from all ``⟨xᵢ, xⱼ⟩``."""
        raise NotImplementedError


def arc(cosine: np.ndarray, t: float, lerp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return slerp's two coefficients ``sin((1−t)θ)/sin θ`` and ``sin(tθ)/sin θ``, or ``1−t`` and ``t`` where ``lerp``."""
    theta = np.arccos(np.where(lerp, 0.0, cosine))
    sine = np.sin(theta)
    return np.where(lerp, 1 - t, np.sin((1 - t) * theta) / sine), np.where(lerp, t, np.sin(t * theta) / sine)


class Slerp(Spanned):
    """``(sin((1−t)θ) x₁ + sin(tθ) x₂) / sin θ`` with θ the angle between two tensors; lengths are interpolated along.

    Where the angle is 0 or π, to the precision of its sine, the result is linear.

    Departs in mergekit: linear already where ``|cos θ| > 0.9995``, as between most fine-tunes of one base.

    Reference:
        Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, section 3.3.
    """

    def coefficients(self, products: np.ndarray) -> list[float]:
        """Find the angle."""
        norms = np.sqrt(np.diag(products))
        norms = np.where(norms > (1e-8 if self.setting.mergekit else 0.0), norms, 1.0)
        cosine = np.clip(products[0, 1] / norms[0] / norms[1], -1, 1)
        close = np.abs(cosine) > 0.9995 if self.setting.mergekit else 1 - cosine**2 <= _SMALLEST_SINE**2
        return [float(value) for value in arc(cosine, float(self.setting.parameters["t"]), close)]


class NuSlerp(Spanned):
    """Slerp with ``t = c₂ / (c₁ + c₂)``, of models or of their task vectors; over the whole tensor, rows or columns.

    Departs in mergekit: ``row_wise`` is the other way round there (true interpolates columns).

    Reference:
        Goddard et al., mergekit 0.1.5, ``nuslerp``; the angle as in Shoemake, SIGGRAPH 1985.
    """

    buffers = 6

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        first, second = setting.coeffs
        self._t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
        whole = bool(setting.parameters["flatten"]) or len(setting.shape) < 2
        by_row = bool(setting.parameters["row_wise"]) is not setting.mergekit
        self._axis = None if whole else "row" if by_row else "column"
        self.unit = {None: 1, "row": setting.row, "column": max(math.prod(setting.shape[1:]), 1)}[self._axis]

    @property
    def stages(self) -> int:
        """Take a pass for angles, unless every row has its own."""
        return 0 if self._axis == "row" else 1

    def observe(self, block: Block, found: Sequence[Any]) -> Totals:
        """Add inner products of tensors, or of columns."""
        pair = block.models if block.base is None else block.deltas
        if self._axis is None:
            return (inner_products(pair),)
        return (self._products(pair, 0),)

    def _products(self, pair: Sequence[torch.Tensor], along: int) -> np.ndarray:
        """Return ``⟨a, a⟩``, ``⟨b, b⟩`` and ``⟨a, b⟩`` along columns (0) or rows (1)."""
        a, b = (scratch(f"wide {k}", x.numel()).copy_(x).view(-1, self.unit) for k, x in enumerate(pair))
        product = scratch("product", a.numel()).view(a.shape)
        return torch.stack([torch.mul(x, y, out=product).sum(along) for x, y in ((a, a), (b, b), (a, b))]).numpy()

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Turn inner products into coefficients."""
        products = totals[0]
        if self._axis is None:
            products = np.array([products[0, 0], products[1, 1], products[0, 1]])
        return self._arc(products)

    def _arc(self, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        norms = np.maximum(np.sqrt(products[:2]), 1e-7 if self.setting.mergekit else np.finfo(np.float64).tiny)
        cosine = np.clip(products[2] / norms[0] / norms[1], -1, 1)
        return arc(cosine, self._t, 1 - cosine**2 <= _SMALLEST_SINE**2)

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Interpolate the block."""
        pair = block.models if block.base is None else block.deltas
        coefficients = self._arc(self._products(pair, 1)) if self._axis == "row" else found[0]
        dtype = pair[0].dtype
        first, second = (
            x.view(-1, self.unit).mul_(torch.from_numpy(np.asarray(c)).to(dtype).view((-1, 1) if self._axis == "row" else -1))
            for x, c in zip(pair, coefficients, strict=True)
        )  # fmt: skip
        result = first.add_(second).view(-1)
        return result if block.base is None else block.base.add_(result)


class MultiSlerp(Spanned):
    """The direction of ``Σ cᵢ uᵢ`` with ``uᵢ = xᵢ / ‖xᵢ‖``, at the length ``Σ cᵢ ‖xᵢ‖``, of models or task vectors.

    This is what the published method comes to: it projects to the tangent space at the very point that its mean is,
    where the mean of the projections vanishes. One model is returned as it is.

    Departs in mergekit: ``uᵢ = xᵢ / (‖xᵢ‖ + eps)``.

    Reference:
        Goddard, "Multi-SLERP", 2025, the author's blog; mergekit 0.1.5, ``multislerp``.
    """

    def coefficients(self, products: np.ndarray) -> list[float]:
        """Find the mean direction and length."""
        if len(products) == 1:
            return [1.0]
        setting = self.setting
        coeffs = np.array(normalized(setting.coeffs) if setting.parameters["normalize"] else setting.coeffs)
        norms = np.sqrt(np.diag(products))
        eps = float(setting.parameters["eps"])
        inverse = (
            1 / (norms + eps) if setting.mergekit else np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
        )
        along = coeffs * inverse
        length = math.sqrt(max(float(along @ products @ along), 0.0))
        if length < eps:
            if len(products) == 2 or not norms.any():
                return [float(coeff) for coeff in coeffs]
            raise UsageError("the models' directions cancel out", mend="choose other coefficients")
        return [float(value) for value in along / length * float(coeffs @ norms)]


class Karcher(Spanned):
    """The Karcher mean of the directions ``uᵢ = xᵢ / ‖xᵢ‖`` on the unit sphere, at the mean of the lengths.

    The point where the tangent vectors to all ``uᵢ`` sum to zero, by fixed-point iteration from the Euclidean mean.
    Tensors shorter than ``tol`` have no direction and take no part in it.

    Reference:
        Karcher, "Riemannian center of mass and mollifier smoothing", Comm. Pure Appl. Math. 30, 1977; for models
        arXiv:2603.04972.
    """

    def coefficients(self, products: np.ndarray) -> list[float]:
        """Iterate in the span of the inputs."""
        tol = float(self.setting.parameters["tol"])
        norms = np.sqrt(np.diag(products))
        if len(norms) == 1:
            return [1.0]
        valid = np.flatnonzero(norms > tol)
        if not valid.size:
            return [0.0] * len(norms)
        cosines = products[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
        mean = self._iterate(cosines, tol)
        found = np.zeros(len(norms))
        found[valid] = mean / norms[valid] * norms.mean()
        return [float(value) for value in found]

    def _iterate(self, cosines: np.ndarray, tol: float) -> np.ndarray:
        """Return the mean's coefficients on the directions, whose inner products are given."""

        def length(vector: np.ndarray) -> float:
            return math.sqrt(max(float(vector @ cosines @ vector), 0.0))

        count = len(cosines)
        mean = np.full(count, 1 / count)
        start = length(mean)
        mean = np.eye(count)[0] if start < tol else mean / start
        for _ in range(int(self.setting.parameters["max_iter"])):
            tangent = np.zeros(count)
            for one, cosine in zip(np.eye(count), np.clip(cosines @ mean, -1, 1), strict=True):
                angle = math.acos(cosine)
                if angle >= tol:
                    tangent += angle / math.sin(angle) / count * (one - cosine * mean)
            size = length(tangent)
            if size < tol:
                break
            mean = math.cos(size) * mean + math.sin(size) * tangent / size
            mean = mean / length(mean)
        return mean


class NearSwap(Kernel):
    """Move towards a second model where it is near: ``b + w (x − b)`` with ``w = min(t / |x − b|, 1)``.

    Departs in mergekit: differences below 1e-6 count as 1e-6.

    Reference:
        alchemonaut, "QuartetAnemoi-70B-t0.0001", 2024, its model card.
    """

    buffers = 1

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Step ``min(t, |δ|)`` towards the model."""
        assert block.base is not None
        (delta,) = block.deltas
        t = float(self.setting.parameters["t"])
        if not self.setting.mergekit:
            return block.base.add_(delta.clamp_(-t, t))  # δ · min(t / |δ|, 1)
        weight = torch.abs(delta, out=scratch("weight", delta.numel(), delta.dtype))
        weight.clamp_min_(1e-6).reciprocal_().mul_(t).clamp_max_(1.0)
        return block.base.add_(delta.mul_(weight))
