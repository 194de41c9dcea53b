"""``--push-to``: what a command has written goes to the Hub; where to is looked at before the work begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.cli import terminal
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint
    from surgery.operations.push import Destination


def look() -> Destination | None:
    """Look at the repository that ``--push-to`` names; ``None`` without it.

    Raises:
        UsageError: ``--public`` without ``--push-to``.
        HubError: it may not be pushed to.
    """
    name = _wanted()
    if name is None:
        return None
    # This brings huggingface_hub, which nobody else must pay for.
    from surgery.operations.push import destination

    return destination(name, private=not click.get_current_context().meta.get("surgery.public"))


def _wanted() -> str | None:
    """Return what ``--push-to`` names, and refuse what says nothing without it."""
    meta = click.get_current_context().meta
    name: str | None = meta.get("surgery.push_to")
    for option in ("public", "stream"):
        if name is None and meta.get(f"surgery.{option}"):
            raise UsageError(f"--{option} says nothing without --push-to")
    return name


def refuse(why: str) -> None:
    """Refuse ``--push-to`` where there is not one output to push, before anybody is asked.

    Raises:
        UsageError: it was given.
    """
    if _wanted() is not None:
        raise click.UsageError(f"--push-to {why}")


def push(out: str, to: Destination | None, *, quiet: bool, progress: str) -> str | None:
    """Push what was written, and return where it is now."""
    if to is None:
        return None
    from surgery.operations.push import plan_push

    planned = plan_push(out, to)
    made = planned.run(terminal.watcher(progress, quiet=quiet, what="push"))
    if not quiet:
        terminal.notes(planned.commit.notes)
    return made.url


def streams() -> bool:
    """Say whether ``--stream`` was given: then nothing is written here."""
    return bool(click.get_current_context().meta.get("surgery.stream"))


def stream(checkpoint: Checkpoint, to: Destination | None, **how: Any) -> str:
    """Push a checkpoint as it is made, and return where it is."""
    from surgery.operations.push_stream import push_stream

    assert to is not None  # look() has refused --stream without --push-to
    made, commit = push_stream(checkpoint, to, **how)
    terminal.notes(commit.notes)
    return made.url
