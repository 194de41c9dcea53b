"""How new parameters start: each kind knows its values, in float64, from a seed and the tensor's name alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from surgery.tensor import LazyTensor, TensorSpec

if TYPE_CHECKING:
    import torch


class Start(Protocol):
    """A way to start."""

    def values(self, spec: TensorSpec, base: Mapping[str, LazyTensor], seed: int) -> torch.Tensor:
        """Return float64 values of ``spec``'s shape."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """Every element is ``value``."""

    value: float

    def values(self, spec: TensorSpec, base: Mapping[str, LazyTensor], seed: int) -> torch.Tensor:
        """Fill."""
        import torch

        return torch.full(spec.shape, self.value, dtype=torch.float64)


ZEROS, ONES = Constant(0.0), Constant(1.0)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform in ``[-bound, bound)``."""

    bound: float

    def values(self, spec: TensorSpec, base: Mapping[str, LazyTensor], seed: int) -> torch.Tensor:
        """Draw."""
        import torch

        from surgery import numerics

        generator = numerics.generator(seed, spec.name)
        return (2 * torch.rand(spec.shape, generator=generator, dtype=torch.float64) - 1) * self.bound


def kaiming_uniform(fan_in: int) -> Uniform:
    """Start as ``torch.nn.Linear`` and LoRA's A do: uniform within ``1/√fan_in``.

    Reference: He et al. 2015, "Delving Deep into Rectifiers", arXiv:1502.01852, with the gain of a leaky ReLU of slope √5.

    >>> kaiming_uniform(4).bound
    0.5
    """
    return Uniform(fan_in**-0.5)


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal with mean 0, cut off at two standard deviations where ``truncated``."""

    std: float
    truncated: bool = False

    def values(self, spec: TensorSpec, base: Mapping[str, LazyTensor], seed: int) -> torch.Tensor:
        """Draw."""
        import torch

        from surgery import numerics

        generator = numerics.generator(seed, spec.name)
        drawn = torch.empty(spec.shape, dtype=torch.float64)
        if self.truncated:
            return torch.nn.init.trunc_normal_(
                drawn, std=self.std, a=-2 * self.std, b=2 * self.std, generator=generator
            )
        return drawn.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True, slots=True)
class Copy:
    """The values of a tensor of the base."""

    source: str

    def values(self, spec: TensorSpec, base: Mapping[str, LazyTensor], seed: int) -> torch.Tensor:
        """Read."""
        from surgery import numerics

        return numerics.load_wide(base[self.source])


@dataclass(frozen=True, slots=True)
class Norms:
    """The norm of each output's weights: ``‖W‖`` by rows, by columns where the weight is stored ``(in, out)``."""

    source: str
    transposed: bool

    def values(self, spec: TensorSpec, base: Mapping[str, LazyTensor], seed: int) -> torch.Tensor:
        """Read and measure."""
        from surgery import numerics

        norms: torch.Tensor = numerics.load_wide(base[self.source]).norm(dim=0 if self.transposed else 1)
        return norms


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an embedding, repeated until there are enough."""

    source: str
    rows: tuple[int, ...]

    def values(self, spec: TensorSpec, base: Mapping[str, LazyTensor], seed: int) -> torch.Tensor:
        """Read each row alone: the embedding may be large."""
        import torch

        from surgery import numerics

        tensor, width = base[self.source], spec.shape[1]
        taken = torch.empty(spec.shape, dtype=torch.float64)
        for place in range(spec.shape[0]):
            row = self.rows[place % len(self.rows)]
            numerics.widen(tensor, row * width, (row + 1) * width, taken[place])
        return taken


@dataclass(frozen=True, slots=True)
class Initial:
    """A new parameter as a lazy tensor: drawn when it is read, the same each time."""

    spec: TensorSpec
    start: Start
    base: Mapping[str, LazyTensor]
    seed: int

    @property
    def unit(self) -> int:
        """All elements are drawn together."""
        return max(self.spec.numel, 1)

    @property
    def scratch(self) -> int:
        """Bytes beside the range: its float64 values."""
        return 8

    @property
    def resident(self) -> int:
        """Bytes of what it is taken from, widened."""
        source = getattr(self.start, "source", None)
        return 0 if source is None or isinstance(self.start, Rows) else 8 * self.base[source].spec.numel

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Draw all values and write the range, rounded once."""
        from surgery import numerics

        values = self.start.values(self.spec, self.base, self.seed)
        numerics.narrow(values.reshape(-1)[start:stop].contiguous(), self.spec, out)
