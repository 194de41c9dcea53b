"""``merge`` with exact deltas: the fine-tune restored from its base bit for bit, or the base from it; one delta or a chain."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery import provenance
from surgery.checkpoint import Checkpoint, Origin, Source, open_checkpoint, work_of
from surgery.errors import FormatError, MismatchError, SurgeryError, UsageError, VerificationError
from surgery.exact import Delta, open_delta, restored, wrong_twin
from surgery.formats.delta_manifest import Known
from surgery.formats.safetensors import strict_object
from surgery.operations.merge_rules import Rule, rules_table
from surgery.report import join_shown
from surgery.sources.local import pinned
from surgery.tensor import LazyTensor, any_range

DeltaSource = str | os.PathLike[str] | Delta


def merge_delta(known: Source, *sources: DeltaSource, reverse: bool = False) -> Checkpoint:
    """Restore one side of an exact delta from the other, or go along a chain of deltas, lazily.

    Args:
        known: the base that the first delta was made with; with ``reverse`` its fine-tune.
        sources: the deltas, in the order in which they are applied: each was made with what the one before restores.
        reverse: restore the base of each from its fine-tune.

    Raises:
        MismatchError: a tensor is missing, or of another dtype or shape; deltas that do not follow each other. Differing
            bits are found by whoever reads.
        UsageError: ``reverse``, and a delta holds no way back.
    """
    deltas = [open_delta(source) for source in sources]
    if reverse:
        for delta in deltas:
            check_way_back(delta)
    check_chain(deltas, reverse=reverse)
    work = None
    checkpoint = open_checkpoint(known)
    for delta in deltas:
        work = Restoration(checkpoint, delta, reverse=reverse, previous=work)
        checkpoint = work.checkpoint()
    return checkpoint


def check_way_back(delta: Delta) -> None:
    """Refuse a delta that the base cannot be restored by.

    Raises:
        UsageError: by name.
    """
    if not delta.manifest.goes_back:
        raise UsageError(
            "holds no way back: it was made without --reversible", file=delta.label,
            mend="extract it with --reversible, or start from the base itself",
        )  # fmt: skip


def check_chain(deltas: Sequence[Delta], *, reverse: bool = False) -> None:
    """Refuse deltas of which one was not made with what the one before restores; only manifests are compared.

    Raises:
        MismatchError: by tensor; with the order in which they do follow each other, if there is one.
    """
    chain = list(reversed(deltas)) if reverse else list(deltas)
    for first, second in itertools.pairwise(chain):
        found = _break(first, second)
        if found is not None:
            raise MismatchError(
                f"was not made with what {first.label} restores", file=second.label, tensor=found,
                mend=_order_to_use(deltas, reverse=reverse),
            )  # fmt: skip


def _break(first: Delta, second: Delta) -> str | None:
    """Find a tensor that ``second`` takes from its base and ``first`` does not restore."""
    there = first.manifest.task.tensors
    for change in second.manifest.changes.values():
        if change.base is None:
            continue
        wanted = second.manifest.base.tensors[change.base]
        if change.base not in there or there[change.base].fingerprint != wanted.fingerprint:
            return change.base
    return None


_TRIED = 6
"""Deltas of which every order is tried, to name one that works."""


def _order_to_use(deltas: Sequence[Delta], *, reverse: bool) -> str:
    for order in itertools.permutations(deltas) if len(deltas) <= _TRIED else ():
        chain = reversed(order) if reverse else order
        if all(_break(first, second) is None for first, second in itertools.pairwise(chain)):
            return f"name them in this order: {' '.join(delta.label for delta in order)}"
    return "a chain goes from each delta's fine-tune to the next one's base; of one base they are switched, not chained"


class Restoration:
    """One restoration: what is read, what must come out, and what its record says.

    Args:
        source: the checkpoint that is at hand.
        delta: the delta.
        reverse: whether ``source`` is the fine-tune.
        previous: how ``source`` is restored itself, in a chain.
        given: tensors of the outcome that are at hand already, and where from; they are copied.
    """

    def __init__(
        self, source: Checkpoint, delta: Delta, *, reverse: bool, previous: Restoration | None = None,
        given: tuple[Mapping[str, LazyTensor], str] = ({}, ""),
    ) -> None:  # fmt: skip
        self.delta = delta
        self._checkpoint = source
        self._reverse = reverse
        self._previous = previous
        self._given, self._giver = given
        manifest = delta.manifest
        self._source, self.target = (manifest.task, manifest.base) if reverse else (manifest.base, manifest.task)
        pairs = [(change.base, name) for name, change in manifest.changes.items() if change.base is not None]
        twins = (
            {base: name for base, name in pairs if base not in manifest.back}
            if reverse
            else {name: base for base, name in pairs}
        )
        self.twins = {name: twin for name, twin in twins.items() if name not in self._given}
        """The names of restored tensors → of those they are restored from."""
        self.shared = {
            name for name, twin in self.twins.items() if not manifest.changes[twin if reverse else name].blocks
        }
        """The names of restored tensors that both sides have alike."""
        self._traced: dict[str, provenance.Traced] = {}
        for name in self.twins.values():
            self._traced[name] = provenance.Traced(any_range(self._find(self._source.tensors[name])))

    def checkpoint(self) -> Checkpoint:
        """Return the outcome, lazily."""
        made = restored(self.delta, self._traced, self._checkpoint.label, reverse=self._reverse, leave=self._given)
        tensors = {**made, **self._given}
        config, files = self._config()
        kept = len(self.shared) + len(self._given)
        return Checkpoint(
            {name: tensors[name] for name in self.target.tensors},
            label=self.target.name,
            stored=[*self._checkpoint.stored, *self.delta.stored],
            shards=self._shards(),
            config=config,
            side_files=self._checkpoint.side_files,
            notes=[*self._checkpoint.notes, *self._notes()],
            origin=Origin(
                self.record,
                counts={"restored": len(self.target.tensors) - kept, "copied": kept},
                files=files,
                bytes_read=self._bytes_read(),
                tables=[rules_table({name: self.rule(name) for name in tensors}, tensors)],
                work=work_of([self._checkpoint], "exact delta", self.delta.digest, self._reverse, sorted(self._given)),
            ),
        )

    def _find(self, wanted: Known) -> LazyTensor:
        found = self._checkpoint.tensors.get(wanted.spec.name)
        side = "fine-tune" if self._reverse else "base"
        if found is None:
            what = f"is not there; the delta was made with a {side}, {self._source.name}, that has it"
        elif (found.spec.dtype, found.spec.shape) != (wanted.spec.dtype, wanted.spec.shape):
            what = f"is {found.spec.describe()}; the {side} that the delta was made with has {wanted.spec.describe()}"
        else:
            return found
        raise MismatchError(what, file=self._checkpoint.label, tensor=wanted.spec.name, mend=f"name that {side}")

    def rule(self, name: str) -> Rule:
        """Say how a tensor is made: a copy, restored from its twin, or from the delta alone that holds it whole."""
        if name in self._given or name in self.shared:
            return Rule(f"copy of {self._giver if name in self._given else self._checkpoint.label}")
        twin = f"{self._checkpoint.label} and " if name in self.twins else ""
        return Rule(f"restored from {twin}{self.delta.label}")

    def _bytes_read(self) -> int:
        known = self._checkpoint.origin.bytes_read if self._previous and self._checkpoint.origin else None
        return (self._checkpoint.nbytes if known is None else known) + self.delta.nbytes

    def _shards(self) -> dict[str, str]:
        """Put every tensor into the file that its twin lies in."""
        own = self._checkpoint.shards
        return {name: own[twin] for name, twin in self.twins.items() if twin in own}

    def _config(self) -> tuple[Mapping[str, Any] | None, Mapping[str, bytes]]:
        """Return the configuration, and its file where the two sides' differ."""
        text = self.target.config
        if text is None:
            origin = self._checkpoint.origin
            return self._checkpoint.config, origin.files if origin else {}
        try:
            return strict_object(text.encode()), {"config.json": text.encode()}
        except (FormatError, json.JSONDecodeError) as error:
            raise FormatError(f"the configuration in it is malformed: {error}", file=self.delta.label) from None

    def _notes(self) -> list[str]:
        """Say what the delta does not know."""
        extra = sorted(self._checkpoint.tensors.keys() - self._source.tensors.keys())
        return [f"left out, the delta knows nothing of it: {join_shown(extra)}"] if extra else []

    def record(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """Compose the record, and prove both sides.

        Raises:
            MismatchError: a tensor that was read is not what the delta was made with.
            VerificationError: a restored tensor is not what it was.
        """
        if provenance.PLACEHOLDER not in fingerprints.values():
            self.prove(fingerprints)
        return provenance.record(
            "merge",
            parameters={"reverse": self._reverse},
            inputs=self.inputs(),
            tensors=fingerprints,
        )

    def inputs(self) -> list[dict[str, Any]]:
        """Name the checkpoint that it began with, and all deltas on the way."""
        before = self._previous.inputs() if self._previous else []
        if not before:
            prints = {name: known.fingerprint for name, known in self._source.tensors.items()}
            role = "fine-tune" if self._reverse else "base"
            before = [
                {
                    "role": role,
                    "name": self._checkpoint.label,
                    **self._checkpoint.pinned,
                    "fingerprint": provenance.combine(prints),
                }
            ]
        return [
            *before,
            {"role": "delta", "name": self.delta.label, **pinned(self.delta.stored), "fingerprint": self.delta.digest},
        ]

    def prove(self, fingerprints: Mapping[str, str]) -> None:
        """Hold what was restored, and what it was restored from, against what is recorded: a recipe may take some layers.

        Raises:
            MismatchError: a tensor that was read is not what the delta was made with.
            VerificationError: a restored tensor is not what it was.
        """
        self.prove_source([self.twins[wanted] for wanted in fingerprints if wanted in self.twins])
        for name, value in fingerprints.items():
            if value == self.target.tensors[name].fingerprint:
                continue
            if name in self._given:
                raise wrong_twin(name, self._giver, reverse=True)
            raise self.damaged(name)

    def prove_source(self, names: Iterable[str] | None = None) -> None:
        """Hold tensors that the others are restored from against what is recorded; all of them by default.

        Raises:
            MismatchError: one of them is not what the delta was made with.
        """
        for name in self._traced if names is None else names:
            if self._traced[name].fingerprint() != self._source.tensors[name].fingerprint:
                raise self.wrong(name)

    def wrong(self, name: str) -> SurgeryError:
        """Say whose fault a wrong input is: that of the checkpoint that everything began with, if it led here."""
        if self._previous is None:
            return wrong_twin(name, self._checkpoint.label, reverse=self._reverse)
        if name in self._previous.twins:
            return self._previous.wrong(self._previous.twins[name])
        return self._previous.damaged(name)

    def damaged(self, name: str) -> VerificationError:
        """Compose the refusal of a delta that does not give what its own record says."""
        return VerificationError(
            "was not restored to the bits that it had", file=self.delta.label, tensor=name, mend="verify the delta"
        )
