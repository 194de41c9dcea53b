"""``surgery info``."""

from __future__ import annotations

import click

from surgery.cli import options, terminal
from surgery.errors import printable
from surgery.operations.info import Info, info


@click.command("info", short_help="Show what a checkpoint holds, from its headers alone.")
@click.argument("checkpoint", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--roles", is_flag=True, help="Show what each tensor is taken for; role:NAME in patterns chooses by it.")
@options.no_cache
@options.common
def command(checkpoint: str, tensors: bool, roles: bool, as_json: bool, quiet: bool) -> None:
    """Show what CHECKPOINT holds: tensors, dtypes, shapes, parameters, bytes.

    Only headers and config.json are read, whatever the size.

    \b
      surgery info ./Qwen2.5-1.5B
      surgery info model.safetensors --tensors
      surgery info ./Qwen2.5-1.5B --roles
      surgery info task.delta                     base, task, bytes, and how each kind of tensor is kept
    """
    found = info(checkpoint)
    if as_json:
        terminal.document(found.document(tensors=tensors or roles))
        return
    if quiet:
        click.echo(str(found.parameters))
        return
    click.echo(printable(found.label))
    terminal.facts(found.facts())
    click.echo()
    if roles and isinstance(found, Info):
        terminal.table(found.by_layout())
        terminal.notes([*found.notes, *found.unknown()])
        return
    terminal.table(found.all_tensors() if tensors else found.by_role())
    terminal.notes(found.notes)
