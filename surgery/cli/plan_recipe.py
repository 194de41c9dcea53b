"""``surgery plan RECIPE.yml``: what ``plan`` does where its input is a recipe."""

from __future__ import annotations

from typing import Any

import click

from surgery.algorithms.registry import COMPAT
from surgery.cli import options, planning


@click.command("plan", short_help="Show what a recipe would do.")
@click.argument("recipe", type=click.Path())
@click.option("--compat", type=click.Choice(COMPAT), default="mergekit", show_default=True,
              help="Whose semantics, where mergekit's differ from the paper's.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="For algorithms that draw random numbers.")
@options.allow_base_mismatch
@options.allow_nonfinite
@planning.accept
def command(recipe: str, compat: str, seed: int, allow_base_mismatch: bool, allow_nonfinite: bool, **how: Any) -> None:
    """Show what RECIPE would do, from headers alone: what becomes of every tensor, reads, writes, memory, time.

    \b
      surgery plan recipe.yml
      surgery plan recipe.yml -o merged --plan-out plan.json
      surgery run plan.json --job 1/2 & surgery run plan.json --job 2/2; surgery run plan.json --finish
    """
    from surgery.operations.recipe import merge_recipe, read_recipe  # brings torch, which --help must not pay for

    given: dict[str, Any] = {
        "compat": compat, "seed": seed, "allow_base_mismatch": allow_base_mismatch, "allow_nonfinite": allow_nonfinite,
    }  # fmt: skip
    merged = merge_recipe(recipe, **given)
    planning.show(merged, {"recipe": read_recipe(recipe).decode(), **given}, **how)
