"""Taking adapters out again to the bit: from what was added, the undo records, and the originals that merge kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery import provenance
from surgery.adapter import Adapter
from surgery.binding import Binding
from surgery.checkpoint import Checkpoint
from surgery.delta import ADDITIVE, Update
from surgery.errors import MismatchError, VerificationError
from surgery.history import History
from surgery.kept import KEPT_FILE
from surgery.report import join_shown
from surgery.tensor import LazyTensor, any_range
from surgery.undo import Undone


def is_undoable(history: History, step: int, entries: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether everything that adapters of one step touched can be brought back to the bit."""
    touched = {name for entry in entries for name in entry["touched"]}
    return bool(touched) and all(
        f"{step}/{name}" in history.undo or f"{step}/tensor/{name}" in history.kept for name in touched
    )


def refuse_order(checkpoint: Checkpoint, history: History, places: Sequence[int]) -> None:
    """Refuse to take adapters out from under others that changed the same weights; say in which order it goes.

    Raises:
        MismatchError: by tensor.
    """
    entries = [history.adapters[place] for place in places]
    step, touched = entries[0]["step"], {name for entry in entries for name in entry["touched"]}
    others = [entry for place, entry in enumerate(history.adapters) if place not in places and entry["step"] >= step]
    above = [entry for entry in reversed(others) if touched & set(entry["touched"])]
    if not above:
        return
    shared = min(touched & set(above[-1]["touched"]))
    later = [entry["name"] for entry in above if entry["step"] > step]
    if later:
        raise MismatchError(
            f"{later[-1]} was merged into it after {entries[0]['name']}", file=checkpoint.label, tensor=shared,
            mend=f"unmerge {', then '.join(later)} first; --approximate subtracts in any order, to rounding",
        )  # fmt: skip
    together = join_shown([entry["name"] for entry in (*entries, *above)])
    raise MismatchError(
        f"{above[0]['name']} was merged into it together with {entries[0]['name']}", file=checkpoint.label, tensor=shared,
        mend=f"name all of them: {together}; --approximate subtracts one, to rounding",
    )  # fmt: skip


class ExactWork:
    """One way back: how each touched tensor is restored, what it must be, and what the record will say.

    Args:
        merged: the checkpoint to restore.
        history: what is in it.
        places: the entries of the adapters that come out, all of one step.
        adapters: these adapters.
        bindings: bound with their coefficients negated.
    """

    def __init__(
        self, merged: Checkpoint, history: History, places: Sequence[int], adapters: Sequence[Adapter],
        bindings: Sequence[Binding],
    ) -> None:  # fmt: skip
        self.merged = merged
        self.history = history
        self.adapters = adapters
        self.bindings = bindings
        self.entries = [history.adapters[place] for place in places]
        self.step: int = self.entries[0]["step"]
        self.touched = {name for binding in bindings for name in binding.updates}
        self.before: dict[str, str] = {}
        """Touched tensor → the fingerprint that it must have again."""
        self.resized: dict[str, int] = {}
        """Weights that get back the number of rows they had."""
        self._undone: dict[str, Undone] = {}
        self._traced: dict[str, provenance.Traced] = {}
        self._check_touched()
        self.tensors = {
            name: self._restored(name) if name in self.touched else tensor for name, tensor in merged.tensors.items()
        }

    def _check_touched(self) -> None:
        recorded = {name for entry in self.entries for name in entry["touched"]}
        if odd := sorted(recorded ^ self.touched):
            what = (
                "was not changed by it then, and would be now"
                if odd[0] in self.touched
                else "was changed by it, and would not be"
            )
            raise MismatchError(
                f"{what}: {self.adapters[0].label} is bound to other weights than when it was merged",
                file=self.merged.label, tensor=odd[0], mend="give the --name-map that it was merged with",
            )  # fmt: skip

    def _restored(self, name: str) -> LazyTensor:
        merged = self.merged.tensors[name]
        original = self.history.original(self.step, name)
        if original is not None:
            known = self.history.kept_prints.get(KEPT_FILE, {}).get(f"{self.step}/tensor/{name}")
            if known is not None:
                self.before[name] = known
            if original.spec != merged.spec:
                self.resized[name] = original.spec.shape[0]
            return original
        found = self.history.undo_of(self.step, name, merged.spec.numel)
        assert found is not None  # is_undoable was asked
        undo, record = found
        self.before[name] = undo.before
        updates: list[Update] = [
            update
            for binding in self.bindings
            for update in binding.updates.get(name, ())
            if isinstance(update, ADDITIVE)
        ]
        rows = self.history.original_rows(self.step, name)
        self._traced[name] = provenance.Traced(any_range(merged))
        self._undone[name] = Undone(self._traced[name], updates if undo.predicted else [], undo, record, rows)
        return self._undone[name]

    def record(self, fingerprints: Mapping[str, str], adapters: list[dict[str, Any]]) -> dict[str, Any]:
        """Compose the provenance record, once every tensor is proved.

        Raises:
            MismatchError: a tensor was changed since it was merged; before anything is published.
            VerificationError: a tensor did not come back as it was.
        """
        draft = provenance.PLACEHOLDER in fingerprints.values()
        if not draft:
            self._prove(fingerprints)
        tensors: dict[str, dict[str, Any]] = {}
        for name, value in fingerprints.items():
            known = self.history.base_prints.get(name)
            tensors[name] = {"fingerprint": value} | ({"base": known} if known and (draft or known != value) else {})
        return provenance.record(
            "unmerge",
            parameters={"coeff": [entry["coeff"] for entry in self.entries]},
            inputs=[
                {"role": "merged", "name": self.merged.label, **self.merged.pinned},
                *(
                    {"role": "adapter", "name": adapter.label, **adapter.pinned, "fingerprint": adapter.fingerprint()}
                    for adapter in self.adapters
                ),
            ],
            tensors=tensors,
            adapters=adapters,
            restored={"tensors": len(self.touched), "proven_exact": 0 if draft else len(self.before)},
        )

    def _prove(self, fingerprints: Mapping[str, str]) -> None:
        for name, value in fingerprints.items():
            now = self._now(name, value)
            if self.history.prints.get(name, now) != now:
                raise changed_since(name, self.merged.label)
            if self.before.get(name, value) == value or name not in self.touched:
                continue
            if name in self._undone:
                raise self._undone[name].failure(now)
            raise VerificationError(
                "the original that was kept was changed", file=KEPT_FILE, tensor=name, mend="fetch it again"
            )

    def _now(self, name: str, written: str) -> str:
        """Fingerprint a tensor of the merged checkpoint."""
        if name not in self.touched:
            return written  # it was copied
        if name in self._traced:
            return self._traced[name].fingerprint()
        return provenance.fingerprint(self.merged.tensors[name])


def changed_since(name: str, label: str) -> MismatchError:
    """Compose the refusal of a merged checkpoint that is not any more what its record says."""
    return MismatchError(
        "is not what the record beside it says: it was changed since it was merged", file=label, tensor=name,
        mend="fetch it again; --approximate takes the adapter out of what is there, to rounding",
    )  # fmt: skip
