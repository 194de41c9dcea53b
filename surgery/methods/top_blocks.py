"""FT-TopK: fine-tune the last blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import MismatchError, UsageError
from surgery.methods.addition import Addition
from surgery.methods.model import Model
from surgery.roles import layer_of


def plan(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Train the last ``k`` blocks in full: nothing is added, and the result is a list of names.

    As many parameters as those blocks have (``k (12 d² + 13 d)`` in GPT-2); not the last norm, not the head.

    Args:
        model: the model's header.
        target: patterns of the stack to take, where there are several.
        settings: ``k``.

    Raises:
        MismatchError: fewer blocks than ``k``, or several stacks.

    Reference: the baseline FT^Top2 of Li and Liang 2021, arXiv:2101.00190, and Hu et al. 2021, arXiv:2106.09685.
    """
    stacks = model.blocks
    if target:
        chosen, _ = model.choose(target, ())
        stacks = {stem: blocks for stem, blocks in stacks.items() if {layer_of(name) for name in chosen} & set(blocks)}
    if len(stacks) != 1:
        raise MismatchError(
            f"has {len(stacks)} stacks of blocks: {', '.join(stacks) or 'none is chosen'}",
            mend="choose one by --target, as 'decoder.*'",
        )
    ((stem, blocks),) = stacks.items()
    if settings["k"] < 1:
        raise UsageError(f"k must be at least 1, not {settings['k']}")
    if settings["k"] > len(blocks):
        raise MismatchError(f"{stem} has {len(blocks)} blocks, fewer than k={settings['k']}")
    top = set(blocks[-settings["k"] :])
    names = {name: spec.numel for name, spec in model.specs.items() if layer_of(name) in top}
    return Addition((), "names", existing=names, chosen=tuple(names))
