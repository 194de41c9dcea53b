"""``merge``: put adapters into the weights of a base, or merge whole models by an algorithm."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from surgery.adapter import Adapter, is_adapter, open_adapter
from surgery.algorithms.registry import PAPER, Algorithm, find
from surgery.binding import bind
from surgery.checkpoint import Checkpoint, Origin, Source, open_checkpoint, require_arithmetic, work_of
from surgery.errors import UsageError
from surgery.exact import Delta, is_delta
from surgery.history import history_of
from surgery.kept import KEPT_FILE, UNDO_FILE
from surgery.lossy import is_lossy, open_lossy
from surgery.operations.merge_adapters import Work, resized_config
from surgery.operations.merge_exact import merge_exact
from surgery.operations.merge_models import Missing, Value, merge_models
from surgery.operations.merge_rules import rules_table

AdapterSource = str | os.PathLike[str] | Adapter


def merge(
    base: Source,
    *others: Source | AdapterSource | Delta,
    algorithm: str | Algorithm | None = None,
    coeff: Value | None = None,
    name_map: Mapping[str, str] | None = None,
    allow_base_mismatch: bool = False,
    allow_incomplete: bool = False,
    allow_nonfinite: bool = False,
    with_base: bool | None = None,
    dtype: str | None = None,
    compat: str = PAPER,
    seed: int = 0,
    missing: Missing = "refuse",
    reverse: bool = False,
    undo: bool = True,
    delta_base: Source | None = None,
    **parameters: Value,
) -> Checkpoint:
    r"""Merge adapters into a base, or models by an algorithm.

    *With an algorithm*, models are merged tensor by tensor; ``surgery algorithms`` lists what there is. Those that need
    no base take ``base`` as their first model.

    *Without*, every touched weight becomes ``round(W + Σᵢ cᵢ · Δᵢ)`` with ``Δ = scaling · B @ A`` for LoRA and ``Δ = new − W`` for
    tensors that an adapter stores in full. Sums are taken in float64 and rounded once to the weight's own dtype;
    untouched tensors, and full replacements with ``c = 1``, are copied as bytes.

    *With an exact delta* (:func:`surgery.extract_delta`) the fine-tune that it was made from is restored, bit for bit; a wrong
    base is refused by tensor. Several are a chain, each made with what the one before restores. With ``reverse`` the base
    is restored from the fine-tune. With ``delta_base`` they are numbers, ``round(W + Σᵢ cᵢ · (FTᵢ − BASE))``, for any ``W``.

    Args:
        base: the checkpoint to merge into.
        others: PEFT LoRA adapters (rsLoRA and DoRA variants included): folders or :class:`surgery.Adapter` objects; or
            exact deltas, files or :func:`surgery.extract_delta`'s;
            with an algorithm models, and any number of adapters and deltas, each of which stands for the base with it.
        algorithm: how to merge models: a name (``"ties"``) or a row of the registry.
        coeff: one coefficient for all, or one for each; any finite number. With an algorithm also ``{pattern: number}``
            or a function of the tensor's name.
        name_map: names in the adapters → names in the base, for models whose modules are not called as on disk.
        allow_base_mismatch: merge although an adapter was taken from another base, or is in there already.
        allow_incomplete: merge adapters that lack modules which their configuration names.
        allow_nonfinite: let NaN, Inf and overflow through.
        with_base: with an algorithm whose base is optional: whether the first input is the base.
        dtype: with an algorithm: of merged tensors; the base's or the first model's by default.
        compat: with an algorithm: ``"paper"``, or ``"mergekit"`` for mergekit 0.1.5's semantics where they differ.
        seed: with an algorithm: keys random draws.
        missing: with an algorithm: ``"refuse"`` a tensor that some input lacks, or ``"copy"`` it.
        reverse: with an exact delta: ``base`` is the fine-tune, and the base is restored.
        undo: with adapters, saved as a folder: keep beside the weights what :func:`surgery.unmerge` needs to give the
            base back to the bit.
        delta_base: with exact deltas: the base that they were made with, for coefficients and for merging into another.
        **parameters: with an algorithm: its own (``density``, ``t`` …), given as ``coeff`` is.

    Returns:
        The merged checkpoint, lazily: nothing is computed before a tensor is looked at or saved.

    Raises:
        UsageError: no adapter, a checkpoint where an adapter belongs, or parameters that do not fit.
        MismatchError: an adapter, or a model, does not fit this base.

    >>> import torch
    >>> merged = merge({"q.weight": torch.zeros(2, 2)}, Adapter(
    ...     {"base_model.model.q.lora_A.weight": open_checkpoint({"a": torch.ones(1, 2)}).lazy("a"),
    ...      "base_model.model.q.lora_B.weight": open_checkpoint({"b": torch.ones(2, 1)}).lazy("b")},
    ...     {"peft_type": "LORA", "r": 1, "lora_alpha": 2}, label="demo"))
    >>> merged["q.weight"].tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    >>> merge({"w": torch.zeros(2)}, {"w": torch.ones(2)}, algorithm="task_arithmetic", coeff=0.5)["w"].tolist()
    [0.5, 0.5]
    """
    if algorithm is not None:
        if reverse or delta_base is not None:
            what = "reverse restores a base from" if reverse else "delta_base decodes"
            raise UsageError(f"{what} an exact delta: no algorithm does")
        row = find(algorithm)
        own = row.base == "required" if with_base is None else with_base
        return merge_models(
            others if own else (base, *others), algorithm=row, base=base if own else None,
            parameters=parameters if coeff is None else {"coeff": coeff, **parameters},
            dtype=dtype, compat=compat, seed=seed, missing=missing, allow_nonfinite=allow_nonfinite,
            name_map=name_map, allow_base_mismatch=allow_base_mismatch, allow_incomplete=allow_incomplete,
        )  # fmt: skip
    if any(map(is_delta, others)):
        return merge_exact(
            base, others, coeffs=None if coeff is None else spread(coeff, len(others)), delta_base=delta_base,
            reverse=reverse, allow_nonfinite=allow_nonfinite,
            unfit={
                "without an algorithm it takes no parameters": parameters,
                "its codes mean nothing on another base, so --allow-base-mismatch does not apply": allow_base_mismatch,
                "it knows its tensors' names, so a name map does not apply": name_map is not None,
            },
        )  # fmt: skip
    sources = [open_lossy(source) if is_lossy(source) else source for source in others if not isinstance(source, Delta)]
    if reverse or delta_base is not None:
        what = "the way back" if reverse else "--delta-base"
        raise UsageError(f"{what} is one of exact deltas", mend="take adapters out with unmerge" if reverse else None)
    if parameters or dtype or with_base is not None:
        given = next(iter(parameters), "dtype" if dtype else "with_base")
        raise UsageError(f"{given} belongs to an algorithm: name one, as algorithm='ties'")
    coeffs = spread(1.0 if coeff is None else coeff, len(sources))
    for source in sources:
        _refuse_checkpoint(source)
    checkpoint = open_checkpoint(base)
    opened = [open_adapter(source) for source in sources if not isinstance(source, Mapping)]
    bindings = [
        bind(adapter, checkpoint, coeff=c, name_map=name_map, allow_incomplete=allow_incomplete)
        for adapter, c in zip(opened, coeffs, strict=True)
    ]
    work = Work(
        checkpoint, history_of(checkpoint), opened, coeffs, bindings, allow_base_mismatch=allow_base_mismatch, undo=undo
    )
    work.check_not_merged_yet()
    require_arithmetic(checkpoint, sorted(work.touched - work.copied))
    tensors = {name: work.output(name, allow_nonfinite) for name in checkpoint.tensors}
    config, files = resized_config(checkpoint.config, [binding.resized for binding in bindings])
    counts = {"merged": len(work.touched), "copied": len(tensors) - len(work.touched)}
    return Checkpoint(
        tensors,
        label=f"{checkpoint.label} + {' + '.join(adapter.label for adapter in opened)}",
        stored=[*checkpoint.stored, *work.history.stored, *(stored for adapter in opened for stored in adapter.stored)],
        shards=checkpoint.shards,
        config=config,
        side_files=checkpoint.side_files,
        notes=[*checkpoint.notes, *work.history.notes, *(note for binding in bindings for note in binding.notes)],
        origin=Origin(
            work.record,
            kept={KEPT_FILE: work.originals(), UNDO_FILE: work.history.undo},
            carried=work.history.kept_prints,
            watch=lambda: work.watch(tensors),
            counts=counts,
            history=work.future(),
            files=files,
            bytes_read=checkpoint.nbytes + sum(adapter.nbytes for adapter in opened),
            tables=[rules_table({name: work.rule(name) for name in tensors}, tensors)],
            work=work_of([checkpoint], coeffs, work.prints, sorted((name_map or {}).items()), allow_nonfinite, undo),
        ),
    )


def spread(coeff: Value, count: int) -> list[float]:
    """Turn ``--coeff`` into one coefficient an adapter.

    Raises:
        UsageError: another number of them, or one that is not finite.
    """
    if count == 0:
        raise UsageError("nothing to merge: name at least one adapter after the base")
    if callable(coeff) or isinstance(coeff, Mapping):
        raise UsageError("adapters take a number as coefficient, the same for all tensors", mend="name an algorithm")
    given = [float(coeff)] if isinstance(coeff, int | float) else [float(c) for c in coeff]
    if len(given) not in (1, count):
        raise UsageError(f"{len(given)} coefficients for {count} adapters", mend="give --coeff once, or once for each")
    if not all(map(math.isfinite, given)):
        raise UsageError("a coefficient is not a finite number")
    return given * count if len(given) == 1 else given


def _refuse_checkpoint(source: Source | AdapterSource) -> None:
    if isinstance(source, Adapter) or is_adapter(source):
        return
    if isinstance(source, Mapping):
        raise UsageError(
            "an adapter is a folder or a surgery.Adapter, not a state dict",
            mend="to merge models name an algorithm, as algorithm='task_arithmetic'",
        )
    open_checkpoint(source)  # a path that is not there, or is malformed, says so itself
    raise UsageError(
        "is a checkpoint, not an adapter: merging whole models needs an algorithm",
        file=os.fspath(source),
        mend="add --algorithm task_arithmetic (surgery algorithms lists them)",
    )
