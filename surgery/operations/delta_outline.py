"""What ``extract-delta`` and ``delta squash`` would do, from headers and manifests alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.checkpoint import Source, open_checkpoint
from surgery.exact import Delta
from surgery.formats.delta_manifest import fits
from surgery.names import align, parse_renames
from surgery.operations.merge_delta import check_chain


@dataclass(frozen=True, slots=True)
class DeltaOutline:
    """One fine-tune beside its base."""

    compared: int
    """Tensors that are coded against the base's."""
    whole: int
    """Tensors that the base lacks, or has in another dtype or another shape of rows."""
    removed: int
    """Tensors of the base alone."""
    bytes_read: int
    bytes_written: int
    """At most, where not one block is shorter than its bits; without the manifest."""


def outline_delta(base: Source, tuned: Source, *, reversible: bool = False, rename: Sequence[str] = ()) -> DeltaOutline:
    """Say what an exact delta would hold, without reading data.

    Args:
        base: the checkpoint before training.
        tuned: the checkpoint after it.
        reversible: whether the way back would be stored too.
        rename: ``OLD=NEW`` rules that turn the fine-tune's names into the base's.

    Raises:
        MismatchError: two of the fine-tune's names become one.

    >>> import numpy
    >>> outline_delta({"w": numpy.zeros(2)}, {"w": numpy.ones(2), "v": numpy.ones(3)})
    DeltaOutline(compared=1, whole=1, removed=0, bytes_read=56, bytes_written=40)
    """
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    spelled = align(list(before.tensors), list(after.tensors), parse_renames(rename)).names
    specs = before.specs
    alike = [name for name, spec in after.specs.items() if spelled[name] in specs and fits(specs[spelled[name]], spec)]
    removed = specs.keys() - set(spelled.values())
    return DeltaOutline(
        len(alike), len(after) - len(alike), len(removed), before.nbytes + after.nbytes,
        after.nbytes + (before.nbytes if reversible else 0),
    )  # fmt: skip


def outline_squash(deltas: Sequence[Delta], base: Source | None = None) -> DeltaOutline:
    """Say what one delta of a chain would hold, without reading its blocks.

    Args:
        deltas: in the order of the chain.
        base: the first one's base, where it will be read too.

    Raises:
        MismatchError: they do not follow each other.
    """
    check_chain(deltas)
    last = deltas[-1].manifest
    origins = {name: _origin(deltas, name) for name in last.changes}
    found = {origin for origin in origins.values() if origin is not None}
    before = 0 if base is None else open_checkpoint(base).nbytes
    return DeltaOutline(
        sum(origin is not None for origin in origins.values()),
        sum(origin is None for origin in origins.values()),
        len(deltas[0].manifest.base.tensors.keys() - found),
        sum(delta.nbytes for delta in deltas) + before,
        sum(known.spec.nbytes for known in last.task.tensors.values())
        + (before if all(delta.manifest.reversible for delta in deltas) else 0),
    )


def _origin(deltas: Sequence[Delta], name: str) -> str | None:
    """Follow a tensor of the last fine-tune back to the first base's; ``None`` where one of the chain holds it whole."""
    for delta in reversed(deltas):
        known = delta.manifest.changes[name].base
        if known is None:
            return None
        name = known
    return name
