"""Coding of exact differences: the bits of a fine-tune's block, given the base's, in few bytes. NumPy alone.

A bit pattern becomes an integer in the order of the values (for floats the sign-magnitude pattern, folded), so that the
difference of two of them counts the representable values in between: *units in the last place*. Differences wrap round,
so every pair of patterns has one, NaN payloads and −0 included. Small ones of either sign become small unsigned numbers
(zigzag), their bytes are put into planes, and each plane is compressed with zstd.

How large a difference is in units depends on the weight's exponent, because ΔW hardly depends on W. The base's exponents are
known to whoever decodes: differences are stably sorted by them, which brings like to like and costs nothing. They are sorted
in runs of 2¹⁸ elements, whose order stays in the processor's caches, and compressed with a window of 16 KiB, because zstd makes
one Huffman code for at most a window: what lies in it has much the same exponent.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from surgery.errors import FormatError
from surgery.tensor import BITS

SAME, SPARSE, SORTED, PLAIN, RAW = "same", "sparse", "sorted", "plain", "raw"
CODINGS = (SAME, SPARSE, SORTED, PLAIN, RAW)
"""What a block can be: the base's · differences at positions · all differences, sorted · unsorted · without the base."""

RUN = 1 << 18
"""Elements that are sorted together."""
LEVEL = 1
"""Of zstd, for bits as they are."""
CODES = zstandard.ZstdCompressionParameters(
    window_log=14, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0, strategy=zstandard.STRATEGY_FAST,
    write_content_size=True,
)  # fmt: skip
"""Of zstd, for codes: they have no repetitions but runs of zeros, and looking for others costs time and bytes."""
SPARSE_SHARE = 1 / 8
"""Where more elements than this differ, positions are not tried."""
POSITIONS_WORTH = 64
"""Bytes a block that positions may cost more than what is sorted: without the base they are undone, and joined to others."""

_Bits = NDArray[Any]

_EXPONENT = {
    "F64": (52, 0x7FF), "F32": (23, 0xFF), "C64": (23, 0xFF), "BF16": (7, 0xFF), "F16": (10, 0x1F),
    "F8_E4M3": (3, 0x0F), "F8_E4M3FNUZ": (3, 0x0F), "F8_E5M2": (2, 0x1F), "F8_E5M2FNUZ": (2, 0x1F),
}  # fmt: skip
"""Where the exponent stands in a bit pattern: shift, and mask after it. Dtypes that are not here are not floats to us."""


def width(dtype: str) -> int:
    """Bytes of the numbers that a dtype is coded as: its own, 4 for complex pairs, 1 for elements below a byte."""
    return 4 if dtype == "C64" else max(BITS[dtype] // 8, 1)


def block_elements(dtype: str) -> int:
    """Elements in a block: 2²⁰, or as many more as fill whole mebibytes where an element is less than a byte."""
    return {4: 1 << 21, 6: 1 << 22}.get(BITS[dtype], 1 << 20)


class Block:
    """One block of a tensor that both sides know, with what coding against it needs, found once."""

    def __init__(self, dtype: str, data: memoryview | bytes | bytearray) -> None:
        self.dtype = dtype
        self.bits: _Bits = np.frombuffer(data, f"<u{width(dtype)}")
        self.values = _ordered(self.bits, dtype)
        self._order: list[NDArray[np.intp]] | None = None

    @property
    def sortable(self) -> bool:
        """Whether the dtype has exponents."""
        return self.dtype in _EXPONENT

    def keys(self) -> _Bits:
        """Return the exponents."""
        shift, mask = _EXPONENT[self.dtype]
        keys: _Bits = (self.bits >> shift).astype(np.uint8 if mask <= 0xFF else np.uint16)
        if mask != 0xFF:
            keys &= keys.dtype.type(mask)
        return keys

    def order(self) -> list[NDArray[np.intp]]:
        """Return the stable order by exponent, run by run."""
        if self._order is None:
            self._order = _order(self.keys())
        return self._order


def encode(tuned: Block, known: Block | None, *, reversible: bool = False) -> tuple[str, bytes]:
    """Code a block in the cheapest way.

    Args:
        tuned: what is to be restored.
        known: the base's block, of the same dtype and size; ``None`` where the base has none.
        reversible: store what restoring ``known`` from ``tuned`` needs, too.

    Returns:
        The coding's name and the bytes.

    >>> base, tuned = (Block("F32", np.float32(values).tobytes()) for values in ([1, 2, 3, -0.0], [1, 2, 3, 0.0]))
    >>> coding, data = encode(tuned, base)
    >>> np.frombuffer(decode(coding, data, base), np.float32).tolist()
    [1.0, 2.0, 3.0, 0.0]
    """
    reuse_freed_memory()
    if known is None:
        return RAW, _planes(tuned.bits, compress)
    codes = _zigzag(tuned.values - known.values)
    changed = int(np.count_nonzero(codes))
    if not changed:
        return SAME, b""
    tries = []
    if changed <= SPARSE_SHARE * codes.size or codes.size < 64:
        tries.append((SPARSE, _sparse(codes)))
    if known.sortable:
        keys = _sparse(tuned.keys() - known.keys()) if reversible else b""
        tries.append((SORTED, _section(keys) + _planes(_gather(codes, known.order()))))
    else:
        tries.append((PLAIN, _planes(codes)))
    if not reversible and 2 * int(np.count_nonzero(codes >> 8 * (codes.itemsize - 1))) > codes.size:
        tries.append((RAW, _planes(tuned.bits, compress)))  # most differ by far: perhaps the base says nothing
    return min(tries, key=lambda found: len(found[1]) - POSITIONS_WORTH * (found[0] == SPARSE))


def decode(coding: str, data: bytes, known: Block, *, reverse: bool = False) -> memoryview:
    """Restore a block's bytes.

    Args:
        coding: as :func:`encode` named it; not ``raw``, which :func:`decode_raw` takes.
        data: its bytes.
        known: the base's block; with ``reverse`` the fine-tune's, and the base's is restored.
        reverse: go back.

    Raises:
        FormatError: the bytes are not such a coding.
    """
    reuse_freed_memory()
    if coding == SAME:
        return _bytes(known.bits)
    if coding != SORTED:
        codes = _unsorted(coding, data, known.bits)
    else:
        reader = _Reader(data)
        steps_of_keys = _Reader(reader.section())
        if reverse:
            keys = known.keys()
            order = _order(keys - steps_of_keys.sparse(keys))
        else:
            order = known.order()
        codes = _scatter(reader.planes(known.bits.dtype, known.bits.size), order)
        reader.end()
    steps = _unzigzag(codes)
    return _bytes(_ordered(known.values - steps if reverse else known.values + steps, known.dtype))


def decode_raw(data: bytes, dtype: str, nbytes: int) -> memoryview:
    """Restore a block that was coded without a base."""
    reader, size = _Reader(data), width(dtype)
    bits = reader.planes(np.dtype(f"<u{size}"), nbytes // size)
    reader.end()
    return _bytes(bits)


def combine(first: tuple[str, bytes], second: tuple[str, bytes], dtype: str, nbytes: int) -> tuple[str, bytes] | None:
    """Make one coded block of two, of which the second goes on from what the first restores; the base is not known.

    Args:
        first: coding and bytes of the step from the base.
        second: coding and bytes of the step after it.
        dtype: of the tensor.
        nbytes: bytes of the block, restored.

    Returns:
        Coding and bytes, or ``None`` where it takes the base's exponents.
    """
    if second[0] in (SAME, RAW) or first[0] == SAME:
        return first if second[0] == SAME else second
    size = width(dtype)
    if first[0] == RAW:
        known = Block(dtype, decode_raw(first[1], dtype, nbytes))
        return RAW, _planes(Block(dtype, decode(*second, known)).bits, compress)
    if SORTED in (first[0], second[0]):
        return None
    like = np.zeros(nbytes // size, f"<u{size}")
    codes = _zigzag(_unzigzag(_unsorted(*first, like)) + _unzigzag(_unsorted(*second, like)))
    if not codes.any():
        return SAME, b""
    return min((SPARSE, _sparse(codes)), (PLAIN, _planes(codes)), key=lambda found: len(found[1]))


def _unsorted(coding: str, data: bytes, like: _Bits) -> _Bits:
    """Take apart a block whose codes lie in the order of the elements."""
    reader = _Reader(data)
    codes = reader.sparse(like) if coding == SPARSE else reader.planes(like.dtype, like.size)
    reader.end()
    return codes


def pack_numbers(values: _Bits) -> bytes:
    """Write unsigned numbers as planes, those of either sign made small first."""
    return _planes(_zigzag(values))


def unpack_numbers(data: bytes, dtype: str, count: int) -> _Bits:
    """Read what :func:`pack_numbers` wrote.

    Raises:
        FormatError: it is something else.
    """
    reader = _Reader(data)
    codes = reader.planes(np.dtype(dtype), count)
    reader.end()
    return _unzigzag(codes)


@functools.cache
def reuse_freed_memory() -> None:
    """Have the C library keep what is freed for what is allocated next.

    A block takes some twenty temporaries of a few megabytes. The GNU C library maps each anew, and touching its pages
    costs as much as all the coding, until it has once seen a larger one freed: up to that size (32 MB at most) it then
    takes memory from its heap, and gives none back before twice as much lies idle. This frees one, never touched.
    """
    bytearray(31 << 20)


def compress(data: bytes | memoryview) -> bytes:
    """Compress bytes into one zstd frame that says how long they were."""
    return _compressor().compress(data)


def decompress(data: bytes, limit: int) -> bytes:
    """Undo :func:`compress`.

    Raises:
        FormatError: not a zstd frame, or of more than ``limit`` bytes.
    """
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= limit:
            raise FormatError(f"a compressed part says that it holds {size:,} bytes, {limit:,} may be there")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"a compressed part is damaged: {error}") from None


def _compress_codes(data: bytes | memoryview) -> bytes:
    return _compressor("codes").compress(data)


_local = threading.local()


def _compressor(kind: str = "bits") -> zstandard.ZstdCompressor:
    """Return this thread's compressor: they are not for sharing."""
    held: zstandard.ZstdCompressor | None = getattr(_local, kind, None)
    if held is None:
        codes = zstandard.ZstdCompressor(compression_params=CODES)
        held = codes if kind == "codes" else zstandard.ZstdCompressor(level=LEVEL)
        setattr(_local, kind, held)
    return held


def _order(keys: _Bits) -> list[NDArray[np.intp]]:
    """Sort keys stably, run by run; a radix sort for numbers this short."""
    return [np.argsort(keys[start : start + RUN], kind="stable") for start in range(0, keys.size, RUN)]


def _gather(values: _Bits, order: list[NDArray[np.intp]]) -> _Bits:
    out = np.empty_like(values)
    for number, run in enumerate(order):
        part = slice(number * RUN, number * RUN + len(run))
        out[part] = values[part].take(run)
    return out


def _scatter(values: _Bits, order: list[NDArray[np.intp]]) -> _Bits:
    """Undo :func:`_gather`."""
    out = np.empty_like(values)
    for number, run in enumerate(order):
        part = slice(number * RUN, number * RUN + len(run))
        out[part][run] = values[part]
    return out


def _bytes(bits: _Bits) -> memoryview:
    return np.ascontiguousarray(bits).view(np.uint8).data


def _ordered(bits: _Bits, dtype: str) -> _Bits:
    """Turn float patterns into integers in the order of their values (modulo 2ⁿ), or back: it is its own inverse."""
    if dtype not in _EXPONENT:
        return bits
    signed = bits.view(f"<i{bits.itemsize}")
    last = 8 * bits.itemsize - 1
    folded = signed >> last
    folded &= folded.dtype.type((1 << last) - 1)
    folded ^= signed
    return folded.view(bits.dtype)


def _zigzag(steps: _Bits) -> _Bits:
    signed = steps.view(f"<i{steps.itemsize}")
    codes = signed >> (8 * steps.itemsize - 1)
    codes ^= signed << 1
    return codes.view(steps.dtype)


def _unzigzag(codes: _Bits) -> _Bits:
    steps = ~(codes & 1)
    steps += steps.dtype.type(1)
    steps ^= codes >> 1
    return steps


def _section(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def _planes(numbers: _Bits, shrink: Callable[[bytes | memoryview], bytes] = _compress_codes) -> bytes:
    """Compress the lowest bytes of all numbers, then the next: one section each, empty where all are zero."""
    sections = []
    for plane in range(numbers.itemsize):
        values = (numbers >> 8 * plane).astype(np.uint8)
        sections.append(_section(shrink(values.data) if values.any() else b""))
    return b"".join(sections)


def _sparse(codes: _Bits) -> bytes:
    """Store the numbers that are not zero, with the distances between them."""
    places = np.flatnonzero(codes)
    gaps = np.diff(places, prepend=-1).astype("<u4") - np.uint32(1)
    return struct.pack("<I", len(places)) + _planes(gaps) + _planes(codes[places])


class _Reader:
    """Takes a coded block apart."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def section(self) -> bytes:
        """Take a section."""
        return self._take(self._number())

    def planes(self, dtype: np.dtype[Any], count: int) -> _Bits:
        """Take as many sections as a number has bytes."""
        out = np.zeros(count, dtype)
        for plane in range(dtype.itemsize):
            data = self.section()
            if data:
                found = decompress(data, count)
                if len(found) != count:
                    raise FormatError(f"a plane holds {len(found):,} bytes where {count:,} belong")
                values = np.frombuffer(found, np.uint8)
                out |= values if not plane else values.astype(dtype) << dtype.type(8 * plane)
        return out

    def sparse(self, like: _Bits) -> _Bits:
        """Take numbers at positions; all others are zero."""
        if not self._data[self._place :]:
            raise FormatError("a coded block ends too early: it was not made to be reversible")
        count = self._number()
        if count > like.size:
            raise FormatError(f"a coded block names {count:,} of {like.size:,} elements")
        places = np.cumsum(self.planes(np.dtype("<u4"), count).astype(np.int64) + 1) - 1
        values = self.planes(like.dtype, count)
        if count and places[-1] >= like.size:
            raise FormatError(f"a coded block names element {places[-1]:,} of {like.size:,}")
        codes = np.zeros_like(like)
        codes[places] = values
        return codes

    def end(self) -> None:
        """Refuse what is left over."""
        if self._place != len(self._data):
            raise FormatError("a coded block is longer than what it holds")

    def _number(self) -> int:
        (number,) = struct.unpack("<I", self._take(4))
        return int(number)

    def _take(self, count: int) -> bytes:
        taken = self._data[self._place : self._place + count]
        if len(taken) != count:
            raise FormatError("a coded block ends too early")
        self._place += count
        return taken
