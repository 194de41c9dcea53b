"""What commands print: tables and lines for people, one JSON document for programs, progress on stderr.

Results go to stdout, talk to stderr. Colour and bars appear on terminals only, and NO_COLOR is honoured.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from surgery.errors import printable
from surgery.execute import Progress, Silent
from surgery.plan import Plan
from surgery.report import Table
from surgery.tensor import human_bytes


def document(content: Mapping[str, Any]) -> None:
    """Print one JSON document."""
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    click.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _finite(value: Any) -> Any:
    """Put null where JSON has no number for a value, as in a configuration's Infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def say(text: str) -> None:
    """Say something to the person, on stderr. Where nobody listens any more, work goes on in silence."""
    with contextlib.suppress(BrokenPipeError):
        click.echo(printable(text), err=True)


def notes(lines: Iterable[str]) -> None:
    """Say what a person should know, a line each."""
    for line in lines:
        say(f"note: {line}")


LONG_TABLE = 500
"""Rows from which on a table is drawn without rich, which would take half a millisecond for each."""


def table(content: Table) -> None:
    """Draw a table on stdout, as wide as it must be where stdout is no terminal."""
    words = [
        number == 0 or any(not row[number].lstrip("-")[:1].isdigit() for row in content.rows if row[number])
        for number in range(len(content.columns))
    ]
    draw: Callable[[Table, Sequence[bool]], Iterable[str]]
    draw = _long_table if len(content.rows) >= LONG_TABLE else _drawn_table
    click.echo("\n".join(line.rstrip() for line in draw(content, words)))


def _drawn_table(content: Table, words: Sequence[bool]) -> list[str]:
    from rich.console import Console
    from rich.table import Table as Drawing
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 200)
    drawing = Drawing(
        title=Text(content.title),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column, left in zip(content.columns, words, strict=True):
        drawing.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in content.rows:
        drawing.add_row(*(Text(printable(cell)) for cell in row))
    with console.capture() as capture:
        console.print(drawing)
    return capture.get().splitlines()


def _long_table(content: Table, words: Sequence[bool]) -> Iterator[str]:
    from rich.cells import cell_len

    rows = [content.columns, *([printable(cell) for cell in row] for row in content.rows)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    yield content.title
    for row in rows:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cell + gap if left else gap + cell for cell, gap, left in zip(row, gaps, words, strict=True))


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{name:<{width}}  {printable(value)}")


def plan(found: Plan, *, as_json: bool, verb: str, notes_: Iterable[str] = (), tables: Iterable[Table] = ()) -> None:
    """Print what a run would do."""
    if as_json:
        document(
            {
                "schema": "surgery.plan/1", "operation": verb, "tensors": dict(found.counts),
                "files": {file.name: file.size for file in found.files}, "bytes_read": found.bytes_read,
                "bytes_written": found.bytes_written, "peak_memory": found.peak_memory, "jobs": found.workers,
                "notes": list(notes_), **_rows(tables),
            }
        )  # fmt: skip
        return
    for content in tables:
        table(content)
        click.echo()
    facts(
        [
            ("would", ", ".join(f"{kind} {count:,}" for kind, count in found.counts.items() if count) + " tensors"),
            ("files", f"{len(found.files)}: {', '.join(file.name for file in found.files[:3])}{' …' if len(found.files) > 3 else ''}"),
            ("read", human_bytes(found.bytes_read)),
            ("write", human_bytes(found.bytes_written)),
            ("memory", f"at most {human_bytes(found.peak_memory)} with {found.workers} job{'s' if found.workers > 1 else ''}"),
        ]
    )  # fmt: skip
    notes(notes_)


def _rows(tables: Iterable[Table]) -> dict[str, Any]:
    """Turn tables into lists of objects, by title."""
    return {
        content.title.lower().replace(" ", "_"): [dict(zip(content.columns, row, strict=True)) for row in content.rows]
        for content in tables
    }


def watcher(mode: str, *, quiet: bool, what: str) -> Progress:
    """Choose how to show progress: a bar, lines, or nothing."""
    if mode == "none" or quiet:
        return Silent()
    if mode == "auto" and sys.stderr.isatty():
        return Bar(what)
    return Lines(what)


class Bar:
    """A bar on a terminal."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None
        self._task: Any = None

    def start(self, total: int) -> None:
        """Draw the bar."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._what, total=total)
        self._bar.start()

    def advance(self, nbytes: int) -> None:
        """Move the bar."""
        self._bar.advance(self._task, nbytes)

    def shard(self, name: str, done: int, total: int) -> None:
        """Say nothing: the bar shows it."""

    def finish(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


class Lines:
    """A line for every file that is finished, for logs."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def start(self, total: int) -> None:
        """Say nothing yet."""

    def advance(self, nbytes: int) -> None:
        """Say nothing: lines are for whole files."""

    def shard(self, name: str, done: int, total: int) -> None:
        """Say that a file is finished."""
        with self._lock:
            say(f"{self._what}: {name} ({done} of {total}, {time.monotonic() - self._began:.1f} s)")

    def finish(self) -> None:
        """Say nothing more."""
