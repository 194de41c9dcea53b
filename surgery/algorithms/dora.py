"""DoRA: fit a magnitude and a low-rank direction to a fine-tuned weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgery import numerics

ROUNDS = 4
"""Alternations; the error settles within two or three."""
Factor = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class DoraFit:
    """``W' = m / ‖W + BA‖ ∘ (W + BA)``, norms over each output's weights.

    Args:
        left: ``B (out, r)``.
        right: ``A (r, in)``.
        magnitude: ``m (out,)``.
        residual: ``‖W_tuned − W'‖²``.
    """

    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor
    residual: float


def fit_dora(
    weight: torch.Tensor,
    tuned: torch.Tensor,
    factor: Factor,
    rounded: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> DoraFit:
    r"""Fit DoRA's magnitude and direction to ``tuned``.

    The magnitude is known: ``m = ‖W_tuned‖`` by outputs. Given it, the direction should be
    ``BA = W_tuned ∘ ‖W + BA‖ / m − W``, which holds the norms of its own result: they are taken from the round before,
    and the best round is kept. The first round is plain LoRA's delta.

    Args:
        weight: ``W (out, in)``, float32.
        tuned: ``(out, in)``, float32.
        factor: gives ``B (out, r)`` and ``A (r, in)`` of a matrix, rounded as they will be stored.
        rounded: rounds magnitudes to the dtype in which they will be stored.

    >>> from surgery.algorithms.lowrank import truncated_svd
    >>> def factor(matrix):
    ...     return truncated_svd(matrix, 1, torch.Generator().manual_seed(0)).factors(1)
    >>> w = torch.eye(3)
    >>> fit_dora(w, w * torch.tensor([[1.0], [2.0], [3.0]]), factor).residual < 1e-9
    True

    Reference: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, equation 5.
    Departs from the paper: it trains both parts; here they are fitted to weights that are known.
    """
    magnitude = rounded(tuned.norm(dim=1))
    best: DoraFit | None = None
    target = tuned - weight
    for _ in range(ROUNDS):
        left, right = factor(target)
        direction = torch.addmm(weight, left.to(weight.dtype), right.to(weight.dtype))
        norms = direction.norm(dim=1)
        scale = (magnitude.to(norms.dtype) / norms.clamp_min(torch.finfo(norms.dtype).tiny))[:, None]
        residual = numerics.squared_norm(direction.mul_(scale).sub_(tuned))
        if best is None or residual < best.residual:
            best = DoraFit(left, right, magnitude, residual)
        ratio = norms / magnitude.to(norms.dtype).clamp_min(torch.finfo(norms.dtype).tiny)
        target = (tuned * ratio[:, None]).sub_(weight)
    assert best is not None
    return best
