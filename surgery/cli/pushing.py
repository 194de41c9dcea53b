"""``--push-to``: what a command has written goes to the Hub; where to is looked at before the work begins."""

from __future__ import annotations

from collections.abc import Sequence
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
    meta = click.get_current_context().meta
    name, public = meta.get("surgery.push_to"), bool(meta.get("surgery.public"))
    if name is None:
        for option in ("public", "stream"):
            if meta.get(f"surgery.{option}"):
                raise UsageError(f"--{option} says nothing without --push-to")
        return None
    # This brings huggingface_hub, which nobody else must pay for.
    from surgery.operations.push import destination

    return destination(name, private=not public)


def push(out: str, to: Destination | None, *, base_id: Sequence[str] = (), quiet: bool, progress: str) -> str | None:
    """Push what was written, and return where it is now."""
    if to is None:
        return None
    from surgery.operations.push import plan_push

    planned = plan_push(out, to, base_id=base_id)
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
