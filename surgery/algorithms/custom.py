"""Algorithms of your own: a function on tensors, with a declared scope, becomes a row like those of the registry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from surgery.algorithms.kernel import Block, Kernel, Setting
from surgery.algorithms.registry import COEFF, Algorithm, Base, Scope
from surgery.errors import UsageError

Function = Callable[[Sequence[torch.Tensor], "torch.Tensor | None", Sequence[float]], torch.Tensor]


def algorithm(
    *, scope: Scope = "tensor", base: Base = "none", symmetric: bool = False
) -> Callable[[Function], Algorithm]:
    """Declare a function ``(models, base, coeffs) -> tensor`` as a merge algorithm.

    Args:
        scope: what it has to see: ``"element"``: flat blocks, cut anywhere; ``"row"``: ``(rows, row)`` blocks of whole
            rows; ``"tensor"``: the tensor in its own shape, held in memory. There is no ``"statistics"`` for functions.
        base: whether it takes a base.
        symmetric: whether the order of the models does not matter.

    Returns:
        A decorator that gives an :class:`Algorithm`, to be passed to :func:`surgery.merge`.

    Raises:
        UsageError: another scope.

    >>> @algorithm(scope="element", base="required")
    ... def strongest(models, base, coeffs):
    ...     '''Take over the greatest change of each element.'''
    ...     deltas = torch.stack([c * (model - base) for c, model in zip(coeffs, models)])
    ...     return base + deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
    >>> import surgery
    >>> base, a, b = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -3.0])}, {"w": torch.tensor([-2.0, 2.0])}
    >>> surgery.merge(base, a, b, algorithm=strongest)["w"].tolist()
    [-2.0, -3.0]
    """
    if scope not in ("element", "row", "tensor"):
        raise UsageError(f"a function's scope is element, row or tensor, not {scope!r}")

    def declare(function: Function) -> Algorithm:
        title = (function.__doc__ or function.__name__).strip().splitlines()[0]
        kernel = functools.partial(_Custom, function, scope)
        return Algorithm(function.__name__, kernel, title, "–", scope, base, parameters=(COEFF,), symmetric=symmetric)

    return declare


class _Custom(Kernel):
    def __init__(self, function: Function, scope: Scope, setting: Setting) -> None:
        super().__init__(setting)
        self._function = function
        self._shape: tuple[int, ...] = {"element": (-1,), "row": (-1, setting.row), "tensor": setting.shape}[scope]
        self.unit = {"element": 1, "row": setting.row, "tensor": max(setting.numel, 1)}[scope]
        self.buffers = 2 * len(setting.coeffs) + 2  # as far as anybody can tell

    def combine(self, block: Block, found: Sequence[Any]) -> torch.Tensor:
        """Call the function, and hold its answer against what it was given."""
        models = [model.view(self._shape) for model in block.models]
        base = None if block.base is None else block.base.view(self._shape)
        result = self._function(models, base, self.setting.coeffs)
        if result.shape != models[0].shape:
            raise UsageError(f"{self._function!r} returned {list(result.shape)} for {list(models[0].shape)}")
        return result.to(self.setting.dtype).reshape(-1)
