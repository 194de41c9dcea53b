"""``surgery spectrum``."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import options, terminal


@click.command("spectrum", short_help="Show the singular values of a fine-tune's changes.")
@click.argument("base", type=click.Path())
@click.argument("ft", type=click.Path())
@click.option("--depth", type=click.IntRange(min=1), default=256, show_default=True, metavar="N",
              help="Singular values of each matrix, at most.")  # fmt: skip
@click.option("--target", multiple=True, metavar="PATTERN", help="Look only at what matches; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out what matches; repeatable.")
@click.option("--csv", "as_csv", is_flag=True, help="One line a matrix, numbers in full.")
@options.rename
@options.jobs
@options.progress
@options.no_cache
@options.common
def command(base: str, ft: str, as_csv: bool, as_json: bool, quiet: bool, progress: str, **arguments: Any) -> None:
    """Show for every matrix that FT, a fine-tune of BASE, changed what its rank is.

    Shares of ‖Δ‖² that ranks 4 to 256 hold; the effective rank (Σσ²)²/Σσ⁴; and the noise rank: how many components the
    rounding of FT's own dtype could not have made. A merged LoRA shows its rank there; "?" marks what is not certain.
    --json has all singular values.

    \b
      surgery spectrum base ft
      surgery spectrum base ft --target '*mlp*' --csv > mlp.csv
    """
    from surgery.operations.spectrum import spectrum  # brings torch, which --help must not pay for

    if as_csv and as_json:
        raise click.UsageError("--csv and --json are two formats: give one of them")
    report = spectrum(base, ft, progress=terminal.watcher(progress, quiet=quiet, what="spectrum"), **arguments)
    if as_json:
        terminal.document({"schema": "surgery.spectrum/1", **report.document()})
    elif as_csv:
        click.echo(report.csv(), nl=False)
    else:
        terminal.table(report.table())
        if report.unchanged:
            terminal.say(f"note: {report.unchanged:,} matrices are unchanged")
        terminal.notes(report.notes)
