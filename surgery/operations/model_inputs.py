"""What stands for a model in a merge: a checkpoint, or a base with an adapter or an exact delta in it. Never on disk."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from surgery import numerics, provenance
from surgery.adapter import Adapter, is_adapter, open_adapter
from surgery.binding import bind
from surgery.checkpoint import Checkpoint, Origin, require_arithmetic, work_of
from surgery.exact import Delta, is_delta, open_delta
from surgery.history import history_of
from surgery.lossy import is_lossy, open_lossy
from surgery.names import align
from surgery.operations.merge_adapters import Work, resized_config
from surgery.operations.merge_delta import merge_delta
from surgery.tensor import BITS, LazyTensor, byte_range, read_bytes, renamed

Change = str | os.PathLike[str] | Adapter | Delta
"""Something that is a model only together with its base."""


def is_change(source: object) -> TypeGuard[Change]:
    """Say whether ``source`` is an adapter, an exact delta, or a lossy one, which is an adapter in another coding."""
    return is_adapter(source) or is_delta(source) or is_lossy(source)


def kind_of(change: Change) -> str:
    """Name it for people: ``an exact delta``, ``a lossy delta`` or ``an adapter``."""
    return "an exact delta" if is_delta(change) else "a lossy delta" if is_lossy(change) else "an adapter"


def with_change(base: Checkpoint, change: Change, **options: Any) -> Checkpoint:
    """Return what an adapter or an exact delta stands for: its base with it in there, lazily.

    An adapter's weights are float32 at least, so that nothing is rounded in between; a delta's have their own bits.
    The record of the result refuses a base that the change was not taken from.

    Args:
        base: the base.
        change: the adapter or delta.
        **options: for adapters, see :func:`as_model`.

    Raises:
        MismatchError: it does not fit this base.
    """
    if not is_delta(change):
        assert not isinstance(change, Delta)  # says is_delta
        return as_model(base, open_lossy(change) if is_lossy(change) else open_adapter(change), **options)
    delta = open_delta(change)
    restored = merge_delta(base, delta)
    restored.label = delta.label
    return buffered(restored)


def as_model(
    base: Checkpoint,
    adapter: Adapter,
    *,
    name_map: Mapping[str, str] | None = None,
    allow_base_mismatch: bool = False,
    allow_incomplete: bool = False,
) -> Checkpoint:
    """Return the base with an adapter merged into it, not rounded: touched weights are float32 at least.

    Args:
        base: the base.
        adapter: the adapter.
        name_map: names in the adapter → names in the base.
        allow_base_mismatch: take it although it was taken from another base, or is in there already.
        allow_incomplete: take it although it lacks modules that its configuration names.

    Raises:
        MismatchError: the adapter does not fit this base, or is in there already.
    """
    binding = bind(adapter, base, name_map=name_map, allow_incomplete=allow_incomplete)
    work = Work(
        base, history_of(base), [adapter], [1.0], [binding], allow_base_mismatch=allow_base_mismatch, undo=False
    )
    work.check_not_merged_yet()
    require_arithmetic(base, sorted(work.touched))
    config, files = resized_config(base.config, [binding.resized])
    stored = adapter.stored and adapter.report is None  # not an adapter that was just made
    return Checkpoint(
        {name: work.output(name, wide=True) for name in base.tensors},
        label=adapter.label,
        stored=[*base.stored, *adapter.stored],
        shards=base.shards,
        config=config,
        side_files=base.side_files,
        notes=[*base.notes, *binding.notes],
        origin=Origin(
            work.record,
            files={**(base.origin.files if base.origin else {}), **files},
            bytes_read=bytes_read(base) + adapter.nbytes,
            work=work_of([base], work.prints, sorted((name_map or {}).items())) if stored else None,
        ),
    )


def bytes_read(model: Checkpoint) -> int:
    """Return how many bytes making all of a model reads: what it was made from, where it is not stored as it is."""
    made = None if model.origin is None else model.origin.bytes_read
    return model.nbytes if made is None else made


def buffered(model: Checkpoint) -> Checkpoint:
    """Make a model's tensors readable at any element where they come in units larger than a block.

    Blocks and rows of a merge need not fit the units: those of coded differences, of whole matrices.
    """
    large = {name: tensor for name, tensor in model.tensors.items() if tensor.unit > numerics.BLOCK}
    if not large:
        return model
    found, kept = copy.copy(model), threading.local()
    found.tensors = {name: Buffered(large[name], kept) if name in large else t for name, t in model.tensors.items()}
    return found


def respelled(model: Checkpoint, names: Collection[str]) -> Checkpoint:
    """Give a model's tensors the names that the others know them by; see :func:`surgery.names.align`.

    Args:
        model: the model.
        names: those of the base, or of the first model.

    Raises:
        MismatchError: two names collapse into one.

    >>> from surgery.checkpoint import open_checkpoint
    >>> import numpy
    >>> list(respelled(open_checkpoint({"model.w": numpy.zeros(2)}), ["w"]))
    ['w']
    """
    alignment = align(names, list(model.tensors))
    if all(old == new for old, new in alignment.names.items()):
        return model
    found = copy.copy(model)
    found.tensors = {new: renamed(model.tensors[old], new) for old, new in alignment.names.items()}
    found.shards = {alignment.names[old]: shard for old, shard in model.shards.items()}
    found.notes = [*model.notes, *(f"{model.label}: {note}" for note in alignment.notes)]
    found.origin = None if model.origin is None else _respelled(model.origin, alignment.names)
    return found


def _respelled(origin: Origin, names: Mapping[str, str]) -> Origin:
    """Let a record be composed from fingerprints under other names."""

    def record(prints: Mapping[str, str]) -> dict[str, Any]:
        return origin.record({old: prints[new] for old, new in names.items() if new in prints})

    return replace(origin, record=record)


def input_entry(role: str, model: Checkpoint, read: Mapping[str, provenance.Traced], *, draft: bool) -> dict[str, Any]:
    """Compose a record's entry for one input of a merge, and let what it was made from prove itself.

    Args:
        role: what it is in the merge; a ``change`` is entered as the adapter or delta that it was made with.
        model: the input.
        read: the tensors of it that went into the merge.
        draft: nothing was read yet.

    Raises:
        MismatchError: an adapter or a delta in it was taken from another base.
    """
    prints = {name: provenance.PLACEHOLDER if draft else tensor.fingerprint() for name, tensor in read.items()}
    leaves = model.origin.record(prints).get("inputs", []) if model.origin is not None else []
    if role == "change":
        return dict(leaves[-1])
    whole = provenance.PLACEHOLDER if draft else provenance.combine(prints)
    return {"role": role, "name": model.label, **model.pinned, "fingerprint": whole} | (
        {"inputs": leaves} if leaves else {}
    )


class Buffered:
    """A tensor of large units, readable at any element: each thread keeps the unit that it made last.

    Args:
        source: the tensor.
        kept: what is kept, shared by all tensors of a model: a thread reads one of them at a time.
    """

    unit, scratch = 1, 0

    def __init__(self, source: LazyTensor, kept: threading.local) -> None:
        self.spec = source.spec
        self._source = source
        self._kept = kept

    @property
    def resident(self) -> int:
        """What the source holds and needs for a unit, and the unit."""
        count = min(self._source.unit, self.spec.numel)
        return self._source.resident + count * BITS[self.spec.dtype] // 8 * (1 + self._source.scratch)

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Copy the range from the units that it lies in."""
        unit = self._source.unit
        first, _ = byte_range(self.spec, start, stop)
        for number in range(start // unit, -(-stop // unit)):
            low, high = max(start, number * unit), min(stop, (number + 1) * unit)
            here = slice(*(place - first for place in byte_range(self.spec, low, high)))
            there = slice(*byte_range(self.spec, low - number * unit, high - number * unit))
            out[here] = self._unit(number)[there]

    def _unit(self, number: int) -> memoryview:
        held = getattr(self._kept, "held", None)
        if held is None or held[0] is not self or held[1] != number:
            self._kept.held = None  # let go of the old one before the new one is made
            start = number * self._source.unit
            data = read_bytes(self._source, start, min(start + self._source.unit, self.spec.numel))
            self._kept.held = held = (self, number, memoryview(data))
        found: memoryview = held[2]
        return found
