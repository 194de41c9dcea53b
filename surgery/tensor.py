"""What a tensor is before anybody reads it: a name, a dtype, a shape, and a way to its bytes.

This room knows no tensor library. It holds the dtype table (the safetensors names are the names everywhere),
:class:`TensorSpec`, the :class:`LazyTensor` protocol that every producer of values implements, and the few
producers that need no arithmetic: bytes in memory, and a range of another lazy tensor's bytes.

*Ranges are counted in elements of the flattened tensor (C order)*, not in rows, because biases, 3-D experts and
convolutions have rows of very different kinds. A producer that can only make whole rows says so with ``unit``:
a range then starts at a multiple of ``unit`` and ends at one, or at the tensor's end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits an element of every dtype that safetensors 0.8 defines."""

ARITHMETIC = ("F64", "F32", "BF16", "F16")
"""The dtypes that surgery computes with. All others are copied as bytes, never decoded."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The name, dtype and shape of a tensor: all that a plan needs to know.

    >>> spec = TensorSpec("w", "BF16", (3, 5))
    >>> spec.numel, spec.nbytes
    (15, 30)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar, 0 where a dimension is 0."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return self.numel * BITS[self.dtype] // 8

    @property
    def itemsize(self) -> int:
        """Bytes an element; raises ``ValueError`` for dtypes that pack several into one byte."""
        if BITS[self.dtype] % 8:
            raise ValueError(f"{self.dtype} elements are not whole bytes")
        return BITS[self.dtype] // 8

    def describe(self) -> str:
        """Write the spec as ``BF16[3, 5]``."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@runtime_checkable
class LazyTensor(Protocol):
    """A tensor whose dtype and shape are known at once, and whose values are made when asked for.

    Producers are safe to read from several threads at once.
    """

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape."""
        ...

    @property
    def unit(self) -> int:
        """Elements that can only be made together: ranges start at its multiples."""
        ...

    @property
    def scratch(self) -> int:
        """Bytes of working memory a range costs, for each byte of the range, beside the range itself."""
        ...

    @property
    def resident(self) -> int:
        """Bytes the producer holds while it is being read, whatever the range (LoRA factors, a whole matrix)."""
        ...

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Write the bytes of elements ``[start, stop)`` into ``out``, which has exactly their size."""
        ...


@dataclass(frozen=True, slots=True)
class BytesTensor:
    """A tensor whose bytes are in memory already."""

    spec: TensorSpec
    data: memoryview | bytes
    unit: int = 1
    scratch: int = 0
    resident: int = 0

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Copy the range."""
        low, high = byte_range(self.spec, start, stop)
        out[:] = memoryview(self.data)[low:high]


class Wrapper:
    """A tensor made from one other, range by range: what a range costs is what it costs there."""

    __slots__ = ()
    source: LazyTensor

    @property
    def unit(self) -> int:
        """The source's unit: ranges pass through unchanged."""
        return self.source.unit

    @property
    def scratch(self) -> int:
        """The source's scratch."""
        return self.source.scratch

    @property
    def resident(self) -> int:
        """The source's resident bytes."""
        return self.source.resident


@dataclass(frozen=True, slots=True)
class Renamed(Wrapper):
    """Another tensor's values under a different name or a different view of its shape."""

    source: LazyTensor
    spec: TensorSpec

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the same range of the source."""
        self.source.read_into(start, stop, out)


@dataclass(frozen=True, slots=True)
class AnyRange(Wrapper):
    """Another tensor, readable at any element: what was not asked for of a unit is made and thrown away."""

    source: LazyTensor

    @property
    def spec(self) -> TensorSpec:
        """The source's spec."""
        return self.source.spec

    @property
    def unit(self) -> int:
        """One element."""
        return 1

    @property
    def scratch(self) -> int:
        """The source's scratch and the range in whole units."""
        return self.source.scratch + 1

    @property
    def resident(self) -> int:
        """The source's resident bytes, and the parts of units at both ends."""
        return self.source.resident + 2 * self.source.unit * BITS[self.spec.dtype] // 8

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the range in whole units, and cut it."""
        unit = self.source.unit
        first, last = start // unit * unit, min(-(-stop // unit) * unit, self.spec.numel)
        if (first, last) == (start, stop):
            self.source.read_into(start, stop, out)
            return
        low, high = byte_range(self.spec, start - first, stop - first)
        out[:] = memoryview(read_bytes(self.source, first, last))[low:high]


def any_range(tensor: LazyTensor) -> LazyTensor:
    """Make a tensor readable at any element (itself, if it is)."""
    return tensor if tensor.unit == 1 else AnyRange(tensor)


def renamed(tensor: LazyTensor, name: str) -> LazyTensor:
    """Give ``tensor`` another name (itself, if it has that name)."""
    if tensor.spec.name == name:
        return tensor
    return Renamed(tensor, TensorSpec(name, tensor.spec.dtype, tensor.spec.shape))


def byte_range(spec: TensorSpec, start: int, stop: int) -> tuple[int, int]:
    """Turn an element range into a byte range. Sub-byte dtypes are read whole or in whole bytes.

    >>> byte_range(TensorSpec("w", "BF16", (4,)), 1, 3)
    (2, 6)
    """
    bits = BITS[spec.dtype]
    low, high = start * bits, stop * bits
    if low % 8 or high % 8:
        raise ValueError(f"elements {start}..{stop} of {spec.describe()} are not whole bytes")
    return low // 8, high // 8


def read_bytes(tensor: LazyTensor, start: int = 0, stop: int | None = None) -> bytearray:
    """Read a range (by default all of it) into fresh memory."""
    stop = tensor.spec.numel if stop is None else stop
    low, high = byte_range(tensor.spec, start, stop)
    out = bytearray(high - low)
    if out:
        tensor.read_into(start, stop, memoryview(out))
    return out


def human_bytes(count: float) -> str:
    """Write a byte count for people, in decimal units.

    >>> human_bytes(90_868_376)
    '90.9 MB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


_UNITS = {
    "": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int | None:
    """Read a byte count as people write it; ``None`` if it is none.

    >>> parse_bytes("5GB"), parse_bytes("1.5 MiB"), parse_bytes("many")
    (5000000000, 1572864, None)
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?i?B?)", text, re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    return int(float(found[1]) * unit) if found and unit else None


def human_count(count: float) -> str:
    """Write a parameter count for people.

    >>> human_count(22_713_728)
    '22.7 M'
    """
    for unit in ("", "K", "M", "B"):
        if abs(count) < 999.5 or unit == "B":
            return f"{count:.3g} {unit}".strip()
        count /= 1000
    raise AssertionError
