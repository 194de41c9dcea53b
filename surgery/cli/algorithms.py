"""``surgery algorithms``."""

from __future__ import annotations

import click

from surgery.cli import options, terminal
from surgery.operations.algorithms import algorithms


@click.command("algorithms", short_help="List what models can be merged by.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@options.common
def command(names: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """List the merge algorithms, or everything about those that are named.

    \b
      surgery algorithms
      surgery algorithms ties della
    """
    found = algorithms(*names)
    if as_json:
        terminal.document(found.document())
        return
    if quiet:
        for row in found.rows:
            click.echo(row.name)
        return
    terminal.table(found.table())
    if names:
        click.echo()
        terminal.table(found.parameters())
