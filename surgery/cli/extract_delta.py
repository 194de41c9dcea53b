"""``surgery extract-delta``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import click

from surgery.cli import options, terminal
from surgery.errors import printable
from surgery.exact import Delta
from surgery.operations.delta_report import describe
from surgery.report import Table
from surgery.tensor import human_bytes


@click.command("extract-delta", short_help="Keep a fine-tune as what differs from its base, exactly.")
@click.argument("base", type=click.Path())
@click.argument("tuned", metavar="FT...", type=click.Path(), nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(),
    help="The delta's file, ./<ft>.delta by default; of several FT, the folder for theirs.",
)
@click.option("--reversible", is_flag=True, help="Store what restoring the base from the fine-tune needs, too.")
@options.rename
@options.jobs
@options.overwrite
@options.dry_run
@options.progress
@options.no_cache
@options.common
def command(
    base: str, tuned: tuple[str, ...], out: str | None, reversible: bool, rename: tuple[str, ...], jobs: int | None,
    overwrite: bool, dry_run: bool, progress: str, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Keep FT, a fine-tune of BASE, as what differs from it: BASE and the delta give FT back bit for bit.

    Tensors of every dtype are coded, those that were added, resized or recast are stored whole. Each block becomes the
    shortest of: nothing, the differences at the positions that changed, all differences sorted by the base's exponents,
    the bits themselves. Of several FT the base is read once.

    \b
      surgery extract-delta base ft -o task.delta
      surgery merge base task.delta -o ft-again
      surgery extract-delta base ft --reversible       then merge --reverse gives the base back from ft
      surgery extract-delta base ft1 ft2 ft3 -o store
    """
    from surgery.checkpoint import open_checkpoint
    from surgery.exact import SUFFIX, delta_output
    from surgery.operations.extract_delta import default_stem, extract_delta, extract_deltas

    if dry_run:
        _outline(base, tuned, reversible, rename, as_json=as_json)
        return
    watcher = terminal.watcher(progress, quiet=quiet, what="extract")
    began = time.monotonic()
    if len(tuned) > 1:
        if out is None:
            raise click.UsageError("several fine-tunes need a folder for their deltas: -o DIR")
        found = extract_deltas(
            base, tuned, out, overwrite=overwrite, reversible=reversible, rename=rename, jobs=jobs, progress=watcher
        )
    else:
        out = out or f"./{default_stem(tuned[0])}{SUFFIX}"
        pair = open_checkpoint(base), open_checkpoint(tuned[0])
        delta_output(
            out, overwrite=overwrite, inputs=[stored.path for checkpoint in pair for stored in checkpoint.stored]
        )
        delta = extract_delta(*pair, reversible=reversible, rename=rename, jobs=jobs, progress=watcher)
        delta.save(out, overwrite=overwrite)
        found = [(out, delta)]
    _show(found, time.monotonic() - began, as_json=as_json, quiet=quiet)


def _outline(base: str, tuned: Sequence[str], reversible: bool, rename: Sequence[str], *, as_json: bool) -> None:
    """Print what would be done, a line or an entry a fine-tune."""
    from surgery.operations.delta_outline import outline_delta

    found = {each: outline_delta(base, each, reversible=reversible, rename=rename) for each in tuned}
    if as_json:
        deltas = [{"tuned": each, **dataclasses.asdict(outline)} for each, outline in found.items()]
        terminal.document({"schema": "surgery.plan/1", "operation": "extract-delta", "deltas": deltas})
        return
    rows = tuple(
        (printable(each), f"{o.compared:,}", f"{o.whole:,}", f"{o.removed:,}", human_bytes(o.bytes_read),
         human_bytes(o.bytes_written))
        for each, o in found.items()
    )  # fmt: skip
    columns = ("fine-tune", "tensors to compare", "to store whole", "of the base alone", "reads", "writes at most")
    terminal.table(Table("What would be done", columns, rows))


def _show(found: Sequence[tuple[str, Delta]], seconds: float, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        deltas = [{"out": out, **describe(delta).document()} for out, delta in found]
        terminal.document({"schema": "surgery.extract-delta/1", "deltas": deltas, "seconds": round(seconds, 3)})
        return
    for out, delta in found:
        info = describe(delta)
        if quiet:
            click.echo(printable(out))
            continue
        if len(found) == 1:
            terminal.table(info.by_role())
            click.echo()
        click.echo(f"wrote {printable(out)} ({human_bytes(delta.nbytes)}, {info.bits:.3g} bits a weight)")
        terminal.notes(info.notes)
    if not quiet:
        click.echo(f"{len(found)} delta{'s' if len(found) > 1 else ''} in {seconds:.1f} s")
