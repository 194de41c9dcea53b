"""``surgery methods``."""

from __future__ import annotations

import click

from surgery.cli import options, terminal
from surgery.errors import UsageError
from surgery.methods.published import PUBLISHED
from surgery.operations.methods import methods, published_document, published_table


@click.command("methods", short_help="Show what each PEFT method would cost on a model.")
@click.argument("checkpoint", type=click.Path(), required=False)
@click.option("--published", is_flag=True, help="Recompute published counts from shapes; takes no checkpoint.")
@options.no_cache
@options.common
def command(checkpoint: str | None, published: bool, as_json: bool, quiet: bool) -> None:
    """Show what every method of surgery add would cost on CHECKPOINT, with its default settings.

    Only headers and config.json are read. Counts leave out the task's head; sizes are of float32 values.

    \b
      surgery methods ./Qwen2.5-1.5B
      surgery methods --published
    """
    if published == (checkpoint is not None):
        raise UsageError("methods takes either a checkpoint or --published")
    if checkpoint is None:
        if as_json:
            terminal.document(published_document())
        elif quiet:
            click.echo("\n".join(str(each.exact) for each in PUBLISHED))
        else:
            terminal.table(published_table())
        return
    found = methods(checkpoint)
    if as_json:
        terminal.document(found.document())
        return
    if quiet:
        for row in found.rows:
            click.echo(f"{row.method.name} {'-' if row.parameters is None else row.parameters}")
        return
    terminal.table(found.table())
    terminal.notes(found.notes())
