"""What ``plan`` does with a merge, be it of models or of a recipe: print what would happen, and save it for ``run``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from surgery.checkpoint import Checkpoint
from surgery.cli import options, terminal
from surgery.errors import UsageError, printable
from surgery.formats import run_plan
from surgery.writer import write_file

accept = options.stack(
    click.option("-o", "--output", "out", type=click.Path(), help="The folder that a saved plan will write."),
    click.option("--plan-out", type=click.Path(), metavar="FILE", help="Save the plan for surgery run."),
    options.overwrite,
    options.sharding,
    options.resources,
    options.no_cache,
    options.common,
)
"""The options of planning."""


def show(
    merged: Checkpoint, described: Mapping[str, Any], *, out: str | None, plan_out: str | None, overwrite: bool, max_shard_size: int | None,
    jobs: int | None, max_memory: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Print what a merge would do, from headers alone, and save it where that is asked for.

    ``described`` is what goes into a saved plan, see :class:`surgery.formats.run_plan.RunPlan`; the rest are the options
    of :data:`accept`.

    Raises:
        UsageError: a plan is to be saved that says no folder to write.
    """
    if plan_out is not None and (out is None or out.endswith(".safetensors")):
        raise UsageError("a saved plan needs the folder that it will write", mend="say -o FOLDER")
    found = merged.plan(max_shard_size=max_shard_size, jobs=jobs, max_memory=max_memory)
    tables = merged.origin.tables if merged.origin else ()
    if not quiet:
        terminal.plan(found, as_json=as_json, verb="merge", notes_=merged.notes, tables=tables)
    if not as_json and not quiet:
        from surgery.operations import cost  # brings torch, which --help must not pay for

        time = cost.seconds(found, merged.tensors.values())
        terminal.facts([("time", f"about {time:.0f} s, were this the machine of docs/performance.md, and idle")])
    if plan_out is not None and out is not None:
        files = {file.name: file.size for file in found.files}
        digest = merged.digest(max_shard_size=max_shard_size)
        saved = run_plan.RunPlan(dict(described), out, digest, max_shard_size, overwrite, files)
        write_file(plan_out, run_plan.encode(saved), overwrite=overwrite)
        if not as_json:
            shown = printable(plan_out)
            click.echo(
                shown
                if quiet
                else f"wrote {shown}: {len(found.files)} file{'s' if len(found.files) > 1 else ''} to make"
            )
