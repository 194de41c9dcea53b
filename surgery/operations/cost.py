"""How long a merge will take, about: from what each algorithm took where it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from surgery.merged import Merged
from surgery.plan import Plan
from surgery.tensor import LazyTensor, Wrapper

NANOSECONDS: Mapping[str, float] = {
    "linear": 0.95, "passthrough": 1.3, "task_arithmetic": 0.9, "nearswap": 2.5, "ram": 3.1, "ramplus": 12,
    "slerp": 3.0, "nuslerp": 3.0, "multislerp": 3.1, "karcher": 3.1, "model_stock": 5.0,
    "ties": 3.7, "breadcrumbs": 6.1, "breadcrumbs_ties": 8.8, "dare_linear": 4.5, "dare_ties": 7.5,
    "della": 18.5, "della_linear": 19.5, "sce": 21, "arcee_fusion": 21.5,
}  # fmt: skip
"""What one core takes for an element of one input: ``python -m bench.kernels`` on a 2.9 GHz Zen 3 core."""
OTHER = 10.0
"""The same for a function of somebody's own: a guess."""
WRITE = 0.6
"""Nanoseconds a core takes to fingerprint and write a byte, or to copy one."""
DISK = 0.7e9
"""Bytes a second that go to disk."""


def seconds(plan: Plan, tensors: Iterable[LazyTensor]) -> float:
    """Estimate the time of a run: that of its threads, or of the disk where it is longer.

    >>> from surgery.checkpoint import open_checkpoint
    >>> import numpy
    >>> checkpoint = open_checkpoint({"w": numpy.zeros(1000, "float32")})
    >>> seconds(checkpoint.plan(), checkpoint.tensors.values()) < 0.001
    True
    """
    computing = sum(map(_nanoseconds, tensors)) + WRITE * plan.bytes_written
    return max(computing * 1e-9 / plan.workers, plan.bytes_written / DISK)


def _nanoseconds(tensor: LazyTensor) -> float:
    if isinstance(tensor, Wrapper):
        return _nanoseconds(tensor.source)
    if not isinstance(tensor, Merged):
        return 0.0
    inputs = [*tensor.inputs, *([] if tensor.base is None else [tensor.base])]
    below = sum(map(_nanoseconds, inputs))  # of an earlier stage, or an adapter's
    return below + NANOSECONDS.get(tensor.algorithm.name, OTHER) * tensor.spec.numel * len(inputs)
