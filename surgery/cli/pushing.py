"""``--push-to``: what a command has written goes to the Hub; where to is looked at before the work begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from surgery.cli import terminal
from surgery.errors import UsageError

if TYPE_CHECKING:
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
        if public:
            raise UsageError("--public says nothing without --push-to")
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
        terminal.notes(planned.notes)
    return made.url
