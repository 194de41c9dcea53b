"""``surgery run``."""

from __future__ import annotations

import re
from typing import Any

import click

from surgery.cli import options, terminal
from surgery.cli.writing import write
from surgery.errors import MismatchError, SurgeryError, UsageError
from surgery.formats import run_plan
from surgery.sources import local


class Share(click.ParamType[tuple[int, int]]):
    """One of several parts: ``3/16``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse a share."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            self.fail(f"{value!r} is no part like 3/16, counted from 1", param, ctx)
        return int(found[1]), int(found[2])


@click.command("run", short_help="Run a saved plan, or one part of it.")
@click.argument("plan", type=click.Path())
@click.option("--job", "share", type=Share(), metavar="K/N", help="Make the K-th of N parts of the files.")
@click.option("--finish", is_flag=True, help="Publish, once all parts are made.")
@options.dry_run
@options.resources
@options.progress
@options.no_cache
@options.common
def command(
    plan: str, share: tuple[int, int] | None, finish: bool, dry_run: bool, jobs: int | None, max_memory: int | None, as_json: bool,
    quiet: bool, progress: str,
) -> None:  # fmt: skip
    """Run PLAN, which surgery plan --plan-out saved, on any machine that sees the same files by the same paths.

    \b
      surgery run plan.json --job 1/2       on one machine
      surgery run plan.json --job 2/2       on another, at the same time
      surgery run plan.json --finish        on either, when both are done

    Parts may be made in any order, again, and by different splits; finished files are kept. Without --job and
    --finish all that is missing is made, and published.
    """
    if share and finish:
        raise UsageError("--job and --finish are two steps", mend="finish when all jobs are done")
    path = local.resolve(plan)
    try:
        saved = run_plan.parse(local.read_small(path))
    except SurgeryError as error:
        raise error.at(file=path) from None
    from surgery.operations.planned import planned  # brings torch, which --help must not pay for

    merged = planned(saved.merge)
    if merged.digest(max_shard_size=saved.max_shard_size) != saved.digest:
        raise MismatchError("an input, or surgery itself, is not as it was planned", file=path, mend="plan again")
    if dry_run and share is not None:
        plan_of_all = merged.plan(max_shard_size=saved.max_shard_size, jobs=jobs, max_memory=max_memory)
        terminal.plan(plan_of_all.part(share), as_json=as_json, verb="run")
        return
    if share is None:
        write(merged, saved.out, "run", overwrite=saved.overwrite, dry_run=dry_run, max_shard_size=saved.max_shard_size,
              jobs=jobs, max_memory=max_memory, as_json=as_json, quiet=quiet, progress=progress, finish=finish)  # fmt: skip
        return
    files = merged.save_share(
        saved.out, share, overwrite=saved.overwrite, max_shard_size=saved.max_shard_size, jobs=jobs,
        max_memory=max_memory, progress=terminal.watcher(progress, quiet=quiet, what="run"),
    )  # fmt: skip
    if as_json:
        terminal.document({"schema": "surgery.run/1", "out": saved.out, "job": list(share), "files": files})
    elif not quiet:
        click.echo(
            f"job {share[0]}/{share[1]}: {len(files)} of {len(saved.files)} files are finished: {', '.join(files)}"
        )
