"""``surgery info``."""

from __future__ import annotations

import click

from surgery.cli import options, terminal
from surgery.errors import SurgeryError, printable
from surgery.operations.delta_report import DeltaInfo
from surgery.operations.info import Info, info, overview


@click.command("info", short_help="Show what a checkpoint holds, from its headers alone.")
@click.argument("checkpoints", metavar="CHECKPOINT...", type=click.Path(), nargs=-1, required=True)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--roles", is_flag=True, help="Show what each tensor is taken for; role:NAME in patterns chooses by it.")
@options.no_cache
@options.common
def command(checkpoints: tuple[str, ...], tensors: bool, roles: bool, as_json: bool, quiet: bool) -> None:
    """Show what CHECKPOINT holds: tensors, dtypes, shapes, parameters, bytes.

    Only headers and config.json are read, whatever the size. Of several, checkpoints or exact deltas, one line each.

    \b
      surgery info ./Qwen2.5-1.5B
      surgery info model.safetensors --tensors
      surgery info ./Qwen2.5-1.5B --roles
      surgery info task.delta                     base, task, bytes, and how each kind of tensor is kept
      surgery info store/*.delta                  base, task and bytes of each
    """
    if len(checkpoints) > 1:
        _list(checkpoints, as_json=as_json, quiet=quiet)
        return
    found = info(checkpoints[0])
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


def _list(checkpoints: tuple[str, ...], *, as_json: bool, quiet: bool) -> None:
    """Show many; one that cannot be read does not hide the others."""
    found: list[tuple[str, Info | DeltaInfo]] = []
    failed: list[tuple[str, SurgeryError]] = []
    for path in checkpoints:
        try:
            found.append((path, info(path)))
        except SurgeryError as error:
            failed.append((path, error))
    if as_json:
        errors = [{"path": path, "error": str(error), "exit_code": error.exit_code} for path, error in failed]
        listed = [{"path": path, **each.document()} for path, each in found]
        terminal.document({"schema": "surgery.info-many/1", "found": listed, "failed": errors})
    elif quiet:
        for _, each in found:
            click.echo(str(each.parameters))
    elif found:
        terminal.table(overview(found))
    for _, why in () if as_json else failed:
        terminal.say(f"surgery: error: {why}")
    if failed:
        raise click.exceptions.Exit(failed[0][1].exit_code)
