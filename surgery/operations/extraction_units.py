"""What is factored: one unit a weight, with how its factors are laid out in a PEFT adapter.

A unit's delta is one matrix, or one an expert. Its factors wait in the spool as they were found, ``left @ right`` in the
weight's own layout, so that any leading part of them can still be chosen. ``left`` is kept transposed: the first ``r``
components of both are then the first rows.

========== ===================== ================== ======================================================
kind       weight                A                  B
========== ===================== ================== ======================================================
linear     (out, in)             (r, in)            (out, r)
linear     (in, out), ``flipped`` (r, in)           (out, r)
embedding  (vocab, dim)          (r, vocab)         (dim, r)
conv       (out, in, k…)         (r, in, k…)        (out, r, 1…)
experts    (E, out, in)          (E·r, in)          (out, r·E): row ``e·r + k`` meets column ``k·E + e``
========== ===================== ================== ======================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from surgery import numerics
from surgery.tensor import LazyTensor, TensorSpec

EXPERTS = "experts"
"""The group of all experts that are stored one by one."""
Kind = Literal["linear", "embedding", "conv", "experts"]


@dataclass(frozen=True, slots=True)
class Unit:
    """One weight that is factored."""

    spec: TensorSpec
    kind: Kind
    flipped: bool = False
    """The weight is stored ``(in, out)``: its delta is ``(B @ A)ᵀ``."""
    group: str = ""
    """Units of one group get one rank, and are stored together or not at all; alone by default."""

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.spec.name

    @property
    def experts(self) -> int:
        """Number of matrices."""
        return self.spec.shape[0] if self.kind == "experts" else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of one of them."""
        if self.kind == "experts":
            return self.spec.shape[1], self.spec.shape[2]
        return self.spec.shape[0], math.prod(self.spec.shape[1:])

    @property
    def limit(self) -> int:
        """The largest rank a delta of this shape can have."""
        return min(self.matrix)

    @property
    def cost(self) -> int:
        """Elements a component needs."""
        return self.experts * sum(self.matrix)

    @property
    def suffixes(self) -> tuple[str, str]:
        """What PEFT appends to the module's name."""
        if self.kind == "embedding":
            return ".lora_embedding_A", ".lora_embedding_B"
        return ".lora_A.weight", ".lora_B.weight"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B: see the table above."""
        rows, columns = self.matrix
        into, out = (rows, columns) if self.flipped or self.kind == "embedding" else (columns, rows)
        if self.kind == "conv":
            return (rank, *self.spec.shape[1:]), (out, rank, *(1,) * (len(self.spec.shape) - 2))
        return (rank * self.experts, into), (out, rank * self.experts)

    def dress(self, left_t: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lay factors out as PEFT's A and B.

        Args:
            left_t: ``(E, r, m)``.
            right: ``(E, r, n)``.

        Returns:
            A and B, contiguous.
        """
        inner, outer = (left_t, right) if self.flipped or self.kind == "embedding" else (right, left_t)
        shapes = self.shapes(right.shape[1])
        return inner.reshape(shapes[0]).contiguous(), outer.permute(2, 1, 0).reshape(shapes[1]).contiguous()


@dataclass(frozen=True, slots=True)
class Factors:
    """What a factorisation found, to the depth it was asked for; rounded to the adapter's dtype.

    Args:
        unit: whose.
        left_t: ``(E, depth, m)``, in the spool.
        right: ``(E, depth, n)``, in the spool.
        squares: ``(depth,)``, ``σ²`` summed over experts.
        energy: ``‖Δ‖²``.
        products: ``(depth,)``, ``Σ_e ⟨bₖ aₖ, Δ⟩`` of the rounded components: what the error of any leading part needs of Δ.
        residual: ``‖Δ − BA‖²`` of all of them, as rounded.
        excess: certified relative excess of the error at ``depth`` over the best possible.
        noise_rank: components above the floor of the fine-tune's rounding, where that was asked for.
        doubt: why ``noise_rank`` is not certain; empty where it is.
        magnitude: DoRA's ``(out,)``, in the spool.
    """

    unit: Unit
    left_t: LazyTensor
    right: LazyTensor
    squares: NDArray[np.float64]
    energy: float
    products: NDArray[np.float64]
    residual: float
    excess: float
    noise_rank: int | None = None
    doubt: str = ""
    magnitude: LazyTensor | None = None

    @property
    def depth(self) -> int:
        """Components at hand."""
        return len(self.squares)

    def leading(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the first ``rank`` components: ``(E, rank, m)`` and ``(E, rank, n)``, padded with zeros beyond ``depth``."""
        return _padded(self.left_t, rank), _padded(self.right, rank)

    def residual_at(self, rank: int) -> float:
        """Return ``‖Δ − Σ_{k≤rank} bₖ aₖ‖²``: what is left at full depth, and what the dropped components take with them.

        ``‖Δ − X‖² = ‖Δ − Y‖² + 2⟨Δ, Y − X⟩ + ‖X‖² − ‖Y‖²`` for the leading part ``X`` of ``Y``.
        """
        if rank >= self.depth:
            return self.residual
        left_t, right = self.leading(self.depth)
        dropped = (
            2 * float(self.products[rank:].sum()) + _energy(left_t, right, rank) - _energy(left_t, right, self.depth)
        )
        return max(self.residual + dropped, 0.0)


def _energy(left_t: torch.Tensor, right: torch.Tensor, rank: int) -> float:
    """Return ``‖Σ_{k≤rank} bₖ aₖ‖²`` over all experts, from the two Gram matrices."""
    pairs = zip(left_t[:, :rank].double(), right[:, :rank].double(), strict=True)
    return math.fsum(float(((b @ b.T) * (a @ a.T)).sum()) for b, a in pairs)


def _padded(tensor: LazyTensor, rank: int) -> torch.Tensor:
    values = numerics.load(tensor)
    experts, depth, width = values.shape
    if rank <= depth:
        return values[:, :rank]
    return torch.cat([values, values.new_zeros(experts, rank - depth, width)], 1)
