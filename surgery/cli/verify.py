"""``surgery verify``."""

from __future__ import annotations

import click

from surgery.cli import options, terminal
from surgery.operations.verify import verify


@click.command("verify", short_help="Check a checkpoint or adapter against its own record.")
@click.argument("path", type=click.Path())
@options.jobs
@options.progress
@options.common
def command(path: str, jobs: int | None, as_json: bool, quiet: bool, progress: str) -> None:
    """Check PATH, a checkpoint or an adapter: headers, index, configuration, and every tensor's fingerprint.

    Exits with 10 and names the tensor if a byte is not what was recorded.
    """
    found = verify(path, jobs=jobs, progress=terminal.watcher(progress, quiet=quiet, what="verify"))
    if as_json:
        terminal.document(found.document())
    elif quiet:
        click.echo("verified")
    else:
        terminal.table(found.table())
        terminal.notes(found.notes)
