"""``surgery unmerge``."""

from __future__ import annotations

import click

from surgery.cli import options
from surgery.cli.writing import write


@click.command("unmerge", short_help="Take an adapter out of a merged checkpoint again.")
@click.argument("merged", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.option("--base", type=click.Path(), help="The checkpoint before the merge: makes the result exact.")
@click.option("--coeff", type=float, metavar="C", help="The coefficient it was merged with; the record's, or 1.")
@options.name_map
@options.writing
@options.sharding
@options.resources
@options.progress
@options.no_cache
@options.common
def command(
    merged: str, adapter: str, base: str | None, coeff: float | None, name_map: dict[str, str] | None, out: str, overwrite: bool, dry_run: bool,
    max_shard_size: int | None, jobs: int | None, max_memory: int | None, as_json: bool, quiet: bool,
    progress: str,
) -> None:  # fmt: skip
    """Take ADAPTER out of MERGED.

    Low-rank parts are subtracted, which is right to rounding; tensors and rows that the adapter replaced come back from
    the originals that merge kept. With --base every touched tensor is copied from it, and the result is exact.

    \b
      surgery unmerge merged adapter -o restored
      surgery unmerge merged adapter --base base -o restored
    """
    from surgery.operations.unmerge import unmerge  # brings torch, which --help must not pay for

    restored = unmerge(merged, adapter, base=base, coeff=coeff, name_map=name_map)
    write(restored, out, "unmerge", overwrite=overwrite, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs,
          max_memory=max_memory, as_json=as_json, quiet=quiet, progress=progress)  # fmt: skip
