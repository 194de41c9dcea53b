"""The safetensors container: a strict header reader, a deterministic header writer, and the shard index.

A file is ``N`` (8 bytes, little endian), ``N`` bytes of JSON, then the tensors' bytes. The JSON maps each name to
``{"dtype", "shape", "data_offsets"}``; ``__metadata__`` maps strings to strings.

This reader is stricter than the reference implementation where that one lets two readers disagree (duplicate keys,
unknown fields) and never more lenient. Its errors name the tensor; callers add the file.

Nothing here opens a file, and nothing here knows what a torch tensor is.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import FormatError, MismatchError, UnsafeError, UnsupportedError
from surgery.tensor import BITS, TensorSpec

HEADER_LIMIT = 100_000_000
"""Largest header in bytes: the reference implementation's own limit."""
TENSOR_LIMIT = 500_000
"""Most tensors in one file. The largest published checkpoints hold about 200,000 a model, over many files."""
DIMENSION_LIMIT = 32
NAME_LIMIT = 1024
"""Longest tensor name, in UTF-8 bytes."""
SIZE_LIMIT = 2**63 - 1
ALIGNMENT = 8
"""The header is padded with spaces so that tensors start at a multiple of this."""
METADATA_KEY = "__metadata__"


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: where each tensor lies, counted from the start of the file."""

    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    metadata: dict[str, str] = field(default_factory=dict)


def header_length(prefix: bytes, file_size: int) -> int:
    """Read the header's length from a file's first 8 bytes, and check that such a header fits the file.

    Args:
        prefix: the first 8 bytes (fewer where the file is shorter).
        file_size: the size of the whole file, in bytes.

    Raises:
        FormatError: too short, too long, or not a safetensors file at all.
    """
    if len(prefix) < 8:
        raise FormatError(
            f"a safetensors file starts with 8 bytes of header length, this one has {file_size}",
            mend="fetch it again, the download is incomplete",
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > HEADER_LIMIT:
        raise FormatError(f"header length {length:,} exceeds the limit of {HEADER_LIMIT:,} bytes{_hint(prefix)}")
    if 8 + length > file_size:
        raise FormatError(
            f"header needs {8 + length:,} bytes, the file has {file_size:,}{_hint(prefix)}",
            mend="fetch it again, the download is incomplete",
        )
    return int(length)


_KINDS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes"), (b"GGUF", "a GGUF file"), (b"\x89HDF", "an HDF5 file"),
    (b"version ", "a Git LFS pointer, not the file itself"), (b"\x80", "a pickle"),
)  # fmt: skip


def _hint(start: bytes) -> str:
    """Say what a file that is no safetensors file looks like. Never asked of one that could be."""
    return next((f": it looks like {kind}" for magic, kind in _KINDS if start.startswith(magic)), "")


def parse_header(raw: bytes, file_size: int) -> Header:
    """Parse and check a header.

    Rules: strict UTF-8 JSON without duplicate keys, floats or constants; known dtypes; shapes whose size equals
    the byte range; ranges that are contiguous, do not overlap and cover the file to its last byte.

    Args:
        raw: the header's JSON bytes, without the 8-byte length.
        file_size: the size of the whole file, in bytes.

    Raises:
        FormatError: a rule is broken.
        UnsupportedError: a dtype that safetensors does not define.
    """
    with without_collector():  # a hundred thousand new objects would set it off again and again
        return _parse_header(raw, file_size)


@contextmanager
def without_collector() -> Iterator[None]:
    """Suspend the search for cycles while many objects without any are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse_header(raw: bytes, file_size: int) -> Header:
    document = _strict_json(raw)
    if isinstance(document, _Repeated):
        raise FormatError("the name stands twice in the header", tensor=document.key)
    if type(document) is not dict:
        raise FormatError("the header is not a JSON object")
    metadata = _metadata(document.pop(METADATA_KEY, None))
    if len(document) > TENSOR_LIMIT:
        raise FormatError(f"{len(document):,} tensors in one file exceed the limit of {TENSOR_LIMIT:,}")
    start = 8 + len(raw)
    specs: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in document.items():
        spec, low, high = _entry(name, entry)
        specs[name] = spec
        spans.append((low, high, name))
    _check_coverage(spans, file_size - start)
    return Header(specs, {name: start + low for low, _, name in spans}, metadata)


class _NotASize:
    """A number that no size can be: refused where the tensor it stands in is known."""

    def __init__(self, text: str) -> None:
        self._text = text if len(text) <= 20 else f"{text[:20]}…"

    def __repr__(self) -> str:
        return self._text


class _Repeated(dict[str, Any]):
    """An object in which a key stands twice."""

    key = ""


_DIGITS = bytes.maketrans(b"0123456789", b"0" * 10)


def _strict_json(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"the header is not UTF-8 at byte {8 + error.start}") from None
    if not text.startswith("{"):
        raise FormatError("the header does not start with '{'" + _hint(raw))
    # Python's own conversion is fast; only signs and long numbers need a second look.
    integer = _integer if b"-" in raw or b"0" * 20 in raw.translate(_DIGITS) else None
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_float=_NotASize, parse_constant=_NotASize, parse_int=integer
        )
    except json.JSONDecodeError as error:
        raise FormatError(f"the header is not JSON: {error.msg} at byte {8 + error.pos}") from None
    except RecursionError:
        raise FormatError("the header nests too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    repeated = _Repeated(result)
    repeated.key = _first_repeated(pairs)
    return repeated


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError


def _integer(text: str) -> Any:
    return _NotASize(text) if text.startswith("-") or len(text) > 20 else int(text)


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if type(value) is not dict or not all(type(item) is str for item in value.values()):
        raise FormatError("__metadata__ is not a mapping of strings to strings")
    try:
        "".join(itertools.chain(*value.items())).encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError("__metadata__ holds text that is not valid Unicode") from None
    return value


def check_name(name: str) -> None:
    """Refuse names that no reader could hold: empty, with NUL, unencodable, reserved, or over-long."""
    try:
        length = len(name) if name.isascii() else len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise FormatError("the tensor's name is not valid Unicode", tensor=name[:80]) from None
    if not name or "\0" in name or length > NAME_LIMIT:
        raise FormatError(
            f"a tensor's name must have 1 to {NAME_LIMIT} bytes and no NUL, this one has {length}", tensor=name[:80]
        )
    if name == METADATA_KEY:
        raise MismatchError(
            "a tensor of that name could be written but never read back", tensor=name, mend="--rename it"
        )


def _entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    check_name(name)
    if isinstance(entry, _Repeated):
        raise FormatError(f"its header entry has the field {entry.key!r} twice", tensor=name)
    if type(entry) is not dict:
        raise FormatError("its header entry is not an object", tensor=name)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        missing = {"dtype", "shape", "data_offsets"} - entry.keys()
        extra = entry.keys() - {"dtype", "shape", "data_offsets"}
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"has the unknown field {min(extra)!r}"
        raise FormatError(f"its header entry {what}", tensor=name)
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str:
        raise FormatError("its dtype is not a string", tensor=name)
    if dtype not in BITS:
        raise UnsupportedError(f"unknown dtype {dtype!r}; known are {', '.join(BITS)}", tensor=name)
    if not _are_sizes(shape):
        raise FormatError(f"shape {shape!r:.60} is not a list of sizes", tensor=name)
    if len(shape) > DIMENSION_LIMIT:
        raise FormatError(f"{len(shape)} dimensions exceed the limit of {DIMENSION_LIMIT}", tensor=name)
    if not _are_sizes(span, math.inf) or len(span) != 2:
        raise FormatError(f"data_offsets {span!r:.60} are not two offsets", tensor=name)
    low, high = span
    bits = math.prod(shape) * BITS[dtype]
    if (bits or math.prod(filter(None, shape)) * BITS[dtype]) > 8 * SIZE_LIMIT:
        raise FormatError(f"shape {shape} overflows", tensor=name)
    if bits % 8:
        raise FormatError(f"{dtype}{shape} does not fill whole bytes", tensor=name)
    if high < low or high - low != bits // 8:
        raise FormatError(
            f"{dtype}{shape} needs {bits // 8:,} bytes, data_offsets [{low}, {high}] give {high - low:,}", tensor=name
        )
    return TensorSpec(name, dtype, tuple(shape)), low, high


def _are_sizes(values: Any, limit: float = SIZE_LIMIT) -> bool:
    if type(values) is not list:
        return False
    for value in values:  # noqa: SIM110  a generator for each of 200,000 lists would double the time
        if type(value) is not int or not 0 <= value <= limit:
            return False
    return True


def _check_coverage(spans: list[tuple[int, int, str]], available: int) -> None:
    end, before = 0, ""
    for low, high, name in sorted(spans):
        if low < end:
            raise FormatError(f"its bytes [{low}, {high}) overlap those of {before!r}", tensor=name)
        if low > end:
            raise FormatError(f"{low - end:,} bytes before it belong to no tensor", tensor=name)
        if high > available:
            raise FormatError(
                f"its bytes end at {high:,}, the file's at {available:,}",
                tensor=name,
                mend="fetch it again, the download is incomplete",
            )
        end, before = high, name
    if end != available:
        raise FormatError(f"{available - end:,} bytes after the last tensor belong to none")


def build_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Lay out a file: the same specs and metadata give the same bytes on every run.

    Tensors lie in the order given, without gaps; metadata keys are sorted; the JSON is padded with spaces to a
    multiple of 8 bytes.

    Returns:
        The file's bytes up to the first tensor, and each tensor's offset from the start of the file.
    """
    document: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))}
    position, starts = 0, {}
    for spec in specs:
        check_name(spec.name)
        starts[spec.name] = position
        document[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % ALIGNMENT)
    if len(raw) > HEADER_LIMIT:
        raise MismatchError(
            f"a header of {len(raw):,} bytes exceeds the limit of {HEADER_LIMIT:,}", mend="write smaller shards"
        )
    prefix = struct.pack("<Q", len(raw)) + raw
    return prefix, {name: len(prefix) + start for name, start in starts.items()}


def parse_index(raw: bytes) -> dict[str, str]:
    """Parse ``*.index.json`` into tensor name → shard file name.

    Raises:
        FormatError: not JSON, no ``weight_map``, an empty one, or values that are not file names.
        UnsafeError: a shard outside the index's own folder.
    """
    document = strict_object(raw)
    weight_map = document.get("weight_map")
    if isinstance(weight_map, _Repeated):
        raise FormatError("stands twice in the weight_map", tensor=weight_map.key)
    if type(weight_map) is not dict or not weight_map:
        raise FormatError("the index has no weight_map that maps tensors to files")
    for name, shard in weight_map.items():
        if type(shard) is not str or not shard:
            raise FormatError(f"weight_map gives {shard!r:.60} for a file name", tensor=name)
        if "/" in shard or "\\" in shard or shard in (".", "..") or "\0" in shard or shard[1:2] == ":":
            raise UnsafeError(
                f"weight_map points to {shard!r}, outside the index's folder",
                tensor=name,
                mend="shards lie beside their index",
            )
    return weight_map


def strict_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys and anything that is not UTF-8 or not an object."""
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"not JSON: {error.msg} at line {error.lineno}") from None
    except ValueError:  # Python's own limit of 4,300 digits
        raise FormatError("holds a number of thousands of digits") from None
    except RecursionError:
        raise FormatError("nests too deeply") from None
    if not isinstance(document, dict):
        raise FormatError("not a JSON object")
    if isinstance(document, _Repeated):
        raise FormatError(f"the key {document.key!r} stands twice")
    return document


def encode_document(document: Mapping[str, Any]) -> bytes:
    """Write a JSON object for people. Lone surrogates, which JSON has and UTF-8 has not, become escapes again.

    >>> print(encode_document({"name": "é"}).decode())
    {
      "name": "é"
    }
    <BLANKLINE>
    """
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def build_index(shards: Mapping[str, Iterable[TensorSpec]]) -> bytes:
    """Write ``*.index.json``: the total size in bytes, and every tensor's shard, sorted by name."""
    specs = [(spec, shard) for shard, members in shards.items() for spec in members]
    document = {
        "metadata": {"total_size": sum(spec.nbytes for spec, _ in specs)},
        "weight_map": {spec.name: shard for spec, shard in sorted(specs, key=lambda pair: pair[0].name)},
    }
    return encode_document(document)


def shard_names(stem: str, count: int) -> list[str]:
    """Name shards as the field does.

    >>> shard_names("model", 1), shard_names("model", 2)[0]
    (['model.safetensors'], 'model-00001-of-00002.safetensors')
    """
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
