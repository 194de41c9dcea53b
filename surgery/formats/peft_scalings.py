"""PEFT's methods without factors that merge: IA³'s vectors, and the copies of norms of LayerNorm tuning.

Names and shapes alone; what they do to a weight is told in :mod:`surgery.scaling`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import MismatchError, UnsupportedError
from surgery.formats import peft

KINDS = ("IA3", "LN_TUNING")
_VECTOR, _COPY = ".ia3_l", ".ln_tuning_layers."
_KNOWN = peft.HARMLESS | {"feedforward_modules", "init_ia3_weights"}


@dataclass
class Scalings:
    """The tensors of such an adapter, by what they change."""

    vectors: dict[str, str] = field(default_factory=dict)
    """Module → key of the vector that scales it."""
    copies: dict[str, str] = field(default_factory=dict)
    """Parameter → key of its replacement."""


def check(document: Mapping[str, Any]) -> None:
    """Refuse a configuration with a field that may change the result in a way not known here.

    Raises:
        MismatchError: it has one.
    """
    unknown = [key for key, value in document.items() if key not in _KNOWN and value]
    if unknown:
        raise MismatchError(
            f"{peft.CONFIG} sets {unknown[0]!r}, which may change the result", mend="remove it if it does not"
        )


def collect(keys: Iterable[str], kind: str) -> Scalings:
    """Group an adapter's tensors.

    Raises:
        UnsupportedError: a tensor that the method does not have.

    >>> collect(["base_model.model.h.0.k.ia3_l", "base_model.model.classifier.bias"], "IA3").vectors
    {'h.0.k': 'base_model.model.h.0.k.ia3_l'}
    """
    found = Scalings()
    for key in keys:
        name = key.removeprefix(peft.PREFIX)
        if kind == "IA3" and name.endswith(_VECTOR):
            found.vectors[name.removesuffix(_VECTOR)] = key
        elif kind == "LN_TUNING" and _COPY in name:
            found.copies[name.replace(_COPY, ".")] = key
        elif (part := _part(key)) is not None and part.kind == "full":
            found.copies[f"{part.module}.{part.parameter}"] = key
        else:
            raise UnsupportedError(f"is no tensor that an adapter of {kind} has", tensor=key)
    return found


def _part(key: str) -> peft.Part | None:
    try:
        return peft.parse_key(key)
    except UnsupportedError:
        return None
