"""Merging adapters: what each weight becomes, what is kept so that it can be undone, and what the record says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surgery import provenance, rounding
from surgery.adapter import Adapter
from surgery.binding import Binding, expected_base
from surgery.checkpoint import Checkpoint
from surgery.delta import ADDITIVE, Applied, Cast, Checked, Replacement, Update
from surgery.errors import MismatchError
from surgery.formats.safetensors import encode_document
from surgery.history import History
from surgery.operations.merge_rules import Rule
from surgery.tensor import ARITHMETIC, BytesTensor, LazyTensor, TensorSpec, renamed
from surgery.undo import Ledger


class Work:
    """One merge: what it touches, and what its record will say."""

    def __init__(
        self,
        base: Checkpoint,
        history: History,
        adapters: Sequence[Adapter],
        coeffs: Sequence[float],
        bindings: Sequence[Binding],
        *,
        allow_base_mismatch: bool,
        undo: bool,
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
        self.undo = undo
        self.prints = [adapter.fingerprint() for adapter in adapters]

    @property
    def touched(self) -> set[str]:
        """Names of the weights that change."""
        return set(self.updates)

    @property
    def is_proved(self) -> bool:
        """Whether the adapters' own records prove that all that is touched is what they were taken from."""
        known = [expected_base(adapter, self.base).keys() for adapter in self.adapters]
        return not self._allow_base_mismatch and all(self.touched <= names for names in known)

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

    def watch(self, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], Witnessed]:
        """Begin a run in which it is noted what becomes of every weight that is computed.

        Args:
            tensors: the outputs.
        """
        computed = {
            name: tensor for name, tensor in tensors.items() if isinstance(tensor, Applied) and name in self.touched
        }
        replaced = {name for binding in self.bindings for name in binding.replaced}
        ledger = Ledger(frozenset(computed.keys() - replaced if self.undo else ()))
        watched: dict[str, LazyTensor] = {
            name: tensor.watched(ledger.witness(tensor.spec)) for name, tensor in computed.items()
        }
        return watched, Witnessed(self, ledger)

    def originals(self) -> dict[str, LazyTensor]:
        """Collect what a later unmerge cannot recompute: the base's values of replaced tensors and rows."""
        step = self.history.next_step
        kept = dict(self.history.kept)
        if not self.undo:
            return kept
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
        return replace(
            self.history, known=True, adapters=self._entries(), base_prints=prints, prints={}, kept=self.originals()
        )

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
                    tensor=min(self.touched),
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
        for name, value in self.history.prints.items():
            if before.get(name, value) != value:
                raise MismatchError(
                    "is not what the record beside it says: it was changed since",
                    file=self.base.label,
                    tensor=name,
                    mend=f"fetch it again; if it was meant, remove {provenance.RECORD} or pass --allow-base-mismatch",
                )
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


@dataclass
class Witnessed:
    """One run of a merge under the eyes of a ledger: what it adds to the output."""

    work: Work
    ledger: Ledger

    def pack(self, names: Collection[str]) -> Iterable[bytes]:
        """Write what was noted of some weights."""
        return self.ledger.pack(names)

    def unpack(self, data: bytes) -> None:
        """Take over what an earlier run noted."""
        self.ledger.unpack(data)

    def allowance(self) -> int:
        """Count 2 % of what is merged, which records of usual deltas stay below, and 1 kB a record."""
        return sum(self.work.base.tensors[name].spec.nbytes // 50 + 1000 for name in self.ledger.undoable)

    def records(self, fingerprints: Mapping[str, str]) -> dict[str, LazyTensor]:
        """Compose the undo records, named by step and weight."""
        step = self.work.history.next_step
        before = {name: traced.fingerprint() for name, traced in self.work.traced.items()}
        found = self.ledger.records(before, fingerprints)
        return {f"{step}/{name}": renamed(record, f"{step}/{name}") for name, record in found.items()}

    def report(self) -> dict[str, Any]:
        """Say how much of the deltas survived, and what being able to undo it costs."""
        sums = self.ledger.sums()
        return {**rounding.report(sums), "undo": self._cost(), **self._inside(sums)}

    def _cost(self) -> dict[str, int]:
        step = f"{self.work.history.next_step}/"
        originals = [tensor.spec for name, tensor in self.work.originals().items() if name.startswith(step)]
        weights = sum(self.work.base.tensors[name].spec.numel for name in self.ledger.undoable)
        return {
            "bytes": self.ledger.nbytes, "weights": weights, "originals": len(originals),
            "original_bytes": sum(spec.nbytes for spec in originals),
        }  # fmt: skip

    def _inside(self, sums: Mapping[str, rounding.Sums]) -> dict[str, Any]:
        """Warn where there is no record to say so, and the adapter seems to be in there already."""
        work = self.work
        if work.history.known or len(work.adapters) != 1 or work.is_proved:
            return {}
        additive = {name for name, updates in work.updates.items() if all(isinstance(u, ADDITIVE) for u in updates)}
        share = rounding.inside({name: one for name, one in sums.items() if name in additive})
        if share is None:
            return {}
        found = f"{share * abs(work.coeffs[0]):.2g}"
        return {
            "warnings": [
                (
                    f"{work.adapters[0].label} seems to be in {work.base.label} already, with coefficient {found} or so "
                    "(projection of the weights on it); there is no record to tell"
                )
            ]
        }


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
    return changed, {"config.json": encode_document(changed)}


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
