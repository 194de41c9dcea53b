"""``surgery unmerge``."""

from __future__ import annotations

import click

from surgery.cli import options
from surgery.cli.writing import write


@click.command("unmerge", short_help="Take an adapter out of a merged checkpoint again.")
@click.argument("merged", type=click.Path())
@click.argument("adapters", type=click.Path(), nargs=-1, required=True)
@click.option("--base", type=click.Path(), help="The checkpoint before the merge: makes the result exact.")
@click.option("--coeff", type=float, metavar="C", help="The coefficient it was merged with; the record's, or 1.")
@click.option(
    "--approximate", is_flag=True, help="Subtract, whatever the records say: in any order, right to rounding."
)
@options.name_map
@options.writing
@options.sharding
@options.resources
@options.progress
@options.no_cache
@options.common
def command(
    merged: str, adapters: tuple[str, ...], base: str | None, coeff: float | None, approximate: bool, name_map: dict[str, str] | None, out: str, overwrite: bool, dry_run: bool,
    max_shard_size: int | None, jobs: int | None, max_memory: int | None, as_json: bool, quiet: bool,
    progress: str,
) -> None:  # fmt: skip
    """Take ADAPTERS out of MERGED.

    Every touched tensor comes back to the bit, from the undo records and originals that merge kept, and is proved by its
    fingerprint. Adapters merged one after another come out in reverse order; those merged at once come out at once.

    Where there are no records (merge --no-undo, a single file), low-rank parts are subtracted, which is right to rounding.
    With --base every touched tensor is copied from it, and the result is exact.

    \b
      surgery unmerge merged adapter -o restored
      surgery unmerge merged adapter --base base -o restored
      surgery unmerge twice second first -o restored
    """
    from surgery.operations.unmerge import unmerge  # brings torch, which --help must not pay for

    restored = unmerge(merged, *adapters, base=base, coeff=coeff, name_map=name_map, approximate=approximate)
    write(restored, out, "unmerge", overwrite=overwrite, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs,
          max_memory=max_memory, as_json=as_json, quiet=quiet, progress=progress)  # fmt: skip
