"""The zip archives that ``torch.save`` writes: stored entries, checked from end to end.

Python's zipfile is more lenient than a strict reader may be: it skips leading and trailing bytes, keeps the last of two
equal names, and does not hold local headers against the directory. Here whatever two readers could take for two
different archives is refused. Nothing is unpacked, and what entries hold is nobody's business in this room.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from surgery.errors import FormatError, UnsafeError

Read = Callable[[int, int], bytes]
"""``read(offset, length)`` gives those bytes of the file."""

DIRECTORY_LIMIT = 100_000_000
"""Largest zip directory, in bytes."""
ENTRY_LIMIT = 500_000
"""Most zip entries: one a storage, and as many as a safetensors file may hold tensors."""

SANDBOX = "convert it in a sandbox to safetensors"
INCOMPLETE = "fetch it again, the download is incomplete"

_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_WIDE_END = struct.Struct("<4sQHHIIQQQQ")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_STREAMED, _UTF8 = 0x0008, 0x0800
_FOLDER = 0x10
"""An attribute with which torch takes an entry for a folder, and leaves its tensor uninitialised."""
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF

Span = tuple[int, int, int]
"""First byte, end, and checksum of an entry's data."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    flags: int
    method: int
    crc: int
    stored: int
    size: int
    offset: int


def exactly(read: Read, offset: int, length: int) -> bytes:
    """Read ``length`` bytes, and refuse fewer."""
    data = read(offset, length)
    if len(data) != length:
        raise FormatError(f"the file ends within the {length:,} bytes at {offset:,}", mend=INCOMPLETE)
    return data


def check_kind(head: bytes) -> None:
    """Refuse files that are no zip archive, by what their first bytes say they are."""
    if head.startswith(b"PK\x03\x04"):
        return
    if head[257:262] == b"ustar":
        raise UnsafeError("a tar archive, which torch wrote before 2018, holds pickles that must be run", mend=SANDBOX)
    if head[:1] == b"\x80" and head[1:2] in b"\0\1\2\3\4\5":
        raise UnsafeError("a bare pickle, torch's legacy format, and not a zip checkpoint", mend=SANDBOX)
    if not head:
        raise FormatError("the file is empty", mend=INCOMPLETE)
    raise FormatError(f"not a zip checkpoint as torch.save writes: it starts with {head[:8]!r}")


def read_archive(read: Read, size: int) -> dict[str, Span]:
    """Check an archive from end to end, and find every entry's data.

    Args:
        read: gives ``length`` bytes of the file from ``offset``.
        size: the size of the whole file, in bytes.

    Returns:
        Each entry's name in lower case, which is how torch looks names up → first byte, end, and checksum of its data.

    Raises:
        FormatError: malformed, compressed, ambiguous, or incomplete.
        UnsafeError: a TorchScript archive.
    """
    start, length, count = _directory(read, size)
    named: dict[str, _Entry] = {}
    for entry in _central(exactly(read, start, length), count):
        try:
            name = entry.name.decode("utf-8").lower()
        except UnicodeDecodeError:
            raise FormatError(f"the zip name {entry.name[:80]!r} is not UTF-8") from None
        if name in named:
            raise FormatError(f"the zip name {name!r:.80} stands twice")
        named[name] = entry
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in named):
        raise UnsafeError("a TorchScript archive, which holds code and not a state dict", mend=SANDBOX)
    spans, end = {}, 0
    for name, entry in sorted(named.items(), key=lambda pair: pair[1].offset):
        _check_stored(name, entry)
        if entry.offset != end:
            raise FormatError(f"the zip entry {name!r:.80} overlaps the one before it, or leaves a gap")
        low = _data_start(read, name, entry, start)
        if low + entry.size > start:
            raise FormatError(f"the zip entry {name!r:.80} reaches into the directory", mend=INCOMPLETE)
        spans[name] = (low, low + entry.size, entry.crc)
        end = low + entry.size + _descriptor_length(read, name, entry, low + entry.size)
    if end != start:
        raise FormatError("bytes before the zip directory belong to no entry")
    return spans


def _directory(read: Read, size: int) -> tuple[int, int, int]:
    """Find the directory: its start, length and number of entries."""
    tail = exactly(read, max(0, size - 98), min(size, 98)).rjust(98, b"\0")
    signature, disk, first, here, count, length, start, comment = _END.unpack(tail[-22:])
    if signature != b"PK\x05\x06" or comment:
        raise FormatError("the file does not end with a zip directory", mend=INCOMPLETE)
    end = size - 22
    if tail[56:60] == b"PK\x06\x07":
        _, wide_disk, wide_at, disks = _LOCATOR.unpack(tail[56:76])
        mark, record, _, _, *wide = _WIDE_END.unpack(tail[:56])
        narrow = (disk, first, here, count, length, start)
        full = (_FULL16, _FULL16, _FULL16, _FULL16, _FULL32, _FULL32)
        agree = all(small in (large, limit) for small, large, limit in zip(narrow, wide, full, strict=True))
        end = size - 98
        if (mark, record, wide_disk, wide_at, disks) != (b"PK\x06\x06", 44, 0, end, 1) or not agree:
            raise FormatError("the two end records of the zip archive disagree")
        disk, first, here, count, length, start = wide
    if disk or first or here != count or start + length != end:
        raise FormatError("the zip directory does not lie at the end of one file", mend=INCOMPLETE)
    if length > DIRECTORY_LIMIT or count > ENTRY_LIMIT:
        raise FormatError(f"a zip directory of {length:,} bytes and {count:,} entries exceeds the limits")
    return start, length, count


def _central(raw: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        if at + 46 > len(raw):
            raise FormatError("the zip directory is shorter than its entries")
        (signature, _, _, flags, method, _, _, crc, stored, size, named, extra, comment, disk, _, marks, offset) = (
            _CENTRAL.unpack_from(raw, at)
        )
        end = at + 46 + named + extra
        if signature != b"PK\x01\x02" or disk or end + comment > len(raw) or (marks & _FOLDER and size):
            raise FormatError(f"the zip directory is malformed at byte {at}")
        fields = _widened((size, stored, offset), raw[at + 46 + named : end])
        yield _Entry(raw[at + 46 : at + 46 + named], flags, method, crc, fields[1], fields[0], fields[2])
        at = end + comment
    if at != len(raw):
        raise FormatError("the zip directory is longer than its entries")


def _widened(fields: tuple[int, ...], extra: bytes) -> list[int]:
    """Replace the 32-bit fields that are full with those of the zip64 extra field, which holds them in order."""
    if _FULL32 not in fields:
        return list(fields)
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and at + 4 + length <= len(extra) and length >= 8 * fields.count(_FULL32):
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(wide) if value == _FULL32 else value for value in fields]
        at += 4 + length
    raise FormatError("a zip entry lacks its zip64 sizes")


def _check_stored(name: str, entry: _Entry) -> None:
    if entry.method:
        raise FormatError(
            f"the zip entry {name!r:.80} is compressed (method {entry.method}), torch.save only stores",
            mend="unpack it and zip it again without compression",
        )
    if entry.flags & ~(_STREAMED | _UTF8):
        raise FormatError(f"the zip entry {name!r:.80} has the flags {entry.flags:#06x}, as if encrypted")
    if entry.stored != entry.size:
        raise FormatError(f"the zip entry {name!r:.80} stores {entry.stored:,} bytes for {entry.size:,}")


def _data_start(read: Read, name: str, entry: _Entry, limit: int) -> int:
    """Hold the local header against the directory, and find where the data begins."""
    length = 30 + len(entry.name)
    if entry.offset + length > limit:
        raise FormatError(f"the zip entry {name!r:.80} lies outside the file", mend=INCOMPLETE)
    raw = exactly(read, entry.offset, length)
    signature, _, flags, method, _, _, crc, stored, size, named, extra = _LOCAL.unpack(raw[:30])
    local: list[int] = [size, stored]
    if _FULL32 in local and entry.offset + length + extra <= limit:
        local = _widened((size, stored), exactly(read, entry.offset + length, extra))
    # A streamed entry's sizes and checksum follow its data: its local header holds zeros.
    told = [crc, *local] == [entry.crc, entry.size, entry.size] or (flags & _STREAMED and not any([crc, *local]))
    same = (signature, flags, method, named) == (b"PK\x03\x04", entry.flags, entry.method, len(entry.name))
    if not (told and same and raw[30:] == entry.name):
        raise FormatError(f"the zip entry {name!r:.80} is described in two ways", mend="fetch it again, it is damaged")
    return entry.offset + length + int(extra)


def _descriptor_length(read: Read, name: str, entry: _Entry, at: int) -> int:
    """Check the sizes and checksum that follow a streamed entry's data."""
    if not entry.flags & _STREAMED:
        return 0
    wide = struct.pack("<4sIQQ", b"PK\x07\x08", entry.crc, entry.size, entry.size)
    raw = exactly(read, at, 24)  # the directory's end, at least 22 bytes, follows the last one
    if raw == wide:
        return 24
    if entry.size > _FULL32 or raw[:16] != wide[:12] + wide[16:20]:
        raise FormatError(f"the zip entry {name!r:.80} is described in two ways", mend="fetch it again, it is damaged")
    return 16
