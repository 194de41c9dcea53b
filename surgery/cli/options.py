"""Options that several commands share, and the values that they turn into.

========================  =============================================================
``common``                every command: ``--json``, ``-q``, ``--debug``
``no_cache``              commands that take ``hf://`` references: ``--no-cache``
``progress``              commands that read data
``push_to``               commands that write: ``--push-to``, ``--public``; read by ``cli/pushing``
``writing``               commands that write a checkpoint: ``-o``, ``--overwrite``, ``--dry-run``, and ``push_to``
``resources``             ``--jobs``, ``--max-memory``
``sharding``              ``--max-shard-size``
========================  =============================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from surgery.errors import FormatError, UsageError
from surgery.formats.safetensors import strict_object
from surgery.sources import local
from surgery.tensor import parse_bytes

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """A number of bytes: ``5GB``, ``500MB``, ``1GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a size."""
        if isinstance(value, int):
            return value
        size = parse_bytes(value) or 0
        if size < 1:
            self.fail(f"{value!r} is not a size like 5GB or 500MB", param, ctx)
        return size


class NameMap(click.ParamType[dict[str, str]]):
    """A JSON file of names in an adapter → names in a checkpoint."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, str]:
        """Read the file."""
        try:
            document = strict_object(local.read_small(local.resolve(value)))
        except FormatError as error:
            raise UsageError(f"--name-map: {error.what}", file=value) from None
        if not all(isinstance(name, str) for name in document.values()):
            raise UsageError("--name-map must be a JSON object of names", file=value)
        return document


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Make one decorator of several, in the order in which ``--help`` lists them."""

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


common = stack(
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


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep a value for ``cli/pushing``, which every command that writes calls."""
    ctx.meta[f"surgery.{param.name}"] = value


def _require_output(ctx: click.Context, _param: click.Parameter, value: str | None) -> str:
    """Do without an output only where it goes to the Hub as it is made."""
    streamed = ctx.meta.get("surgery.stream")
    if (value is None) != bool(streamed):
        what = "--stream writes nothing here" if streamed else "no output is named"
        raise click.UsageError(f"{what}: {'drop' if streamed else 'say'} -o/--output FOLDER", ctx)
    return "" if value is None else value


output = click.option("-o", "--output", "out", type=click.Path(), callback=_require_output,
                      help="A folder; one file where it ends in .safetensors.")  # fmt: skip
stream = click.option("--stream", is_flag=True, is_eager=True, expose_value=False, callback=_keep,
                      help="With --push-to, and no -o: push each file as it is made, and keep none here.")  # fmt: skip

overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing output, in one atomic exchange.")
dry_run = click.option("--dry-run", is_flag=True, help="Print the plan: tensors, bytes, memory. Write nothing.")
restart = click.option("--restart", is_flag=True, help="Begin anew where an interrupted run would be continued.")

push_to = stack(
    click.option("--push-to", metavar="ORG/NAME", expose_value=False, callback=_keep,
                 help="Then push it to this repository on the Hub, private unless --public."),
    click.option("--public", is_flag=True, expose_value=False, callback=_keep, help="With --push-to: a public one."),
)  # fmt: skip
writing = stack(output, overwrite, dry_run, push_to, stream)


def _leave_cache_alone(_ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from surgery.sources import hub

        hub.leave_cache_alone()


no_cache = click.option(
    "--no-cache", is_flag=True, expose_value=False, callback=_leave_cache_alone,
    help="Neither read from the Hugging Face cache nor fill it.",
)  # fmt: skip

jobs = click.option("--jobs", type=click.IntRange(min=1), metavar="N",
                    help="Threads; all cores by default. The bytes written do not depend on it.")  # fmt: skip
max_memory = click.option("--max-memory", type=Size(), help="Refuse a plan that may need more, as 2GB.")
resources = stack(jobs, max_memory)

sharding = click.option("--max-shard-size", type=Size(), help="As 5GB; the input's own files are kept by default.")
allow_nonfinite = click.option("--allow-nonfinite", is_flag=True, help="Let NaN, Inf and overflow through.")
allow_base_mismatch = click.option(
    "--allow-base-mismatch", is_flag=True, help="Merge although an adapter was taken from another base, or is in there."
)
name_map = click.option("--name-map", type=NameMap(), metavar="FILE",
                        help="JSON: names in the adapter → names in the checkpoint.")  # fmt: skip
rename = click.option("--rename", multiple=True, metavar="OLD=NEW",
                      help="Rename a tensor, or a prefix that ends at a dot; repeatable.")  # fmt: skip
settings = click.option("-p", "settings", multiple=True, metavar="KEY=VALUE",
                        help="A setting of the method: r=8; repeatable.")  # fmt: skip


def parsed_settings(texts: tuple[str, ...]) -> dict[str, str]:
    """Split ``-p``'s values.

    Raises:
        UsageError: one is not ``KEY=VALUE``, or a key has two values.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"-p takes KEY=VALUE, not {text!r}")
        if found.setdefault(key, value) != value:
            raise UsageError(f"-p gives {key} twice")
    return found
