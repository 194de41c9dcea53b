"""IA³: scale keys, values and feed-forward activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.formats import peft
from surgery.methods.addition import Addition, New
from surgery.methods.model import Model
from surgery.methods.starts import ONES


def plan(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:  # noqa: ARG001  as all methods
    """Scale activations by trained vectors: ``l_k ∘ K``, ``l_v ∘ V``, and the down projection's input by ``l_ff``.

    One parameter an output of k and v, one an input of down; all start at one, so nothing changes.

    Args:
        model: the model's header.
        target: patterns; k, v and down by default. Weights taken for ``down`` are scaled at their input.
        settings: none.

    Raises:
        MismatchError: a target that is no matrix.

    Reference: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", arXiv:2205.05638, section 3.3.
    """
    chosen, notes = model.choose(target, ("k", "v", "down"))
    chosen = [name for name in chosen if not (name.endswith(".bias") and f"{name[:-5]}.weight" in chosen)]
    new: list[New] = []
    feeding: list[str] = []
    scaled: list[str] = []
    for name in chosen:
        model.check_adaptable(name)
        model.name(name)
        out, into = model.sides(name)
        inside = model.roles[name] == "down"
        (feeding if inside else scaled).append(model.module(name))
        new.append(New(f"{peft.PREFIX}{model.module(name)}.ia3_l", (1, into) if inside else (out, 1), ONES))
    heads, head = model.task_head(peft.PREFIX)
    words = peft.target_modules(feeding, model.modules) if feeding else []
    config = {
        "peft_type": "IA3", "task_type": model.task, "auto_mapping": None, "base_model_name_or_path": None,
        "revision": None, "inference_mode": False, "exclude_modules": None, "init_ia3_weights": True,
        "fan_in_fan_out": all(name in model.transposed for name in chosen), "modules_to_save": heads or None,
        "feedforward_modules": words,
        "target_modules": [*(peft.target_modules(scaled, model.modules) if scaled else []), *words],
    }  # fmt: skip
    return Addition(tuple(new), "peft", config, head=head, chosen=tuple(chosen), notes=notes)
