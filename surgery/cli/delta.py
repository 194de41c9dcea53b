"""``surgery delta``: what is done with exact deltas themselves."""

from __future__ import annotations

import time

import click

from surgery.cli import options, terminal
from surgery.cli.extract_delta import show, show_outlines
from surgery.cli.writing import write
from surgery.operations.delta_outline import outline_squash


@click.group("delta", short_help="Squash a chain of exact deltas, or switch between the fine-tunes of two.")
def command() -> None:
    """Work with exact deltas (surgery extract-delta).

    \b
      surgery delta squash step1.delta step2.delta --base base -o both.delta
      surgery delta switch ft one.delta two.delta -o other-ft

    surgery info lists them, diff compares two, verify proves one, merge applies one or a chain.
    """


@command.command("squash", short_help="Make one delta of a chain.")
@click.argument("deltas", metavar="DELTA DELTA...", type=click.Path(), nargs=-1, required=True)
@click.option(
    "--base", type=click.Path(), help="The first delta's base: needed where two of them change a tensor densely."
)
@click.option("--reversible", is_flag=True, help="With --base: store the way back, though some of the chain lack it.")
@click.option("-o", "--output", "out", type=click.Path(), required=True, help="The delta's file.")
@options.jobs
@options.overwrite
@options.dry_run
@options.progress
@options.common
def squash_command(
    deltas: tuple[str, ...], base: str | None, reversible: bool, out: str, jobs: int | None, overwrite: bool,
    dry_run: bool, progress: str, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Make one delta of a chain, each DELTA of which was made with what the one before restores.

    Without --base, differences at positions are added, and blocks that only one of the deltas changes are taken over.
    Dense differences of both are sorted by the base's exponents, and take the base to join.

    \b
      surgery delta squash step1.delta step2.delta -o both.delta
      surgery delta squash step1.delta step2.delta --base base -o both.delta
    """
    from surgery.exact import delta_output, open_delta
    from surgery.operations.delta_squash import squash_deltas

    opened = [open_delta(path) for path in deltas]
    if dry_run:
        show_outlines({opened[-1].manifest.task.name: outline_squash(opened, base)}, "delta-squash", as_json=as_json)
        return
    inputs = [stored.path for delta in opened for stored in delta.stored]
    delta_output(out, overwrite=overwrite, inputs=inputs)
    began = time.monotonic()
    watcher = terminal.watcher(progress, quiet=quiet, what="squash")
    delta = squash_deltas(*opened, base=base, reversible=reversible or None, jobs=jobs, progress=watcher)
    delta.save(out, overwrite=overwrite)
    show(delta, out, time.monotonic() - began, "delta-squash", as_json=as_json, quiet=quiet)


@command.command("switch", short_help="Turn one fine-tune into another.")
@click.argument("checkpoint", type=click.Path())
@click.argument("source", metavar="FROM", type=click.Path())
@click.argument("target", metavar="TO", type=click.Path())
@click.option("--base", type=click.Path(), help="The deltas' base, where FROM holds no way back.")
@options.writing
@options.restart
@options.sharding
@options.resources
@options.progress
@options.common
def switch_command(
    checkpoint: str, source: str, target: str, base: str | None, out: str, overwrite: bool, dry_run: bool, restart: bool,
    max_shard_size: int | None, jobs: int | None, max_memory: int | None, as_json: bool, quiet: bool, progress: str,
) -> None:  # fmt: skip
    """Turn CHECKPOINT, the fine-tune of the exact delta FROM, into that of TO, bit for bit.

    Both deltas are of one base, which is not needed where FROM is --reversible, or holds no dense differences. Tensors
    that both fine-tunes have alike are copied.

    \b
      surgery delta switch ft one.delta two.delta -o other-ft
      surgery delta switch ft one.delta two.delta --base base -o other-ft
    """
    from surgery.operations.delta_switch import switch_delta

    outcome = switch_delta(checkpoint, source, target, base=base)
    write(outcome, out, "delta-switch", overwrite=overwrite, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs,
          max_memory=max_memory, as_json=as_json, quiet=quiet, progress=progress, restart=restart)  # fmt: skip
