"""LoRA on experts: fused ones, which are bare 3-D parameters, and ones that are stored matrix by matrix."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from surgery.errors import MismatchError
from surgery.formats import peft
from surgery.methods.addition import New
from surgery.methods.model import Model
from surgery.methods.starts import ZEROS, kaiming_uniform
from surgery.roles import is_fused_experts

_SINGLE = re.compile(r"(?P<owner>.*\.experts)\.(?P<number>\d+)\.(?P<rest>.+)")
_FUSED_WITH = {"w3": "w1", "up_proj": "gate_proj"}
"""Projections that PEFT makes one with another: of the expert's gate."""


def fused(model: Model, chosen: Sequence[str]) -> list[str]:
    """List the fused experts among chosen tensors."""
    return [name for name in chosen if is_fused_experts(model.specs[name])]


def factors(model: Model, name: str, rank: int, adapted: Collection[str]) -> list[New]:
    """Plan A and B of one fused parameter: ``A (E·r, in)``, row ``e·r + k``; ``B (out, r·E)``, column ``k·E + e``.

    Args:
        model: the model's header.
        name: the parameter ``(E, out, in)``, or ``(E, in, out)`` in models that have it so.
        rank: of each expert.
        adapted: all fused parameters that are adapted. Of two in one module PEFT wraps the first innermost.
    """
    count, out, into = model.specs[name].shape
    if peft.experts_transposed(model.config):
        out, into = into, out
    home = name.rpartition(".")[0]
    beside = sorted((one for one in adapted if one.rpartition(".")[0] == home), key=peft.parameter_order)
    wrappers = ".base_layer" * (len(beside) - 1 - beside.index(name))
    key = f"{peft.PREFIX}{model.name(name).rpartition('.')[0]}{wrappers}"
    return [
        New(f"{key}.lora_A.weight", (count * rank, into), kaiming_uniform(into)),
        New(f"{key}.lora_B.weight", (out, rank * count), ZEROS),
    ]


def check_single(model: Model, chosen: Sequence[str]) -> tuple[str, ...]:
    """Refuse a choice of single experts that PEFT cannot fuse as the model does in memory.

    Returns:
        A note where there are any.

    Raises:
        MismatchError: some experts of a module are left out, or its gate is chosen and its up projection not.
    """
    together: dict[tuple[str, str], list[str]] = {}
    for name in model.specs:
        if found := _SINGLE.fullmatch(name):
            projection = found["rest"].removesuffix(".weight")
            together.setdefault((found["owner"], _FUSED_WITH.get(projection, projection)), []).append(name)
    taken, any_single = set(chosen), False
    for names in together.values():
        mine = [name for name in names if name in taken]
        any_single |= bool(mine)
        if mine and len(mine) < len(names):
            raise MismatchError(
                f"must be adapted with {mine[0]}: PEFT fuses experts, and a gate with its up projection",
                tensor=next(name for name in names if name not in taken),
                mend="choose both in all experts, as --target role:gate,role:up",
            )
    if not any_single:
        return ()
    return ("PEFT fuses experts when it loads them: it then trains gate and up as one, with twice the rank",)
