"""Options that several commands share, and the values that they turn into.

========================  =============================================================
``common``                every command: ``--json``, ``-q``, ``--debug``
``progress``              commands that read data
``writing``               commands that write: ``-o``, ``--overwrite``, ``--dry-run``
``resources``             ``--jobs``, ``--max-memory``
``sharding``              ``--max-shard-size``
========================  =============================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


class Size(click.ParamType[int]):
    """A number of bytes: ``5GB``, ``500MB``, ``1GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a size."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?i?B?)", value, re.IGNORECASE)
        unit = found[2].upper() if found else ""
        if found and unit in {"K", "M", "G", "T"}:
            unit += "B"
        size = int(float(found[1]) * _UNITS[unit]) if found and unit in _UNITS else 0
        if size < 1:
            self.fail(f"{value!r} is not a size like 5GB or 500MB", param, ctx)
        return size


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


common = _stack(
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but the result's path or verdict."),
    click.option("--debug", is_flag=True, expose_value=False, help="Print a traceback with an error."),
)
progress = click.option(
    "--progress",
    type=click.Choice(["auto", "plain", "none"]),
    default="auto",
    show_default=True,
    help="A bar on a terminal, a line a shard elsewhere.",
)

output = click.option("-o", "--output", "out", type=click.Path(), required=True,
                      help="A folder; one file where it ends in .safetensors.")  # fmt: skip

overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing output, in one atomic exchange.")
dry_run = click.option("--dry-run", is_flag=True, help="Print the plan: tensors, bytes, memory. Write nothing.")
restart = click.option("--restart", is_flag=True, help="Begin anew where an interrupted run would be continued.")
writing = _stack(output, overwrite, dry_run)

jobs = click.option("--jobs", type=click.IntRange(min=1), metavar="N",
                    help="Threads; all cores by default. The bytes written do not depend on it.")  # fmt: skip
max_memory = click.option("--max-memory", type=Size(), help="Refuse a plan that may need more, as 2GB.")
resources = _stack(jobs, max_memory)

sharding = click.option("--max-shard-size", type=Size(), help="As 5GB; the input's own files are kept by default.")
allow_nonfinite = click.option("--allow-nonfinite", is_flag=True, help="Let NaN, Inf and overflow through.")
rename = click.option("--rename", multiple=True, metavar="OLD=NEW",
                      help="Rename a tensor, or a prefix that ends at a dot; repeatable.")  # fmt: skip
