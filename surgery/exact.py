"""Exact deltas: a fine-tune kept as what differs from its base, restored to the last bit.

:class:`Delta` is a delta file, open; :class:`Restored` one tensor made from the base's and the coded blocks. Both know their
fingerprints, so a wrong base or a damaged file is found by whoever reads a tensor whole, and by every merge.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import xxhash

from surgery.errors import FormatError, MismatchError, SurgeryError, UsageError, VerificationError
from surgery.formats import delta_codec, delta_manifest
from surgery.formats.delta_codec import Block
from surgery.formats.delta_manifest import DATA, MANIFEST, Coded, Known, Manifest, Prediction
from surgery.formats.delta_prediction import Factors, matrix_of
from surgery.provenance import BlockDigests
from surgery.sources import folders, local
from surgery.sources.references import is_hub_reference
from surgery.tensor import BITS, BytesTensor, LazyTensor, TensorSpec, Wrapper, byte_range, read_bytes
from surgery.writer import Publication

SUFFIX = ".delta"

COPY_BYTES = 1 << 20
"""Coded bytes that are copied at a time."""


@dataclass(frozen=True, eq=False)
class Delta:
    """An exact delta, in a file or just made: its manifest, and the bytes of its coded blocks."""

    label: str
    """A short name for messages and records."""
    manifest: Manifest
    data: LazyTensor
    head: bytes
    """The file up to the coded blocks: header and manifest."""
    stored: Sequence[local.StoredWeights]
    """The files that ``data``, or the checkpoints it was made from, are read from."""

    @property
    def digest(self) -> str:
        """Of header and manifest, which hold the digests of all blocks: two deltas that share it are the same."""
        return f"xxh3-128:{xxhash.xxh3_128_hexdigest(self.head)}"

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.head) + self.manifest.data_bytes

    def places(self, *, base: bool = False) -> dict[str, int]:
        """Find where each tensor's blocks begin in the data: the fine-tune's, or those of the base stored for the way back."""
        found, offset = {}, 0
        for (name, back), blocks in self.manifest.runs():
            if back == base:
                found[name] = offset
            offset += sum(block.size for block in blocks)
        return found

    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the delta's file, and publish it whole or not at all.

        Raises:
            UsageError: the name does not end in ``.delta``.
            OutputError: it exists, is an input, or does not fit.
        """
        with delta_output(out, overwrite=overwrite, inputs=[stored.path for stored in self.stored]) as publication:
            publication.check_space(self.nbytes)
            with publication.create(publication.out.name, self.nbytes) as file:
                file.write_at(0, memoryview(self.head))
                for start in range(0, self.data.spec.numel, COPY_BYTES):
                    stop = min(start + COPY_BYTES, self.data.spec.numel)
                    file.write_at(len(self.head) + start, memoryview(read_bytes(self.data, start, stop)))
            for stored in self.stored:
                stored.check_unchanged()
            publication.commit()


def delta_output(out: str | os.PathLike[str], *, overwrite: bool, inputs: Iterable[Path]) -> Publication:
    """Check where a delta is to be written.

    Raises:
        UsageError: the name does not end in ``.delta``.
        OutputError: it exists, or is an input.
    """
    if not os.fspath(out).endswith(SUFFIX):
        raise UsageError(f"a delta is one file, whose name ends in {SUFFIX}", file=out)
    return Publication(out, overwrite=overwrite, inputs=inputs, single=True)


def is_delta(source: object) -> TypeGuard[str | os.PathLike[str] | Delta]:
    """Say whether ``source`` is an exact delta: an object, or a file that begins as one does, whatever it is called."""
    if isinstance(source, Delta):
        return True
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(source).expanduser()
    if is_hub_reference(source) or path.is_dir():
        path = local.resolve(source)
    if not (path.is_file() or folders.is_absent(path)) or path.name.endswith(local.PICKLE_SUFFIXES):
        return False
    file = folders.open_file(path)
    start = file.read(0, min(512, file.size))
    file.close()
    # Any of three, so that a damaged file is still known for what it is.
    return any(mark.encode() in start for mark in (delta_manifest.FORMAT, MANIFEST, DATA))


def open_delta(source: str | os.PathLike[str] | Delta) -> Delta:
    """Open an exact delta: its header and manifest are read and checked, coded blocks are not.

    Args:
        source: a file that ``extract-delta`` wrote.

    Raises:
        FormatError: it is malformed.
        VerificationError: a byte of it was changed.
        UnsupportedError: a later version wrote it.
    """
    if isinstance(source, Delta):
        return source
    stored = local.open_weights(source)
    try:
        return _open(stored)
    except SurgeryError as error:
        stored.close()
        raise error.at(file=stored.path) from None


def _open(stored: local.StoredWeights) -> Delta:
    if stored.tensors.keys() != {MANIFEST, DATA}:
        raise FormatError(f"is no exact delta: it holds {', '.join(list(stored.tensors)[:3])}")
    if stored.tensors[MANIFEST].spec.nbytes > delta_manifest.LIMIT:
        raise FormatError(f"its manifest exceeds the limit of {delta_manifest.LIMIT:,} bytes")
    packed, data = bytes(read_bytes(stored.tensors[MANIFEST])), stored.tensors[DATA]
    head = delta_manifest.container(packed, data.spec.nbytes) + packed
    if stored.files[0].read(0, min(len(head), stored.files[0].size)) != head:
        raise VerificationError("its header or manifest was changed: they do not fit each other", mend="fetch it again")
    manifest = delta_manifest.parse(packed)
    if manifest.data_bytes != data.spec.nbytes:
        raise FormatError(f"holds {data.spec.nbytes:,} bytes of blocks, its manifest names {manifest.data_bytes:,}")
    return Delta(stored.label, manifest, data, head, [stored])


def read_block(data: LazyTensor, offset: int, block: Coded) -> bytes:
    """Read a coded block and hold it against its digest.

    Raises:
        VerificationError: its bytes were changed.
    """
    coded = bytes(read_bytes(data, offset, offset + block.size))
    if block.size and xxhash.xxh3_64_hexdigest(coded) != block.digest:
        raise VerificationError("a coded block of it in the delta was changed", mend="fetch the delta again")
    return coded


class Refitted(Wrapper):
    """A tensor with rows cut off, or with rows of zero bits added: what a resized tensor is coded against.

    Args:
        source: the tensor, readable at any element.
        spec: what it is to be; of the same dtype.
    """

    def __init__(self, source: LazyTensor, spec: TensorSpec) -> None:
        self.spec = spec
        self.source = source

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read what there is of the range, and zeros after it."""
        there = max(min(stop, self.source.spec.numel), start)
        low, high = byte_range(self.spec, start, there)
        if high > low:
            self.source.read_into(start, there, out[: high - low])
        out[high - low :] = bytes(len(out) - (high - low))


class Predicted(Wrapper):
    """A base's matrix, brought nearer to the fine-tune's by factors.

    Args:
        source: the matrix, readable at any element.
        prediction: the factors' description.
        data: the delta's bytes.
        offset: where in them the factors begin.
    """

    def __init__(self, source: LazyTensor, prediction: Prediction, data: LazyTensor, offset: int) -> None:
        self.spec = source.spec
        self.source = source
        self._prediction = prediction
        self._data = data
        self._offset = offset
        self._lock = threading.Lock()
        self._factors: Factors | None = None

    @property
    def scratch(self) -> int:
        """The source's scratch, and a few float64 copies."""
        return self.source.scratch + 6 * 64 // BITS[self.spec.dtype]

    @property
    def resident(self) -> int:
        """The source's, and the factors as they are and widened."""
        rows, columns = matrix_of(self.spec.shape)
        return self.source.resident + 12 * self._prediction.rank * (rows + columns)

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the range, and add the factors' product."""
        self.source.read_into(start, stop, out)
        known = Block(self.spec.dtype, bytes(out))
        out[:] = self._load().predict(known, start).bits.view("u1").data

    def _load(self) -> Factors:
        with self._lock:
            if self._factors is None:
                found = self._prediction
                packed = read_block(self._data, self._offset, found.packed)
                self._factors = Factors.unpack(packed, self.spec.shape, found.rank, found.scale)
            return self._factors


class Restored:
    """A tensor of one side of a delta, made from its twin on the other and the coded blocks between them.

    Args:
        spec: of the tensor.
        known: the twin, as many elements as the coded blocks have; ``None`` where it is stored whole.
        blocks: its coded blocks.
        data: the delta's bytes.
        offset: where in them the blocks begin.
        reverse: whether the base is restored from the fine-tune.
    """

    def __init__(
        self,
        spec: TensorSpec,
        known: LazyTensor | None,
        blocks: tuple[Coded, ...],
        data: LazyTensor,
        offset: int,
        *,
        reverse: bool = False,
    ) -> None:
        self.spec = spec
        self._known = known
        self._blocks = blocks
        self._data = data
        self._offsets = list(itertools.accumulate((block.size for block in blocks), initial=offset))
        self._reverse = reverse

    @property
    def unit(self) -> int:
        """Elements in a coded block."""
        return delta_codec.block_elements(self.spec.dtype)

    @property
    def scratch(self) -> int:
        """The twin's block, coded and decoded bytes, numbers in two orders, and eight bytes an element for the order."""
        return 8 + 16 * 8 // BITS[self.spec.dtype] + (0 if self._known is None else self._known.scratch)

    @property
    def resident(self) -> int:
        """The twin's resident bytes."""
        return 0 if self._known is None else self._known.resident

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Decode the range's blocks."""
        first, _ = byte_range(self.spec, start, stop)
        for low in range(start, stop, self.unit):
            high = min(low + self.unit, stop)
            begin, end = (place - first for place in byte_range(self.spec, low, high))
            out[begin:end] = self._decode(low, high)

    def _decode(self, low: int, high: int) -> memoryview:
        number = low // self.unit
        block = self._blocks[number]
        coded = read_block(self._data, self._offsets[number], block)
        if block.coding == delta_codec.RAW:
            begin, end = byte_range(self.spec, low, high)
            return delta_codec.decode_raw(coded, self.spec.dtype, end - begin)
        assert self._known is not None  # the manifest was checked: only raw blocks do without
        end = min(low + self.unit, self._known.spec.numel)  # beyond ``high`` where rows were added on the way there
        known = Block(self.spec.dtype, read_bytes(self._known, low, end))
        first, last = byte_range(self.spec, low, high)
        return delta_codec.decode(block.coding, coded, known, reverse=self._reverse)[: last - first]


class Proved(Wrapper):
    """A tensor that is held against its recorded fingerprint whenever all of it is read at once.

    Args:
        source: the values.
        known: the name and fingerprint that it is to have.
        label: the checkpoint that it is made from, for the message.
        reverse: whether that is the fine-tune.
    """

    def __init__(self, source: LazyTensor, known: Known, label: str, *, reverse: bool) -> None:
        self.spec = known.spec
        self.source = source
        self._fingerprint = known.fingerprint
        self._label = label
        self._reverse = reverse

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the range, and prove it if it is all there is."""
        try:
            self.source.read_into(start, stop, out)
        except SurgeryError as error:
            raise error.at(tensor=self.spec.name) from None
        if (start, stop) == (0, self.spec.numel):
            digests = BlockDigests(self.spec)
            digests.stream(0).update(out)
            if digests.fingerprint() != self._fingerprint:
                raise wrong_twin(self.spec.name, self._label, reverse=self._reverse)


def wrong_twin(name: str, label: str, *, reverse: bool) -> MismatchError:
    """Compose the refusal of a checkpoint that a delta was not made for."""
    side = "fine-tune" if reverse else "base"
    return MismatchError(
        f"is not the {side}'s that the delta was made with: its bits differ", file=label, tensor=name,
        mend=f"name the {side} itself; an exact delta means nothing on another",
    )  # fmt: skip


def restored(
    delta: Delta, known: Mapping[str, LazyTensor], label: str, *, reverse: bool = False, leave: Container[str] = ()
) -> dict[str, LazyTensor]:
    """Make all tensors of one side from those of the other.

    Args:
        delta: the delta.
        known: the base's tensors, by name; with ``reverse`` the fine-tune's. Those that nothing is made from may lack.
        label: what they are called together, for messages.
        reverse: restore the base.
        leave: the names of tensors that are not wanted.
    """
    manifest = delta.manifest
    found: dict[str, LazyTensor] = {}
    places, back = delta.places(), delta.places(base=True)

    def add(wanted: Known, twin: LazyTensor | None, blocks: tuple[Coded, ...], offset: int) -> None:
        spec = wanted.spec
        source: LazyTensor = BytesTensor(spec, b"")
        if spec.numel and not blocks and twin is not None:
            source = twin
        elif spec.numel:
            if twin is not None and not reverse and twin.spec.shape != spec.shape:
                twin = Refitted(twin, spec)
            prediction = None if reverse else manifest.changes[spec.name].prediction
            if prediction is not None and twin is not None:
                twin = Predicted(twin, prediction, delta.data, offset + sum(block.size for block in blocks))
            source = Restored(spec, twin, blocks, delta.data, offset, reverse=reverse)
        found[spec.name] = Proved(source, wanted, label, reverse=reverse)

    twins = {change.base: name for name, change in manifest.changes.items() if change.base is not None}
    for name, change in () if reverse else manifest.changes.items():
        if name not in leave:
            add(change.tuned, None if change.base is None else known[change.base], change.blocks, places[name])
    for name, was in manifest.base.tensors.items() if reverse else ():
        if name in leave:
            continue
        if name in manifest.back:
            add(was, None, manifest.back[name], back[name])
        else:
            add(was, known[twins[name]], manifest.changes[twins[name]].blocks, places[twins[name]])
    return found
