"""``unmerge``: take an adapter out of a merged checkpoint again."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery import provenance
from surgery.adapter import Adapter, open_adapter
from surgery.binding import Binding, bind, expected_base
from surgery.checkpoint import Checkpoint, Origin, Record, Source, open_checkpoint, require_arithmetic
from surgery.delta import Applied, Dense, ExpertsLowRank, LowRank, Rows, Update
from surgery.errors import MismatchError, UsageError
from surgery.history import History, history_of
from surgery.kept import KEPT_FILE, UNDO_FILE
from surgery.lossy import is_lossy, open_lossy
from surgery.operations.merge_adapters import resized_config
from surgery.operations.unmerge_exact import ExactWork, is_undoable, refuse_order
from surgery.report import join_shown
from surgery.roles import role_of
from surgery.tensor import LazyTensor, TensorSpec, read_bytes


def unmerge(
    merged: Source,
    *adapters: str | os.PathLike[str] | Adapter,
    base: Source | None = None,
    coeff: float | None = None,
    name_map: Mapping[str, str] | None = None,
    approximate: bool = False,
) -> Checkpoint:
    r"""Take adapters out of a checkpoint that they were merged into.

    Where ``merge`` kept undo records (a saved folder, by default), every touched tensor comes back to the bit, and is proved by
    its fingerprint. Adapters merged one after another come out in reverse order; those merged at once that share weights
    come out at once; others in any order.

    Without records low-rank parts are subtracted, ``round(W' − c · scaling · B @ A)``, which is right to one unit in the last
    place, not to the bit; tensors and rows that the adapter replaced are restored from the originals that ``merge`` kept.
    With ``base`` every touched tensor is copied from it, and the result is exact.

    Args:
        merged: the checkpoint to restore.
        adapters: what was merged.
        base: the checkpoint before the merge.
        coeff: the coefficient it was merged with; by default what the record says, or 1.
        name_map: names in the adapters → names in the checkpoint.
        approximate: subtract, whatever the records say: in any order, and from weights that changed since.

    Returns:
        The restored checkpoint, lazily.

    Raises:
        MismatchError: the record says that an adapter is not in there, that another must come out first, or that the
            checkpoint was changed since; what it replaced is not to be had; or ``base`` is not the base of the record.
        VerificationError: when read or saved: a tensor did not come back as it was.

    >>> import torch, surgery
    >>> base = {"q_proj.weight": torch.ones(4, 4)}
    >>> adapter = surgery.extract_lora(base, {"q_proj.weight": torch.eye(4)}, rank=4)
    >>> restored = unmerge(surgery.merge(base, adapter), adapter)
    >>> torch.allclose(restored["q_proj.weight"], base["q_proj.weight"])
    True
    """
    if coeff is not None and not math.isfinite(coeff):
        raise UsageError("a coefficient is not a finite number")
    if not adapters:
        raise UsageError("nothing to unmerge: name an adapter after the checkpoint")
    checkpoint, left = (
        open_checkpoint(merged),
        [open_lossy(adapter) if is_lossy(adapter) else open_adapter(adapter) for adapter in adapters],
    )
    while left:
        history = history_of(checkpoint)
        places = [_find(checkpoint, adapter, history) for adapter in left]
        step = max((history.adapters[place]["step"] for place in places if place is not None), default=0)
        now = [k for k, place in enumerate(places) if place is None or history.adapters[place]["step"] == step]
        found = [place for k in now if (place := places[k]) is not None]
        entries = [history.adapters[place] for place in found]
        for entry, k in zip(entries, now, strict=False):
            _check_coeff(left[k], entry, coeff)
        if base is None and not approximate and len(set(found)) == len(now) and is_undoable(history, step, entries):
            checkpoint = _exactly(checkpoint, history, found, [left[k] for k in now], name_map)
        else:
            now = now[:1]
            checkpoint = _roughly(checkpoint, history, found[0] if found else None, left[now[0]], base, coeff, name_map)
        left = [adapter for k, adapter in enumerate(left) if k not in now]
    return checkpoint


def _exactly(
    checkpoint: Checkpoint, history: History, places: Sequence[int], adapters: Sequence[Adapter],
    name_map: Mapping[str, str] | None,
) -> Checkpoint:  # fmt: skip
    """Take adapters of one step out to the bit."""
    refuse_order(checkpoint, history, places)
    bindings = [
        bind(adapter, checkpoint, coeff=-history.adapters[place]["coeff"], name_map=name_map, allow_incomplete=True)
        for adapter, place in zip(adapters, places, strict=True)
    ]
    work = ExactWork(checkpoint, history, places, adapters, bindings)
    future = history.without(places, work.touched, exact=True)
    return _restored(
        checkpoint, work.tensors, adapters, [], history, future, work.resized, len(work.touched),
        [note for binding in bindings for note in binding.notes],
        lambda prints: work.record(prints, future.adapters),
    )  # fmt: skip


def _roughly(
    checkpoint: Checkpoint, history: History, place: int | None, adapter: Adapter, base: Source | None,
    coeff: float | None, name_map: Mapping[str, str] | None,
) -> Checkpoint:  # fmt: skip
    """Take one adapter out by subtraction, or copy what it touched from the base."""
    entry = None if place is None else history.adapters[place]
    factor = coeff if coeff is not None else entry["coeff"] if entry else 1.0
    binding = bind(adapter, checkpoint, coeff=-factor, name_map=name_map, allow_incomplete=True)
    if entry is None and base is None:
        _refuse_untouched(checkpoint, adapter, binding)
    if base is None:
        require_arithmetic(checkpoint, sorted(binding.updates.keys() - binding.replaced))
    _refuse_later(history, place, binding, checkpoint, from_base=base is not None)
    work = _Work(checkpoint, history, adapter, entry, binding)
    source = None if base is None else open_checkpoint(base)
    tensors = work.by_subtraction() if source is None else work.from_base(source)
    future = History(history.known, [], history.base_prints, stored=history.stored)
    if place is not None:
        future = history.without([place], binding.updates.keys(), exact=base is not None)
    return _restored(
        checkpoint, tensors, [adapter], [source] if source else [], history, future, work.resized, len(binding.updates),
        [*binding.notes, *work.notes], lambda prints: work.record(prints, future.adapters),
    )  # fmt: skip


def _restored(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], adapters: Sequence[Adapter],
    others: Sequence[Checkpoint], history: History, future: History, resized: Mapping[str, int], touched: int,
    notes: Sequence[str], record: Record,
) -> Checkpoint:  # fmt: skip
    config, files = resized_config(checkpoint.config, [resized])
    stored = [stored for source in (checkpoint, *others) for stored in source.stored]
    return Checkpoint(
        tensors,
        label=f"{checkpoint.label} − {' − '.join(adapter.label for adapter in adapters)}",
        stored=[*stored, *history.stored, *(stored for adapter in adapters for stored in adapter.stored)],
        shards=checkpoint.shards,
        config=config,
        side_files=checkpoint.side_files,
        notes=[*checkpoint.notes, *history.notes, *notes],
        origin=Origin(
            record, kept={KEPT_FILE: future.kept, UNDO_FILE: future.undo}, carried=history.kept_prints, history=future,
            counts={"restored": touched, "copied": len(tensors) - touched}, files=files,
            bytes_read=checkpoint.nbytes + sum(adapter.nbytes for adapter in adapters),
        ),
    )  # fmt: skip


def _find(checkpoint: Checkpoint, adapter: Adapter, history: History) -> int | None:
    """Find the place of the adapter's entry in the record; refuse where the record says that it is not in there.

    Raises:
        MismatchError: it is not.
    """
    if not history.known:
        return None
    fingerprint = adapter.fingerprint()
    for place in reversed(range(len(history.adapters))):
        if history.adapters[place]["fingerprint"] == fingerprint:
            return place
    inside = join_shown([entry["name"] for entry in history.adapters]) or "none"
    raise MismatchError(
        f"the record says that {adapter.label} is not merged into it; merged adapters: {inside}", file=checkpoint.label
    )


def _check_coeff(adapter: Adapter, entry: Mapping[str, Any], coeff: float | None) -> None:
    if coeff is not None and coeff != entry["coeff"]:
        raise MismatchError(
            f"was merged with coefficient {entry['coeff']}, not {coeff}", file=adapter.label, mend="drop --coeff"
        )


def _refuse_untouched(checkpoint: Checkpoint, adapter: Adapter, binding: Binding) -> None:
    """Without a record, refuse where what the adapter changes is still what it says it was taken from."""
    expected = expected_base(adapter, checkpoint)
    known = sorted(binding.updates.keys() & expected.keys(), key=lambda name: checkpoint.tensors[name].spec.nbytes)
    wanted = [name for name in known if len(checkpoint.tensors[name].spec.shape) >= 2][:3]
    if wanted and all(provenance.fingerprint(checkpoint.tensors[n]) == expected[n] for n in wanted):
        raise MismatchError(
            f"is what {adapter.label} was taken from: nothing is merged into it",
            file=checkpoint.label,
            tensor=wanted[0],
        )


def _refuse_later(
    history: History, place: int | None, binding: Binding, checkpoint: Checkpoint, *, from_base: bool
) -> None:
    """Refuse what other adapters in the same tensors make impossible."""
    if place is None:
        return
    entry = history.adapters[place]
    for other in (entry for number, entry in enumerate(history.adapters) if number != place):
        if other["step"] < entry["step"] and not from_base:
            continue  # what this step found and kept is what the earlier one had left
        shared = sorted(set(other["touched"]) & set(binding.updates))
        # What this adapter replaced comes back as it was, without what others did to it; and what a later one replaced
        # is no longer this one's to subtract from.
        theirs = other["replaced"] if other["step"] > entry["step"] else []
        blocked = shared if from_base else sorted(set(shared) & {*entry["replaced"], *theirs})
        if blocked:
            later = other["step"] > entry["step"]
            mend = f"unmerge {other['name']} first" if later else "unmerge without --base" if from_base else None
            raise MismatchError(
                f"{other['name']} is merged into it too", file=checkpoint.label, tensor=blocked[0],
                mend=mend or "start again from the base",
            )  # fmt: skip


class _Work:
    """One unmerge: how each touched tensor is restored, and what the record will say."""

    def __init__(
        self, merged: Checkpoint, history: History, adapter: Adapter, entry: Mapping[str, Any] | None, binding: Binding
    ) -> None:
        self.merged = merged
        self.history = history
        self.adapter = adapter
        self.entry = entry
        self.binding = binding
        self.notes: list[str] = []
        self.resized: dict[str, int] = {}
        """Weights that get back the number of rows they had."""
        self._base: dict[str, provenance.Traced] = {}
        self._base_label = ""

    def from_base(self, base: Checkpoint) -> dict[str, LazyTensor]:
        """Copy every touched tensor from the base."""
        tensors = dict(self.merged.tensors)
        self._base_label = base.label
        for name in self.binding.updates:
            if name not in base.tensors:
                raise MismatchError("is not in the base", file=base.label, tensor=name)
            if not self._fits(name, base.tensors[name].spec):
                raise MismatchError(
                    f"is {base.tensors[name].spec.describe()} in the base and "
                    f"{self.merged.tensors[name].spec.describe()} in {self.merged.label}",
                    file=base.label,
                    tensor=name,
                )
            self._base[name] = provenance.Traced(base.tensors[name])
            tensors[name] = self._base[name]
        return tensors

    def _fits(self, name: str, before: TensorSpec) -> bool:
        """Say whether a tensor may be put back: it is like what is there, or its vocabulary was resized."""
        now = self.merged.tensors[name].spec
        if before == now:
            return True
        if name not in self.binding.replaced or before.dtype != now.dtype or before.shape[1:] != now.shape[1:]:
            return False
        if len(before.shape) == 2 and role_of(before) in ("embedding", "head"):
            self.resized[name] = before.shape[0]
        return name in self.resized

    def by_subtraction(self) -> dict[str, LazyTensor]:
        """Subtract low-rank parts and put the originals back."""
        tensors = dict(self.merged.tensors)
        subtracted = 0
        for name, updates in self.binding.updates.items():
            if name in self.binding.replaced:
                tensors[name] = self._original(name)
                continue
            undo = [*(self._negated(name, update) for update in updates if not isinstance(update, Rows))]
            subtracted += bool(undo)
            if name in self.binding.rows:
                undo.append(self._rows(name))
            tensors[name] = Applied(self.merged.tensors[name], undo)
        if subtracted:
            self.notes.append(
                f"{subtracted} weights are restored by subtraction: right to rounding, not to the bit; --base BASE is exact"
            )
        return tensors

    def _negated(self, name: str, update: Update) -> Update:
        if isinstance(update, LowRank | ExpertsLowRank | Dense):
            return update  # bound with the negated coefficient already
        raise MismatchError(
            "what scales weights (DoRA, IA³) cannot be subtracted", file=self.adapter.label, tensor=name,
            mend="pass --base BASE",
        )  # fmt: skip

    def _original(self, name: str) -> LazyTensor:
        found = self.history.original(self.entry["step"], name) if self.entry else None
        if found is None or not self._fits(name, found.spec):
            raise self._lost(name)
        return found

    def _rows(self, name: str) -> Update:
        found = self.history.original_rows(self.entry["step"], name) if self.entry else None
        if found is None:
            raise self._lost(name)
        numbers, values = found
        indices = np.frombuffer(bytes(read_bytes(numbers)), dtype=np.int64).tolist()
        return Rows(tuple(indices), values, absolute=True)

    def _lost(self, name: str) -> MismatchError:
        return MismatchError(
            f"{self.adapter.label} replaced it, and what it was before is not kept", file=self.merged.label, tensor=name,
            mend="pass --base BASE",
        )  # fmt: skip

    def record(self, fingerprints: Mapping[str, str], adapters: list[dict[str, Any]]) -> dict[str, Any]:
        """Compose the provenance record; with a base, refuse one that is not the record's.

        Raises:
            MismatchError: by tensor, before anything is published.
        """
        draft = provenance.PLACEHOLDER in fingerprints.values()
        for name, traced in {} if draft else self._base.items():
            known = self.history.base_prints.get(name)
            if known and known != traced.fingerprint():
                raise MismatchError(
                    "is not what was merged into", file=self._base_label, tensor=name, mend="pass the right base"
                )
        tensors: dict[str, dict[str, Any]] = {}
        for name, value in fingerprints.items():
            known = self.history.base_prints.get(name)
            tensors[name] = {"fingerprint": value} | ({"base": known} if known and (draft or known != value) else {})
        touched = self.binding.updates.keys() & self.history.base_prints.keys()
        exact = sum(fingerprints[name] == self.history.base_prints[name] for name in touched)
        return provenance.record(
            "unmerge",
            parameters={"coeff": self.entry["coeff"] if self.entry else None},
            inputs=[
                {"role": "merged", "name": self.merged.label, **self.merged.pinned},
                {
                    "role": "adapter",
                    "name": self.adapter.label,
                    **self.adapter.pinned,
                    "fingerprint": self.adapter.fingerprint(),
                },
                *([{"role": "base", "name": self._base_label}] if self._base else []),
            ],
            tensors=tensors,
            adapters=adapters,
            restored={"tensors": len(self.binding.updates), "proven_exact": 0 if draft else exact},
        )
