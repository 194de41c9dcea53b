"""``surgery merge RECIPE.yml``: what ``merge`` does where its input is a recipe."""

from __future__ import annotations

from typing import Any

import click

from surgery.algorithms.registry import COMPAT
from surgery.cli import mergekit_flags, options, pushing
from surgery.cli.writing import write
from surgery.errors import UsageError
from surgery.formats.tokenizer import FILE_STARTS


@click.command("merge", short_help="Merge as a recipe says.")
@click.argument("recipe", type=click.Path())
@click.argument("folder", type=click.Path(), required=False)
@click.option("-o", "--output", "out", type=click.Path(), help="A folder; one file where it ends in .safetensors.")
@options.overwrite
@options.dry_run
@options.push_to
@options.stream
@options.restart
@click.option("--compat", type=click.Choice(COMPAT), default="mergekit", show_default=True,
              help="Whose semantics, where mergekit's differ from the paper's.")  # fmt: skip
@click.option("--seed", type=int, help="For algorithms that draw random numbers; 0 by default.")
@options.allow_base_mismatch
@options.allow_nonfinite
@options.sharding
@options.resources
@options.progress
@options.no_cache
@options.common
@mergekit_flags.accept
def command(
    recipe: str, folder: str | None, out: str | None, overwrite: bool, dry_run: bool, restart: bool, compat: str, seed: int | None,
    allow_base_mismatch: bool, allow_nonfinite: bool, max_shard_size: int | None, jobs: int | None, max_memory: int | None, as_json: bool,
    quiet: bool, progress: str, **flags: Any,
) -> None:  # fmt: skip
    """Merge as RECIPE, a YAML file in mergekit's language, says; write to FOLDER or -o.

    \b
      surgery merge recipe.yml -o merged
      surgery merge recipe.yml merged --cuda --copy-tokenizer     mergekit's own command lines run too
      surgery plan recipe.yml                                     what would happen

    Everything is checked before data is read. Stages of a file with several recipes are never written. Models are
    folders or files under the working directory, or models in the Hugging Face cache.
    """
    notes = mergekit_flags.notes(flags)
    target = _target(out, folder, flags["out_path"])
    from surgery.operations.recipe import merge_recipe  # brings torch, which --help must not pay for

    chosen = next((number for number in (seed, flags["random_seed"]) if number is not None), 0)
    merged = merge_recipe(
        recipe, compat=compat, seed=chosen, allow_base_mismatch=allow_base_mismatch, allow_nonfinite=allow_nonfinite
    )
    if not flags["copy_tokenizer"]:
        merged.side_files = {name: path for name, path in merged.side_files.items() if not name.startswith(FILE_STARTS)}
    merged.notes += notes
    write(merged, target, "merge", overwrite=overwrite, dry_run=dry_run,
          max_shard_size=max_shard_size or flags["out_shard_size"], jobs=jobs or flags["num_threads"],
          max_memory=max_memory, as_json=as_json, quiet=quiet, progress=progress, restart=restart)  # fmt: skip


def _target(*given: str | None) -> str:
    named = [path for path in given if path is not None]
    if pushing.streams():
        named.append("")  # it goes to the Hub as it is made
    if len(named) != 1:
        raise UsageError("the output is named twice" if named else "no output is named", mend="say -o FOLDER once")
    return named[0]
