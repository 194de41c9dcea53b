"""LayerNorm tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import MismatchError
from surgery.formats import peft
from surgery.methods.addition import Addition, New
from surgery.methods.model import Model
from surgery.methods.starts import Copy
from surgery.names import module_of


def plan(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:  # noqa: ARG001  as all methods
    """Train copies of the norms' scales and biases; they replace the base's: ``γ, β → γ', β'``.

    As many parameters as the norms have. The copies are the base's own values, so nothing changes at first.

    Args:
        model: the model's header.
        target: patterns; every norm by default. A norm is taken whole, scale and bias.
        settings: none.

    Raises:
        MismatchError: a target that is no norm.

    Reference: Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
    arXiv:2312.11420.
    """
    chosen, notes = model.choose(target, ("norm",))
    for name in chosen:
        if model.roles[name] != "norm":
            raise MismatchError(f"is taken for {model.roles[name]}, not a norm", tensor=name, mend="choose norms")
    wanted = {module_of(name) for name in chosen}
    whole = [name for name in model.specs if module_of(name) in wanted]
    new = []
    for name in whole:
        key = f"{peft.PREFIX}{model.module(name)}.ln_tuning_layers.{model.name(name).rpartition('.')[2]}"
        new.append(New(key, model.specs[name].shape, Copy(name)))
    heads, head = model.task_head(peft.PREFIX)
    config = {
        "peft_type": "LN_TUNING", "task_type": model.task, "auto_mapping": None, "base_model_name_or_path": None,
        "revision": None, "inference_mode": False, "exclude_modules": None, "modules_to_save": heads or None,
        "target_modules": peft.target_modules(sorted({model.module(name) for name in whole}), model.modules),
    }  # fmt: skip
    return Addition(tuple(new), "peft", config, head=head, chosen=tuple(whole), notes=notes)
