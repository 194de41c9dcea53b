"""What adding a method to a model amounts to: new tensors, names that train, and the configuration of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from surgery.methods.starts import Start
from surgery.tensor import TensorSpec

File = Literal["peft", "adapterhub", "tensors", "names"]
"""A PEFT folder · an AdapterHub folder · plain tensors · a list of names, nothing new."""


@dataclass(frozen=True, slots=True)
class New:
    """One new parameter, by the key that its file has for it."""

    key: str
    shape: tuple[int, ...]
    start: Start
    frozen: bool = False
    """Only carried along, or a second name of another: not trained by itself, and not counted."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return TensorSpec(self.key, "F32", self.shape).numel


@dataclass(frozen=True)
class Addition:
    """A method, added to one model; nothing is drawn yet.

    Args:
        new: the parameters.
        file: what they are written as.
        config: ``adapter_config.json``, for files that have one.
        existing: parameters of the base that train, and the number of elements of each.
        head: the task's classification head, which PEFT trains and saves beside any method; never counted.
        chosen: the tensors of the base that the method was applied to.
        unchanged: whether the model computes the same as before, until the first step.
        notes: what a person should know.
    """

    new: tuple[New, ...]
    file: File
    config: Mapping[str, Any] = field(default_factory=dict)
    existing: Mapping[str, int] = field(default_factory=dict)
    head: tuple[New, ...] = ()
    chosen: tuple[str, ...] = ()
    unchanged: bool = True
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[New, ...]:
        """Everything that is written."""
        return (*self.new, *self.head)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names that train: keys of the file, and parameters of the base."""
        return (*(one.key for one in self.tensors if not one.frozen), *self.existing)

    @property
    def parameters(self) -> int:
        """Elements that train, without the task's head."""
        return sum(one.numel for one in self.new if not one.frozen) + sum(self.existing.values())
