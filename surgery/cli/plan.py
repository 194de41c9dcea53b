"""``surgery plan``."""

from __future__ import annotations

import click

from surgery.algorithms.registry import COMPAT
from surgery.cli import options, terminal
from surgery.errors import UsageError
from surgery.formats import run_plan
from surgery.tensor import human_bytes
from surgery.writer import write_file

RATE = 1e9
"""Bytes a second for the time estimate."""


@click.command("plan", short_help="Show what a recipe would do.")
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", "out", type=click.Path(), help="The folder that a saved plan will write.")
@click.option("--plan-out", type=click.Path(), metavar="FILE", help="Save the plan for surgery run.")
@options.overwrite
@click.option("--compat", type=click.Choice(COMPAT), default="mergekit", show_default=True,
              help="Whose semantics, where mergekit's differ from the paper's.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="For algorithms that draw random numbers.")
@options.allow_nonfinite
@options.sharding
@options.resources
@options.no_cache
@options.common
def command(
    recipe: str, out: str | None, plan_out: str | None, overwrite: bool, compat: str, seed: int, allow_nonfinite: bool,
    max_shard_size: int | None, jobs: int | None, max_memory: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Show what RECIPE would do, from headers alone: what becomes of every tensor, reads, writes, memory, time.

    \b
      surgery plan recipe.yml
      surgery plan recipe.yml -o merged --plan-out plan.json
      surgery run plan.json --job 1/2 & surgery run plan.json --job 2/2; surgery run plan.json --finish
    """
    from surgery.operations.recipe import merge_recipe, read_recipe  # brings torch, which --help must not pay for

    if plan_out is not None and (out is None or out.endswith(".safetensors")):
        raise UsageError("a saved plan needs the folder that it will write", mend="say -o FOLDER")
    merged = merge_recipe(recipe, compat=compat, seed=seed, allow_nonfinite=allow_nonfinite)
    found = merged.plan(max_shard_size=max_shard_size, jobs=jobs, max_memory=max_memory)
    tables = merged.origin.tables if merged.origin else ()
    if not quiet:
        terminal.plan(found, as_json=as_json, verb="merge", notes_=merged.notes, tables=tables)
    if not as_json and not quiet:
        total = found.bytes_read + found.bytes_written
        terminal.facts([("time", f"about {total / RATE:.0f} s where reading and writing go at {human_bytes(RATE)}/s")])
    if plan_out is not None and out is not None:
        saved = run_plan.RunPlan(
            read_recipe(recipe).decode(), out, merged.digest(max_shard_size=max_shard_size), compat, seed,
            allow_nonfinite, max_shard_size, overwrite, {file.name: file.size for file in found.files},
        )  # fmt: skip
        write_file(plan_out, run_plan.encode(saved), overwrite=overwrite)
        if not as_json:
            click.echo(plan_out if quiet else f"wrote {plan_out}: {len(found.files)} files to make")
