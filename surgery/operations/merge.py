"""``merge``: put adapters into the weights of a base, or merge whole models by an algorithm."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery import provenance
from surgery.adapter import Adapter, Binding, bind, expected_base, is_adapter, open_adapter
from surgery.algorithms.registry import PAPER, Algorithm, find
from surgery.checkpoint import Checkpoint, Origin, Source, open_checkpoint, require_arithmetic, work_of
from surgery.delta import Applied, Cast, Checked, Replacement, Update
from surgery.errors import MismatchError, UsageError
from surgery.exact import Delta, is_delta
from surgery.history import History, history_of
from surgery.operations.merge_delta import merge_delta
from surgery.operations.merge_models import Missing, Value, merge_models
from surgery.operations.merge_rules import Rule, rules_table
from surgery.tensor import ARITHMETIC, BytesTensor, LazyTensor, TensorSpec, renamed

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
    **parameters: Value,
) -> Checkpoint:
    r"""Merge adapters into a base, or models by an algorithm.

    *With an algorithm*, models are merged tensor by tensor; ``surgery algorithms`` lists what there is. Those that need
    no base take ``base`` as their first model.

    *Without*, every touched weight becomes ``round(W + Σᵢ cᵢ · Δᵢ)`` with ``Δ = scaling · B @ A`` for LoRA and ``Δ = new − W`` for
    tensors that an adapter stores in full. Sums are taken in float64 and rounded once to the weight's own dtype;
    untouched tensors, and full replacements with ``c = 1``, are copied as bytes.

    *With an exact delta* (:func:`surgery.extract_delta`) the fine-tune that it was made from is restored, bit for bit; a wrong
    base is refused by tensor. With ``reverse`` the base is restored from the fine-tune.

    Args:
        base: the checkpoint to merge into.
        others: PEFT LoRA adapters (rsLoRA and DoRA variants included): folders or :class:`surgery.Adapter` objects; or one
            exact delta, a file or :func:`surgery.extract_delta`'s;
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
        if reverse:
            raise UsageError("reverse restores a base from an exact delta: no algorithm does")
        row = find(algorithm)
        own = row.base == "required" if with_base is None else with_base
        return merge_models(
            others if own else (base, *others), algorithm=row, base=base if own else None,
            parameters=parameters if coeff is None else {"coeff": coeff, **parameters},
            dtype=dtype, compat=compat, seed=seed, missing=missing, allow_nonfinite=allow_nonfinite,
            name_map=name_map, allow_base_mismatch=allow_base_mismatch, allow_incomplete=allow_incomplete,
        )  # fmt: skip
    for source in others:
        if is_delta(source):
            _refuse_beside_delta(source, len(others), coeff, parameters, allow_base_mismatch, name_map)
            return merge_delta(base, source, reverse=reverse)
    sources = [source for source in others if not isinstance(source, Delta)]
    if reverse:
        raise UsageError("the way back is one of an exact delta", mend="take adapters out with unmerge")
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
    work = Work(checkpoint, history_of(checkpoint), opened, coeffs, bindings, allow_base_mismatch)
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
        notes=[*checkpoint.notes, *(note for binding in bindings for note in binding.notes)],
        origin=Origin(
            work.record,
            kept=work.originals(),
            counts=counts,
            history=work.future(),
            files=files,
            bytes_read=checkpoint.nbytes + sum(adapter.nbytes for adapter in opened),
            tables=[rules_table({name: work.rule(name) for name in tensors}, tensors)],
            work=work_of([checkpoint], coeffs, work.prints, sorted((name_map or {}).items()), allow_nonfinite),
        ),
    )


def resized_config(
    config: Mapping[str, Any] | None, resized: Sequence[Mapping[str, int]]
) -> tuple[Mapping[str, Any] | None, dict[str, bytes]]:
    """Say a resized vocabulary's new size in ``config.json``; return the configuration, and its file if it changed.

    Raises:
        MismatchError: adapters want different sizes.
    """
    rows = {name: count for binding in resized for name, count in binding.items()}
    for binding in resized:
        for name, count in binding.items():
            if rows[name] != count:
                raise MismatchError(f"adapters want {rows[name]:,} and {count:,} rows of it", tensor=name)
    if not rows or config is None or "vocab_size" not in config:
        return config, {}
    changed = {**config, "vocab_size": max(rows.values())}
    return changed, {"config.json": (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()}


def _refuse_beside_delta(
    delta: str | os.PathLike[str] | Delta, count: int, coeff: Value | None,
    parameters: Mapping[str, Value], allow_base_mismatch: bool, name_map: object,
) -> None:  # fmt: skip
    """Refuse what means nothing for an exact delta.

    Raises:
        UsageError: something was asked for that does.
    """
    what = None
    if parameters:
        what = "without an algorithm it takes no parameters"
    elif coeff is not None and coeff not in (1, [1]):
        what = "its coefficient is 1: it holds bits, not numbers to scale"
    elif allow_base_mismatch:
        what = "its codes mean nothing on another base, so --allow-base-mismatch does not apply"
    elif name_map is not None:
        what = "it knows its tensors' names, so a name map does not apply"
    elif count > 1:
        what = "it is merged alone"
    if what is not None:
        name = delta.label if isinstance(delta, Delta) else os.fspath(delta)
        mend = "name an algorithm, for which it counts as a model: task_arithmetic, ties …"
        raise UsageError(f"is an exact delta: {what}", file=name, mend=mend)


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


class Work:
    """One merge: what it touches, and what its record will say."""

    def __init__(
        self,
        base: Checkpoint,
        history: History,
        adapters: Sequence[Adapter],
        coeffs: Sequence[float],
        bindings: Sequence[Binding],
        allow_base_mismatch: bool,
    ) -> None:
        self.base = base
        self.history = history
        self.adapters = adapters
        self.coeffs = coeffs
        self.bindings = bindings
        self.updates: dict[str, list[Update]] = {}
        self._labels: dict[str, list[str]] = {}
        for adapter, binding in zip(adapters, bindings, strict=True):
            for name, updates in binding.updates.items():
                self.updates.setdefault(name, []).extend(updates)
                self._labels.setdefault(name, [base.label]).extend([adapter.label] * len(updates))
        self.traced = {name: provenance.Traced(base.tensors[name]) for name in self.updates}
        self._allow_base_mismatch = allow_base_mismatch
        self.prints = [adapter.fingerprint() for adapter in adapters]

    @property
    def touched(self) -> set[str]:
        """Names of the weights that change."""
        return set(self.updates)

    @property
    def copied(self) -> set[str]:
        """Names of the weights that become copies of one adapter's tensor."""
        return {name for name, updates in self.updates.items() if _is_copy(updates)}

    def output(self, name: str, allow_nonfinite: bool = False, *, wide: bool = False) -> LazyTensor:
        """Compose one output tensor, ``wide`` for one that is not rounded to the base's dtype."""
        if name not in self.updates:
            return self.base.tensors[name]
        spec = self.base.tensors[name].spec
        if wide:
            spec = TensorSpec(name, "F64" if spec.dtype == "F64" else "F32", spec.shape)
        first = self.updates[name][0]
        if any(name in binding.resized for binding in self.bindings) and not _is_copy(self.updates[name]):
            raise MismatchError("is resized by one adapter and changed by another", file=self.base.label, tensor=name)
        if isinstance(first, Replacement) and _is_copy(self.updates[name]):
            return take(first.new, spec, self._labels[name][1], allow_nonfinite=allow_nonfinite)
        return Applied(
            self.traced[name],
            self.updates[name],
            spec.dtype,
            allow_nonfinite=allow_nonfinite,
            labels=self._labels[name],
        )

    def rule(self, name: str) -> Rule:
        """Say how a tensor is made."""
        adapters = ", ".join(dict.fromkeys(self._labels.get(name, [])[1:]))
        if _is_copy(self.updates.get(name, ())):
            return Rule(f"copy of {adapters}")
        return Rule(f"{self.base.label} with {adapters}" if adapters else f"copy of {self.base.label}")

    def originals(self) -> dict[str, LazyTensor]:
        """Collect what a later unmerge cannot recompute: the base's values of replaced tensors and rows."""
        step = self.history.next_step
        kept = dict(self.history.kept)
        for name in sorted(self.updates):
            if any(name in binding.replaced for binding in self.bindings):
                kept[f"{step}/tensor/{name}"] = renamed(self.base.tensors[name], f"{step}/tensor/{name}")
                continue
            rows = sorted({row for binding in self.bindings for row in binding.rows.get(name, ())})
            if rows:
                kept |= original_rows(self.base.tensors[name], rows, step)
        return kept

    def future(self) -> History:
        """Return the history that the merged checkpoint will have."""
        prints = {name: self.history.base_prints[name] for name in self.history.base_prints}
        return History(True, self._entries(), prints, {}, self.originals(), self.history.stored)

    def check_not_merged_yet(self) -> None:
        """Refuse to merge what the base's record says is in there.

        Raises:
            MismatchError: it is.
        """
        inside = {entry["fingerprint"] for entry in self.history.adapters}
        named: set[str] = set()
        for adapter, fingerprint in zip(self.adapters, self.prints, strict=True):
            if fingerprint in named and not self._allow_base_mismatch:
                raise MismatchError(
                    "is named twice", file=adapter.label, mend="--coeff 2 adds it twice, or --allow-base-mismatch"
                )
            named.add(fingerprint)
            if fingerprint in inside and not self._allow_base_mismatch:
                raise MismatchError(
                    f"already has the adapter {adapter.label} in it",
                    file=self.base.label,
                    mend="--allow-base-mismatch merges it again",
                )

    def record(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """Compose the provenance record, and refuse adapters that were taken from another base.

        Raises:
            MismatchError: by tensor, before anything is published.
        """
        draft = provenance.PLACEHOLDER in fingerprints.values()
        before = {
            **fingerprints,
            **{n: provenance.PLACEHOLDER if draft else t.fingerprint() for n, t in self.traced.items()},
        }
        if not draft:
            self._check_base(before)
            if self.base.origin is not None:
                self.base.origin.record(before)  # what the base was made from proves itself
        tensors: dict[str, dict[str, Any]] = {}
        for name, value in fingerprints.items():
            tensors[name] = {"fingerprint": value}
            if name in self.traced or name in self.history.base_prints:
                tensors[name]["base"] = self.history.base_prints.get(name, before[name])
        combined = provenance.PLACEHOLDER if draft else provenance.combine(before)
        return provenance.record(
            "merge",
            parameters={"coeff": list(self.coeffs)},
            inputs=[
                {"role": "base", "name": self.base.label, **self.base.pinned, "fingerprint": combined},
                *(
                    {"role": "adapter", "name": adapter.label, **adapter.pinned, "fingerprint": value}
                    for adapter, value in zip(self.adapters, self.prints, strict=True)
                ),
            ],
            tensors=tensors,
            adapters=self._entries(),
        )

    def _entries(self) -> list[dict[str, Any]]:
        step = self.history.next_step
        return self.history.adapters + [
            {
                "name": adapter.label,
                "fingerprint": value,
                "coeff": coeff,
                "step": step,
                "replaced": sorted({*binding.replaced, *binding.rows}),
                "touched": sorted(binding.updates),
            }
            for adapter, value, coeff, binding in zip(
                self.adapters, self.prints, self.coeffs, self.bindings, strict=True
            )
        ]

    def _check_base(self, before: Mapping[str, str]) -> None:
        if self._allow_base_mismatch:
            return
        for adapter in self.adapters:
            found = expected_base(adapter, self.base)
            expected = {name: value for name, value in found.items() if name in before}  # a recipe may take some layers
            wrong = [
                name for name, value in expected.items() if value not in (before[name], self.history.base_prints.get(name))
            ]  # fmt: skip
            if wrong:
                raise MismatchError(
                    f"is not the tensor that {adapter.label} was taken from ({len(wrong)} of {len(expected)} differ)",
                    file=self.base.label,
                    tensor=wrong[0],
                    mend="use the adapter's own base, or pass --allow-base-mismatch",
                )


def _is_copy(updates: Sequence[Update]) -> bool:
    """Say whether base + Σ c·Δ is just one new tensor: no arithmetic, and bit-identical where the dtype is the same."""
    return len(updates) == 1 and isinstance(updates[0], Replacement) and updates[0].coeff == 1.0


def take(tensor: LazyTensor, spec: TensorSpec, label: str, *, allow_nonfinite: bool = False) -> LazyTensor:
    """Put ``tensor``'s values under ``spec``'s name and dtype: as bytes where the dtype is the same, rounded otherwise."""
    named = renamed(tensor, spec.name)
    if named.spec.dtype != spec.dtype:
        return Cast(named, spec.dtype, allow_nonfinite=allow_nonfinite, label=label)
    return named if allow_nonfinite or spec.dtype not in ARITHMETIC else Checked(named, label)


def original_rows(tensor: LazyTensor, rows: Sequence[int], step: int) -> dict[str, LazyTensor]:
    """Compose the two tensors that keep some rows of a weight: their numbers, and their values."""
    name, (_, width) = tensor.spec.name, tensor.spec.shape
    numbers = TensorSpec(f"{step}/rows/{name}", "I64", (len(rows),))
    values = TensorSpec(f"{step}/values/{name}", tensor.spec.dtype, (len(rows), width))
    return {
        numbers.name: BytesTensor(numbers, np.asarray(rows, dtype=np.int64).tobytes()),
        values.name: PickedRows(tensor, tuple(rows), values),
    }


@dataclass(frozen=True, slots=True)
class PickedRows:
    """Some rows of a matrix, in order."""

    source: LazyTensor
    rows: tuple[int, ...]
    spec: TensorSpec
    scratch: int = 0
    resident: int = 0

    @property
    def unit(self) -> int:
        """One row."""
        return max(self.spec.shape[1], 1)

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read row by row."""
        width, size = self.unit, self.spec.itemsize
        for place, number in enumerate(range(start // width, stop // width)):
            row = self.rows[number]
            self.source.read_into(
                row * width, (row + 1) * width, out[place * width * size : (place + 1) * width * size]
            )
