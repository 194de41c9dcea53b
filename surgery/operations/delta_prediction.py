"""Whether a fine-tune's matrix is its base's plus few directions, and which: for the low-rank prediction of exact deltas."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from surgery import numerics
from surgery.algorithms.lowrank import truncated_svd
from surgery.formats import delta_codec
from surgery.formats.delta_codec import Block
from surgery.formats.delta_prediction import LEVELS, Factors, matrix_of
from surgery.tensor import LazyTensor, read_bytes

TRIED_LEVELS = (LEVELS >> 8, LEVELS >> 6, LEVELS >> 4, LEVELS >> 2)
"""Largest magnitudes of entries that are tried: fewer are fewer bytes, and a worse prediction."""

SPARE = 8
"""Directions that are looked for beyond those of the sample, where rounding hides the weakest."""


def find_factors(base: LazyTensor, tuned: LazyTensor, rank: int) -> Factors | None:
    """Find factors that predict the fine-tune's matrix, if coding against that is cheaper than against the base.

    Args:
        base: the base's matrix, readable at any element.
        tuned: the fine-tune's.
        rank: how many directions a sample of the difference seemed to have.

    Returns:
        The factors, or ``None`` where they do not pay.
    """
    rows, columns = matrix_of(base.spec.shape)
    delta, noise = _difference(base, tuned, rows, columns)
    if not bool(delta.isfinite().all()):
        return None
    wanted = min(rank + SPARE, rows, columns)
    svd = truncated_svd(delta, wanted, torch.Generator().manual_seed(0))
    edge = noise * (rows**0.5 + columns**0.5)
    kept = int((svd.sigma > edge).sum())
    if not kept:
        return None
    left, right = (factor.numpy() for factor in svd.factors(min(kept, wanted)))
    return _cheapest(base, tuned, left, right)


def _difference(base: LazyTensor, tuned: LazyTensor, rows: int, columns: int) -> tuple[torch.Tensor, float]:
    """Return ``FT − BASE`` in float32, and the root mean square of what rounding the fine-tune did to it."""
    delta = torch.empty(rows * columns)
    squares = 0.0
    for start, stop in _ranges(rows * columns):
        values = numerics.widen(tuned, start, stop, numerics.scratch("tuned", stop - start))
        squares += float(_spacing(values, tuned.spec.dtype).square_().sum()) / 12
        delta[start:stop] = values - numerics.widen(base, start, stop, numerics.scratch("base", stop - start))
    return delta.view(rows, columns), (squares / (rows * columns)) ** 0.5


def _ranges(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, numerics.BLOCK):
        yield start, min(start + numerics.BLOCK, count)


def _spacing(values: torch.Tensor, dtype: str) -> torch.Tensor:
    digits = {"BF16": 8, "F16": 11, "F32": 24}[dtype]
    _, exponents = torch.frexp(values)
    return torch.ldexp(torch.ones_like(values), exponents - digits)


def _cheapest(base: LazyTensor, tuned: LazyTensor, left: np.ndarray, right: np.ndarray) -> Factors | None:
    """Code one block in each way, and see which would cost least over the whole."""
    count = min(delta_codec.block_elements(base.spec.dtype), base.spec.numel)
    known, wanted = (Block(tensor.spec.dtype, read_bytes(tensor, 0, count)) for tensor in (base, tuned))
    blocks = base.spec.numel / count
    best, least = None, len(delta_codec.encode(wanted, known)[1]) * blocks
    for levels in TRIED_LEVELS:
        factors = Factors.of(left, right, levels)
        residual = len(delta_codec.encode(wanted, factors.predict(known, 0))[1])
        cost = residual * blocks + len(factors.pack())
        if cost < least:
            best, least = factors, cost
    return best
