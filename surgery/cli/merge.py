"""``surgery merge``."""

from __future__ import annotations

import click

from surgery.cli import options
from surgery.cli.writing import write
from surgery.errors import FormatError, UsageError
from surgery.formats.safetensors import strict_object
from surgery.sources import local


@click.command("merge", short_help="Merge adapters into a base.")
@click.argument("base", type=click.Path())
@click.argument("adapters", type=click.Path(), nargs=-1, required=True)
@click.option(
    "--coeff",
    type=float,
    multiple=True,
    metavar="C",
    help="Once for all adapters, or once for each; 1 by default, any sign.",
)
@click.option("--name-map", type=click.Path(), metavar="FILE", help="JSON: names in the adapter → names in the base.")
@click.option(
    "--allow-base-mismatch", is_flag=True, help="Merge although an adapter was taken from another base, or is in there."
)
@click.option("--allow-incomplete", is_flag=True, help="Merge an adapter that lacks modules its configuration names.")
@options.allow_nonfinite
@options.writing
@options.sharding
@options.resources
@options.progress
@options.common
def command(
    base: str, adapters: tuple[str, ...], coeff: tuple[float, ...], name_map: str | None, allow_base_mismatch: bool,
    allow_incomplete: bool, allow_nonfinite: bool, out: str, overwrite: bool, dry_run: bool, max_shard_size: int | None,
    jobs: int | None, max_memory: int | None, as_json: bool, quiet: bool, progress: str,
) -> None:  # fmt: skip
    """Merge ADAPTERS into BASE.

    Each weight becomes W + Σ c·ΔW, summed in float64 and rounded once; what no adapter touches is copied as bytes.
    PEFT LoRA adapters are understood with rank and alpha patterns, rsLoRA, DoRA, biases, saved modules and token rows.

    \b
      surgery merge base adapter -o merged
      surgery merge base math code --coeff 0.6 --coeff 0.4 -o both
      surgery merge base style --coeff -1 -o negated
    """
    from surgery.operations.merge import merge  # brings torch, which --help must not pay for

    merged = merge(
        base, *adapters, coeff=list(coeff) if coeff else 1.0, name_map=_name_map(name_map),
        allow_base_mismatch=allow_base_mismatch, allow_incomplete=allow_incomplete, allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    write(merged, out, "merge", overwrite=overwrite, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs,
          max_memory=max_memory, as_json=as_json, quiet=quiet, progress=progress)  # fmt: skip


def _name_map(path: str | None) -> dict[str, str] | None:
    if path is None:
        return None
    try:
        document = strict_object(local.read_small(local.resolve(path)))
    except FormatError as error:
        raise UsageError(f"--name-map: {error.what}", file=path) from None
    if not all(isinstance(value, str) for value in document.values()):
        raise UsageError("--name-map must be a JSON object of names", file=path)
    return document
