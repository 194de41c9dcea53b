"""BitFit: train biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import MismatchError, UsageError
from surgery.formats import peft
from surgery.methods.addition import Addition, New
from surgery.methods.model import Model
from surgery.methods.starts import ZEROS, Copy
from surgery.names import module_of


def plan(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Train the biases that a model has, and with ``norms`` its norms' scales too, as the published count does.

    As many parameters as they have elements. PEFT has no such method: the carrier is a LoRA of rank 1 whose two factors
    are zero, so that neither of them ever gets a gradient, with ``bias: "all"``; scales go as saved modules. With
    ``create``, modules of 2-D weights without a bias get a zero one; no PEFT file can hold those, so they come as plain
    tensors.

    Args:
        model: the model's header.
        target: must be empty for the PEFT file, which holds all biases or none; with ``create`` it chooses modules.
        settings: ``norms``, ``create``.

    Raises:
        MismatchError: the model has no biases.

    Reference: Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models", arXiv:2106.10199, section 3.
    """
    if settings["create"]:
        return _created(model, target)
    heads, head = model.task_head(peft.PREFIX)
    heading = tuple(f"{each}." for each in heads)
    body = [n for n in model.specs if not (heads and f"{model.module(n)}.".startswith(heading))]
    biases = [name for name in body if name.endswith((".bias", ".beta")) and len(model.specs[name].shape) == 1]
    if target:
        raise UsageError("PEFT's file holds all biases or none", mend="drop --target")
    # A model whose norms alone have biases has nothing of what the method trains.
    if not any(model.roles[name] == "bias" for name in biases):
        raise MismatchError("the model has no biases to train", mend="-p create=true adds zero ones, as plain tensors")
    scales = [n for n in body if model.roles[n] == "norm" and n not in biases] if settings["norms"] else []
    normed = {module_of(name) for name in scales}
    modules = sorted({model.module(name) for name in scales})
    new = [New(f"{peft.PREFIX}{model.name(n)}", model.specs[n].shape, Copy(n)) for n in (*biases, *scales)]
    carrier = _carrier(model)
    out, into = model.sides(carrier)
    # PEFT wraps the carrier's module, and finds its bias one level down.
    inner = f"{peft.PREFIX}{model.module(carrier)}"
    new = [New(f"{inner}.base_layer.bias", one.shape, one.start) if one.key == f"{inner}.bias" else one for one in new]
    new += [
        New(f"{inner}.lora_A.weight", (1, into), ZEROS, frozen=True),
        New(f"{inner}.lora_B.weight", (out, 1), ZEROS, frozen=True),
    ]
    config = peft.lora_config(
        r=1, targets=peft.target_modules([model.module(carrier)], model.modules), ranks={}, base_name=None,
        task=model.task, bias=True, modules_to_save=[*heads, *modules], fan_in_fan_out=carrier in model.transposed,
    )  # fmt: skip
    chosen = (*biases, *scales)
    notes = (f"{len(normed)} norms are trained whole",) if normed else ()
    return Addition(tuple(new), "peft", config | {"inference_mode": False}, head=head, chosen=chosen, notes=notes)


def _carrier(model: Model) -> str:
    """Choose the linear weight that carries the zero LoRA: the first of an attention."""
    for name in model.having("q", "qkv", "k", "v", "o", "up", "down"):
        if len(model.specs[name].shape) == 2:
            return name
    raise MismatchError("no rule finds a linear layer in this model, which PEFT needs to carry biases")


def _created(model: Model, target: Sequence[str]) -> Addition:
    linear = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
    present = tuple(role for role in linear if role in model.roles.values())
    if not present:
        raise MismatchError("no rule finds a linear layer in this model", mend="name modules by --target")
    chosen, notes = model.choose(target, present)
    new = []
    for name in chosen:
        bias = f"{module_of(name)}.bias"
        if len(model.specs[name].shape) == 2 and bias not in model.specs:
            new.append(New(bias, (model.sides(name)[0],), ZEROS))
    if not new:
        raise MismatchError("every chosen layer has a bias already", mend="drop create")
    biases = {name: spec.numel for name, spec in model.specs.items() if name.endswith((".bias", ".beta"))}
    return Addition(tuple(new), "tensors", existing=biases, chosen=tuple(chosen), notes=notes)
