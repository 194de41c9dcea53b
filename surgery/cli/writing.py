"""What all commands that write a checkpoint do after their one call: print the plan, or save and say what was done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from surgery.checkpoint import Checkpoint
from surgery.cli import pushing, terminal
from surgery.errors import printable
from surgery.plan import Plan
from surgery.report import percent
from surgery.tensor import human_bytes


def write(
    checkpoint: Checkpoint,
    out: str,
    verb: str,
    *,
    overwrite: bool,
    dry_run: bool,
    max_shard_size: int | None,
    jobs: int | None,
    max_memory: int | None,
    as_json: bool,
    quiet: bool,
    progress: str,
    restart: bool = False,
    finish: bool = False,
) -> None:
    """Save a lazy checkpoint and report, or print its plan."""
    plan = checkpoint.plan(
        None if pushing.streams() else out, max_shard_size=max_shard_size, jobs=jobs, max_memory=max_memory
    )
    if dry_run:
        terminal.plan(plan, as_json=as_json, verb=verb, notes_=checkpoint.notes)
        return
    to = pushing.look()
    began = time.monotonic()
    if pushing.streams():
        done = pushing.stream(
            checkpoint, to, max_shard_size=max_shard_size, jobs=jobs, max_memory=max_memory,
            progress=terminal.watcher(progress, quiet=quiet, what=verb),
        )  # fmt: skip
        _say_streamed(done, plan, time.monotonic() - began, as_json=as_json, quiet=quiet, notes=checkpoint.notes)
        return
    record = checkpoint.save(
        out, overwrite=overwrite, max_shard_size=max_shard_size, jobs=jobs, max_memory=max_memory,
        restart=restart, finish=finish, progress=terminal.watcher(progress, quiet=quiet, what=verb),
    )  # fmt: skip
    seconds = time.monotonic() - began
    nbytes = sum(file.size for file in plan.files)
    pushed = pushing.push(out, to, quiet=quiet or as_json, progress=progress)
    if as_json:
        head = {
            key: value for key, value in record.items() if key not in ("schema", "tensors", "kept", "files", "digest")
        }
        terminal.document({"schema": f"surgery.{verb}/1", "out": out, "tensors": dict(plan.counts), "bytes": nbytes,
                           "seconds": round(seconds, 3), "notes": checkpoint.notes, **({"pushed": pushed} if pushed else {}), **head})  # fmt: skip
    elif quiet:
        click.echo(printable(pushed or out))
    else:
        done = ", ".join(f"{count:,} {kind}" for kind, count in plan.counts.items() if count)
        files = f"{len(plan.files)} file{'s' if len(plan.files) > 1 else ''}"
        click.echo(f"wrote {printable(out)} ({human_bytes(nbytes)} in {files}; tensors: {done}) in {seconds:.1f} s")
        if pushed:
            click.echo(f"pushed to {printable(pushed)}")
        restored = record.get("restored")
        if restored and restored["proven_exact"]:  # none where no record says what the base was
            click.echo(
                f"{restored['proven_exact']} of {restored['tensors']} touched tensors proven bit-identical to the base"
            )
        for line in _accounts(record):
            click.echo(line)
        terminal.notes([*checkpoint.notes, *record.get("warnings", ())])


def _accounts(record: Mapping[str, Any]) -> Iterator[str]:
    """Say what rounding left of a merge's deltas, and what it costs to be able to undo it."""
    kept, undo = record.get("delta_kept"), record.get("undo")
    if kept and kept["error"] is not None:
        worst = kept["worst"][0]
        yield (
            f"of the delta {percent(kept['changed'])} of the weights took something; error {percent(kept['error'])}, "
            f"at most {percent(kept['tensors'][worst]['error'])} ({printable(worst)})"
        )
    if undo and undo["bytes"] + undo["original_bytes"]:
        bits = f" ({8 * undo['bytes'] / undo['weights']:.2g} bits a weight)" if undo["weights"] else ""
        kinds = (
            f" and {undo['originals']} originals, {human_bytes(undo['original_bytes'])}" if undo["originals"] else ""
        )
        yield f"kept for unmerge: undo records, {human_bytes(undo['bytes'])}{bits}{kinds}"


def _say_streamed(url: str, plan: Plan, seconds: float, *, as_json: bool, quiet: bool, notes: Sequence[str]) -> None:
    if as_json:
        terminal.document({"schema": "surgery.push/1", "pushed": url, "tensors": dict(plan.counts),
                           "bytes": sum(file.size for file in plan.files), "seconds": round(seconds, 3), "notes": list(notes)})  # fmt: skip
    elif quiet:
        click.echo(printable(url))
    else:
        nbytes = human_bytes(sum(file.size for file in plan.files))
        click.echo(f"pushed {nbytes} as they were made to {printable(url)} in {seconds:.1f} s")
        terminal.notes(notes)
