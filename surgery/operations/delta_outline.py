"""What ``extract-delta`` would do, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.checkpoint import Source, open_checkpoint
from surgery.formats.delta_manifest import fits
from surgery.names import align, parse_renames


@dataclass(frozen=True, slots=True)
class DeltaOutline:
    """One fine-tune beside its base."""

    compared: int
    """Tensors that are coded against the base's, or against the rows that it has."""
    whole: int
    """Tensors that the base lacks, or has in another dtype or shape."""
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
    alike = [
        name for name, spec in after.specs.items()
        if (twin := specs.get(spelled[name])) is not None and fits(twin, spec)
    ]  # fmt: skip
    removed = specs.keys() - set(spelled.values())
    return DeltaOutline(
        len(alike), len(after) - len(alike), len(removed), before.nbytes + after.nbytes,
        after.nbytes + (before.nbytes if reversible else 0),
    )  # fmt: skip
