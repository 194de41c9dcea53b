"""IA³: a weight scaled by a trained vector, as an update of :mod:`surgery.delta`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery import numerics
from surgery.tensor import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """``Δ = l ∘ W − W``: rows or columns of a weight times the entries of a vector.

    Args:
        vector: as many entries as there are rows, or columns; its shape does not matter.
        width: columns of the weight; 1 for a bias.
        columns: whether it scales columns: inputs, or outputs where the weight is stored ``(in, out)``.
        coeff: the coefficient ``c`` of ``W + c·(l ∘ W − W)``.

    Reference: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", arXiv:2205.05638, section 3.3.
    """

    vector: LazyTensor
    width: int
    columns: bool = False
    coeff: float = 1.0

    @property
    def unit(self) -> int:
        """One row of the weight."""
        return max(self.width, 1)

    @property
    def resident(self) -> int:
        """The vector in float64, and a scaled copy of the range."""
        return 8 * (self.vector.spec.numel + numerics.BLOCK)

    def load(self) -> LoadedScaled:
        """Read the vector."""
        return LoadedScaled(numerics.load_wide(self.vector).reshape(-1), self.width, self.columns, self.coeff)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedScaled:
    """The vector in float64."""

    vector: torch.Tensor
    width: int
    columns: bool
    coeff: float

    def add_to(self, values: torch.Tensor, base: torch.Tensor, start: int) -> None:
        """Add ``coeff · (l ∘ W − W)`` for the range's rows."""
        matrix = base.view(-1, self.width)
        first = start // self.width
        factor = self.vector if self.columns else self.vector[first : first + matrix.shape[0]].unsqueeze(1)
        if self.coeff == 1.0:  # exactly the product where nothing was added before
            values.sub_(base).add_((matrix * factor).view(-1))
        else:
            values.add_((matrix * (factor - 1.0)).view(-1), alpha=self.coeff)
