"""The merge that a saved plan, or a command line, describes in plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.operations.merge import merge
from surgery.operations.recipe import merge_recipe


def planned(described: Mapping[str, Any]) -> Checkpoint:
    """Compose a merge.

    Args:
        described: the fields of :data:`surgery.formats.run_plan.RECIPE`, or of :data:`surgery.formats.run_plan.MODELS`.

    Raises:
        SurgeryError: whatever :func:`surgery.merge_recipe` or :func:`surgery.merge` refuses.
    """
    given = dict(described)
    if "recipe" in given:
        return merge_recipe(given.pop("recipe").encode(), **given)
    base, *others = given.pop("inputs")
    parameters: dict[str, Any] = given.pop("parameters")
    return merge(base, *others, **given, **parameters)
