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
from surgery.report import join_shown
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
    counts = {"restored": len(wanted) - work.copied, "copied": work.copied}
    config, files = work.config()
    return Checkpoint(
        restored(delta, work.traced, checkpoint.label, reverse=reverse),
        label=work.target.name,
        stored=[*checkpoint.stored, *delta.stored],
        shards=work.shards(),
        config=config,
        side_files=checkpoint.side_files,
        notes=[*checkpoint.notes, *work.notes()],
        origin=Origin(
            work.record, counts=counts, files=files, bytes_read=checkpoint.nbytes + delta.nbytes,
            work=work_of([checkpoint], "exact delta", delta.digest, reverse),
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
        pairs = [(change.base, name) for name, change in manifest.changes.items() if change.base is not None]
        self.twins = (
            {base: name for base, name in pairs if base not in manifest.back}
            if reverse
            else {name: base for base, name in pairs}
        )
        """The names of restored tensors → of those they are restored from."""
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

    @property
    def copied(self) -> int:
        """How many tensors both sides share."""
        return sum(not change.blocks and change.base is not None for change in self.delta.manifest.changes.values())

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
                {"role": "fine-tune" if self.reverse else "base", "name": self.checkpoint.label,
                 "fingerprint": provenance.combine(prints)},
                {"role": "delta", "name": self.delta.label, "fingerprint": self.delta.digest},
            ],
            tensors={name: {"fingerprint": value} for name, value in fingerprints.items()},
        )  # fmt: skip

    def _prove(self, fingerprints: Mapping[str, str]) -> None:
        for name, traced in self.traced.items():
            if traced.fingerprint() != self.source.tensors[name].fingerprint:
                raise wrong_twin(name, self.checkpoint.label, reverse=self.reverse)
        for name, value in fingerprints.items():
            if value != self.target.tensors[name].fingerprint:
                raise VerificationError(
                    "was not restored to the bits that it had", file=self.delta.label, tensor=name,
                    mend="verify the delta",
                )  # fmt: skip
