"""What can go wrong between a client and a Hub, to be put in the way of chosen requests; and the log of requests."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

KINDS = {
    "drop": "close the connection before any answer",
    "lost": "do what was asked, then close the connection before any answer",
    "cut": "close the connection in the middle of the answer's body",
    "stall": "say nothing until the hub is closed or the client goes away",
    "stall-body": "stop in the middle of the answer's body, and say nothing more",
    "no-range": "answer a range request with the whole file and 200",
    "short": "answer with fewer bytes than were asked for, and a Content-Length that agrees",
    "long": "answer with more bytes than were asked for, and a Content-Length that agrees",
    "wrong-range": "answer 206 with the right number of bytes from another place",
    "moved": "put a new commit on every branch first, then answer",
}
"""Faults by name; any HTTP status is one too."""


@dataclass
class Fault:
    """A fault, and the requests it meets.

    Args:
        kind: a name in :data:`KINDS`, or an HTTP status.
        match: a regular expression that ``METHOD path?query`` must contain.
        at: the number of the request, from 0, counted over those that match since the fault was set.
        times: how many requests it meets, from ``at`` on; ``None`` for all.
        headers: with a status: headers of the answer, such as ``Retry-After``.
    """

    kind: str | int
    match: str = ""
    at: int = 0
    times: int | None = 1
    headers: dict[str, str] = field(default_factory=dict)
    met: int = 0
    """How many requests it has met."""
    _passed: int = 0

    def __post_init__(self) -> None:
        assert self.kind in KINDS or isinstance(self.kind, int), self.kind

    def meets(self, line: str) -> bool:
        """Say whether it befalls this request, and count the request."""
        if not re.search(self.match, line):
            return False
        number, self._passed = self._passed, self._passed + 1
        if number < self.at or (self.times is not None and number >= self.at + self.times):
            return False
        self.met += 1
        return True


@dataclass
class Seen:
    """A request, and what was answered."""

    port: str
    """``hub`` or ``cdn``."""
    method: str
    path: str
    """With the query."""
    authorization: str | None
    range: str | None
    received: int = 0
    """Bytes of the request's body."""
    status: int = 0
    """0 where the connection was closed without an answer."""
    sent: int = 0
    """Bytes of the answer's body that were sent."""
    wire: int = 0
    """Bytes of the whole answer that were sent: status line, headers and body."""
    fault: str | int | None = None

    @property
    def line(self) -> str:
        """``METHOD path?query``."""
        return f"{self.method} {self.path}"


class Traffic:
    """The log of a hub, and the faults that are set: shared by its two ports."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.closed = threading.Event()
        self.before: list[Callable[[Seen], None]] = []
        """Called with every request before it is answered: for what no fault describes."""
        self._lock = threading.Lock()

    def arrive(self, seen: Seen) -> Fault | None:
        """Log a request and return the fault it meets."""
        with self._lock:
            self.seen.append(seen)
            met = [fault for fault in self.faults if fault.meets(seen.line)]
        for call in self.before:
            call(seen)
        if met:
            seen.fault = met[0].kind
        return met[0] if met else None
