"""A classification head of a given size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import MismatchError, UsageError
from surgery.methods.addition import Addition, New
from surgery.methods.model import Model
from surgery.methods.starts import ZEROS, Normal


def plan(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Add ``logits = W h + b``: ``W (labels, d)``, ``b (labels,)``, ``labels (d + 1)`` parameters.

    W is normal with standard deviation 0.02 and b zero, as BERT's heads are.

    Args:
        model: the model's header.
        target: must be empty.
        settings: ``labels``, ``name`` of the module.

    Raises:
        MismatchError: the model has a module of that name already.

    Reference: Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers", arXiv:1810.04805, section 4.1.
    """
    if target:
        raise UsageError("a head stands at the model's end: there is nothing to choose", mend="drop --target")
    if settings["labels"] < 1:
        raise UsageError(f"labels must be at least 1, not {settings['labels']}")
    name = settings["name"]
    taken = [tensor for tensor in model.specs if tensor.startswith(f"{name}.")]
    if taken:
        raise MismatchError(f"the model has a module {name} already", tensor=taken[0], mend="-p name=another")
    weight = New(f"{name}.weight", (settings["labels"], model.hidden), Normal(0.02))
    return Addition((weight, New(f"{name}.bias", (settings["labels"],), ZEROS)), "tensors")
