"""Saved plans: a merge as a file that several machines can work on. JSON; the recipe goes in as its own text."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from surgery.errors import FormatError
from surgery.formats.safetensors import strict_object

SCHEMA = "surgery.run/1"


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All that a machine which sees the same files needs to make its share of a merge."""

    recipe: str
    out: str
    digest: str
    compat: str
    seed: int
    allow_nonfinite: bool
    max_shard_size: int | None
    overwrite: bool
    files: dict[str, int]
    """Name → bytes of every file that the output will have."""


_KINDS: dict[str, tuple[type, ...]] = {
    "recipe": (str,), "out": (str,), "digest": (str,), "compat": (str,), "seed": (int,), "allow_nonfinite": (bool,),
    "max_shard_size": (int, type(None)), "overwrite": (bool,), "files": (dict,),
}  # fmt: skip


def encode(plan: RunPlan) -> bytes:
    """Write a plan."""
    return (json.dumps({"schema": SCHEMA, **dataclasses.asdict(plan)}, indent=2, ensure_ascii=False) + "\n").encode()


def parse(data: bytes) -> RunPlan:
    """Read a plan.

    Raises:
        FormatError: it is none.

    >>> plan = RunPlan("models: …", "out", "xxh3-128:0", "mergekit", 0, False, None, False, {"model.safetensors": 8})
    >>> parse(encode(plan)) == plan
    True
    """
    document: dict[str, Any] = strict_object(data)
    if document.pop("schema", None) != SCHEMA:
        raise FormatError(f"is no plan of the schema {SCHEMA!r}", mend="make one with surgery plan --plan-out")
    wrong = [key for key, kinds in _KINDS.items() if not isinstance(document.get(key), kinds)]
    if wrong or document.keys() != _KINDS.keys():
        raise FormatError(
            f"is no plan: {(wrong or sorted(document.keys() - _KINDS.keys()))[0]!r} is not as it should be"
        )
    return RunPlan(**document)
