"""``delta switch``: one fine-tune of a base turned into another, without the base where the way back is stored."""

from __future__ import annotations

from surgery.checkpoint import Checkpoint, Source, open_checkpoint
from surgery.errors import MismatchError, UsageError
from surgery.exact import Delta, open_delta
from surgery.operations.merge_delta import DeltaSource, Restoration
from surgery.tensor import LazyTensor


def switch_delta(known: Source, source: DeltaSource, target: DeltaSource, *, base: Source | None = None) -> Checkpoint:
    """Turn the fine-tune of one exact delta into that of another of the same base, bit for bit and lazily.

    Tensors that both fine-tunes have alike are copied. All others go back to the base's by the first delta, and on by the
    second; with ``base`` they are restored from it.

    Args:
        known: the first delta's fine-tune.
        source: the delta that it was restored by.
        target: the delta of what is wanted.
        base: the base of both, for a first delta without a way back.

    Raises:
        UsageError: the first delta holds no way back, and no base is given.
        MismatchError: the deltas are of different bases, or ``known`` lacks a tensor.

    >>> import numpy, surgery
    >>> base, one, two = ({"w": numpy.float32([1, 2, value])} for value in (3, 4, 5))
    >>> first, second = (surgery.extract_delta(base, tuned, reversible=True) for tuned in (one, two))
    >>> switch_delta(one, first, second)["w"].tolist()
    [1.0, 2.0, 5.0]
    """
    old, new = open_delta(source), open_delta(target)
    _check_same_base(old, new)
    checkpoint = open_checkpoint(known)
    given = _alike(checkpoint, old, new)
    if base is not None:
        work = Restoration(open_checkpoint(base), new, reverse=False, given=(given, checkpoint.label))
    else:
        if not old.manifest.goes_back:
            raise UsageError(
                "holds no way back to the base: it was made without --reversible", file=old.label,
                mend="name the base with --base",
            )  # fmt: skip
        back = Restoration(checkpoint, old, reverse=True)
        work = Restoration(back.checkpoint(), new, reverse=False, previous=back, given=(given, checkpoint.label))
    outcome = work.checkpoint()
    if base is not None:
        outcome.stored += checkpoint.stored  # else it is what everything begins with
    outcome.shards |= {name: checkpoint.shards[name] for name in given if name in checkpoint.shards}
    return outcome


def _check_same_base(old: Delta, new: Delta) -> None:
    there = old.manifest.base.tensors
    for name, known in new.manifest.base.tensors.items():
        if name not in there or there[name].fingerprint != known.fingerprint:
            raise MismatchError(
                f"is not the same in the base of {old.label}: deltas are switched between fine-tunes of one base",
                file=new.label, tensor=name,
            )  # fmt: skip


def _alike(checkpoint: Checkpoint, old: Delta, new: Delta) -> dict[str, LazyTensor]:
    """Find the tensors that both fine-tunes have, bit for bit."""
    there = old.manifest.task.tensors
    return {
        name: checkpoint.tensors[name] for name, known in new.manifest.task.tensors.items()
        if name in there and there[name].fingerprint == known.fingerprint and name in checkpoint.tensors
        and checkpoint.tensors[name].spec == known.spec
    }  # fmt: skip
