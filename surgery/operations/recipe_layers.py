"""Which tensors are layers: found from names and ``config.json``, never from a table of architectures.

A *stack* is a run of names ``PREFIX.0.…``, ``PREFIX.1.…`` up to its last layer. What a model has besides is taken for
what comes before its layers where its name speaks of embeddings, and for what comes after them otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import MismatchError
from surgery.report import join_shown
from surgery.roles import layer_of

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What configurations call the number of layers."""
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_BEFORE = re.compile(r"(?i)(^|[._])(\w*embed\w*|wte|wpe)([._]|$)")


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of one model, or of one of its modules."""

    prefix: str
    layers: tuple[tuple[str, ...], ...]
    """For every layer the ends of its tensors' names, after ``PREFIX.NUMBER.``."""

    def name(self, layer: int, end: str) -> str:
        """Name one tensor.

        >>> Stack("model.layers", (("mlp.weight",),)).name(3, "mlp.weight")
        'model.layers.3.mlp.weight'
        """
        return f"{self.prefix}.{layer}.{end}" if self.prefix else f"{layer}.{end}"


def stacks_of(names: Iterable[str]) -> dict[str, Stack]:
    """Find every stack whose layers are numbered from 0 without a gap, by its prefix."""
    groups: dict[str, dict[int, list[str]]] = {}
    for name in names:
        block = layer_of(name)
        prefix, _, number = block.rpartition(".")
        if number.isdecimal():
            groups.setdefault(prefix, {}).setdefault(int(number), []).append(name[len(block) + 1 :])
    return {
        prefix: Stack(prefix, tuple(tuple(layers[number]) for number in range(len(layers))))
        for prefix, layers in groups.items()
        if set(layers) == set(range(len(layers)))
    }


def layer_key(config: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Find where a configuration says the number of layers: a path of keys.

    >>> layer_key({"text_config": {"num_hidden_layers": 4}})
    ('text_config', 'num_hidden_layers')
    """
    config = config or {}
    for where in ((), ("text_config",)):
        inner = config if not where else config.get(where[0])
        for key in LAYER_KEYS if isinstance(inner, Mapping) else ():
            if isinstance(inner, Mapping) and isinstance(inner.get(key), int):
                return (*where, key)
    return None


def layer_count(config: Mapping[str, Any] | None) -> int | None:
    """Return the number of layers that a configuration states."""
    found: Any = config
    key = layer_key(config)
    for part in key or ():
        found = found[part]
    return found if key else None


def main_stack(model: Checkpoint, names: Iterable[str]) -> Stack:
    """Find the stack that layer ranges count in.

    Raises:
        MismatchError: there is none, or more than one.
    """
    stacks = stacks_of(names)
    stated = layer_count(model.config)
    fitting = [stack for stack in stacks.values() if stated is None or len(stack.layers) == stated]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        what = f"states {stated} layers, but its tensors have none of that number" if stated else "has no layers"
        raise MismatchError(f"{what}, so a layer_range means nothing", file=model.label)
    shown = join_shown([f"{stack.prefix} ({len(stack.layers)})" for stack in fitting])
    raise MismatchError(
        f"has {len(fitting)} stacks of layers: {shown}",
        file=model.label,
        mend="name them under modules:, each with its slices",
    )


def is_head(name: str) -> bool:
    """Say whether a tensor is an output head, which a model may tie to its embedding and not store."""
    return _HEAD.search(name) is not None


def comes_before(name: str) -> bool:
    """Say whether a tensor outside of the layers stands before them.

    >>> comes_before("model.embed_tokens.weight"), comes_before("transformer.wte.weight")
    (True, True)
    >>> comes_before("embed_out.weight"), comes_before("model.norm.weight")
    (False, False)
    """
    return not is_head(name) and _BEFORE.search(name) is not None
