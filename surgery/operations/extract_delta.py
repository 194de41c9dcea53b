"""``extract-delta``: what a fine-tune is beside its base, exactly."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from surgery import execute
from surgery.checkpoint import Checkpoint, Source, default_jobs, open_checkpoint
from surgery.errors import SurgeryError, UsageError
from surgery.exact import SUFFIX, Delta, delta_output
from surgery.formats import delta_codec, delta_manifest
from surgery.formats.delta_codec import Block
from surgery.formats.delta_manifest import Change, Coded, Known, Manifest, Side
from surgery.names import align, parse_renames
from surgery.provenance import BlockDigests
from surgery.sources import local
from surgery.sources.remote import expect
from surgery.sources.spool import Spool, SpooledTensor
from surgery.tensor import LazyTensor, TensorSpec, any_range, byte_range, read_bytes


def extract_delta(
    base: Source,
    tuned: Source,
    *,
    reversible: bool = False,
    rename: Sequence[str] = (),
    jobs: int | None = None,
    progress: execute.Progress | None = None,
) -> Delta:
    """Take what differs between a base and a fine-tune, so that the base and it restore the fine-tune bit for bit.

    Every block of 2²⁰ elements becomes the shortest of: nothing (unchanged), differences at the positions that changed,
    all differences sorted by the base's exponents, or the fine-tune's bits as they are. Differences count units in the
    last place, as integers. Tensors that the base lacks, or has in another dtype or shape, are stored whole.

    Args:
        base: the checkpoint before training.
        tuned: the checkpoint after it; tensors of any dtype.
        reversible: store what restoring the base from the fine-tune needs, too.
        rename: ``OLD=NEW`` rules that turn the fine-tune's names into the base's.
        jobs: threads; as many as there are cores by default. The bytes do not depend on it.
        progress: somebody who watches.

    Returns:
        The delta, coded: ``save("task.delta")`` writes it, ``surgery.merge(base, delta)`` restores the fine-tune.

    Raises:
        MismatchError: two of the fine-tune's names become one.
        IOFailure: a file changed, or cannot be read.

    >>> import numpy, surgery
    >>> base = {"w": numpy.float32([1, 2, 3])}
    >>> delta = extract_delta(base, {"w": numpy.float32([1, 2, 3.5])})
    >>> surgery.merge(base, delta)["w"].tolist()
    [1.0, 2.0, 3.5]

    Reference:
        The order of floats as integers: Dawson, "Comparing Floating Point Numbers", 2012. Differences of integers in
        place of floats, coded losslessly: Ning et al., "FM-Delta", NeurIPS 2024. Sorting by the base's exponent is ours.
    """
    (delta,) = _extract(open_checkpoint(base), [open_checkpoint(tuned)], reversible, rename, jobs, progress)
    return delta


def extract_deltas(
    base: Source,
    tuned: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    reversible: bool = False,
    rename: Sequence[str] = (),
    jobs: int | None = None,
    progress: execute.Progress | None = None,
) -> list[tuple[str, Delta]]:
    """Extract a delta from each of many fine-tunes of one base into ``out/<ft>.delta``; the base is read once.

    Args:
        base: the checkpoint before training.
        tuned: the fine-tunes: folders or files.
        out: the folder for the deltas.
        overwrite: replace deltas that are there.
        reversible: see :func:`extract_delta`.
        rename: see :func:`extract_delta`.
        jobs: threads.
        progress: somebody who watches.

    Returns:
        Each delta and the file that it was written to.

    Raises:
        UsageError: two fine-tunes would have one output.
        OutputError: an output exists, before anything is computed.
    """
    names = [str(Path(out) / f"{default_stem(source)}{SUFFIX}") for source in tuned]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two of the fine-tunes would both become {twice}", mend="rename their folders")
    before, after = open_checkpoint(base), [open_checkpoint(source) for source in tuned]
    inputs = [stored.path for checkpoint in (before, *after) for stored in checkpoint.stored]
    for name in names:
        delta_output(name, overwrite=overwrite, inputs=inputs)
    deltas = _extract(before, after, reversible, rename, jobs, progress)
    for name, delta in zip(names, deltas, strict=True):
        delta.save(name, overwrite=overwrite)
    return list(zip(names, deltas, strict=True))


def default_stem(source: str | os.PathLike[str]) -> str:
    """Name a fine-tune by its folder, its repository, or its file without the ending."""
    return local.stem_of(source)


@dataclass
class _Task:
    """One fine-tune, and what was coded of it so far."""

    checkpoint: Checkpoint
    spelled: dict[str, str]
    """The fine-tune's names → the base's, where it has them."""
    twins: dict[str, str]
    """The base's names → the fine-tune's, where dtype and shape are the same too."""
    digests: dict[str, BlockDigests]
    coded: dict[tuple[str, bool], dict[int, tuple[Coded, SpooledTensor | None]]] = field(default_factory=dict)
    """By (name, whether it is the base's) and number of the block."""


class _Extraction:
    """One pass over a base and its fine-tunes, block by block. Its methods may be called from many threads."""

    def __init__(self, base: Checkpoint, tuned: Sequence[Checkpoint], reversible: bool, rename: Sequence[str]) -> None:
        self.base = base
        self.reversible = reversible
        self.spool = Spool()
        self.digests = {name: BlockDigests(spec) for name, spec in base.specs.items()}
        self.tasks = [_task(base, checkpoint, rename) for checkpoint in tuned]

    def items(self) -> list[tuple[_Task | None, str, int]]:
        """List the work: a task's own tensor, or with ``None`` a tensor of the base, and the number of the block."""
        found: list[tuple[_Task | None, str, int]] = [
            (None, name, number) for name, spec in self.base.specs.items() for number in _blocks_of(spec)
        ]
        for task in self.tasks:
            paired = set(task.twins.values())
            found += [
                (task, name, number)
                for name, spec in task.checkpoint.specs.items() if name not in paired
                for number in _blocks_of(spec)
            ]  # fmt: skip
        return found

    def work(self, item: tuple[_Task | None, str, int]) -> int:
        """Read and code one block; return the bytes that were read."""
        task, name, number = item
        if task is not None:
            tuned = _read(task.checkpoint, name, number, task.digests[name])
            self._keep(task, (name, False), number, delta_codec.encode(tuned, None))
            return tuned.bits.nbytes
        known = _read(self.base, name, number, self.digests[name])
        done = known.bits.nbytes
        for each in self.tasks:
            twin = each.twins.get(name)
            if twin is not None:
                tuned = _read(each.checkpoint, twin, number, each.digests[twin])
                done += tuned.bits.nbytes
                coded = delta_codec.encode(tuned, known, reversible=self.reversible)
                self._keep(each, (twin, False), number, coded)
            elif self.reversible:
                self._keep(each, (name, True), number, delta_codec.encode(known, None))
        return done

    def _keep(self, task: _Task, key: tuple[str, bool], number: int, coded: tuple[str, bytes]) -> None:
        coding, data = coded
        spooled = self.spool.add(TensorSpec(key[0], "U8", (len(data),)), data) if data else None
        task.coded.setdefault(key, {})[number] = (Coded.of(coding, data), spooled)

    def compose(self, task: _Task) -> Delta:
        """Put one fine-tune's delta together."""
        was, config = _knowns(self.base, self.digests), _configs(self.base, task.checkpoint)
        tuned = _knowns(task.checkpoint, task.digests)
        changes = {name: self._change(task, name, tuned[name], was) for name in tuned}
        back = (
            {name: _coded(task, (name, True), was[name].spec) for name in was if name not in task.twins}
            if self.reversible
            else {}
        )
        manifest = Manifest(
            Side(self.base.label, was, config[0]), Side(task.checkpoint.label, tuned, config[1]),
            changes, self.reversible, back,
        )  # fmt: skip
        return Delta(
            f"{task.checkpoint.label} − {self.base.label}", manifest, _Gathered(manifest, task),
            delta_manifest.build(manifest), [*self.base.stored, *task.checkpoint.stored],
        )  # fmt: skip

    def _change(self, task: _Task, name: str, tuned: Known, was: dict[str, Known]) -> Change:
        base = task.spelled.get(name)
        if base is None or task.twins.get(base) != name:
            return Change(tuned, None, _coded(task, (name, False), tuned.spec))
        if was[base].fingerprint == tuned.fingerprint:
            return Change(tuned, base, ())
        return Change(tuned, base, _coded(task, (name, False), tuned.spec))


def _extract(
    base: Checkpoint, tuned: Sequence[Checkpoint], reversible: bool, rename: Sequence[str], jobs: int | None,
    progress: execute.Progress | None,
) -> list[Delta]:  # fmt: skip
    watcher = progress or execute.Silent()
    extraction = _Extraction(base, tuned, reversible, rename)
    expect(tensor for checkpoint in (base, *tuned) for tensor in checkpoint.tensors.values())
    watcher.start(base.nbytes + sum(checkpoint.nbytes for checkpoint in tuned))
    with ThreadPoolExecutor(jobs or default_jobs(), thread_name_prefix="surgery") as pool:
        try:
            for done in pool.map(extraction.work, extraction.items()):
                watcher.advance(done)
        finally:
            pool.shutdown(cancel_futures=True)
            watcher.finish()
    return [extraction.compose(task) for task in extraction.tasks]


def _task(base: Checkpoint, tuned: Checkpoint, rename: Sequence[str]) -> _Task:
    aligned = align(base.tensors, tuned.tensors, parse_renames(rename))
    spelled = {name: known for name, known in aligned.names.items() if known in base.tensors}
    twins = {
        known: name for name, known in spelled.items()
        if (base.tensors[known].spec.dtype, base.tensors[known].spec.shape)
        == (tuned.tensors[name].spec.dtype, tuned.tensors[name].spec.shape)
    }  # fmt: skip
    return _Task(tuned, spelled, twins, {name: BlockDigests(spec) for name, spec in tuned.specs.items()})


def _blocks_of(spec: TensorSpec) -> range:
    return range(delta_manifest.block_count(spec))


def _read(checkpoint: Checkpoint, name: str, number: int, digests: BlockDigests) -> Block:
    """Read a block and feed its digest: blocks are whole mebibytes, as those of fingerprints are."""
    tensor = any_range(checkpoint.tensors[name])
    step = delta_codec.block_elements(tensor.spec.dtype)
    start, stop = number * step, min((number + 1) * step, tensor.spec.numel)
    try:
        data = read_bytes(tensor, start, stop)
    except SurgeryError as error:
        raise error.at(file=checkpoint.label, tensor=name) from None
    digests.stream(byte_range(tensor.spec, start, stop)[0]).update(memoryview(data))
    return Block(tensor.spec.dtype, data)


def _knowns(checkpoint: Checkpoint, digests: dict[str, BlockDigests]) -> dict[str, Known]:
    found = {}
    for name, spec in checkpoint.specs.items():
        fingerprint = digests[name].fingerprint()
        assert fingerprint is not None  # every block was read
        found[name] = Known(TensorSpec(name, spec.dtype, spec.shape), fingerprint)
    return found


def _coded(task: _Task, key: tuple[str, bool], spec: TensorSpec) -> tuple[Coded, ...]:
    return tuple(task.coded[key][number][0] for number in _blocks_of(spec))


def _configs(base: Checkpoint, tuned: Checkpoint) -> tuple[str | None, str | None]:
    """Read both sides' ``config.json`` where they differ: a resized vocabulary needs its own."""
    texts = []
    for checkpoint in (base, tuned):
        path = checkpoint.side_files.get("config.json")
        texts.append(None if path is None else local.read_small(path).decode("utf-8", "replace"))
    return (None, None) if texts[0] == texts[1] else (texts[0], texts[1])


class _Gathered:
    """Coded blocks that lie anywhere in a spool, in the order of the file."""

    unit, scratch, resident = 1, 1, 0

    def __init__(self, manifest: Manifest, task: _Task) -> None:
        self.spec = TensorSpec(delta_manifest.DATA, "U8", (manifest.data_bytes,))
        self._starts: list[int] = []
        self._pieces: list[SpooledTensor] = []
        offset = 0
        for key, blocks in manifest.runs():
            for number in range(len(blocks)):
                coded, spooled = task.coded[key][number]
                if spooled is not None:
                    self._starts.append(offset)
                    self._pieces.append(spooled)
                    offset += coded.size

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Put the range together."""
        place = start
        while place < stop:
            number = bisect_right(self._starts, place) - 1
            piece: LazyTensor = self._pieces[number]
            low = place - self._starts[number]
            high = min(piece.spec.numel, low + stop - place)
            piece.read_into(low, high, out[place - start : place - start + high - low])
            place += high - low
