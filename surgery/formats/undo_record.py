"""The undo record of one weight: what takes it from its merged bits back to the bits that it had. NumPy alone.

Whoever has the merged weight ``W'`` and what was added to it can *predict* the old one, ``round(W' − Σ c·Δ)``, and is right
but where the exponent grew: there the sum was rounded more coarsely than the old weight. The record lists those
elements, with the integer that leads from the predicted pattern to the right one. Elements whose prediction another
order of summation might change are listed apart, and led to from the merged pattern, which is certain.

A record is ``U8``: the length of its head (4 bytes, little endian), the XXH3-64 of the head, the head (JSON), and the parts.
Every part has a digest of its own, so that any part can be read and trusted alone. docs/undo-format.md tells all of it.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from surgery.errors import FormatError, SurgeryError, VerificationError
from surgery.formats import delta_codec
from surgery.formats.delta_codec import CODINGS, RAW, Block
from surgery.formats.safetensors import strict_object

SAME, LISTED, CODED = "same", "listed", "coded"
"""What a part can be: as predicted · as predicted but for the elements listed · coded against the merged bits."""
LISTED_SHARE = 1 / 4
"""Where more elements than this are not as predicted, coding against the merged bits is tried, too."""
_HEAD_LIMIT = 100_000_000
_PREFIX = struct.Struct("<I8s")

Bits = NDArray[Any]
"""Patterns: unsigned integers as wide as an element."""


@dataclass(frozen=True, slots=True)
class Part:
    """The elements ``[start, stop)`` of a weight, and how they are restored."""

    start: int
    stop: int
    coding: str
    size: int
    digest: str
    """XXH3-64 of its bytes, in hexadecimal digits."""

    @classmethod
    def of(cls, start: int, stop: int, coding: str, data: bytes) -> Part:
        """Describe a part's bytes."""
        return cls(start, stop, coding, len(data), xxhash.xxh3_64_hexdigest(data))


@dataclass(frozen=True, slots=True)
class Undo:
    """All of a record but the parts' bytes."""

    before: str
    """Fingerprint of the weight before the merge."""
    after: str
    """And of the merged one."""
    parts: tuple[Part, ...]
    offset: int = 0
    """Where in the record the parts begin."""

    @property
    def predicted(self) -> bool:
        """Whether what was added must be known to go back."""
        return any(part.coding != CODED for part in self.parts)


def build_head(undo: Undo) -> bytes:
    """Write a record up to its parts."""
    parts = [[part.start, part.stop, part.coding, part.size, part.digest] for part in undo.parts]
    head = json.dumps({"before": undo.before, "after": undo.after, "parts": parts}, separators=(",", ":")).encode()
    return _PREFIX.pack(len(head), xxhash.xxh3_64_digest(head)) + head


def head_length(start: bytes, size: int) -> int:
    """Return where a record's head ends, from its first 12 bytes.

    Raises:
        FormatError: the record is shorter than that.
    """
    if len(start) < _PREFIX.size:
        raise FormatError("the undo record is too short")
    length = _PREFIX.size + int(_PREFIX.unpack(start[: _PREFIX.size])[0])
    if length > min(size, _HEAD_LIMIT):
        raise FormatError(f"the undo record's head claims {length:,} bytes of {size:,}")
    return length


def parse_head(data: bytes, size: int, numel: int | None = None) -> Undo:
    """Read a record's head.

    Args:
        data: the record up to its parts.
        size: bytes of the whole record.
        numel: elements of the weight, where they are known.

    Raises:
        VerificationError: it was changed.
        FormatError: it is malformed, or its parts do not make up the weight.
    """
    _, digest = _PREFIX.unpack(data[: _PREFIX.size])
    head = data[_PREFIX.size :]
    if xxhash.xxh3_64_digest(head) != digest:
        raise VerificationError("the head of its undo record was changed", mend="fetch the output again")
    document = strict_object(head)
    before, after, found = document.get("before"), document.get("after"), document.get("parts")
    if not isinstance(before, str) or not isinstance(after, str) or not isinstance(found, list):
        raise FormatError("the undo record's head is malformed")
    parts = tuple(_part(item) for item in found)
    stops = [part.stop for part in parts]
    if [part.start for part in parts] != [0, *stops][:-1] or numel not in (None, stops[-1] if stops else 0):
        raise FormatError("the undo record's parts do not make up the weight")
    if len(data) + sum(part.size for part in parts) != size:
        raise FormatError("the undo record has another length than its head says")
    return Undo(before, after, parts, len(data))


def _part(item: Any) -> Part:
    if not isinstance(item, list) or len(item) != 5:
        raise FormatError("a part of the undo record is malformed")
    start, stop, coding, size, digest = item
    numbers = all(type(number) is int and 0 <= number < 1 << 60 for number in (start, stop, size))
    if not numbers or start >= stop or coding not in (SAME, LISTED, CODED) or not isinstance(digest, str):
        raise FormatError("a part of the undo record is malformed")
    return Part(start, stop, coding, size, digest)


def check_part(part: Part, data: bytes) -> None:
    """Hold a part's bytes against its digest.

    Raises:
        VerificationError: they were changed.
    """
    if xxhash.xxh3_64_hexdigest(data) != part.digest:
        raise VerificationError("a part of its undo record was changed", mend="fetch the output again")


@dataclass(frozen=True, slots=True)
class Missed:
    """Elements that are not surely as predicted: places, ascending, and patterns there."""

    places: NDArray[np.int64]
    known: Bits
    """What they are to be."""
    low: Bits
    """The smallest and …"""
    high: Bits
    """… the largest prediction that any order of summation can give."""
    merged: Bits


def encode(missed: Missed, known: Bits, merged: Bits, dtype: str) -> tuple[str, bytes]:
    """Code a part whose old bits can be predicted.

    Args:
        missed: where the prediction fails.
        known: all old patterns.
        merged: all merged patterns.
        dtype: the weight's.

    Returns:
        The coding and the bytes.
    """
    if not missed.places.size:
        return SAME, b""
    open_ = missed.low != missed.high
    sure = ~open_
    listed = _pack(missed.places[open_], missed.known[open_] - missed.merged[open_])
    listed += _pack(missed.places[sure], missed.known[sure] - missed.low[sure])
    if missed.places.size <= LISTED_SHARE * known.size:
        return LISTED, listed
    coded = encode_against(known, merged, dtype)
    return (LISTED, listed) if len(listed) <= len(coded) else (CODED, coded)


def encode_against(known: Bits, merged: Bits, dtype: str) -> bytes:
    """Code old patterns against merged ones, where nothing predicts them."""
    coding, data = delta_codec.encode(Block(dtype, known.tobytes()), Block(dtype, merged.tobytes()))
    return bytes([CODINGS.index(coding)]) + data


def correct(data: bytes, predicted: Bits, merged: Bits) -> None:
    """Put right what a ``listed`` part lists.

    Args:
        data: the part's bytes.
        predicted: the predictions; overwritten with the old patterns.
        merged: the merged patterns.

    Raises:
        FormatError: the bytes are not such a part.
    """
    places, steps, end = _unpack(data, 0, predicted)
    restored = merged[places] + steps
    others, moves, end = _unpack(data, end, predicted)
    if end != len(data):
        raise FormatError("a part of the undo record is longer than what it holds")
    predicted[others] += moves
    predicted[places] = restored


def decode_against(data: bytes, merged: Bits, dtype: str) -> Bits:
    """Restore old patterns from merged ones.

    Raises:
        FormatError: the bytes are not such a part.
    """
    if not data or data[0] >= len(CODINGS):
        raise FormatError("a part of the undo record is of no known coding")
    coding = CODINGS[data[0]]
    if coding == RAW:
        found = delta_codec.decode_raw(data[1:], dtype, merged.nbytes)
    else:
        found = delta_codec.decode(coding, data[1:], Block(dtype, merged.tobytes()))
    return np.frombuffer(found, merged.dtype)


def _pack(places: NDArray[np.int64], steps: Bits) -> bytes:
    """Write places as gaps and steps as zigzag numbers, each as byte planes under zstd."""
    gaps = (np.diff(places, prepend=-1) - 1).astype("<u4")
    signed = steps.view(f"<i{steps.itemsize}")
    codes = ((signed << 1) ^ (signed >> (8 * steps.itemsize - 1))).view(steps.dtype)
    planes = [delta_codec.encode(Block(f"U{8 * each.itemsize}", each.tobytes()), None)[1] for each in (gaps, codes)]
    return struct.pack("<III", len(places), *map(len, planes)) + b"".join(planes)


def _unpack(data: bytes, start: int, like: Bits) -> tuple[NDArray[np.int64], Bits, int]:
    if len(data) < start + 12:
        raise FormatError("a part of the undo record ends too early")
    count, *sizes = struct.unpack_from("<III", data, start)
    start += 12
    if count > like.size or len(data) < start + sum(sizes):
        raise FormatError("a part of the undo record lists more than it can hold")
    middle, end = start + sizes[0], start + sum(sizes)
    try:
        gaps = np.frombuffer(delta_codec.decode_raw(data[start:middle], "U32", 4 * count), "<u4")
        size = like.itemsize
        codes = np.frombuffer(delta_codec.decode_raw(data[middle:end], f"U{8 * size}", size * count), f"<u{size}")
    except SurgeryError as error:
        raise FormatError(f"a part of the undo record is damaged: {error.what}") from None
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if count and places[-1] >= like.size:
        raise FormatError(f"a part of the undo record names element {places[-1]:,} of {like.size:,}")
    return places, (codes >> 1) ^ (~(codes & 1) + 1), end
