"""Low-rank prediction: what a fine-tune's matrix probably is, from the base's and two factors of small integers.

A merged LoRA is ``round(W + B A)``. With factors near to its own, ``round(W + P)`` gives most of its bits, and what is coded is
the difference from that. Both sides must predict the same bits on every machine: the factors are integers of 16 bits, so
that ``L R`` is exact in float64 in whatever order it is summed; everything after that is one operation at a time, rounded as
IEEE 754 says. NumPy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import FormatError
from surgery.formats.delta_codec import Block, pack_numbers, unpack_numbers

PREDICTED = ("BF16", "F16", "F32")
"""The dtypes of matrices that are predicted."""
LARGEST_RANK = 512
LEVELS = 32767
"""Largest magnitude of an entry."""

_Floats = NDArray[Any]


@dataclass(frozen=True)
class Factors:
    """``P = scale · left @ right``, an exact product of integers times one number.

    Args:
        left: ``(rows, r)``, int16.
        right: ``(r, columns)``, int16.
        scale: of the product.
    """

    left: NDArray[np.int16]
    right: NDArray[np.int16]
    scale: float

    @classmethod
    def of(cls, left: _Floats, right: _Floats, levels: int) -> Factors:
        """Round factors of floats to integers of at most ``levels``."""
        steps = [float(np.abs(factor).max(initial=0)) / levels or 1.0 for factor in (left, right)]
        codes = [np.rint(factor / step).astype(np.int16) for factor, step in zip((left, right), steps, strict=True)]
        return cls(codes[0], codes[1], steps[0] * steps[1])

    @property
    def rank(self) -> int:
        """Number of components."""
        return int(self.left.shape[1])

    def pack(self) -> bytes:
        """Write the entries, left before right."""
        entries = np.concatenate([self.left.reshape(-1), self.right.reshape(-1)]).view(np.uint16)
        return pack_numbers(entries)

    @classmethod
    def unpack(cls, data: bytes, shape: tuple[int, ...], rank: int, scale: float) -> Factors:
        """Read what :meth:`pack` wrote.

        Raises:
            FormatError: it is something else.
        """
        rows, columns = matrix_of(shape)
        entries = unpack_numbers(data, "<u2", rank * (rows + columns)).view(np.int16)
        left, right = entries[: rows * rank], entries[rows * rank :]
        return cls(left.reshape(rows, rank), right.reshape(rank, columns), scale)

    def predict(self, known: Block, start: int) -> Block:
        """Predict a range.

        Args:
            known: the base's elements from ``start`` on.
            start: number of the first one.
        """
        columns, count = self.right.shape[1], known.bits.size
        first, last = start // columns, -(-(start + count) // columns)
        product = self.left[first:last].astype(np.float64) @ self.right.astype(np.float64)
        part = product.reshape(-1)[start - first * columns :][:count]
        part += 0.0  # a zero has either sign, as the sum was ordered: now plus
        part *= self.scale
        with np.errstate(over="ignore", invalid="ignore"):  # of infinities and NaNs, which stay as they are
            values = _widened(known.bits, known.dtype)
            bits = np.where(np.isfinite(values), _rounded(values + part, known.dtype), known.bits)
        return Block(known.dtype, bits.tobytes())


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Say how a tensor's elements are laid out as a matrix: rows of its first dimension.

    Raises:
        FormatError: it has fewer than two dimensions, or no elements.
    """
    columns = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 0
    if not columns or not shape[0]:
        raise FormatError(f"a tensor of shape {list(shape)} has no low-rank prediction")
    return shape[0], columns


def _widened(bits: _Floats, dtype: str) -> _Floats:
    if dtype == "BF16":
        wide: _Floats = (bits.astype(np.uint32) << 16).view(np.float32)
        return wide.astype(np.float64)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float64)


def _rounded(values: _Floats, dtype: str) -> _Floats:
    """Round float64 once, to nearest even; the 16-bit dtypes by way of float32 rounded to odd."""
    single = values.astype(np.float32)
    if dtype == "F32":
        return single.view(np.uint32)
    wide = single.astype(np.float64)
    odd = single.view(np.uint32) - (np.abs(wide) > np.abs(values)) | (wide != values)
    odd = odd.astype(np.uint32)
    if dtype == "F16":
        half: _Floats = odd.view(np.float32).astype(np.float16).view(np.uint16)
        return half
    nearest: _Floats = (odd + 0x7FFF + (odd >> 16 & 1) >> 16).astype(np.uint16)
    return nearest
