"""Saved plans: a merge as a file that several machines can work on. JSON; a recipe goes in as its own text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import FormatError
from surgery.formats.safetensors import encode_document, strict_object

SCHEMA = "surgery.run/2"


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All that a machine which sees the same files needs to make its share of a merge."""

    merge: dict[str, Any]
    """What is merged: the fields of :data:`RECIPE`, or those of :data:`MODELS`."""
    out: str
    digest: str
    max_shard_size: int | None
    overwrite: bool
    files: dict[str, int]
    """Name → bytes of every file that the output will have."""


Kinds = Mapping[str, tuple[type, ...]]
_KINDS: Kinds = {
    "merge": (dict,), "out": (str,), "digest": (str,), "max_shard_size": (int, type(None)), "overwrite": (bool,), "files": (dict,),
}  # fmt: skip
RECIPE: Kinds = {
    "recipe": (str,), "compat": (str,), "seed": (int,), "allow_base_mismatch": (bool,), "allow_nonfinite": (bool,),
}  # fmt: skip
"""A recipe's text, and what it is merged with."""
MODELS: Kinds = {
    "inputs": (list,), "algorithm": (str, type(None)), "parameters": (dict,), "compat": (str,), "seed": (int,),
    "dtype": (str, type(None)), "with_base": (bool, type(None)), "missing": (str,), "name_map": (dict, type(None)),
    "allow_base_mismatch": (bool,), "allow_incomplete": (bool,), "allow_nonfinite": (bool,), "reverse": (bool,), "undo": (bool,),
    "delta_base": (str, type(None)),
}  # fmt: skip
"""Paths of inputs, the base first, and the arguments of ``surgery.merge``."""


def encode(plan: RunPlan) -> bytes:
    """Write a plan."""
    return encode_document({"schema": SCHEMA, **dataclasses.asdict(plan)})


def parse(data: bytes) -> RunPlan:
    """Read a plan.

    Raises:
        FormatError: it is none.

    >>> merge = {"recipe": "…", "compat": "paper", "seed": 0, "allow_base_mismatch": False, "allow_nonfinite": False}
    >>> plan = RunPlan(merge, "out", "xxh3-128:0", None, False, {"model.safetensors": 8})
    >>> parse(encode(plan)) == plan
    True
    """
    document: dict[str, Any] = strict_object(data)
    if document.pop("schema", None) != SCHEMA:
        raise FormatError(f"is no plan of the schema {SCHEMA!r}", mend="make one with surgery plan --plan-out")
    _check(document, _KINDS)
    _check(document["merge"], RECIPE if "recipe" in document["merge"] else MODELS)
    if not all(isinstance(path, str) for path in document["merge"].get("inputs", ())):
        raise FormatError("is no plan: its inputs are not paths")
    return RunPlan(**document)


def _check(fields: Mapping[str, Any], kinds: Kinds) -> None:
    wrong = [key for key, allowed in kinds.items() if not isinstance(fields.get(key), allowed)]
    if wrong or fields.keys() != kinds.keys():
        raise FormatError(f"is no plan: {(wrong or sorted(fields.keys() ^ kinds.keys()))[0]!r} is not as it should be")
