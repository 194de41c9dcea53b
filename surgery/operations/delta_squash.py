"""``delta squash``: a chain of exact deltas made one, with the base at hand or, where no coding takes it, without."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

from surgery import execute
from surgery.checkpoint import Source, open_checkpoint
from surgery.errors import UsageError, VerificationError
from surgery.exact import Delta, open_delta, read_block, wrong_twin
from surgery.formats import delta_codec, delta_manifest
from surgery.formats.delta_codec import SAME, Block
from surgery.formats.delta_manifest import Change, Coded, Manifest, Side, covers
from surgery.operations.delta_coding import SPOOL_MEMORY, CodedBlocks, Gathered, keep
from surgery.operations.extract_delta import extract_delta
from surgery.operations.merge_delta import DeltaSource, check_chain, merge_delta
from surgery.sources.spool import Spool
from surgery.tensor import TensorSpec, byte_range


def squash_deltas(
    *sources: DeltaSource,
    base: Source | None = None,
    reversible: bool | None = None,
    jobs: int | None = None,
    progress: execute.Progress | None = None,
) -> Delta:
    """Make one exact delta of a chain: from the first one's base to the last one's fine-tune.

    Args:
        sources: the deltas, in the order of the chain.
        base: the first one's base. Without it, only blocks that one delta alone changes, that a delta stores whole, or
            whose differences lie at positions can be joined: dense differences are sorted by the base's exponents.
        reversible: with ``base``: store the way back; if all deltas have it by default.
        jobs: with ``base``: threads.
        progress: with ``base``: somebody who watches.

    Raises:
        UsageError: fewer than two deltas, or it takes the base.
        MismatchError: they do not follow each other, or ``base`` is another.

    >>> import numpy, surgery
    >>> steps = [{"w": numpy.float32([0] * 999 + [value])} for value in (3, 4, 5)]
    >>> one, two = (surgery.extract_delta(old, new) for old, new in zip(steps, steps[1:]))
    >>> surgery.merge(steps[0], squash_deltas(one, two))["w"][-1].item()
    5.0
    """
    deltas = [open_delta(source) for source in sources]
    if len(deltas) < 2:
        raise UsageError("a chain to squash has at least two deltas")
    check_chain(deltas)
    if base is None:
        if reversible is not None:
            raise UsageError(
                "without the base a squashed delta is reversible if all of the chain are", mend="add --base"
            )
        return functools.reduce(lambda first, second: _Joined(first, second).delta(), deltas)
    both_ways = all(delta.manifest.reversible for delta in deltas) if reversible is None else reversible
    start = open_checkpoint(base)
    found = extract_delta(start, merge_delta(start, *deltas), reversible=both_ways, jobs=jobs, progress=progress)
    _prove(found, deltas, start.label)
    return found


def _prove(found: Delta, deltas: Sequence[Delta], label: str) -> None:
    """Hold both ends against what the chain recorded: extraction fingerprints them as it goes."""
    for change in deltas[0].manifest.changes.values():
        if change.base is not None:
            known = deltas[0].manifest.base.tensors[change.base]
            if found.manifest.base.tensors[change.base].fingerprint != known.fingerprint:
                raise wrong_twin(change.base, label, reverse=False)
    for name, known in deltas[-1].manifest.task.tensors.items():
        if found.manifest.task.tensors[name].fingerprint != known.fingerprint:
            raise VerificationError("was not restored to the bits that it had", file=deltas[-1].label, tensor=name,
                                    mend="verify the deltas")  # fmt: skip


class _Joined:
    """Two deltas of a chain, made one block by block."""

    def __init__(self, first: Delta, second: Delta) -> None:
        self.first = first
        self.second = second
        self._spool = Spool(SPOOL_MEMORY)
        self._coded: CodedBlocks = {}
        self._places = {
            (delta, back): delta.places(base=back) for delta, back in itertools.product((first, second), (False, True))
        }  # fmt: skip

    def delta(self) -> Delta:
        """Return the one delta."""
        first, second = self.first.manifest, self.second.manifest
        changes = {name: self._change(name, change) for name, change in second.changes.items()}
        reversible = first.reversible and second.reversible
        back = {}
        if reversible:
            specs = {name: known.spec for name, known in first.base.tensors.items()}
            covered = {c.base for c in changes.values() if c.base is not None and covers(specs[c.base], c.tuned.spec)}
            back = {name: self._lost(name) for name in sorted(specs.keys() - covered)}
        configs = (first.base.config, second.task.config)
        if second.task.config is None:  # the second step changes nothing of it
            configs = (first.base.config, first.task.config)
        elif first.base.config is None:  # nor does the first
            configs = (second.base.config, second.task.config)
        manifest = Manifest(
            Side(first.base.name, first.base.tensors, configs[0]),
            Side(second.task.name, second.task.tensors, configs[1]),
            changes, reversible, back,
        )  # fmt: skip
        return Delta(
            f"{second.task.name} − {first.base.name}", manifest, Gathered(manifest, self._coded),
            delta_manifest.build(manifest), [*self.first.stored, *self.second.stored],
        )  # fmt: skip

    def _change(self, name: str, later: Change) -> Change:
        earlier = None if later.base is None else self.first.manifest.changes[later.base]
        origin = None if earlier is None else earlier.base
        if earlier is None or later.base is None:
            return Change(later.tuned, None, self._copy(self.second, name, False))
        was = None if origin is None else self.first.manifest.base.tensors[origin]
        if was is not None and was.fingerprint == later.tuned.fingerprint:
            return Change(later.tuned, origin, ())
        if later.prediction or earlier.prediction:
            raise self._takes_the_base(name, "is predicted from the base")
        if later.tuned.spec.shape != earlier.tuned.spec.shape or (was and was.spec.shape != earlier.tuned.spec.shape):
            raise self._takes_the_base(name, "is resized on the way")
        for number, pair in enumerate(zip(
            _pieces(self.first, later.base, earlier), _pieces(self.second, name, later), strict=True,
        )):  # fmt: skip
            joined = delta_codec.combine(*pair, later.tuned.spec.dtype, _extent(later.tuned.spec, number))
            if joined is None:
                raise self._takes_the_base(name, "has dense differences in both, sorted by the base's exponents")
            if joined[0] == SAME and origin is None:
                raise AssertionError("a new tensor has no block that is the base's")
            keep(self._spool, self._coded, (name, False), number, joined)
        return Change(later.tuned, origin, self._kept(name, later.tuned.spec, False))

    def _takes_the_base(self, name: str, why: str) -> UsageError:
        return UsageError(f"{why}: it takes the base to join them", file=self.second.label, tensor=name,
                          mend="name it with --base")  # fmt: skip

    def _copy(self, delta: Delta, name: str, back: bool) -> tuple[Coded, ...]:
        """Take a tensor's blocks over as they are, under the same name."""
        blocks = delta.manifest.back[name] if back else delta.manifest.changes[name].blocks
        offset = self._places[delta, back][name]
        for number, block in enumerate(blocks):
            keep(self._spool, self._coded, (name, back), number, (block.coding, read_block(delta.data, offset, block)))
            offset += block.size
        return blocks

    def _lost(self, name: str) -> tuple[Coded, ...]:
        """Find the bits of a base tensor that the last fine-tune says nothing of, in one of the ways back."""
        if name in self.first.manifest.back:
            return self._copy(self.first, name, True)
        middle, change = next(
            (middle, change) for middle, change in self.first.manifest.changes.items() if change.base == name
        )  # fmt: skip
        spec = self.first.manifest.base.tensors[name].spec
        if change.tuned.spec.shape != spec.shape:
            raise self._takes_the_base(name, "is resized on the way")
        offset = self._places[self.second, True][middle]
        blocks = self.second.manifest.back[middle]
        for number, (step, block) in enumerate(zip(_pieces(self.first, middle, change), blocks, strict=True)):
            raw = read_block(self.second.data, offset, block)
            offset += block.size
            known = Block(spec.dtype, delta_codec.decode_raw(raw, spec.dtype, _extent(spec, number)))
            bits = Block(spec.dtype, delta_codec.decode(*step, known, reverse=True))
            keep(self._spool, self._coded, (name, True), number, delta_codec.encode(bits, None))
        return self._kept(name, spec, True)

    def _kept(self, name: str, spec: TensorSpec, back: bool) -> tuple[Coded, ...]:
        count = delta_manifest.block_count(spec)
        return tuple(self._coded[name, back][number][0] for number in range(count))


def _pieces(delta: Delta, name: str, change: Change) -> Iterator[tuple[str, bytes]]:
    """Read a tensor's coded blocks one by one; of an unchanged tensor, blocks that say so."""
    if not change.blocks:
        yield from [(SAME, b"")] * delta_manifest.block_count(change.tuned.spec)
        return
    offset = delta.places()[name]
    for block in change.blocks:
        yield block.coding, read_block(delta.data, offset, block)
        offset += block.size


def _extent(spec: TensorSpec, number: int) -> int:
    """Count the bytes of a block, restored."""
    step = delta_codec.block_elements(spec.dtype)
    low, high = byte_range(spec, number * step, min((number + 1) * step, spec.numel))
    return high - low
