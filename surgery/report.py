"""Tables for people: rows of text that a terminal, a notebook and a model card show alike.

What the numbers are is decided by operations; how a terminal draws them by the command line.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table of text cells; all columns but the first are numbers, aligned to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self) -> str:
        """Render for a notebook."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return (
            f"<p><b>{html.escape(self.title)}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def markdown(self) -> str:
        """Render for a model card.

        >>> print(Table("t", ("kind", "bytes"), (("q", "3"),)).markdown())
        | kind | bytes |
        |---|---:|
        | q | 3 |
        """
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        return "\n".join(
            "|" + "|".join(cells) + "|" if number == 1 else "| " + " | ".join(cells) + " |"
            for number, cells in enumerate(lines)
        )


def percent(share: float) -> str:
    """Write a share of one.

    >>> percent(0.41234), percent(0.000123), percent(1.0), percent(12.345)
    ('41.2 %', '0.0123 %', '100 %', '1,234 %')
    """
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    return f"{100 * share:,.0f} %" if share >= 9.995 else f"{100 * share:.3g} %"


def join_shown(items: Sequence[str], limit: int = 3) -> str:
    """List the first few of many.

    >>> join_shown(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
