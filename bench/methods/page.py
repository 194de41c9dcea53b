"""What came out, as a table in ``eval-methods.md`` between two marks, and as a picture beside it."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.methods.study import Result

_SHOWN = "![Accuracy of every method, and its bytes](eval-methods.svg)"
BEGIN, END = "<!-- begin: written by make eval-methods -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """A line of the table: what it is, and its results with every seed."""

    title: str
    tool: str
    results: Sequence[Result]
    rate: float | None = None

    @property
    def accuracies(self) -> list[float]:
        """In percent."""
        return [100 * result.test for result in self.results]

    @property
    def mean(self) -> float:
        """Mean accuracy in percent."""
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation between seeds, in points."""
        return statistics.stdev(self.accuracies)

    @property
    def size(self) -> float:
        """Mean bytes."""
        return statistics.mean(result.bytes for result in self.results)


def write(rows: Sequence[Row], notes: Sequence[str], folder: Path) -> None:
    """Put the table into the page, and the picture beside it."""
    page = folder / "eval-methods.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    written = "\n".join([_SHOWN, "", *table(rows), "", *notes])
    page.write_text(f"{before}{BEGIN}\n{written}\n{END}{after}")
    (folder / "eval-methods.svg").write_text(picture(rows))


def table(rows: Sequence[Row]) -> list[str]:
    """Write the table as Markdown."""
    lines = [
        "| method | trained with | learning rate | parameters | accuracy, % | bytes a task | CPU s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        parameters, seconds = row.results[0].parameters, statistics.mean(result.seconds for result in row.results)
        cells = (
            row.title, row.tool, "" if row.rate is None else f"{row.rate:g}", f"{parameters:,}" if parameters else "",
            f"{row.mean:.1f} ± {row.spread:.1f}", size(row.size), f"{seconds:.0f}" if seconds else "",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def size(count: float) -> str:
    """Write bytes in three digits.

    >>> size(1209256)
    '1.21 MB'
    """
    for unit, name in ((1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


LEFT, RIGHT, WIDTH, LINE, TOP = 270, 90, 760, 26, 46
"""Of the picture, in pixels: room for names and sizes, the whole, a row, and the room above the rows."""


def picture(rows: Sequence[Row]) -> str:
    """Draw every row's mean, its spread between seeds, each seed, and its size."""
    reach = [value for row in rows for value in (*row.accuracies, row.mean - row.spread, row.mean + row.spread)]
    step = 2 if max(reach) - min(reach) < 20 else 10
    low, high = int(min(reach) // step) * step, -int(-max(reach) // step) * step
    bottom = TOP + LINE * len(rows)

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    whole = f'width="{WIDTH}" height="{bottom + 34}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {whole} font-family="sans-serif" font-size="13" fill="#222">',
        f'<rect {whole} fill="white"/>',
        _text(LEFT, 20, "test accuracy, %: three seeds, mean and standard deviation", "start"),
        _text(WIDTH - 8, 20, "bytes a task", "end"),
    ]
    for value in range(low, high + 1, step):
        x = across(value)
        parts.append(f'<path d="M{x:.1f} {TOP - 14}V{bottom - 8}" stroke="#ddd"/>')
        parts.append(_text(x, bottom + 10, str(value), "middle"))
    for number, row in enumerate(rows):
        y = TOP + LINE * number
        colour = "#1f5fa8" if row.rate is not None else "#b3541e"
        ends = (across(row.mean - row.spread), across(row.mean + row.spread))
        parts += [
            _text(LEFT - 12, y + 4, row.title, "end"),
            f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}" stroke="{colour}" stroke-width="2"/>',
            *(f'<circle cx="{across(v):.1f}" cy="{y}" r="2.5" fill="{colour}" opacity="0.5"/>' for v in row.accuracies),
            f'<circle cx="{across(row.mean):.1f}" cy="{y}" r="5" fill="{colour}"/>',
            _text(WIDTH - 8, y + 4, size(row.size), "end"),
        ]
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{html.escape(words)}</text>'
