"""``merge`` where deltas are exact ones: restored bit for bit, or with ``delta_base`` scaled as differences of floats."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery import numerics, provenance
from surgery.checkpoint import Checkpoint, Origin, Source, open_checkpoint, work_of
from surgery.delta import Applied
from surgery.errors import MismatchError, UnsupportedError, UsageError
from surgery.exact import Delta, is_delta, open_delta
from surgery.operations.merge_delta import DeltaSource, Restoration, merge_delta
from surgery.provenance import Traced
from surgery.report import join_shown
from surgery.tensor import ARITHMETIC, LazyTensor, any_range, renamed

AS_MODEL = "name an algorithm, for which it counts as a model: task_arithmetic, ties …"
"""How to mend what means nothing for bits."""


def merge_exact(
    base: Source, others: Sequence[object], *, coeffs: Sequence[float] | None, delta_base: Source | None, reverse: bool,
    allow_nonfinite: bool, unfit: Mapping[str, object],
) -> Checkpoint:  # fmt: skip
    """Merge exact deltas into a base.

    Args:
        base: what to merge into.
        others: everything that is to be merged; all must be exact deltas.
        coeffs: one coefficient a delta.
        delta_base: the base that the deltas were made with: they are decoded with it, and added as floats.
        reverse: restore the base from the fine-tune.
        allow_nonfinite: with ``delta_base``: let NaN, Inf and overflow through.
        unfit: what was asked for beside, and means nothing for exact deltas: why not → whether it was asked for.

    Raises:
        UsageError: something was asked for that means nothing here.
        MismatchError: a delta does not fit.
    """
    deltas = [source for source in others if is_delta(source)]
    name = str(deltas[0].label if isinstance(deltas[0], Delta) else os.fspath(deltas[0]))
    if len(deltas) < len(others):
        raise UsageError("is an exact delta: it is not merged beside adapters or models", file=name,
                         mend=AS_MODEL)  # fmt: skip
    for what, given in unfit.items():
        if given:
            raise UsageError(f"is an exact delta: {what}", file=name, mend=AS_MODEL)
    if delta_base is not None:
        if reverse:
            raise UsageError("the way back gives bits, --delta-base numbers", mend="use one of them")
        return merge_scaled(base, deltas, coeffs or [1.0] * len(deltas), delta_base, allow_nonfinite=allow_nonfinite)
    if coeffs and any(coeff != 1 for coeff in coeffs):
        raise UsageError(
            "is an exact delta: its coefficient is 1, it holds bits and not numbers to scale", file=name,
            mend="--delta-base BASE decodes it to numbers",
        )  # fmt: skip
    return merge_delta(base, *deltas, reverse=reverse)


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """``Δ = fine-tune − base``, in float64: both are at hand as tensors of one shape.

    Args:
        tuned: the fine-tune's tensor.
        base: the base's.
        coeff: the coefficient in the merge.
    """

    tuned: LazyTensor
    base: LazyTensor
    coeff: float

    @property
    def unit(self) -> int:
        """The largest unit of both: they are whole blocks, or single elements."""
        return max(self.tuned.unit, self.base.unit)

    @property
    def resident(self) -> int:
        """What both hold, and two widened blocks."""
        return self.tuned.resident + self.base.resident + 16 * max(self.unit, numerics.BLOCK)

    def load(self) -> Difference:
        """Nothing to read ahead: values come range by range."""
        return self

    def add_to(self, values: torch.Tensor, base: torch.Tensor, start: int) -> None:
        """Add ``coeff · (tuned − base)``; ``base`` is the merge's, which may be another."""
        stop = start + values.numel()
        difference = numerics.widen(self.tuned, start, stop, numerics.scratch("new", values.numel()))
        difference.sub_(numerics.widen(self.base, start, stop, numerics.scratch("old", values.numel())))
        values.add_(difference, alpha=self.coeff)


def merge_scaled(
    target: Source,
    sources: Sequence[DeltaSource],
    coeffs: Sequence[float],
    delta_base: Source,
    *,
    allow_nonfinite: bool,
) -> Checkpoint:
    """Merge exact deltas as numbers: ``round(W + Σ c · (FT − BASE))``, sums in float64, rounded once.

    Args:
        target: the checkpoint to merge into, the deltas' base or another.
        sources: the deltas.
        coeffs: one coefficient each.
        delta_base: the base that they were all made with.
        allow_nonfinite: let NaN, Inf and overflow through.

    Raises:
        MismatchError: a tensor that a delta changes is not in the target, or of another shape.
        UnsupportedError: a delta changes something that cannot be scaled: a tensor that is new, resized, or of integers.
    """
    into, base = open_checkpoint(target), open_checkpoint(delta_base)
    parts = [_Part(open_delta(source), base, coeff) for source, coeff in zip(sources, coeffs, strict=True)]
    updates: dict[str, list[Difference]] = {}
    for part in parts:
        for name, difference in part.differences(into).items():
            updates.setdefault(name, []).append(difference)
    labels = [into.label] + [part.delta.label for part in parts]
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in into.tensors.items():
        found = updates.get(name)
        tensors[name] = Applied(
            any_range(tensor), found, allow_nonfinite=allow_nonfinite, labels=labels[: len(found) + 1],
        ) if found else tensor  # fmt: skip
    work = "exact deltas as numbers", [(part.delta.digest, part.coeff) for part in parts], allow_nonfinite

    def record(fingerprints: Mapping[str, str]) -> dict[str, Any]:
        for part in parts if provenance.PLACEHOLDER not in fingerprints.values() else ():
            part.prove()
        return provenance.record(
            "merge",
            parameters={"delta_base": base.label, "allow_nonfinite": allow_nonfinite},
            inputs=[{"role": "base", "name": into.label}, *(part.entry() for part in parts)],
            tensors=fingerprints,
        )

    return Checkpoint(
        tensors, label=f"{into.label} + {' + '.join(part.delta.label for part in parts)}",
        stored=[*into.stored, *base.stored, *(stored for part in parts for stored in part.delta.stored)],
        shards=into.shards, config=into.config, side_files=into.side_files, notes=into.notes,
        origin=Origin(
            record, counts={"merged": len(updates), "copied": len(tensors) - len(updates)},
            files=into.origin.files if into.origin else {},
            bytes_read=into.nbytes + len(parts) * base.nbytes + sum(part.delta.nbytes for part in parts),
            work=work_of([into, base], *work),
        ),
    )  # fmt: skip


class _Part:
    """One delta of a merge: its fine-tune, restored, beside the base that it is subtracted from."""

    def __init__(self, delta: Delta, base: Checkpoint, coeff: float) -> None:
        self.delta = delta
        self.coeff = coeff
        self._base = base
        self._restoration = Restoration(base, delta, reverse=False)
        self._tuned = {name: Traced(tensor) for name, tensor in self._restoration.checkpoint().tensors.items()}
        self._used: list[str] = []

    def differences(self, into: Checkpoint) -> dict[str, Difference]:
        """List what is added to which tensors of the target."""
        found = {}
        for name, change in self.delta.manifest.changes.items():
            if change.base is not None and not change.blocks:
                continue
            self._check(name, change.base)
            assert change.base is not None
            place = change.base if change.base in into.tensors else name
            if place not in into.tensors or into.tensors[place].spec.shape != change.tuned.spec.shape:
                what = "is not there" if place not in into.tensors else f"is {into.tensors[place].spec.describe()}"
                raise MismatchError(f"{what}; the delta {self.delta.label} changes {change.tuned.spec.describe()}",
                                    file=into.label, tensor=place)  # fmt: skip
            if into.tensors[place].spec.dtype not in ARITHMETIC:
                raise UnsupportedError(f"is {into.tensors[place].spec.dtype}; surgery computes with "
                                       f"{', '.join(ARITHMETIC)}", file=into.label, tensor=place)  # fmt: skip
            self._used.append(name)
            known = renamed(any_range(self._base.tensors[change.base]), name)
            found[place] = Difference(self._tuned[name], known, self.coeff)
        gone = sorted(self.delta.manifest.base.tensors.keys()
                      - {change.base for change in self.delta.manifest.changes.values()})  # fmt: skip
        if gone:
            raise UnsupportedError(f"takes tensors away ({join_shown(gone)}), which no number says", file=self.delta.label,
                                   mend="merge it with its own base, without --delta-base")  # fmt: skip
        return found

    def _check(self, name: str, base: str | None) -> None:
        spec = self.delta.manifest.task.tensors[name].spec
        what = None
        if base is None:
            what = "is new"
        elif self.delta.manifest.base.tensors[base].spec.shape != spec.shape:
            what = "is resized"
        elif spec.dtype not in ARITHMETIC:
            what = f"is {spec.dtype}"
        if what is not None:
            raise UnsupportedError(f"{what}, and its change cannot be scaled", file=self.delta.label, tensor=name,
                                   mend="merge it with its own base, without --delta-base")  # fmt: skip

    def prove(self) -> None:
        """Hold both sides of what was used against the delta's record.

        Raises:
            MismatchError: the base is another.
        """
        self._restoration.prove({name: self._tuned[name].fingerprint() for name in self._used})

    def entry(self) -> dict[str, Any]:
        """Describe it for the record."""
        return {"role": "delta", "name": self.delta.label, "fingerprint": self.delta.digest, "coeff": self.coeff}
