"""LoRA, rsLoRA and DoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import MismatchError, UsageError
from surgery.formats import peft
from surgery.methods import experts
from surgery.methods.addition import Addition, New
from surgery.methods.model import Model
from surgery.methods.starts import ZEROS, Normal, Norms, kaiming_uniform


def plan(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    r"""Add ``ΔW = s · B A`` to chosen weights: ``A (r, in)``, ``B (out, r)``, ``s = α/r``, or ``α/√r`` with rsLoRA.

    ``r (in + out)`` parameters a weight. A is Kaiming-uniform and B zero, so that ``ΔW = 0``. DoRA adds the magnitude
    ``m (out,)``, the norms of W's rows: ``W' = m / ‖W + ΔW‖ ∘ (W + ΔW)``. Embeddings: ``A (r, rows)`` starts at zero
    and B is normal, as PEFT has it. Convolutions: ``A (r, in, k…)``, ``B (out, r, 1…)``. Fused experts: ``A (E·r, in)``,
    ``B (out, r·E)``, a pair of factors an expert.

    Args:
        model: the model's header.
        target: patterns; the q and v projections by default.
        settings: ``r``, ``alpha``, ``rslora``, ``dora``.

    Raises:
        MismatchError: a 1-D target, or a rank larger than the matrix.
        UnsupportedError: a bare parameter that is not of experts.

    >>> from surgery.tensor import TensorSpec
    >>> names = ["h.0.q_proj.weight", "h.0.v_proj.weight"]
    >>> model = Model({name: TensorSpec(name, "F32", (6, 4)) for name in names})
    >>> plan(model, (), {"r": 2, "alpha": None, "rslora": False, "dora": False}).parameters
    40

    Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3;
    Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA); Liu et al. 2024, arXiv:2402.09353, equation 5 (DoRA).
    Departs from the paper: A is Kaiming-uniform, as in its authors' code, not Gaussian.
    """
    chosen, notes = model.choose(target, ("q", "v"))
    chosen = [name for name in chosen if not (name.endswith(".bias") and f"{name[:-5]}.weight" in chosen)]
    rank, dora = settings["r"], settings["dora"]
    if rank < 1:
        raise UsageError(f"r must be at least 1, not {rank}")
    fused = experts.fused(model, chosen)
    if dora and fused:
        raise MismatchError("is of experts: DoRA is for linear weights", tensor=fused[0], mend="leave it out")
    notes = (*notes, *experts.check_single(model, chosen))
    new: list[New] = []
    for name in chosen:
        new += experts.factors(model, name, rank, fused) if name in fused else _factors(model, name, rank, dora)
    _check_rank(model, chosen, fused, rank)
    heads, head = model.task_head(peft.PREFIX)
    _refuse_heads(chosen, model, heads)
    matrices = [name for name in chosen if name not in fused]
    modules = [model.module(name) for name in matrices]
    config = peft.lora_config(
        r=rank, targets=peft.target_modules(modules, model.modules), ranks={}, base_name=None, task=model.task,
        parameters=[model.name(name) for name in fused], modules_to_save=heads,
        fan_in_fan_out=bool(matrices) and all(name in model.transposed for name in matrices), dora=dora,
    )  # fmt: skip
    config |= {
        "lora_alpha": rank if settings["alpha"] is None else settings["alpha"],
        "use_rslora": settings["rslora"], "inference_mode": False,
    }  # fmt: skip
    return Addition(tuple(new), "peft", config, head=head, chosen=tuple(chosen), notes=notes)


def _factors(model: Model, name: str, rank: int, dora: bool) -> list[New]:
    model.check_adaptable(name, experts=True)
    shape, key = model.specs[name].shape, f"{peft.PREFIX}{model.module(name)}"
    model.name(name)
    if len(shape) < 2:
        raise MismatchError(f"is {len(shape)}-D: LoRA factors matrices", tensor=name, mend="choose 2-D weights")
    if model.roles[name] == "embedding":
        if dora:
            raise MismatchError("is an embedding: DoRA is for linear weights", tensor=name, mend="leave it out")
        return [
            New(f"{key}.lora_embedding_A", (rank, shape[0]), ZEROS),
            New(f"{key}.lora_embedding_B", (shape[1], rank), Normal(1.0)),
        ]
    if len(shape) > 2:
        return _convolution(name, shape, key, rank, dora)
    out, into = model.sides(name)
    new = [
        New(f"{key}.lora_A.weight", (rank, into), kaiming_uniform(into)),
        New(f"{key}.lora_B.weight", (out, rank), ZEROS),
    ]
    if dora:
        new.append(New(f"{key}.lora_magnitude_vector", (out,), Norms(name, name in model.transposed)))
    return new


def _convolution(name: str, shape: tuple[int, ...], key: str, rank: int, dora: bool) -> list[New]:
    out, into, *kernel = shape
    if dora or (into == 1 and out > 1):
        what = "DoRA is for linear weights" if dora else "a depthwise convolution has no low rank"
        raise MismatchError(f"is a convolution: {what}", tensor=name, mend="leave it out")
    fan_in = math.prod((into, *kernel))
    return [
        New(f"{key}.lora_A.weight", (rank, into, *kernel), kaiming_uniform(fan_in)),
        New(f"{key}.lora_B.weight", (out, rank, *(1 for _ in kernel)), ZEROS),
    ]


def _check_rank(model: Model, chosen: Sequence[str], fused: Sequence[str], rank: int) -> None:
    """Refuse a rank that is larger than a chosen matrix, and say which one fits all of them."""
    sides = {}
    for name in chosen:
        shape = model.specs[name].shape
        sides[name] = shape[1:] if name in fused else (shape[0], math.prod(shape[1:]))
    most = min(map(min, sides.values()), default=rank)
    for name, (rows, columns) in sides.items():
        if rank > min(rows, columns):
            raise MismatchError(
                f"rank {rank} is larger than the matrix, {rows}×{columns}", tensor=name, mend=f"-p r={most} at most"
            )


def _refuse_heads(chosen: Sequence[str], model: Model, heads: Sequence[str]) -> None:
    for name in chosen:
        if any(f"{model.module(name)}.".startswith(f"{head}.") for head in heads):
            raise MismatchError("belongs to the task's head, which PEFT trains whole", tensor=name, mend="leave it out")
