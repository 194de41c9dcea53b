"""Bottleneck adapters: Houlsby's, Pfeiffer's, the parallel one and Lin's, in the format of AdapterHub's ``adapters``.

All compute ``h + s · (W_up f(W_down h + b_down) + b_up)``, ``W_down (r, d)``, ``W_up (d, r)``, at some places of every
block. ``W_up`` starts at zero, so that a model computes what it did. Blocks that are left out are AdapterDrop's
(Rücklé et al. 2020, arXiv:2010.11918). They are not linear, so they cannot be merged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import MismatchError, UsageError
from surgery.methods.addition import Addition, New
from surgery.methods.model import Model
from surgery.methods.starts import ONES, ZEROS, Normal, Start, kaiming_uniform
from surgery.names import module_of
from surgery.roles import layer_of

_HOW_TO_LOAD = "load it by model.load_adapter(FOLDER, use_safetensors=True): AdapterHub looks for a pickle otherwise"


@dataclass(frozen=True)
class Shape:
    """What sets one kind of bottleneck apart from the others."""

    attention: bool
    """One after the attention too, not only after the feed-forward part."""
    activation: str
    before: bool = False
    """The block's own norm comes first."""
    parallel: bool = False
    norm: bool = False
    """A trained LayerNorm before the bottleneck."""

    def down(self, width: int) -> Start:
        """Say how the down projection starts."""
        return kaiming_uniform(width) if self.parallel else Normal(0.01, truncated=True)


def houlsby(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Put a bottleneck after every attention and every feed-forward part: ``2L (2 d r + r + d)`` parameters.

    Args:
        model: the model's header.
        target: must be empty: ``leave_out`` chooses blocks.
        settings: ``size`` r of the bottleneck, ``leave_out`` block numbers, ``name``.

    Raises:
        MismatchError: a bottleneck wider than the model, or a block that is not there.

    Reference: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, section 2.1.
    Departs from the paper: W_up starts at exactly zero, not near it.
    """
    return _bottlenecks(Shape(attention=True, activation="swish"), model, target, settings)


def pfeiffer(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Put a bottleneck after every feed-forward part, before its norm: ``L (2 d r + r + d)`` parameters.

    Arguments and errors are those of :func:`houlsby`.

    Reference: Pfeiffer et al. 2020, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
    arXiv:2005.00247, section 3.
    """
    return _bottlenecks(Shape(attention=False, activation="relu", before=True), model, target, settings)


def parallel(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Put a bottleneck beside every feed-forward part, scaled by 4: ``L (2 d r + r + d)`` parameters.

    Arguments and errors are those of :func:`houlsby`.

    Reference: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366,
    section 4.
    """
    return _bottlenecks(Shape(attention=False, activation="relu", parallel=True), model, target, settings)


def lin(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Put a LayerNorm and a bottleneck after every feed-forward part: ``L (2 d r + r + d) + 2 L d`` parameters.

    Arguments and errors are those of :func:`houlsby`.

    Reference: Lin et al. 2020, "Exploring Versatile Generative Language Model Via Parameter-Efficient Transfer
    Learning", arXiv:2004.03829, section 2.
    Departs from the paper: none in the count; AdapterHub has no such type, so it is its Pfeiffer bottleneck with
    ``ln_before``.
    """
    return _bottlenecks(Shape(attention=False, activation="relu", before=True, norm=True), model, target, settings)


def _bottlenecks(shape: Shape, model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    if target:
        raise UsageError("bottlenecks go into every block", mend="-p leave_out=0,1 leaves blocks out")
    width, size = model.hidden, settings["size"]
    if not 1 <= size <= width:
        raise MismatchError(
            f"a bottleneck of {size} does not fit a model of width {width}", mend=f"-p size=1 to {width}"
        )
    stacks = model.blocks
    if len(stacks) != 1:
        raise MismatchError(f"has {len(stacks)} stacks of blocks, {', '.join(stacks)}: one is supported")
    (blocks,) = stacks.values()
    left_out = sorted(set(settings["leave_out"] or ()))
    if any(not 0 <= number < len(blocks) for number in left_out):
        raise MismatchError(f"leave_out names block {left_out[-1]} of {len(blocks)}, counted from 0")
    new: list[New] = []
    for number, block in enumerate(blocks):
        if number not in left_out:
            for place in _places(model, block, shape.attention):
                new += _bottleneck(f"{place}.adapters.{settings['name']}", width, size, shape)
    config = _config(shape, model, size, left_out, settings["name"])
    return Addition(tuple(new), "adapterhub", config, notes=(_HOW_TO_LOAD,))


def _places(model: Model, block: str, attention: bool) -> list[str]:
    """Name the modules of a block that hold adapters: BERT's ``…output`` modules, else modules that ``adapters`` adds."""
    inside = [name for name in model.specs if layer_of(name) == block and name.endswith(".weight")]
    outputs = [module_of(module_of(name)) for name in inside if re.search(r"\.output\.dense\.weight$", name)]
    if len(outputs) == 2:
        return sorted(outputs, key=len, reverse=True) if attention else [min(outputs, key=len)]
    return [f"{block}.attention_adapters", f"{block}.output_adapters"] if attention else [f"{block}.output_adapters"]


def _bottleneck(key: str, width: int, size: int, shape: Shape) -> list[New]:
    down = f"{key}.adapter_down.{int(shape.norm)}"
    new = [
        New(f"{down}.weight", (size, width), shape.down(width)),
        New(f"{down}.bias", (size,), ZEROS),
        New(f"{key}.adapter_up.weight", (width, size), ZEROS),
        New(f"{key}.adapter_up.bias", (width,), ZEROS),
    ]
    if shape.norm:
        # One norm, which adapters holds under two names, and looks for under both.
        for norm, second in (("adapter_norm_before", False), ("adapter_down.0", True)):
            new.append(New(f"{key}.{norm}.weight", (width,), ONES, frozen=second))
            new.append(New(f"{key}.{norm}.bias", (width,), ZEROS, frozen=second))
    return new


def _config(shape: Shape, model: Model, size: int, left_out: Sequence[int], name: str) -> dict[str, Any]:
    architectures = model.config.get("architectures") or [None]
    factor = model.hidden / size
    if int(model.hidden // factor) != size:
        factor = model.hidden / (size + 0.5)  # adapters rounds the quotient down
    return {
        "config": {
            "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
            "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform",
            "init_weights": "mam_adapter" if shape.parallel else "bert", "inv_adapter": None,
            "inv_adapter_reduction_factor": None, "is_parallel": shape.parallel, "learn_phm": True,
            "leave_out": list(left_out), "ln_after": False, "ln_before": shape.norm, "mh_adapter": shape.attention,
            "non_linearity": shape.activation, "original_ln_after": True, "original_ln_before": shape.before,
            "output_adapter": True, "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001,
            "phm_layer": False, "phm_rank": 1, "reduction_factor": factor, "residual_before_ln": True,
            "scaling": 4.0 if shape.parallel else 1.0, "shared_W_phm": False, "shared_phm_rule": True,
            "stochastic_depth": 0.0, "use_gating": False,
        },
        "hidden_size": model.hidden, "model_class": architectures[0], "model_name": None,
        "model_type": model.config.get("model_type"), "name": name, "version": "adapters.1.3.0",
    }  # fmt: skip
