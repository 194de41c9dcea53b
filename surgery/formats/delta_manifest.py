"""The manifest of an exact delta file: which tensors there were, what became of each, and where its coded blocks lie.

The file is a safetensors container of two byte tensors, :data:`MANIFEST` and :data:`DATA`; docs/delta-format.md tells it to
other programs. Nothing here opens a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from surgery.errors import FormatError, UnsupportedError
from surgery.formats.delta_codec import CODINGS, RAW, SAME, SORTED, block_elements, compress, decompress
from surgery.formats.delta_prediction import LARGEST_RANK, PREDICTED
from surgery.formats.safetensors import build_header, check_name, strict_object
from surgery.tensor import BITS, TensorSpec

FORMAT = "surgery-delta/2"
MANIFEST, DATA = "surgery.delta.manifest", "surgery.delta.data"
FACTORS = "factors"
"""What a prediction's bytes are called beside coded blocks."""
LIMIT = 400_000_000
"""Largest manifest in bytes, decompressed."""


@dataclass(frozen=True, slots=True)
class Coded:
    """One coded block."""

    coding: str
    size: int
    digest: str
    """XXH3-64 of its bytes, in hexadecimal digits."""

    @classmethod
    def of(cls, coding: str, data: bytes) -> Coded:
        """Describe a block's bytes."""
        return cls(coding, len(data), xxhash.xxh3_64_hexdigest(data))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Factors that the base's tensor is brought nearer to the fine-tune's by: see :mod:`surgery.formats.delta_prediction`."""

    rank: int
    scale: float
    packed: Coded
    """Where they lie: in the data after the tensor's blocks."""


@dataclass(frozen=True, slots=True)
class Known:
    """A tensor of one side, as it was when the delta was made."""

    spec: TensorSpec
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Change:
    """How one tensor of the fine-tune is restored."""

    tuned: Known
    base: str | None
    """The base's tensor that it is coded against: of its dtype and shape, or with another number of rows."""
    blocks: tuple[Coded, ...]
    """None where it is the base's tensor, unchanged."""
    prediction: Prediction | None = None
    """What its blocks are coded against, in place of the base's tensor itself."""

    @property
    def stored(self) -> tuple[Coded, ...]:
        """Everything of it that lies in the data, in order."""
        return self.blocks if self.prediction is None else (*self.blocks, self.prediction.packed)


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint: its name, its tensors, and its ``config.json`` where the two differ."""

    name: str
    tensors: dict[str, Known]
    config: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a delta but the coded blocks."""

    base: Side
    task: Side
    changes: dict[str, Change]
    """By the fine-tune's names."""
    reversible: bool = False
    back: dict[str, tuple[Coded, ...]] = field(default_factory=dict)
    """The base's tensors that the fine-tune does not say all about, whole; where ``reversible``."""

    @property
    def goes_back(self) -> bool:
        """Whether the base can be restored from the fine-tune: it was made so, or no coding takes the base to undo."""
        if self.reversible:
            return True
        covered = set()
        for change in self.changes.values():
            if change.base is None or not covers(self.base.tensors[change.base].spec, change.tuned.spec):
                continue
            if change.prediction or any(block.coding in (SORTED, RAW) for block in change.blocks):
                return False
            covered.add(change.base)
        return covered == self.base.tensors.keys()

    @property
    def data_bytes(self) -> int:
        """Bytes of all coded blocks."""
        return sum(block.size for _, blocks in self.runs() for block in blocks)

    def runs(self) -> Iterator[tuple[tuple[str, bool], tuple[Coded, ...]]]:
        """Yield (name, whether it is the base's) and blocks in the order in which they lie in the data."""
        for name in sorted(self.changes):
            yield (name, False), self.changes[name].stored
        for name in sorted(self.back):
            yield (name, True), self.back[name]


def fits(base: TensorSpec, tuned: TensorSpec) -> bool:
    """Say whether ``tuned`` can be coded against ``base``: they are alike, or differ in their number of rows.

    >>> fits(TensorSpec("w", "F16", (8, 4)), TensorSpec("w", "F16", (10, 4)))
    True
    """
    if base.dtype != tuned.dtype or len(base.shape) != len(tuned.shape):
        return False
    return base.shape == tuned.shape or (base.shape[1:] == tuned.shape[1:] and min(base.numel, tuned.numel) > 0)


def covers(base: TensorSpec, tuned: TensorSpec) -> bool:
    """Say whether a tensor that is coded against ``base`` says all about it: it lost no rows."""
    return tuned.numel >= base.numel


def block_count(spec: TensorSpec) -> int:
    """Count the blocks of a tensor."""
    return -(-spec.numel // block_elements(spec.dtype))


def build(manifest: Manifest) -> bytes:
    """Write a delta file up to its coded blocks."""
    packed = compress(json.dumps(_document(manifest), separators=(",", ":"), ensure_ascii=True).encode())
    return container(packed, manifest.data_bytes) + packed


def container(packed: bytes, data_bytes: int) -> bytes:
    """Write the header of a delta file."""
    specs = [TensorSpec(MANIFEST, "U8", (len(packed),)), TensorSpec(DATA, "U8", (data_bytes,))]
    prefix, _ = build_header(specs, {"format": FORMAT, "digest": f"xxh3-128:{xxhash.xxh3_128_hexdigest(packed)}"})
    return prefix


def _document(manifest: Manifest) -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {}
    for name, change in sorted(manifest.changes.items()):
        entry: dict[str, Any] = {} if change.base in (None, name) else {"from": change.base}
        if change.blocks or change.base is None:
            entry["is"] = _known(change.tuned)
            entry["blocks"] = _blocks(change.blocks)
        if change.base is None:
            entry["new"] = True
        if change.prediction is not None:
            found = change.prediction
            entry["predicted"] = [found.rank, found.scale.hex(), found.packed.size, found.packed.digest]
        changes[name] = entry
    return {
        "schema": FORMAT, "reversible": manifest.reversible, "base": _side(manifest.base), "task": _side(manifest.task),
        "base_tensors": {name: _known(known) for name, known in sorted(manifest.base.tensors.items())},
        "task_tensors": changes, "back": {name: _blocks(blocks) for name, blocks in sorted(manifest.back.items())},
    }  # fmt: skip


def _side(side: Side) -> dict[str, Any]:
    return {"name": side.name} if side.config is None else {"name": side.name, "config": side.config}


def _known(known: Known) -> list[Any]:
    return [known.spec.dtype, list(known.spec.shape), known.fingerprint]


def _blocks(blocks: tuple[Coded, ...]) -> list[list[Any]]:
    return [[block.coding, block.size, block.digest] for block in blocks]


def parse(packed: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        FormatError: it is malformed, or its parts do not fit each other.
        UnsupportedError: a later version wrote it.
    """
    document = strict_object(decompress(packed, LIMIT))
    if document.get("schema") != FORMAT:
        raise UnsupportedError(
            f"its schema is {document.get('schema')!r}, this version reads {FORMAT!r}", mend="use a later surgery"
        )
    base_tensors = {name: _parse_known(name, value) for name, value in _mapping(document, "base_tensors").items()}
    changes = {name: _change(name, value, base_tensors) for name, value in _mapping(document, "task_tensors").items()}
    back = {}
    for name, value in _mapping(document, "back").items():
        if name not in base_tensors:
            raise FormatError("is to be brought back, and the base has no such tensor", tensor=name)
        back[name] = _parse_blocks(name, value, base_tensors[name].spec, raw=True)
    reversible = document.get("reversible")
    if not isinstance(reversible, bool) or (back and not reversible):
        raise FormatError("the delta's manifest does not say whether it is reversible")
    if reversible:
        _check_way_back(base_tensors, changes, back)
    base, task = _parse_side(document, "base"), _parse_side(document, "task")
    return Manifest(
        Side(base[0], base_tensors, base[1]), Side(task[0], {n: c.tuned for n, c in changes.items()}, task[1]),
        changes, reversible, back,
    )  # fmt: skip


def _check_way_back(base: Mapping[str, Known], changes: Mapping[str, Change], back: Mapping[str, Any]) -> None:
    coded = {
        change.base for change in changes.values()
        if change.base is not None and covers(base[change.base].spec, change.tuned.spec)
    }  # fmt: skip
    for name in base:
        if name not in back and name not in coded:
            raise FormatError("is the base's, and the delta that is to be reversible says nothing of it", tensor=name)
    for name, change in changes.items():
        if change.base is not None and (change.prediction or any(block.coding == RAW for block in change.blocks)):
            raise FormatError("is stored without its base in a delta that is to be reversible", tensor=name)


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    if not isinstance(value, dict):
        raise FormatError(f"the delta's manifest has no {key}")
    for name in value:
        check_name(name)
    return value


def _parse_side(document: Mapping[str, Any], key: str) -> tuple[str, str | None]:
    value = document.get(key)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise FormatError(f"the delta's manifest does not name its {key}")
    config = value.get("config")
    if config is not None and not (isinstance(config, str) and config == config.encode(errors="replace").decode()):
        raise FormatError(f"the delta's manifest has no text for the configuration of its {key}")
    return value["name"], config


def _parse_known(name: str, value: Any) -> Known:
    if not isinstance(value, list) or len(value) != 3:
        raise FormatError("its entry in the delta's manifest is malformed", tensor=name)
    dtype, shape, fingerprint = value
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UnsupportedError(f"unknown dtype {dtype!r:.40}", tensor=name)
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
    if not sizes or math.prod(shape) * BITS[dtype] % 8 or math.prod(shape) >= 1 << 60:
        raise FormatError(f"shape {shape!r:.60} is not one of {dtype}", tensor=name)
    if not isinstance(fingerprint, str) or not fingerprint.startswith("xxh3-128:"):
        raise FormatError("has no fingerprint of the kind that surgery writes", tensor=name)
    return Known(TensorSpec(name, dtype, tuple(shape)), fingerprint)


def _change(name: str, value: Any, base: Mapping[str, Known]) -> Change:
    if not isinstance(value, dict) or not value.keys() <= {"from", "is", "blocks", "new", "predicted"}:
        raise FormatError("its entry in the delta's manifest is malformed", tensor=name)
    source = None if value.get("new") else value.get("from", name)
    if source is not None and source not in base:
        raise FormatError(f"is coded against {source!r:.80}, which the base does not have", tensor=name)
    if "is" not in value:
        if source is None:
            raise FormatError("is new, and the delta's manifest does not say what it is", tensor=name)
        was = base[source]
        return Change(Known(TensorSpec(name, was.spec.dtype, was.spec.shape), was.fingerprint), source, ())
    tuned = _parse_known(name, value["is"])
    blocks = _parse_blocks(name, value.get("blocks"), tuned.spec, raw=source is None)
    if source is not None and not fits(base[source].spec, tuned.spec):
        raise FormatError("is coded against a tensor of another dtype or shape", tensor=name)
    if "predicted" not in value:
        return Change(tuned, source, blocks)
    if source is None or base[source].spec.shape != tuned.spec.shape:
        raise FormatError("is predicted from nothing", tensor=name)
    return Change(tuned, source, blocks, _parse_prediction(name, value["predicted"], tuned.spec))


def _parse_prediction(name: str, value: Any, spec: TensorSpec) -> Prediction:
    if not isinstance(value, list) or len(value) != 4 or spec.dtype not in PREDICTED or len(spec.shape) < 2:
        raise FormatError("its prediction is malformed", tensor=name)
    rank, scale, size, digest = value
    sized = type(rank) is int and 0 < rank <= LARGEST_RANK and type(size) is int and 0 < size < 1 << 40
    try:
        factor = float.fromhex(scale) if sized and isinstance(digest, str) and isinstance(scale, str) else 0.0
    except (ValueError, OverflowError):
        factor = 0.0
    if not 0 < factor < math.inf:
        raise FormatError("its prediction is malformed", tensor=name)
    return Prediction(rank, factor, Coded(FACTORS, size, digest))


def _parse_blocks(name: str, value: Any, spec: TensorSpec, *, raw: bool) -> tuple[Coded, ...]:
    if not isinstance(value, list) or len(value) != block_count(spec):
        raise FormatError("has another number of coded blocks than its size needs", tensor=name)
    blocks = tuple(Coded(*item) for item in value if isinstance(item, list) and len(item) == 3)
    for block in blocks:
        known = block.coding == RAW if raw else block.coding in CODINGS
        sized = type(block.size) is int and 0 <= block.size < 1 << 40 and (block.size == 0) == (block.coding == SAME)
        if not known or not sized or not isinstance(block.digest, str):
            raise FormatError("a coded block of it is described wrongly", tensor=name)
    if len(blocks) != len(value):
        raise FormatError("a coded block of it is described wrongly", tensor=name)
    return blocks
