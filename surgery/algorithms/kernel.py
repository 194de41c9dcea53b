"""Kernels: an algorithm with its parameters, set up for one tensor, working on blocks.

A kernel makes the elements of a block from the same elements of every input. What it must know of the whole tensor
(thresholds, inner products) it learns in *stages* before: in each, every block is *observed*, the observations are
summed in the order of the blocks, and the sum is *concluded* into a finding that later stages and :meth:`Kernel.combine`
are given. A tensor in memory is one block; :class:`surgery.merged.Merged` streams many. Kernels compute in the dtype
they are given: float64 for exactness, float32 for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from surgery import numerics
from surgery.algorithms.registry import MERGEKIT, PAPER, Algorithm, Number, find, resolve

Totals = tuple[np.ndarray, ...]
"""What a block adds to a stage: arrays that are summed over blocks."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a kernel is set up with.

    Args:
        name: the tensor's name, which keys random draws.
        shape: the whole tensor's shape.
        dtype: the working dtype, float64 or float32.
        parameters: the merge's parameters, all of them.
        per_model: the models' parameters, all of them, one value a model.
        compat: whose semantics, ``paper`` or ``mergekit``.
        seed: keys random draws.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameters: Mapping[str, Number] = field(default_factory=dict)
    per_model: Mapping[str, tuple[Number, ...]] = field(default_factory=dict)
    compat: str = PAPER
    seed: int = 0
    draws: Callable[[int, int, int], np.ndarray] | None = None
    """For tests: gives the random words of a model, a start and a count in place of :func:`numerics.random_words`."""

    @property
    def mergekit(self) -> bool:
        """Whether mergekit's semantics are asked for."""
        return self.compat == MERGEKIT

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements in a row: the last dimension, at least 1."""
        return max(self.shape[-1], 1) if self.shape else 1

    def words(self, model: int, start: int, count: int) -> np.ndarray:
        """Draw a model's random 32-bit words for some elements: the same wherever the tensor is cut."""
        if self.draws is not None:
            return self.draws(model, start, count)
        return numerics.random_words(self.seed, self.name, f"model {model}", start, count)

    @property
    def coeffs(self) -> tuple[float, ...]:
        """The models' coefficients."""
        return tuple(map(float, self.per_model["coeff"]))


@dataclass(frozen=True, slots=True)
class Block:
    """The same elements of every input: flat, in the working dtype. A kernel may overwrite them."""

    models: tuple[torch.Tensor, ...]
    base: torch.Tensor | None
    start: int
    """Place of the first element in the whole tensor."""

    @property
    def deltas(self) -> tuple[torch.Tensor, ...]:
        """Turn the models into ``xᵢ − b``, in place: to be asked for once."""
        assert self.base is not None  # the registry saw to it
        return tuple(model.sub_(self.base) for model in self.models)


class Kernel:
    """An algorithm set up for one tensor."""

    unit: int = 1
    """Elements that can only be made together."""
    buffers: int = 0
    """Working buffers of a block's size that it needs besides the block's own."""
    spoilt_by_nonfinite: bool = False
    """Whether a NaN or an infinity in any input is sure to make the same element of the result one."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @property
    def stages(self) -> int:
        """Count the passes over the whole tensor that go before combining."""
        return 0

    @property
    def resident(self) -> int:
        """Bytes that it holds of a tensor from the first pass to the last block, at most."""
        return 0

    def forget(self) -> None:
        """Let go of what it holds: the whole tensor is made. Should more be asked for, it is found again."""

    def sample(self, block: Block) -> None:
        """See some of the tensor's elements (gathered, ``start`` means nothing) before the first stage."""

    def needs(self, found: Sequence[Any]) -> bool:
        """Say whether stage ``len(found)`` has to look at the tensor; where not, its finding is ``None``."""
        return True

    def observe(self, block: Block, found: Sequence[Any]) -> Totals:
        """Return what the block adds to stage ``len(found)``."""
        raise NotImplementedError

    def conclude(self, totals: Totals, found: Sequence[Any]) -> Any:
        """Turn the sums of stage ``len(found)`` into its finding."""
        raise NotImplementedError

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Make the block's elements; the result may be one of the block's own tensors."""
        raise NotImplementedError


def weighted_sum(tensors: Sequence[torch.Tensor], coeffs: Sequence[float]) -> torch.Tensor:
    """Return ``Σ cᵢ xᵢ``, in order, in the first tensor; the others are overwritten.

    Products and sums are rounded one by one: a fused multiply-add could round otherwise at the end of a block than in
    its middle, and results must not depend on where a tensor is cut.
    """
    total = scaled(tensors[0], coeffs[0])
    for tensor, coeff in zip(tensors[1:], coeffs[1:], strict=True):
        total.add_(scaled(tensor, coeff))
    return total


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply in place, where that changes anything."""
    return tensor if factor == 1.0 else tensor.mul_(factor)


def merge_tensors(
    algorithm: str | Algorithm,
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    parameters: Mapping[str, Any] | None = None,
    per_model: Sequence[Mapping[str, Any]] = (),
    *,
    name: str = "",
    compat: str = PAPER,
    seed: int = 0,
    draws: Callable[[int, int, int], np.ndarray] | None = None,
) -> torch.Tensor:
    """Merge tensors in memory, computing in their own dtype: the algorithms as pure functions.

    Args:
        algorithm: its name, or a row of the registry.
        models: tensors of one shape and dtype (float64 or float32).
        base: the base's tensor, for algorithms that take one.
        parameters: the merge's parameters.
        per_model: each model's own.
        name: the tensor's name, which keys random draws.
        compat: whose semantics: ``paper`` or ``mergekit``.
        seed: keys random draws.
        draws: gives random words in their place, to repeat somebody else's.

    Returns:
        The merged tensor; the inputs are untouched.

    Raises:
        UsageError: a parameter or a number of models that the algorithm does not take.

    >>> merge_tensors("linear", [torch.zeros(2), torch.ones(2)], per_model=[{"coeff": 1}, {"coeff": 3}])
    tensor([0.7500, 0.7500])
    """
    row = find(algorithm)
    row.check_arity(len(models), base is not None)
    whole, each = resolve(row, len(models), parameters or {}, per_model)
    kernel = row.make(Setting(name, tuple(models[0].shape), models[0].dtype, whole, each, compat, seed, draws))

    def block() -> Block:
        flat = tuple(model.reshape(-1).clone() for model in models)
        return Block(flat, None if base is None else base.reshape(-1).clone(), 0)

    if not models[0].numel():
        return models[0].clone()
    found: list[Any] = []
    for _ in range(kernel.stages):
        found.append(kernel.conclude(kernel.observe(block(), found), found) if kernel.needs(found) else None)
    return kernel.combine(block(), found).clone().reshape(models[0].shape)
