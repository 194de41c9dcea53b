"""``extract-lora`` of many fine-tunes of one base: one adapter each, the base read and fingerprinted once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import execute
from surgery.adapter import Adapter
from surgery.checkpoint import Source, open_checkpoint
from surgery.errors import SurgeryError, UsageError
from surgery.operations.extract_lora import plan_extraction
from surgery.operations.extraction_measure import Measurement, in_parallel, largest_first
from surgery.operations.extraction_run import compose
from surgery.operations.outcomes import Outcome, refuse_shared_outputs
from surgery.provenance import Held
from surgery.sources.local import stem_of
from surgery.sources.remote import expect


@dataclass
class _Task:
    outcome: Outcome[Adapter]
    measured: Measurement | None = None


def extract_many(
    base: Source,
    tuned: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: execute.Progress | None = None,
    done: Callable[[Outcome[Adapter]], None] = lambda _outcome: None,
    **options: Any,
) -> list[Outcome[Adapter]]:
    """Extract an adapter from each of many fine-tunes of one base into ``out/<ft>-lora-<rule>``.

    Every tensor of the base is read once, and held against all fine-tunes. One that fails does not stop the others.

    Args:
        base: the checkpoint before training.
        tuned: the fine-tunes: folders or files.
        out: the folder for the adapters.
        overwrite: replace adapters that are there.
        jobs: threads.
        progress: somebody who watches.
        done: told of each fine-tune when it is finished, in their order.
        options: as for :func:`surgery.extract_lora`.

    Returns:
        One outcome a fine-tune, in their order: an adapter that was written, or an error.

    Raises:
        UsageError: two fine-tunes would have one output.
        SurgeryError: the base cannot be read.
    """
    places = [os.path.realpath(source) for source in tuned]
    if twice := next((source for source, place in zip(tuned, places, strict=True) if places.count(place) > 1), None):
        raise UsageError("is named twice", file=twice)
    checkpoint = open_checkpoint(base)
    tasks = [_plan(checkpoint, source, Path(out), overwrite, {**options, "jobs": jobs}) for source in tuned]
    refuse_shared_outputs([task.outcome.out for task in tasks])
    runs = [task for task in tasks if task.measured is not None]
    _examine(runs, progress or execute.Silent())
    for task in tasks:
        _write(task, overwrite)
        done(task.outcome)
    return [task.outcome for task in tasks]


def _plan(base: Source, source: Any, out: Path, overwrite: bool, options: dict[str, Any]) -> _Task:
    outcome: Outcome[Adapter] = Outcome(os.fspath(source), str(out / stem_of(source)))
    try:
        plan = plan_extraction(base, source, **options)
        outcome.out = str(out / f"{stem_of(source)}-lora-{plan.rule.slug}")
        plan.check_output(outcome.out, overwrite=overwrite)
    except SurgeryError as error:
        outcome.error = error
        return _Task(outcome)
    return _Task(outcome, Measurement(plan))


def _examine(tasks: Sequence[_Task], progress: execute.Progress) -> None:
    """Go through the base once; whoever fails on the way is left behind."""
    if not tasks:
        return
    plans = [task.measured.plan for task in tasks if task.measured]
    base = plans[0].base
    wanted_by = {id(task.measured): set(task.measured.plan.names) for task in tasks if task.measured}
    wanted = set().union(*wanted_by.values())
    lock = threading.Lock()

    def work(name: str) -> None:
        held = Held(base.tensors[name])
        progress.advance(held.spec.nbytes)
        for task in tasks:
            with lock:
                measured = task.measured
            if measured is None or name not in wanted_by[id(measured)]:
                continue
            try:
                measured.examine(name, held)
            except SurgeryError as error:
                with lock:
                    task.outcome.error, task.measured = task.outcome.error or error, None
            progress.advance(measured.plan.tuned[name].spec.nbytes)

    expect(base.tensors[name] for name in wanted)
    expect(plan.tuned[name] for plan in plans for name in plan.names)
    progress.start(sum(base.tensors[name].spec.nbytes for name in wanted) + sum(p.tuned_bytes for p in plans))
    try:
        in_parallel(largest_first(base, wanted), work, min(plan.settings.jobs for plan in plans))
    finally:
        progress.finish()


def _write(task: _Task, overwrite: bool) -> None:
    if task.measured is None:
        return
    try:
        adapter = compose(task.measured)
        adapter.save(task.outcome.out, overwrite=overwrite)
    except SurgeryError as error:
        task.outcome.error = error
    else:
        task.outcome.made = adapter
    task.measured = None  # lets its spool go
