"""``surgery plan``."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import merge, planning

PLANNING = ("out", "plan_out", "overwrite", "max_shard_size", "jobs", "max_memory", "as_json", "quiet")


@click.command("plan", short_help="Show what a merge or a recipe would do.")
@merge.accept
@planning.accept
def command(**given: Any) -> None:
    """Show what surgery merge BASE OTHERS would do, from headers alone: what becomes of every tensor, reads, writes, memory.

    \b
      surgery plan recipe.yml                                         see surgery plan recipe.yml --help
      surgery plan base ft1 ft2 --algorithm ties -p density=0.5
      surgery plan base ft1 ft2 --algorithm ties -o merged --plan-out plan.json
      surgery run plan.json --job 1/2 & surgery run plan.json --job 2/2; surgery run plan.json --finish
    """
    how = {name: given.pop(name) for name in PLANNING}
    described = merge.describe(**given)
    from surgery.operations.planned import planned  # brings torch, which --help must not pay for

    planning.show(planned(described), described, **how)
