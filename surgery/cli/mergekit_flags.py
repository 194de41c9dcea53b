"""mergekit's command-line flags, so that its command lines run unchanged: some map, most mean nothing here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from surgery.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

_STREAMS = "tensors are streamed in blocks of about 1 MB, whatever the format"
_CPU = "merging is bound by the disk, and runs on the CPU"
SWITCHES: Mapping[str, str] = {
    "cuda": _CPU,
    "read-to-gpu": _CPU,
    "multi-gpu": _CPU,
    "gpu-rich": _CPU,
    "low-cpu-memory": _STREAMS,
    "lazy-unpickle": _STREAMS,
    "clone-tensors": _STREAMS,
    "async-write": _STREAMS,
    "allow-crimes": "any architecture is merged, and what does not fit is refused by name",
    "trust-remote-code": "no code of a model is ever run",
    "safe-serialization": "weights are always written as safetensors",
    "write-model-card": "surgery.json is the record of what was merged",
    "lazy": "stages are never written, so none is stale",
}
"""Flags with a ``--no-`` twin, and why they mean nothing here."""
VALUES: Mapping[str, str] = {
    "device": _CPU,
    "transformers-cache": "the cache is found by HF_HOME or HF_HUB_CACHE",
    "lora-merge-cache": "adapters are merged on the fly",
    "lora-merge-dtype": "adapters are merged on the fly, in float64",
    "write-threads": "--jobs decides",
    "intermediate-dir": "stages are never written",
}
"""Flags with a value, and why they mean nothing here."""
REFUSED: Mapping[str, tuple[str, str]] = {
    "unsafe-truncate-embeddings": ("would cut rows off", "let the recipe choose a tokenizer: tokenizer_source"),
    "tensor-union": ("would merge a tensor from those models alone that have it", "give every model all tensors"),
    "tensor-intersection": ("would leave out what a model lacks", "drop it from the others: surgery convert --drop"),
}
"""Switches that would change the result: what they would do, and what to do in their place."""
SHORT: Mapping[str, tuple[str]] = {
    "intermediate-dir": ("-I",), "tensor-union": ("-u",), "tensor-intersection": ("-i",),
}  # fmt: skip
"""Flags that have a short form in one of mergekit's commands."""


class Kmb(click.ParamType[int]):
    """mergekit's sizes: ``5B`` is five billion bytes, ``500M`` five hundred million."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a size."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,15})([KMB]?)", value, re.IGNORECASE)
        size = int(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[found[2].upper()] if found else 0
        if size < 1:
            self.fail(f"{value!r} is not a size like 5B or 500M", param, ctx)
        return size


def accept(function: F) -> F:
    """Add all of mergekit's flags to a command, hidden; they arrive as keyword arguments."""
    for name in (*SWITCHES, *REFUSED):
        function = click.option(f"--{name}/--no-{name}", *SHORT.get(name, ()), default=None, hidden=True)(function)
    for name in VALUES:
        function = click.option(f"--{name}", *SHORT.get(name, ()), hidden=True)(function)
    function = click.option("-v", "--verbose", "verbosity", count=True, hidden=True)(function)
    function = click.option("--no-quiet", "loud", is_flag=True, hidden=True)(function)
    function = click.option("--out-shard-size", type=Kmb(), hidden=True)(function)
    function = click.option("--out-path", type=click.Path(), hidden=True)(function)
    function = click.option("--random-seed", type=int, hidden=True)(function)
    function = click.option("-j", "--num-threads", type=click.IntRange(min=1), hidden=True)(function)
    return click.option("--copy-tokenizer/--no-copy-tokenizer", default=True, hidden=True)(function)


def notes(given: Mapping[str, Any]) -> list[str]:
    """Say of every flag that was given and means nothing why that is so.

    Raises:
        UsageError: a flag that would change the result in a way that surgery does not offer.
    """
    for name, (what, mend) in REFUSED.items():
        if given[name.replace("-", "_")]:
            raise UsageError(f"--{name} {what}", mend=mend)
    return [
        f"--{name} means nothing here: {why}"
        for name, why in {**SWITCHES, **VALUES}.items()
        if given[name.replace("-", "_")] is not None
    ]
