"""Many fine-tunes of one base at once: what became of each, and where each goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from surgery.errors import SurgeryError, UsageError

T = TypeVar("T")


@dataclass
class Outcome(Generic[T]):
    """What became of one fine-tune: ``made``, which was written to ``out``, or an error."""

    tuned: str
    out: str
    made: T | None = None
    error: SurgeryError | None = None


def refuse_shared_outputs(outputs: Sequence[str]) -> None:
    """Refuse fine-tunes of which one would replace what another became.

    Raises:
        UsageError: two outputs are one.
    """
    if twice := next((name for name in outputs if outputs.count(name) > 1), None):
        raise UsageError(f"two of the fine-tunes would both become {twice}", mend="rename their folders")
