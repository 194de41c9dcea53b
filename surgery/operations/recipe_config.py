"""The configuration of a merged model: that of its donor, with what the merge changed put right."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.operations.recipe_layers import layer_key

TORCH_NAMES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

LayerOrigin = tuple[Mapping[str, Any] | None, int]
"""The configuration of the model that an output layer comes from, and the layer's number there."""


def corrected(
    donor: Mapping[str, Any],
    *,
    layers: Sequence[LayerOrigin] | None = None,
    dtype: str | None = None,
    vocabulary: int | None = None,
    tied: bool | None = None,
) -> dict[str, Any]:
    """Return a copy of a donor's ``config.json`` that fits the merged tensors.

    Args:
        donor: the base's, or the first model's.
        layers: for each output layer where it comes from; ``None`` where the layers are the donor's.
        dtype: of the merged tensors.
        vocabulary: rows of the embedding, where they changed.
        tied: whether the output head is the embedding, where that changed.

    >>> config = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}
    >>> corrected(config, layers=[(config, 0), (config, 1), (config, 1)])
    {'num_hidden_layers': 3, 'layer_types': ['full', 'sliding', 'sliding']}
    """
    config = copy.deepcopy(dict(donor))
    key = layer_key(config)
    if layers is not None and key is not None:
        _splice(config, key, layers)
    if dtype in TORCH_NAMES:
        for key_name in [name for name in config if name in ("torch_dtype", "dtype")] or ["torch_dtype"]:
            config[key_name] = TORCH_NAMES[str(dtype)]
    for name, value in (("vocab_size", vocabulary), ("tie_word_embeddings", tied)):
        if value is not None:
            inner = config.get("text_config")
            home = inner if name not in config and isinstance(inner, dict) and name in inner else config
            home[name] = value
    return config


def _splice(config: dict[str, Any], key: tuple[str, ...], layers: Sequence[LayerOrigin]) -> None:
    """Correct the number of layers, and every list that has one entry a layer."""
    inner = _inside(config, key)
    count = inner[key[-1]]
    for name, own in list(inner.items()):
        if isinstance(own, list) and len(own) == count and "layer" in name:
            inner[name] = [_entry(name, key, origin, own, count) for origin in layers]
    inner[key[-1]] = len(layers)


def _entry(name: str, key: tuple[str, ...], origin: LayerOrigin, own: list[Any], count: int) -> Any:
    """Return a layer's entry of a list: its own model's, or the donor's where that has no such list."""
    config, number = origin
    if config is not None and layer_key(config) == key:
        inner = _inside(config, key)
        listed = inner.get(name)
        if isinstance(listed, list) and len(listed) == inner[key[-1]]:
            return listed[number]
    return own[min(number, count - 1)]


def _inside(config: Any, key: tuple[str, ...]) -> Any:
    for part in key[:-1]:
        config = config[part]
    return config
