"""Merging whole models by an algorithm: what ``merge`` does where an algorithm is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from surgery import provenance
from surgery.algorithms.registry import ALGORITHMS, PAPER, Algorithm, find, resolve
from surgery.checkpoint import Checkpoint, Origin, open_checkpoint, refuse_quantised, work_of
from surgery.errors import MismatchError, UsageError
from surgery.merged import merged
from surgery.names import Pattern, select
from surgery.operations.convert import config_file, config_in
from surgery.operations.merge_rules import Rule, describe, rules_table
from surgery.operations.model_inputs import (
    Change,
    buffered,
    bytes_read,
    input_entry,
    is_change,
    kind_of,
    respelled,
    with_change,
)
from surgery.report import join_shown
from surgery.roles import roles_of
from surgery.tensor import ARITHMETIC, LazyTensor

OneOrEach = float | Sequence[float]
"""One number, or one for each model."""
Value = OneOrEach | Mapping[str, OneOrEach] | Callable[[str], OneOrEach]
"""A parameter's value: the same for all tensors, by name pattern (the first that matches), or a function of the name."""
Missing = Literal["refuse", "copy"]


def merge_models(
    models: Sequence[Any],
    *,
    algorithm: str | Algorithm,
    base: Any = None,
    parameters: Mapping[str, Value] | None = None,
    dtype: str | None = None,
    compat: str = PAPER,
    seed: int = 0,
    missing: Missing = "refuse",
    allow_nonfinite: bool = False,
    **binding: Any,
) -> Checkpoint:
    """Merge models, tensor by tensor, by one algorithm.

    Args:
        models: checkpoints of one architecture; with a base also adapters of it, which stand for the base with the
            adapter merged into it, unrounded, and exact deltas of it, which stand for the fine-tunes that they hold.
        algorithm: its name, or a row of :data:`surgery.algorithms.registry.ALGORITHMS`.
        base: the base, for algorithms that take one; it decides names, files, dtypes and configuration, else the
            first model does.
        parameters: ``coeff``, ``density`` … → a number, a list (one a model), ``{pattern: number or list}``, or a
            function of the tensor's name.
        dtype: of merged tensors (``"BF16"`` …); that of the base or first model by default.
        compat: ``"paper"``, or ``"mergekit"`` for mergekit 0.1.5's semantics where they differ.
        seed: keys random draws, together with the tensor's name.
        missing: what to do with a tensor that some input lacks: refuse, or copy it from the first that has it.
        allow_nonfinite: let NaN, Inf and overflow through.
        **binding: how adapters find their weights, see :func:`surgery.operations.model_inputs.as_model`.

    Returns:
        The merged checkpoint, lazily.

    Raises:
        UsageError: an algorithm or parameter that is not known, or a number of models that does not fit it.
        MismatchError: tensors that are missing, of different shapes, or no numbers and different.

    >>> import torch
    >>> a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    >>> merge_models([a, b], algorithm="linear", parameters={"coeff": [1, 3]})["w"].tolist()
    [0.75, 0.75]
    """
    row = find(algorithm)
    row.check_arity(len(models), base is not None)
    if dtype is not None and dtype not in ARITHMETIC:
        raise UsageError(f"--dtype can be {', '.join(ARITHMETIC)}, not {dtype!r}")
    opened = None if base is None else buffered(open_checkpoint(base))
    inputs = [
        _changed(opened, model, binding) if is_change(model) else buffered(open_checkpoint(model)) for model in models
    ]
    reference = inputs[0] if opened is None else opened
    roles = ["change" if is_change(model) else "model" for model in models]
    members = inputs if opened is None else [opened, *inputs]
    work = _Work(row, members, roles if opened is None else ["base", *roles], missing)
    values = _Values(row, len(models), parameters or {}, work.roles())
    tensors = {
        name: work.output(name, values.of(name), dtype=dtype, compat=compat, seed=seed, allow_nonfinite=allow_nonfinite)
        for name in work.names
    }
    known = ALGORITHMS.get(row.name) is row and values.fixed()
    said = {"algorithm": row.name, "compat": compat, **values.described()} | ({"seed": seed} if row.random else {})
    return Checkpoint(
        tensors,
        label=f"{row.name}({', '.join(member.label for member in members)})",
        stored=[stored for member in members for stored in member.stored],
        shards=reference.shards,
        config=config_in(reference.config, dtype),
        side_files=reference.side_files,
        notes=list(dict.fromkeys(note for member in work.members for note in member.notes)),
        origin=Origin(
            work.recorder(said | ({"dtype": dtype} if dtype else {})),
            counts=work.counts(),
            files=config_file(reference.config, dtype),
            work=work_of(members, said, dtype, missing, allow_nonfinite) if known else None,
            bytes_read=sum(map(bytes_read, members)),
            tables=[rules_table(work.rules, tensors)],
        ),
    )


def _changed(base: Checkpoint | None, change: Change, binding: Mapping[str, Any]) -> Checkpoint:
    if base is None:
        name = getattr(change, "label", change)
        raise UsageError(
            f"{name} is {kind_of(change)}, which is a model only together with its base",
            mend="use an algorithm that takes a base (task_arithmetic, ties …), or merge it into its base first",
        )
    return with_change(base, change, **binding)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The parameters of one tensor."""

    whole: Mapping[str, Any]
    each: Sequence[Mapping[str, Any]]


class _Values:
    """Parameters as given, looked up tensor by tensor."""

    def __init__(self, row: Algorithm, count: int, given: Mapping[str, Value], roles: Mapping[str, str]) -> None:
        self._row = row
        self._count = count
        self._given = dict(given)
        self._roles = roles
        self._patterns: dict[str, list[tuple[Pattern, OneOrEach]]] = {}
        for key, value in given.items():
            row.parameter(key)
            if isinstance(value, Mapping):
                pairs = [(Pattern(text), item) for text, item in value.items()]
                select(roles, [pattern for pattern, _ in pairs], key)
                self._patterns[key] = pairs

    def of(self, name: str) -> _Chosen:
        """Choose the values for one tensor."""
        whole: dict[str, Any] = {}
        each: list[dict[str, Any]] = [{} for _ in range(self._count)]
        for key in self._given:
            value = self._look_up(key, name)
            if value is None:
                continue
            if not isinstance(value, Sequence):
                whole[key] = value
            elif len(value) != self._count:
                raise UsageError(f"{len(value)} values of {key} for {self._count} models")
            else:
                for own, item in zip(each, value, strict=True):
                    own[key] = item
        resolve(self._row, self._count, whole, each)
        return _Chosen(whole, each)

    def _look_up(self, key: str, name: str) -> OneOrEach | None:
        value = self._given[key]
        if key in self._patterns:
            return next(
                (item for pattern, item in self._patterns[key] if pattern.matches(name, self._roles[name])), None
            )
        if callable(value):
            return value(name)
        assert not isinstance(value, Mapping)  # those have patterns
        return value

    def fixed(self) -> bool:
        """Say whether :meth:`described` says all: a function's name does not tell what it returns."""
        return not any(map(callable, self._given.values()))

    def described(self) -> dict[str, Any]:
        """Say the values as given, for the record."""
        return {
            key: getattr(value, "__name__", "a function") if callable(value) else _plain(value)
            for key, value in self._given.items()
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Sequence) else value


class _Work:
    """One merge of models: which input has what, and what its record will say."""

    def __init__(self, row: Algorithm, members: Sequence[Checkpoint], roles: Sequence[str], missing: Missing) -> None:
        self.row = row
        self.members = [members[0], *(respelled(member, members[0].tensors) for member in members[1:])]
        self.rules: dict[str, Rule] = {}
        self._roles = roles
        self._has_base = roles[0] == "base"
        self._tensors = [
            {name: provenance.Traced(tensor) for name, tensor in member.tensors.items()} for member in self.members
        ]
        self.names = list(dict.fromkeys(name for tensors in self._tensors for name in tensors))
        self._everywhere = {name for name in self.names if all(name in tensors for tensors in self._tensors)}
        if missing == "refuse":
            self._refuse_missing()
        for member in self.members:
            refuse_quantised(member, sorted(self._everywhere))

    def roles(self) -> dict[str, str]:
        """Say what each output tensor is, for patterns."""
        return roles_of({name: next(own[name].spec for own in self._tensors if name in own) for name in self.names})

    def _refuse_missing(self) -> None:
        for name in self.names:
            without = [m.label for m, own in zip(self.members, self._tensors, strict=True) if name not in own]
            if without:
                having = [m.label for m, own in zip(self.members, self._tensors, strict=True) if name in own]
                raise MismatchError(
                    f"is not there, but in {join_shown(having)}", file=without[0], tensor=name,
                    mend="--missing copy takes it from the first that has it",
                )  # fmt: skip

    def output(self, name: str, chosen: _Chosen, **options: Any) -> LazyTensor:
        """Compose one output tensor."""
        labels = [member.label for member in self.members]
        if name not in self._everywhere:
            first = next(number for number, own in enumerate(self._tensors) if name in own)
            self.rules[name] = Rule(f"copy of {labels[first]}")
            return self._tensors[first][name]
        onto = f" onto {labels[0]}" if self._has_base else ""
        self.rules[name] = Rule(
            f"{self.row.name} of {', '.join(labels[self._has_base :])}{onto}", describe(chosen.whole, chosen.each)
        )
        inputs = [own[name] for own in self._tensors]
        base = inputs.pop(0) if self._has_base else None
        return merged(name, inputs, base, self.row, chosen.whole, chosen.each, labels=labels, **options)

    def counts(self) -> dict[str, int]:
        """Count what happens to tensors."""
        numbers = sum(self._tensors[0][name].spec.dtype in ARITHMETIC for name in self._everywhere)
        return {"merged": numbers, "copied": len(self.names) - numbers}

    def recorder(self, parameters: Mapping[str, Any]) -> Callable[[Mapping[str, str]], dict[str, Any]]:
        """Compose the provenance record, with a fingerprint of every input."""

        def record(fingerprints: Mapping[str, str]) -> dict[str, Any]:
            draft = provenance.PLACEHOLDER in fingerprints.values()
            inputs = [
                input_entry(role, member, own, draft=draft)
                for role, member, own in zip(self._roles, self.members, self._tensors, strict=True)
            ]
            return provenance.record("merge", parameters=parameters, inputs=inputs, tensors=fingerprints)

        return record
