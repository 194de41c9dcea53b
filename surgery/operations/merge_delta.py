"""``merge`` with an exact delta: the fine-tune restored from its base bit for bit, or the base from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from surgery import provenance
from surgery.checkpoint import Checkpoint, Origin, Source, open_checkpoint, work_of
from surgery.errors import FormatError, MismatchError, UsageError, VerificationError
from surgery.exact import Delta, open_delta, restored, wrong_twin
from surgery.formats.delta_manifest import Known
from surgery.formats.safetensors import strict_object
from surgery.operations.merge_rules import Rule, rules_table
from surgery.report import join_shown
from surgery.sources.local import pinned
from surgery.tensor import LazyTensor, any_range


def merge_delta(known: Source, source: str | os.PathLike[str] | Delta, *, reverse: bool = False) -> Checkpoint:
    """Restore one side of an exact delta from the other, lazily.

    Args:
        known: the base that the delta was made with; with ``reverse`` the fine-tune.
        source: the delta.
        reverse: restore the base.

    Raises:
        MismatchError: a tensor is missing, or of another dtype or shape; differing bits are found by whoever reads.
        UsageError: ``reverse``, and the delta was not made reversible.
    """
    delta, checkpoint = open_delta(source), open_checkpoint(known)
    if reverse and not delta.manifest.reversible:
        raise UsageError(
            "holds no way back: it was made without --reversible", file=delta.label, mend="restore from the base itself"
        )
    work = _Restoration(checkpoint, delta, reverse)
    wanted = work.target.tensors
    counts = {"restored": len(wanted) - len(work.shared), "copied": len(work.shared)}
    config, files = work.config()
    tensors = restored(delta, work.traced, checkpoint.label, reverse=reverse)
    return Checkpoint(
        tensors,
        label=work.target.name,
        stored=[*checkpoint.stored, *delta.stored],
        shards=work.shards(),
        config=config,
        side_files=checkpoint.side_files,
        notes=[*checkpoint.notes, *work.notes()],
        origin=Origin(
            work.record, counts=counts, files=files, bytes_read=checkpoint.nbytes + delta.nbytes,
            work=work_of([checkpoint], "exact delta", delta.digest, reverse),
            tables=[rules_table({name: work.rule(name) for name in tensors}, tensors)],
        ),
    )  # fmt: skip


class _Restoration:
    """One restoration: what is read, what must come out, and what its record says."""

    def __init__(self, checkpoint: Checkpoint, delta: Delta, reverse: bool) -> None:
        self.checkpoint = checkpoint
        self.delta = delta
        self.reverse = reverse
        manifest = delta.manifest
        self.source, self.target = (manifest.task, manifest.base) if reverse else (manifest.base, manifest.task)
        pairs = [
            (change.base, name, not change.blocks)
            for name, change in manifest.changes.items()
            if change.base is not None
        ]
        self.twins = {(base if reverse else name): (name if reverse else base) for base, name, _ in pairs}
        """The names of restored tensors → of those they are restored from."""
        self.shared = {(base if reverse else name) for base, name, same in pairs if same}
        """The names of restored tensors that both sides have alike."""
        self.traced: dict[str, provenance.Traced] = {}
        for name in self.twins.values():
            self.traced[name] = provenance.Traced(any_range(self._find(self.source.tensors[name])))

    def _find(self, wanted: Known) -> LazyTensor:
        found = self.checkpoint.tensors.get(wanted.spec.name)
        side = "fine-tune" if self.reverse else "base"
        if found is None:
            what = f"is not there; the delta was made with a {side}, {self.source.name}, that has it"
        elif (found.spec.dtype, found.spec.shape) != (wanted.spec.dtype, wanted.spec.shape):
            what = f"is {found.spec.describe()}; the {side} that the delta was made with has {wanted.spec.describe()}"
        else:
            return found
        raise MismatchError(what, file=self.checkpoint.label, tensor=wanted.spec.name, mend=f"name that {side}")

    def rule(self, name: str) -> Rule:
        """Say how a tensor is made: a copy of its twin, restored from it, or from the delta alone that holds it whole."""
        if name in self.shared:
            return Rule(f"copy of {self.checkpoint.label}")
        twin = f"{self.checkpoint.label} and " if name in self.twins else ""
        return Rule(f"restored from {twin}{self.delta.label}")

    def shards(self) -> dict[str, str]:
        """Put every tensor into the file that its twin lies in."""
        own = self.checkpoint.shards
        return {name: own[twin] for name, twin in self.twins.items() if twin in own}

    def config(self) -> tuple[Mapping[str, Any] | None, dict[str, bytes]]:
        """Return the configuration, and its file where the two sides' differ."""
        text = self.target.config
        if text is None:
            return self.checkpoint.config, {}
        try:
            return strict_object(text.encode()), {"config.json": text.encode()}
        except (FormatError, json.JSONDecodeError) as error:
            raise FormatError(f"the configuration in it is malformed: {error}", file=self.delta.label) from None

    def notes(self) -> list[str]:
        """Say what the delta does not know."""
        extra = sorted(self.checkpoint.tensors.keys() - self.source.tensors.keys())
        return [f"left out, the delta knows nothing of it: {join_shown(extra)}"] if extra else []

    def record(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """Compose the record, and prove both sides.

        Raises:
            MismatchError: a tensor that was read is not what the delta was made with.
            VerificationError: a restored tensor is not what it was.
        """
        draft = provenance.PLACEHOLDER in fingerprints.values()
        if not draft:
            self._prove(fingerprints)
        prints = {name: known.fingerprint for name, known in self.source.tensors.items()}
        return provenance.record(
            "merge",
            parameters={"reverse": self.reverse},
            inputs=[
                {"role": "fine-tune" if self.reverse else "base", "name": self.checkpoint.label, **self.checkpoint.pinned,
                 "fingerprint": provenance.combine(prints)},
                {"role": "delta", "name": self.delta.label, **pinned(self.delta.stored), "fingerprint": self.delta.digest},
            ],
            tensors={name: {"fingerprint": value} for name, value in fingerprints.items()},
        )  # fmt: skip

    def _prove(self, fingerprints: Mapping[str, str]) -> None:
        """Prove what was restored, and what it was restored from: a recipe may take some layers alone."""
        for name in [self.twins[wanted] for wanted in fingerprints if wanted in self.twins]:
            if self.traced[name].fingerprint() != self.source.tensors[name].fingerprint:
                raise wrong_twin(name, self.checkpoint.label, reverse=self.reverse)
        for name, value in fingerprints.items():
            if value != self.target.tensors[name].fingerprint:
                raise VerificationError(
                    "was not restored to the bits that it had", file=self.delta.label, tensor=name,
                    mend="verify the delta",
                )  # fmt: skip
