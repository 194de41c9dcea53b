"""``surgery extract-delta``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import click

from surgery.cli import many, options, pushing, terminal
from surgery.errors import printable
from surgery.exact import SUFFIX, Delta
from surgery.execute import Progress
from surgery.operations.delta_outline import DeltaOutline, outline_delta
from surgery.operations.delta_report import describe
from surgery.report import Table
from surgery.sources.local import stem_of
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
@click.option(
    "--lossy",
    type=click.Choice(["int8", "int4"]),
    help="Not exact: low-rank factors in integers, with their error, measured.",
)
@click.option("--rank", type=click.IntRange(min=1), help="With --lossy: components of each matrix; 64 by default.")
@options.rename
@options.jobs
@options.overwrite
@options.dry_run
@options.push_to
@options.progress
@options.no_cache
@options.common
def command(
    base: str, tuned: tuple[str, ...], out: str | None, lossy: str | None, rank: int | None, overwrite: bool, dry_run: bool,
    progress: str, as_json: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Keep FT, a fine-tune of BASE, as what differs from it: BASE and the delta give FT back bit for bit.

    Tensors of every dtype are coded, those that were added or recast are stored whole. Each block becomes the shortest
    of: nothing, the differences at the positions that changed, all differences sorted by the base's exponents, the bits
    themselves. Of several FT the base is read once, and one that fails does not stop the rest.

    \b
      surgery extract-delta base ft -o task.delta
      surgery merge base task.delta -o ft-again
      surgery extract-delta base ft --reversible       then merge --reverse gives the base back from ft
      surgery extract-delta base ft1 ft2 ft3 -o store
      surgery info store/*.delta
      surgery extract-delta base ft --lossy int4       ft.lossy.safetensors, which merge takes as an adapter
    """
    if dry_run:
        if lossy:
            raise click.UsageError("--lossy has no --dry-run: surgery extract-lora has one")
        told = {"reversible": options["reversible"], "rename": options["rename"]}
        show_outlines({each: outline_delta(base, each, **told) for each in tuned}, "extract-delta", as_json=as_json)
        return
    watcher = terminal.watcher(progress, quiet=quiet, what="extract")
    if lossy is None and rank is not None:
        raise click.UsageError("--rank belongs to --lossy: an exact delta has none")
    if lossy is not None:
        if len(tuned) > 1 or options.pop("reversible"):
            raise click.UsageError("--lossy is for one FT, and never reversible")
        pushing.refuse("takes exact deltas")
        found = {"bits": lossy, "rank": rank or 64, "progress": watcher, **options}
        _extract_lossy(base, tuned[0], out, overwrite, as_json, quiet, found)
        return
    if len(tuned) > 1:
        pushing.refuse("takes one delta; push them one by one")
        if out is None:
            raise click.UsageError("several fine-tunes need a folder for their deltas: -o DIR")
        _extract_many(base, tuned, out, overwrite, as_json, quiet, watcher, options)
        return
    from surgery.checkpoint import open_checkpoint
    from surgery.operations.extract_delta import check_output, extract_delta

    out = out or f"./{stem_of(tuned[0])}{SUFFIX}"
    pair = open_checkpoint(base), open_checkpoint(tuned[0])
    check_output(out, pair, overwrite=overwrite)
    to = pushing.look()
    began = time.monotonic()
    delta = extract_delta(*pair, progress=watcher, **options)
    delta.save(out, overwrite=overwrite)
    seconds = time.monotonic() - began
    pushed = pushing.push(out, to, quiet=quiet or as_json, progress=progress)
    show(delta, out, seconds, "extract-delta", as_json=as_json, quiet=quiet, pushed=pushed)


def show_outlines(found: Mapping[str, DeltaOutline], verb: str, *, as_json: bool) -> None:
    """Print what would be done, a line or an entry a delta."""
    if as_json:
        deltas = [{"tuned": each, **dataclasses.asdict(outline)} for each, outline in found.items()]
        terminal.document({"schema": "surgery.plan/1", "operation": verb, "deltas": deltas})
        return
    rows = tuple(
        (printable(each), f"{o.compared:,}", f"{o.whole:,}", f"{o.removed:,}", human_bytes(o.bytes_read),
         human_bytes(o.bytes_written))
        for each, o in found.items()
    )  # fmt: skip
    columns = ("fine-tune", "tensors to compare", "to store whole", "of the base alone", "reads", "writes at most")
    terminal.table(Table("What would be done", columns, rows))


def show(
    delta: Delta, out: str, seconds: float, verb: str, *, as_json: bool, quiet: bool, pushed: str | None = None
) -> None:
    """Say what a delta that was just written holds."""
    info = describe(delta)
    if as_json:
        document = {**info.document(), "schema": f"surgery.{verb}/1", "out": out, "seconds": round(seconds, 3)}
        terminal.document({**document, **({"pushed": pushed} if pushed else {})})
    elif quiet:
        click.echo(printable(pushed or out))
    else:
        terminal.table(info.by_role())
        click.echo()
        size = f"{human_bytes(delta.nbytes)}, {info.bits:.3g} bits a weight"
        click.echo(f"wrote {printable(out)} ({size}) in {seconds:.1f} s")
        if pushed:
            click.echo(f"pushed to {printable(pushed)}")
        terminal.notes(info.notes)


def _extract_many(
    base: str, tuned: tuple[str, ...], out: str, overwrite: bool, as_json: bool, quiet: bool, watcher: Progress,
    options: dict[str, Any],
) -> None:  # fmt: skip
    from surgery.operations.extract_delta import extract_deltas

    many.report(
        lambda tell: extract_deltas(base, tuned, out, overwrite=overwrite, progress=watcher, done=tell, **options),
        "extract-delta", "deltas", as_json=as_json, quiet=quiet,
        line=lambda delta: f"{human_bytes(delta.nbytes)}  {describe(delta).bits:.3g} bits a weight",
        document=lambda delta, place: {"out": place, **describe(delta).document()},
    )  # fmt: skip


def _extract_lossy(
    base: str, tuned: str, out: str | None, overwrite: bool, as_json: bool, quiet: bool, options: dict[str, Any]
) -> None:
    from surgery.lossy import SUFFIX as LOSSY  # these bring torch, which --help must not pay for
    from surgery.operations.extract_lossy import check_lossy_name, extract_lossy

    out = out or f"./{stem_of(tuned)}{LOSSY}"
    check_lossy_name(out)
    began = time.monotonic()
    delta = extract_lossy(base, tuned, **options)
    delta.save(out, overwrite=overwrite)
    seconds = time.monotonic() - began
    if as_json:
        terminal.document({
            "schema": "surgery.extract-lossy-delta/1", "out": out, "bytes": delta.nbytes, "bits": delta.bits,
            "rank": options["rank"], "relative_error": delta.error, "seconds": round(seconds, 3),
        })  # fmt: skip
    elif quiet:
        click.echo(printable(out))
    else:
        size = f"{human_bytes(delta.nbytes)} of {delta.bits}, relative error {delta.error:.4f}, measured"
        click.echo(f"wrote {printable(out)} ({size}) in {seconds:.1f} s; not exact")
        terminal.notes(delta.adapter.report.notes)
