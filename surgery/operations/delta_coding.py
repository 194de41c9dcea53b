"""One pass over a base and its fine-tunes: every block coded, both sides fingerprinted on the way."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from surgery import execute
from surgery.checkpoint import Checkpoint
from surgery.errors import SurgeryError
from surgery.exact import Delta, Refitted
from surgery.formats import delta_codec, delta_manifest
from surgery.formats.delta_codec import Block
from surgery.formats.delta_manifest import FACTORS, Change, Coded, Known, Manifest, Prediction, Side, covers, fits
from surgery.formats.delta_prediction import Factors
from surgery.names import align, parse_renames
from surgery.operations.delta_sample import sampled_rank
from surgery.provenance import BlockDigests
from surgery.sources import local
from surgery.sources.remote import expect
from surgery.sources.spool import Spool, SpooledTensor
from surgery.tensor import LazyTensor, TensorSpec, any_range, byte_range, read_bytes

SPOOL_MEMORY = 64 << 20
"""Coded bytes that wait in memory; beyond that in a temporary file."""

Key = tuple[str, bool]
"""A tensor's name, and whether it is the base's."""

CodedBlocks = dict[Key, dict[int, tuple[Coded, SpooledTensor | None]]]
"""By tensor and number of the block."""


@dataclass
class Task:
    """One fine-tune, and what was coded of it so far."""

    checkpoint: Checkpoint
    partners: Mapping[str, str]
    """The fine-tune's names → those of the base's tensors that they are coded against."""
    digests: dict[str, BlockDigests]
    coded: CodedBlocks = field(default_factory=dict)
    error: SurgeryError | None = None
    """Why nothing will come of it."""
    predictions: dict[str, tuple[Factors, Prediction]] = field(default_factory=dict)
    """The tensors that are coded against a prediction."""

    def __post_init__(self) -> None:
        """See which tensors are alike, and which of the base's are said all about."""
        self.twins: dict[str, str] = {}
        self.covered: set[str] = set()

    def pair_up(self, base: Checkpoint) -> None:
        """Note the base's tensors that have a twin here, of the same shape, and those that need no bytes of their own."""
        own = self.checkpoint.specs
        for name, known in self.partners.items():
            was = base.tensors[known].spec
            if was.shape == own[name].shape:
                self.twins[known] = name
            if covers(was, own[name]):
                self.covered.add(known)


Item = tuple[Task | None, str, int]
"""A task's own tensor, or with ``None`` a tensor of the base, and the number of the block."""


class Coding:
    """The pass. Its methods may be called from many threads."""

    def __init__(self, base: Checkpoint, reversible: bool) -> None:
        self.base = base
        self.reversible = reversible
        self.tasks: list[Task] = []
        self._spool = Spool(SPOOL_MEMORY)
        self._one_matrix = threading.Lock()  # in memory at a time
        self._digests = {name: BlockDigests(spec) for name, spec in base.specs.items()}

    def add(self, tuned: Checkpoint, rename: Sequence[str]) -> Task:
        """Take a fine-tune in.

        Raises:
            MismatchError: two of its names become one.
        """
        base = self.base.tensors
        partners = {
            name: known for name, known in align(base, tuned.tensors, parse_renames(rename)).names.items()
            if known in base and fits(base[known].spec, tuned.tensors[name].spec)
        }  # fmt: skip
        task = Task(tuned, partners, {name: BlockDigests(spec) for name, spec in tuned.specs.items()})
        task.pair_up(self.base)
        self.tasks.append(task)
        return task

    def run(self, jobs: int, watcher: execute.Progress) -> None:
        """Code everything; a fine-tune that fails is left behind.

        Raises:
            SurgeryError: the base cannot be read.
        """
        expect(
            tensor
            for each in (self.base, *(task.checkpoint for task in self.tasks))
            for tensor in each.tensors.values()
        )
        watcher.start(self.base.nbytes + sum(task.checkpoint.nbytes for task in self.tasks))
        with ThreadPoolExecutor(jobs, thread_name_prefix="surgery") as pool:
            try:
                if not self.reversible:
                    list(pool.map(self._predict, [(task, *pair) for task in self.tasks for pair in task.twins.items()]))
                for done in pool.map(self._work, self._items()):
                    watcher.advance(done)
            finally:
                pool.shutdown(cancel_futures=True)
                watcher.finish()

    def _predict(self, item: tuple[Task, str, str]) -> None:
        """See whether a matrix moved along few directions, and find them."""
        task, base, name = item
        pair = self.base.tensors[base], task.checkpoint.tensors[name]
        if pair[0].unit != 1 or pair[1].unit != 1:
            return  # a sample would cost as much as all of it
        try:
            rank = sampled_rank(*pair)
            if rank is None or task.error:
                return
            from surgery.operations.delta_prediction import find_factors  # torch, which few pairs need

            with self._one_matrix:
                factors = find_factors(*pair, rank)
        except SurgeryError:
            return  # the pass over all of it says whose fault it is
        if factors is not None:
            packed = factors.pack()
            number = delta_manifest.block_count(pair[1].spec)
            keep(self._spool, task.coded, (name, False), number, (FACTORS, packed))
            described = Prediction(factors.rank, factors.scale, task.coded[name, False][number][0])
            task.predictions[name] = factors, described

    def _items(self) -> list[Item]:
        items: list[Item] = [
            (None, name, number) for name, spec in self.base.specs.items() for number in _blocks_of(spec)
        ]
        for task in self.tasks:
            paired = set(task.twins.values())
            items += [
                (task, name, number) for name, spec in task.checkpoint.specs.items() if name not in paired
                for number in _blocks_of(spec)
            ]  # fmt: skip
        return items

    def _work(self, item: Item) -> int:
        """Read and code one block; return the bytes that were read."""
        task, name, number = item
        if all(each.error for each in self.tasks):
            return 0
        if task is not None:
            return self._alone(task, name, number)
        known = _read(self.base, name, number, self._digests[name])
        done = known.bits.nbytes
        for each in self.tasks:
            if name in each.twins:
                done += self._against(each, each.twins[name], number, known)
            if self.reversible and name not in each.covered:
                self._keep(each, (name, True), number, delta_codec.encode(known, None))
        return done

    def _against(self, task: Task, name: str, number: int, known: Block | None) -> int:
        if task.error:
            return 0
        try:
            tuned = _read(task.checkpoint, name, number, task.digests[name])
        except SurgeryError as error:
            task.error = error
            return 0
        if known is not None and name in task.predictions:
            known = task.predictions[name][0].predict(known, number * delta_codec.block_elements(known.dtype))
        reversible = self.reversible and known is not None
        self._keep(task, (name, False), number, delta_codec.encode(tuned, known, reversible=reversible))
        return tuned.bits.nbytes

    def _alone(self, task: Task, name: str, number: int) -> int:
        """Code a block of a tensor that has no twin, against what there is of the base's: other rows, or nothing."""
        known = None
        if name in task.partners:
            partner = any_range(self.base.tensors[task.partners[name]])
            known = _block(Refitted(partner, task.checkpoint.tensors[name].spec), number, self.base.label)
        return self._against(task, name, number, known)

    def _keep(self, task: Task, key: Key, number: int, coded: tuple[str, bytes]) -> None:
        keep(self._spool, task.coded, key, number, coded)

    def compose(self, task: Task) -> Delta:
        """Put one fine-tune's delta together."""
        was, config = _knowns(self.base, self._digests), _configs(self.base, task.checkpoint)
        tuned = _knowns(task.checkpoint, task.digests)
        changes = {name: _change(task, name, tuned[name], was) for name in tuned}
        lost = sorted(was.keys() - task.covered) if self.reversible else ()
        manifest = Manifest(
            Side(self.base.label, was, config[0]), Side(task.checkpoint.label, tuned, config[1]),
            changes, self.reversible, {name: _coded(task, (name, True), was[name].spec) for name in lost},
        )  # fmt: skip
        return Delta(
            f"{task.checkpoint.label} − {self.base.label}", manifest, Gathered(manifest, task.coded),
            delta_manifest.build(manifest), [*self.base.stored, *task.checkpoint.stored],
        )  # fmt: skip


def keep(spool: Spool, blocks: CodedBlocks, key: Key, number: int, coded: tuple[str, bytes]) -> None:
    """Put a coded block into the spool, and note where."""
    coding, data = coded
    spooled = spool.add(TensorSpec(key[0], "U8", (len(data),)), data) if data else None
    blocks.setdefault(key, {})[number] = (Coded.of(coding, data), spooled)


def _change(task: Task, name: str, tuned: Known, was: Mapping[str, Known]) -> Change:
    base = task.partners.get(name)
    if base is not None and was[base].fingerprint == tuned.fingerprint:
        return Change(tuned, base, ())
    prediction = task.predictions[name][1] if name in task.predictions else None
    return Change(tuned, base, _coded(task, (name, False), tuned.spec), prediction)


def _blocks_of(spec: TensorSpec) -> range:
    return range(delta_manifest.block_count(spec))


def _read(checkpoint: Checkpoint, name: str, number: int, digests: BlockDigests) -> Block:
    """Read a block and feed its digest: blocks are whole mebibytes, as those of fingerprints are."""
    tensor = any_range(checkpoint.tensors[name])
    block = _block(tensor, number, checkpoint.label)
    low, _ = byte_range(tensor.spec, number * delta_codec.block_elements(tensor.spec.dtype), tensor.spec.numel)
    digests.stream(low).update(block.bits.view("u1").data)
    return block


def _block(tensor: LazyTensor, number: int, label: str) -> Block:
    step = delta_codec.block_elements(tensor.spec.dtype)
    start, stop = number * step, min((number + 1) * step, tensor.spec.numel)
    try:
        return Block(tensor.spec.dtype, read_bytes(tensor, start, stop))
    except SurgeryError as error:
        raise error.at(file=label, tensor=tensor.spec.name) from None


def _knowns(checkpoint: Checkpoint, digests: Mapping[str, BlockDigests]) -> dict[str, Known]:
    found = {}
    for name, spec in checkpoint.specs.items():
        fingerprint = digests[name].fingerprint()
        assert fingerprint is not None  # every block was read
        found[name] = Known(TensorSpec(name, spec.dtype, spec.shape), fingerprint)
    return found


def _coded(task: Task, key: Key, spec: TensorSpec) -> tuple[Coded, ...]:
    return tuple(task.coded[key][number][0] for number in _blocks_of(spec))


def _configs(base: Checkpoint, tuned: Checkpoint) -> tuple[str | None, str | None]:
    """Read both sides' ``config.json`` where they differ: a resized vocabulary needs its own."""
    texts = [config_text(checkpoint) for checkpoint in (base, tuned)]
    return (None, None) if texts[0] == texts[1] else (texts[0], texts[1])


def config_text(checkpoint: Checkpoint) -> str | None:
    """Return the text of a checkpoint's ``config.json``, or of what an operation made of it."""
    made = checkpoint.origin.files.get("config.json") if checkpoint.origin else None
    if made is not None:
        return made.decode("utf-8", "replace")
    path = checkpoint.side_files.get("config.json")
    return None if path is None else local.read_small(path).decode("utf-8", "replace")


class Gathered:
    """Coded blocks that lie anywhere in a spool, in the order of the file."""

    unit, scratch, resident = 1, 1, 0

    def __init__(self, manifest: Manifest, coded: CodedBlocks) -> None:
        self.spec = TensorSpec(delta_manifest.DATA, "U8", (manifest.data_bytes,))
        self._starts: list[int] = []
        self._pieces: list[SpooledTensor] = []
        offset = 0
        for key, blocks in manifest.runs():
            for number in range(len(blocks)):
                block, spooled = coded[key][number]
                if spooled is not None:
                    self._starts.append(offset)
                    self._pieces.append(spooled)
                    offset += block.size

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
