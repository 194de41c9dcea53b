"""Provenance: what made an output, and from what. Fingerprints of tensors, and the record ``surgery.json``.

A fingerprint is ``xxh3-128:<hex>`` over the dtype, the shape, and the XXH3-128 digests of the tensor's bytes in
blocks of 1 MiB. It depends on content alone: not on files, shards, containers or names. Blocks let it be computed
while streaming and by several threads at once. It finds mistakes, not attackers.

Records hold no time, no absolute path and not the output's own name, so that the same work gives the same bytes.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from surgery import __version__
from surgery.errors import FormatError, VerificationError
from surgery.tensor import BITS, LazyTensor, TensorSpec, Wrapper, byte_range, read_bytes

BLOCK_BYTES = 1 << 20
SCHEMA = "surgery.provenance/1"
RECORD = "surgery.json"
METADATA_KEY = "surgery"
ALGORITHM = "xxh3-128"
SEAL = "digest"
"""The record's own."""
PLACEHOLDER = f"{ALGORITHM}:{'0' * 32}"
"""As long as any fingerprint."""


def block_elements(spec: TensorSpec) -> int:
    """Elements in one fingerprint block."""
    return BLOCK_BYTES * 8 // BITS[spec.dtype]


class BlockDigests:
    """Collects the digests of one tensor's blocks, from any threads and in any order of whole blocks."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self._blocks: dict[int, bytes] = {}

    @property
    def count(self) -> int:
        """Blocks that make up the tensor."""
        return -(-self.spec.nbytes // BLOCK_BYTES)

    @property
    def complete(self) -> bool:
        """Whether every block is recorded."""
        return len(self._blocks) == self.count

    def stream(self, start: int) -> BlockStream:
        """Start feeding bytes at byte offset ``start``, a multiple of the block size."""
        return BlockStream(self, start)

    def add(self, index: int, digest: bytes) -> None:
        """Record one block."""
        self._blocks[index] = digest

    def fingerprint(self) -> str | None:
        """Return the fingerprint, or ``None`` while blocks are missing."""
        if not self.complete:
            return None
        head = f"{self.spec.dtype}{list(self.spec.shape)}".encode()
        total = xxhash.xxh3_128(head)
        for index in range(self.count):
            total.update(self._blocks[index])
        return f"{ALGORITHM}:{total.hexdigest()}"


class BlockStream:
    """A run of bytes of one tensor, fed in order by one thread."""

    def __init__(self, digests: BlockDigests, start: int) -> None:
        self.position = start
        self._digests = digests
        self._hash = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        """Feed the next bytes."""
        offset = 0
        while offset < len(data):
            room = BLOCK_BYTES - self.position % BLOCK_BYTES
            piece = data[offset : offset + room]
            self._hash.update(piece)
            self.position += len(piece)
            offset += len(piece)
            if self.position % BLOCK_BYTES == 0 or self.position == self._digests.spec.nbytes:
                self._digests.add((self.position - 1) // BLOCK_BYTES, self._hash.digest())
                self._hash = xxhash.xxh3_128()


def combine(fingerprints: Mapping[str, str]) -> str:
    """Fingerprint a whole checkpoint from its tensors' names and fingerprints."""
    total = xxhash.xxh3_128()
    for name, value in sorted(fingerprints.items()):
        total.update(f"{name}\0{value}\n".encode())
    return f"{ALGORITHM}:{total.hexdigest()}"


def fingerprint(tensor: LazyTensor) -> str:
    """Read a tensor and return its fingerprint.

    >>> from surgery.tensor import BytesTensor, TensorSpec
    >>> fingerprint(BytesTensor(TensorSpec("any name", "U8", (2,)), b"ab"))
    'xxh3-128:0aa089f8b968c7a83a617e76ed70f34b'
    """
    digests = BlockDigests(tensor.spec)
    stream = digests.stream(0)
    step = max(block_elements(tensor.spec) // tensor.unit, 1) * tensor.unit
    for start in range(0, tensor.spec.numel, step):
        stream.update(memoryview(read_bytes(tensor, start, min(start + step, tensor.spec.numel))))
    found = digests.fingerprint()
    assert found is not None  # every byte went through the stream
    return found


class Traced(Wrapper):
    """A tensor that is fingerprinted as it is read, if it is read once, in order, in runs that start at a block."""

    def __init__(self, source: LazyTensor) -> None:
        self.source = source
        self.spec = source.spec
        self.digests = BlockDigests(source.spec)
        self._runs = threading.local()

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the range and feed its digest."""
        self.source.read_into(start, stop, out)
        if self.digests.complete:
            return  # an earlier pass went over all of it
        low, _ = byte_range(self.spec, start, stop)
        run: BlockStream | None = getattr(self._runs, "run", None)
        if run is None or run.position != low:
            run = self.digests.stream(low) if low % BLOCK_BYTES == 0 else None
            self._runs.run = run
        if run is not None:
            run.update(out)

    def fingerprint(self) -> str:
        """Return the fingerprint: from the bytes that went by, else by reading again."""
        return self.digests.fingerprint() or fingerprint(self.source)


class Held:
    """A tensor read into memory once, with its fingerprint: for work that looks at it many times."""

    unit, scratch, resident = 1, 0, 0

    def __init__(self, source: LazyTensor) -> None:
        traced = Traced(source)
        self.spec = source.spec
        self._data = memoryview(read_bytes(traced))
        self._print = traced.fingerprint()

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Copy the range."""
        low, high = byte_range(self.spec, start, stop)
        out[:] = self._data[low:high]

    def fingerprint(self) -> str:
        """Return the fingerprint."""
        return self._print


def record(
    operation: str,
    *,
    parameters: Mapping[str, Any],
    inputs: Iterable[Mapping[str, Any]],
    tensors: Mapping[str, str | Mapping[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """Compose a provenance record.

    Args:
        operation: the verb.
        parameters: everything that decides the result.
        inputs: one mapping an input, with ``role`` and ``name``.
        tensors: for each output tensor its fingerprint, or an entry that holds it and where it differs the ``base`` one.
        **more: fields of single operations (``adapters``, ``report``).
    """
    return {
        "schema": SCHEMA,
        "made_by": f"surgery {__version__}",
        "operation": operation,
        "parameters": dict(parameters),
        "inputs": [dict(item) for item in inputs],
        **more,
        "tensors": {
            name: {"fingerprint": entry} if isinstance(entry, str) else dict(entry)
            for name, entry in sorted(tensors.items())
        },
    }


def encode(document: Mapping[str, Any]) -> bytes:
    """Write a record with one tensor a line, so that it can be read and compared by people."""
    head = {key: value for key, value in document.items() if key != "tensors"}
    text = json.dumps(head, indent=2, ensure_ascii=False, allow_nan=False)[:-2]
    lines = ",\n".join(
        f"    {json.dumps(name, ensure_ascii=False)}: {json.dumps(entry, ensure_ascii=False, allow_nan=False)}"
        for name, entry in document["tensors"].items()
    )
    # backslashreplace makes JSON escapes of lone surrogates, which UTF-8 does not have.
    return f'{text},\n  "tensors": {{\n{lines}\n  }}\n}}\n'.encode(errors="backslashreplace")


def check_schema(document: Mapping[str, Any]) -> None:
    """Refuse a record of another schema.

    Raises:
        FormatError: not ours, or of a later version.
    """
    if document.get("schema") != SCHEMA:
        raise FormatError(
            f"its schema is {document.get('schema')!r}, this version reads {SCHEMA!r}", mend="use a later surgery"
        )
    tensors = document.get("tensors")
    if not isinstance(tensors, dict):
        raise FormatError("the record lists no tensors")
    for name, entry in tensors.items():
        prints = [entry.get("fingerprint"), entry.get("base", PLACEHOLDER)] if isinstance(entry, dict) else [None]
        if not all(map(_is_fingerprint, prints)):
            raise FormatError("the record's entry has no fingerprint of the kind that surgery writes", tensor=name)
    base = document.get("base", {})
    if not isinstance(base, dict) or not all(map(_is_fingerprint, base.values())):
        raise FormatError("the record's base is not a mapping of names to fingerprints")
    entries = document.get("adapters", [])
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise FormatError("an entry of the record's adapters is malformed")
    for key in ("kept", "files"):
        groups = document.get(key, {})
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise FormatError(f"the record's {key!r} is malformed")
    if not all(name and not name.startswith("/") and ".." not in name.split("/") for name in document.get("files", {})):
        raise FormatError("the record's 'files' names something outside the folder")
    if not all(_is_fingerprint(value) for group in document.get("kept", {}).values() for value in group.values()):
        raise FormatError("the record's 'kept' is not made of fingerprints")


def _is_entry(entry: Any) -> bool:
    wanted = {"name": str, "fingerprint": str, "coeff": float, "step": int, "touched": list, "replaced": list}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in wanted.items()):
        return False
    return math.isfinite(entry["coeff"]) and all(isinstance(n, str) for n in (*entry["touched"], *entry["replaced"]))


def digest_of(data: bytes | memoryview) -> str:
    """Digest the bytes of a small file."""
    return f"{ALGORITHM}:{xxhash.xxh3_128_hexdigest(data)}"


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Give a record its own digest, with which a changed bit of it is found.

    >>> document = sealed(record("save", parameters={}, inputs=[], tensors={}))
    >>> check_seal(document, encode(document))
    """
    open_ = {**document, SEAL: PLACEHOLDER}
    return {**open_, SEAL: digest_of(encode(open_))}


def check_seal(document: Mapping[str, Any], data: bytes) -> None:
    """Hold a record against its own digest; one of a version that wrote none passes.

    Args:
        document: the record.
        data: its bytes as they stand in the file.

    Raises:
        VerificationError: it was changed.
    """
    if SEAL in document and (encode(document) != data or sealed(document)[SEAL] != document[SEAL]):
        raise VerificationError("the record was changed since it was written", mend="make it again, or fetch it again")


def _is_fingerprint(value: object) -> bool:
    return isinstance(value, str) and len(value) == len(PLACEHOLDER) and value.startswith(f"{ALGORITHM}:")
