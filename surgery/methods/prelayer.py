"""PreLayer, the prefix-layer tuning of the LoRA paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import UsageError
from surgery.methods.addition import Addition, New
from surgery.methods.model import Model
from surgery.methods.starts import Normal


def plan(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Replace the activations of special tokens after every block by trained ones: ``h_l[prefix] = P_l``.

    ``layers · d · (prefix + infix)`` parameters: ``<block>.prelayer.prefix (prefix, d)`` for tokens put before the
    prompt, and ``<block>.prelayer.infix (infix, d)`` for tokens put after it. No library loads them: they are plain
    tensors, and the model's code must put them in. The function changes at once.

    Raises:
        UsageError: neither prefix nor infix tokens.

    Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 5.1.
    Departs from the paper: it does not say how they start; here normal with standard deviation 0.02.
    """
    if target:
        raise UsageError("every block gets its own", mend="drop --target")
    lengths = {"prefix": settings["prefix"], "infix": settings["infix"]}
    if min(lengths.values()) < 0 or not any(lengths.values()):
        raise UsageError("prefix and infix are numbers of tokens, not both 0")
    blocks = [block for stack in model.blocks.values() for block in stack]
    new = [
        New(f"{block}.prelayer.{place}", (length, model.hidden), Normal(0.02))
        for block in blocks
        for place, length in lengths.items()
        if length
    ]
    return Addition(tuple(new), "tensors", unchanged=False)
