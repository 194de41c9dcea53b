"""``extract-delta``: what a fine-tune is beside its base, exactly."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from surgery import execute
from surgery.checkpoint import Checkpoint, Source, default_jobs, open_checkpoint
from surgery.errors import SurgeryError
from surgery.exact import SUFFIX, Delta, delta_output
from surgery.operations.delta_coding import Coding, Task
from surgery.operations.outcomes import Outcome, refuse_shared_outputs
from surgery.sources.local import stem_of


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
    all differences sorted by the base's exponents, or the fine-tune's bits as they are. A matrix that moved along few
    directions, as by a merged LoRA, is coded against a low-rank prediction. Differences count units in the
    last place, as integers. A tensor with another number of rows is coded against the rows that the base has; one that the
    base lacks, or has in another dtype or shape, is stored whole.

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
    coding = Coding(open_checkpoint(base), reversible)
    task = coding.add(open_checkpoint(tuned), rename)
    coding.run(jobs or default_jobs(), progress or execute.Silent())
    if task.error:
        raise task.error
    return coding.compose(task)


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
    done: Callable[[Outcome[Delta]], None] = lambda _outcome: None,
) -> list[Outcome[Delta]]:
    """Extract a delta from each of many fine-tunes of one base into ``out/<ft>.delta``; the base is read once.

    One that fails does not stop the others.

    Args:
        base: the checkpoint before training.
        tuned: the fine-tunes: folders or files.
        out: the folder for the deltas.
        overwrite: replace deltas that are there.
        reversible: see :func:`extract_delta`.
        rename: see :func:`extract_delta`.
        jobs: threads.
        progress: somebody who watches.
        done: told of each fine-tune when it is finished, in their order.

    Returns:
        One outcome a fine-tune, in their order: a delta that was written, or an error.

    Raises:
        UsageError: two fine-tunes would have one output.
        SurgeryError: the base cannot be read.
    """
    outcomes: list[Outcome[Delta]] = [
        Outcome(os.fspath(source), str(Path(out) / f"{stem_of(source)}{SUFFIX}")) for source in tuned
    ]
    refuse_shared_outputs([outcome.out for outcome in outcomes])
    checkpoint = open_checkpoint(base)
    coding = Coding(checkpoint, reversible)
    tasks = [_begin(coding, outcome, rename, overwrite) for outcome in outcomes]
    if coding.tasks:
        coding.run(jobs or default_jobs(), progress or execute.Silent())
    for outcome, task in zip(outcomes, tasks, strict=True):
        _finish(coding, outcome, task, overwrite)
        done(outcome)
    return outcomes


def _begin(coding: Coding, outcome: Outcome[Delta], rename: Sequence[str], overwrite: bool) -> Task | None:
    try:
        tuned = open_checkpoint(outcome.tuned)
        check_output(outcome.out, (coding.base, tuned), overwrite=overwrite)
        return coding.add(tuned, rename)
    except SurgeryError as error:
        outcome.error = error
        return None


def _finish(coding: Coding, outcome: Outcome[Delta], task: Task | None, overwrite: bool) -> None:
    if task is None:
        return
    outcome.error = task.error
    if task.error:
        return
    try:
        delta = coding.compose(task)
        delta.save(outcome.out, overwrite=overwrite)
    except SurgeryError as error:
        outcome.error = error
    else:
        outcome.made = delta


def check_output(out: str | os.PathLike[str], inputs: Sequence[Checkpoint], *, overwrite: bool) -> None:
    """Refuse an output before anything is computed.

    Raises:
        UsageError: the name does not end in ``.delta``.
        OutputError: it exists, or is an input.
    """
    paths = [stored.path for checkpoint in inputs for stored in checkpoint.stored]
    delta_output(out, overwrite=overwrite, inputs=paths)
