"""``diff``: what changed between two checkpoints, and the cheapest form to ship it in.

This module imports no torch: comparing headers alone must stay as cheap as reading them. Values are compared by
:mod:`surgery.operations.compare_values`.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.checkpoint import Checkpoint, Source, open_checkpoint
from surgery.errors import MismatchError
from surgery.execute import Progress
from surgery.names import Alignment, align, parse_patterns, parse_renames, select
from surgery.report import Table, percent
from surgery.roles import ROLES, layer_of, role_of
from surgery.tensor import ARITHMETIC, LazyTensor, TensorSpec, human_bytes, renamed

RANKS = (4, 8, 16, 32, 64, 128)
LOW_RANK_SHARE = 0.99
"""A delta is called low-rank when a rank of at most 128 holds this share of ‖Δ‖²."""
UNRELATED_COSINE = 0.5
"""Below this cosine between all weights of two models, one is not a fine-tune of the other."""
ROUNDING = 2.0**-22
"""A tensor that moved by no larger share of its norm differs by float32's rounding, not by training."""
_PLURALS = {"bias": "biases", "norm": "norms", "embedding": "embeddings", "head": "the head"}


Extracting = Callable[[int | None, Sequence[str]], str]


@dataclass(frozen=True, slots=True)
class DiffRow:
    """How one tensor differs."""

    name: str
    role: str
    layer: str
    status: str
    """``identical``, ``changed``, ``added``, ``removed``, ``reshaped``, ``recast``, or ``present`` (headers only)."""
    before: TensorSpec | None
    after: TensorSpec | None
    max_abs: float = 0.0
    relative_norm: float = 0.0
    cosine: float = 1.0
    changed: float = 0.0
    """Fraction of elements that differ."""
    effective_rank: float | None = None
    energy: float = 0.0
    """‖Δ‖²."""
    weight_energy: float = 0.0
    """‖W‖² before."""
    after_energy: float = 0.0
    product: float = 0.0
    kept: Mapping[int, float] = field(default_factory=dict)
    """Rank → share of ‖Δ‖² that the best approximation of that rank holds."""
    trained_rows: int | None = None
    rows_energy: float = 0.0
    """‖Δ‖² of the trained rows alone."""
    shrink: float = 0.0
    nonfinite: int = 0

    @property
    def differs(self) -> bool:
        """Whether anything about the tensor differs."""
        return self.status not in ("identical", "present")


@dataclass(frozen=True, slots=True)
class Form:
    """One form that a change could be shipped in."""

    name: str
    nbytes: int
    error: float
    """‖Δ − what the form holds‖ / ‖Δ‖."""
    command: str
    """What makes it, as the two checkpoints were called."""


@dataclass(frozen=True, repr=False)
class DiffReport:
    """All differences between two checkpoints."""

    a: str
    b: str
    rows: tuple[DiffRow, ...]
    values_compared: bool
    notes: tuple[str, ...] = ()
    b_bytes: int = 0
    copying: str = ""
    """The command that copies B."""
    extracting: Extracting = lambda _rank, _excluded: ""
    """Composes the command that extracts an adapter of a rank, or of the default rank, without some tensors."""

    def __repr__(self) -> str:
        """Say the verdict: the rows may be thousands."""
        return f"<DiffReport {self.a!r} → {self.b!r}: {self.verdict()}, {len(self.rows)} tensors>"

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not any(row.differs for row in self.rows)

    @property
    def energy(self) -> float:
        """‖Δ‖² over all compared tensors."""
        return math.fsum(row.energy for row in self.rows)

    @property
    def relative_norm(self) -> float:
        """‖Δ‖ / ‖W‖ over all compared tensors."""
        weight = math.fsum(row.weight_energy for row in self.rows)
        return math.sqrt(self.energy / weight) if weight else 0.0

    @property
    def cosine(self) -> float:
        """Cosine between all of A's and all of B's compared values."""
        before = math.fsum(row.weight_energy for row in self.rows)
        after = math.fsum(row.after_energy for row in self.rows)
        if not before or not after:
            return float(before == after)
        return math.fsum(row.product for row in self.rows) / math.sqrt(before) / math.sqrt(after)

    def verdict(self) -> str:
        """Name the kind of change in a few words."""
        changed = [row for row in self.rows if row.status in ("changed", "recast") and row.energy]
        structure = sorted(
            {row.status for row in self.rows if row.status in ("added", "removed", "reshaped", "recast")}
        )
        suffix = f" (and tensors {', '.join(structure)})" if structure else ""
        unmeasured = self._unmeasured()
        if not self.values_compared:
            return ("different layout" if structure else "same layout") + f": values were not compared{suffix}"
        if not changed and unmeasured:
            return f"only {unmeasured}" + suffix
        if not changed:
            return "identical values" + suffix if structure else "identical"
        suffix += f" (and {unmeasured})" if unmeasured else ""
        roles = {row.role for row in changed}
        if all(row.after and row.after.dtype in ("F32", "F64") and row.relative_norm <= ROUNDING for row in changed):
            return "equal to float32 rounding" + suffix
        if roles <= {"bias", "norm"}:
            return _only(roles) + suffix
        if self.cosine < UNRELATED_COSINE:
            return f"unrelated (cosine {round(self.cosine, 2) + 0.0:.2f})" + suffix
        rank = self._low_rank()
        if rank is not None:
            return f"low-rank (rank {rank} holds {percent(self._matrix_share(rank))} of the matrices' ‖Δ‖²)" + suffix
        if roles <= {"embedding", "head"}:
            return _only(roles) + suffix
        return "dense" + suffix

    def _unmeasured(self) -> str:
        """Name the changes that no norm measures."""
        rows = [row for row in self.rows if row.status == "changed" and (row.nonfinite or not row.energy)]
        return ", ".join(sorted({_unmeasured_kind(row) for row in rows}))

    def _matrices(self) -> list[DiffRow]:
        return [row for row in self.rows if row.kept]

    def _matrix_share(self, rank: int) -> float:
        total = math.fsum(row.energy for row in self._matrices())
        return math.fsum(row.energy * row.kept[rank] for row in self._matrices()) / total if total else 1.0

    def _low_rank(self) -> int | None:
        if not self._matrices():
            return None
        narrow = min(min(row.after.shape) for row in self._matrices() if row.after)
        ranks = [rank for rank in RANKS if rank <= narrow // 4 and self._matrix_share(rank) >= LOW_RANK_SHARE]
        return min(ranks, default=None)

    def forms(self) -> list[Form]:
        """Compare the forms that the change could be shipped in: all of B, or an adapter at each of :data:`RANKS`."""
        forms = [Form("full copy", self.b_bytes, 0.0, self.copying)]
        if not self.values_compared or not self.energy:
            return forms
        if self._matrices():
            return forms + [self._adapter(f"LoRA rank {rank}", rank) for rank in RANKS]
        if any(row.energy and row.after and is_matrix(row.after) for row in self.rows):
            return forms  # no sketch was asked for
        # Without matrices nothing is factored, and the rank does not matter: the adapter holds biases, norms and rows.
        adapter = self._adapter("adapter", None)
        return [*forms, adapter] if adapter.nbytes else forms

    def ship_it_as(self) -> Table:
        """Show :meth:`forms`."""
        lines = [
            (form.name, human_bytes(form.nbytes), f"{form.error:.3f}" if form.error else "0", form.command)
            for form in self.forms()
        ]
        return Table("Ship it as", ("form", "bytes", "rel. error", "command"), tuple(lines))

    def _adapter(self, name: str, rank: int | None) -> Form:
        nbytes, lost, excluded = 0, 0.0, []
        for row in self.rows:
            if row.after is None or not row.energy:
                continue
            if row.kept and rank is not None:
                nbytes += row.after.itemsize * min(rank, *row.after.shape) * sum(row.after.shape)
                lost += row.energy * (1 - row.kept[rank])
            elif row.trained_rows is not None and row.trained_rows <= max(row.after.shape[0] // 4, 64):
                nbytes += row.after.itemsize * row.trained_rows * row.after.shape[1]
                lost += row.energy - row.rows_energy
            elif len(row.after.shape) <= 1:
                nbytes += row.after.nbytes
            else:
                lost += row.energy
                if row.trained_rows is not None:  # moved all over, and not sketched: no telling what a rank would keep
                    excluded.append(row.name)
        return Form(name, nbytes, math.sqrt(max(lost, 0.0) / self.energy), self.extracting(rank, excluded))

    def table(self, by: str = "kind") -> Table:
        """Summarise the changes.

        Args:
            by: ``kind``, ``layer``, ``group`` (layer and kind), or ``tensor``.
        """
        if by == "tensor":
            return self._tensor_table()
        keys: dict[str, Callable[[DiffRow], str]] = {
            "kind": lambda row: row.role,
            "layer": lambda row: row.layer or "(outside of blocks)",
            "group": lambda row: f"{row.layer or '-'} {row.role}",
        }
        groups: dict[str, list[DiffRow]] = {}
        for row in sorted(self.rows, key=lambda row: ROLES.index(row.role)) if by == "kind" else self.rows:
            groups.setdefault(keys[by](row), []).append(row)
        columns = (
            "weights",
            "tensors",
            "differ",
            "max |Δ|",
            "‖Δ‖/‖W‖",
            "cosine",
            "changed",
            "eff. rank",
            "share of ‖Δ‖²",
        )
        return Table(f"Changes by {by}", columns, tuple(self._group(key, rows) for key, rows in groups.items()))

    def _group(self, key: str, rows: Sequence[DiffRow]) -> tuple[str, ...]:
        energy, weight = math.fsum(r.energy for r in rows), math.fsum(r.weight_energy for r in rows)
        after, product = math.fsum(r.after_energy for r in rows), math.fsum(r.product for r in rows)
        count = sum(r.after.numel for r in rows if r.after and r.before)
        ranks = [r.effective_rank for r in rows if r.effective_rank]
        differ = sum(row.differs for row in rows)
        if not self.values_compared or not differ:
            return (key, str(len(rows)), str(differ), *[""] * 6)
        return (
            key, str(len(rows)), str(differ),
            f"{max(r.max_abs for r in rows):.2e}",
            percent(math.sqrt(energy / weight)) if weight else "",
            f"{product / math.sqrt(weight * after):.5f}" if weight * after else "",
            percent(sum(r.changed * r.after.numel for r in rows if r.after and r.before) / count if count else 0.0),
            f"{sum(ranks) / len(ranks):.0f}" if ranks else "",
            percent(energy / self.energy) if self.energy else "",
        )  # fmt: skip

    def _tensor_table(self) -> Table:
        columns = ("name", "status", "shape", "max |Δ|", "‖Δ‖/‖W‖", "cosine", "changed", "eff. rank")
        rows = []
        for row in self.rows:
            spec = row.after or row.before
            shape = spec.describe() if spec else ""
            if row.status in ("reshaped", "recast") and row.before and row.after:
                shape = f"{row.before.describe()} → {row.after.describe()}"
            numbers = ["", "", "", "", ""]
            if row.energy or row.status == "changed":
                rank = "" if row.effective_rank is None else f"{row.effective_rank:.0f}"
                numbers = [
                    f"{row.max_abs:.2e}", percent(row.relative_norm), f"{row.cosine:.6f}", percent(row.changed), rank,
                ]  # fmt: skip
            rows.append((row.name, row.status, shape, *numbers))
        return Table("Changes by tensor", columns, tuple(rows))

    def document(self) -> dict[str, Any]:
        """Return everything, for ``--json``."""
        return {
            "schema": "surgery.diff/1",
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict(),
            "identical": self.identical,
            "values_compared": self.values_compared,
            "relative_norm": self.relative_norm,
            "cosine": self.cosine,
            "notes": list(self.notes),
            "tensors": [_row_document(row) for row in self.rows],
            "ship_it_as": [
                {"form": form.name, "bytes": form.nbytes, "error": form.error, "command": form.command}
                for form in self.forms()
            ],
        }

    def _repr_html_(self) -> str:
        return f"<p>{self.verdict()}</p>" + self.table().html() + self.ship_it_as().html()


def _unmeasured_kind(row: DiffRow) -> str:
    if row.nonfinite:
        return "NaN or Inf"
    return "signs of zeros" if row.after and row.after.dtype in ARITHMETIC else "integers, booleans or codes"


def _only(roles: set[str]) -> str:
    return "only " + " and ".join(_PLURALS[role] for role in sorted(roles))


def _row_document(row: DiffRow) -> dict[str, Any]:
    document: dict[str, Any] = {"name": row.name, "kind": row.role, "layer": row.layer, "status": row.status}
    for side, spec in (("before", row.before), ("after", row.after)):
        if spec is not None:
            document[side] = {"dtype": spec.dtype, "shape": list(spec.shape)}
    if row.weight_energy or row.energy:
        finite = math.isfinite(row.relative_norm)
        document |= {
            "max_abs": row.max_abs, "relative_norm": row.relative_norm if finite else None, "cosine": row.cosine,
            "changed": row.changed, "effective_rank": row.effective_rank,
            "energy_kept": {str(rank): share for rank, share in row.kept.items()},
        }  # fmt: skip
    if row.trained_rows is not None:
        document |= {"trained_rows": row.trained_rows, "shrink": row.shrink}
    if row.nonfinite:
        document["nonfinite"] = row.nonfinite
    return document


@dataclass
class Comparison:
    """What will be compared, known from headers alone. :meth:`run` does it."""

    a: Checkpoint
    b: Checkpoint
    pairs: dict[str, tuple[LazyTensor, LazyTensor]]
    rows: list[DiffRow]
    """Rows that need no values: added, removed, reshaped."""
    notes: tuple[str, ...]
    spectrum: bool
    jobs: int
    copying: str
    extracting: Extracting

    @property
    def bytes_read(self) -> int:
        """Bytes of both checkpoints that will be read."""
        return sum(a.spec.nbytes + b.spec.nbytes for a, b in self.pairs.values())

    @property
    def peak_memory(self) -> int:
        """Bytes at most, above what the process held before."""
        costs = sorted((self._cost(a.spec) + a.resident + b.resident for a, b in self.pairs.values()), reverse=True)
        return (64 << 20) + 4_000 * len(self.pairs) + sum(costs[: self.jobs]) + self.jobs * (24 << 20)

    def _cost(self, spec: TensorSpec) -> int:
        if not self.spectrum or not is_matrix(spec):
            return 64 * spec.shape[0] if len(spec.shape) == 2 else 0
        side, total = min(spec.shape), sum(spec.shape)
        if side <= 512:
            return 12 * spec.numel + 40 * side * side + 32 * total * min(side, 128)
        return 5 * spec.numel + 64 * total * 144

    def run(self, progress: Progress | None = None) -> DiffReport:
        """Read both checkpoints and compare values."""
        from surgery.operations.compare_values import compare

        rows = self.rows + compare(self.pairs, spectrum=self.spectrum, jobs=self.jobs, progress=progress)
        return self._report(rows, values_compared=True)

    def headers_only(self) -> DiffReport:
        """Compare names, dtypes and shapes alone."""
        present = []
        for name, (a, b) in self.pairs.items():
            status = "present" if a.spec.dtype == b.spec.dtype else "recast"
            present.append(DiffRow(name, role_of(a.spec), layer_of(name), status, a.spec, b.spec))
        return self._report(self.rows + present, values_compared=False)

    def _report(self, rows: Iterable[DiffRow], *, values_compared: bool) -> DiffReport:
        order = {name: number for number, name in enumerate(self.a.tensors)}
        ordered = sorted(rows, key=lambda row: (order.get(row.name, len(order)), row.name))
        return DiffReport(
            self.a.label, self.b.label, tuple(ordered), values_compared, self.notes, self.b.nbytes, self.copying,
            self.extracting,
        )  # fmt: skip


def is_matrix(spec: TensorSpec) -> bool:
    """Say whether LoRA would factor a tensor: a 2-D weight that is no embedding."""
    return len(spec.shape) == 2 and spec.numel > 0 and role_of(spec) != "embedding" and spec.dtype in ARITHMETIC


def diff(
    a: Source,
    b: Source,
    *,
    rename: Sequence[str] = (),
    target: Sequence[str] = (),
    spectrum: bool = True,
    headers_only: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare two checkpoints: what changed, how much, how, and the cheapest form to ship it in.

    Args:
        a: the one before.
        b: the one after; its names are spelled as A's first (see :mod:`surgery.names`).
        rename: ``OLD=NEW`` rules for B's names.
        target: compare only what these patterns select.
        spectrum: sketch the spectra of matrices' deltas, for effective ranks and the "ship it as" table.
        headers_only: compare names, dtypes and shapes, and read no values.
        jobs: threads; as many as there are cores by default.
        progress: somebody who watches.

    Returns:
        A report with ``.rows``, ``.verdict()``, ``.table()`` and ``.document()``; it renders in a notebook.

    Raises:
        MismatchError: no tensor in common.

    >>> import torch
    >>> diff({"w": torch.zeros(2)}, {"module.w": torch.zeros(2)}).verdict()
    'identical'
    """
    comparison = plan_diff(a, b, rename=rename, target=target, spectrum=spectrum, jobs=jobs)
    return comparison.headers_only() if headers_only else comparison.run(progress)


def plan_diff(
    a: Source,
    b: Source,
    *,
    rename: Sequence[str] = (),
    target: Sequence[str] = (),
    spectrum: bool = True,
    jobs: int | None = None,
) -> Comparison:
    """Decide from headers alone what :func:`diff` will do; see there for the arguments."""
    from surgery.checkpoint import default_jobs

    before, after = open_checkpoint(a), open_checkpoint(b)
    alignment: Alignment = align(before.tensors.keys(), after.tensors.keys(), parse_renames(rename))
    spelled = {new: renamed(after.tensors[old], new) for old, new in alignment.names.items()}
    names = [*before.tensors, *(name for name in spelled if name not in before.tensors)]
    if not any(name in before.tensors for name in spelled):
        raise MismatchError(
            f"has no tensor in common with {before.label}",
            file=after.label,
            mend="--rename OLD=NEW brings names together",
        )
    roles = {name: role_of((before.tensors.get(name) or spelled[name]).spec) for name in names}
    chosen = select(roles, parse_patterns(target), "--target") if target else set(names)
    rows: list[DiffRow] = []
    pairs: dict[str, tuple[LazyTensor, LazyTensor]] = {}
    for name in names:
        old, new = before.tensors.get(name), spelled.get(name)
        if name not in chosen:
            continue
        if old is not None and new is not None and old.spec.shape == new.spec.shape:
            pairs[name] = (old, new)
            continue
        status = "added" if old is None else "removed" if new is None else "reshaped"
        spec = (new or old).spec  # type: ignore[union-attr]  # one of the two is there
        rows.append(
            DiffRow(name, role_of(spec), layer_of(name), status, old.spec if old else None, new.spec if new else None)
        )
    notes = (*before.notes, *after.notes, *alignment.notes)
    return Comparison(
        before,
        after,
        pairs,
        rows,
        notes,
        spectrum,
        jobs or default_jobs(),
        _copying(b),
        _extracting(a, b, rename, target),
    )


def _copying(b: Source) -> str:
    if isinstance(b, str | os.PathLike):
        return f"cp -r {_typed(b)} OUT"
    return 'surgery.open(b).save("OUT")'


def _extracting(a: Source, b: Source, rename: Sequence[str], target: Sequence[str]) -> Extracting:
    """Compose commands that can be pasted: in a shell where both are on disk, in Python where one is in memory."""
    on_disk = isinstance(a, str | os.PathLike) and isinstance(b, str | os.PathLike)

    def in_shell(rank: int | None, excluded: Sequence[str]) -> str:
        options = (("rename", rename), ("target", target), ("exclude", excluded))
        tail = "".join(f" --{name} {shlex.quote(text)}" for name, given in options for text in given)
        sides = f"{_typed(a)} {_typed(b)}"  # type: ignore[arg-type]  # on_disk
        return f"surgery extract-lora {sides}{'' if rank is None else f' --rank {rank}'}{tail}"

    def in_python(rank: int | None, excluded: Sequence[str]) -> str:
        options = (("rename", rename), ("target", target), ("exclude", excluded))
        more = "".join(f", {name}={list(given)!r}" for name, given in options if given)
        return f"surgery.extract_lora(a, b{'' if rank is None else f', rank={rank}'}{more})"

    return in_shell if on_disk else in_python


def _typed(path: str | os.PathLike[str]) -> str:
    """Spell a path as a shell needs it; ``~`` stays what it was."""
    text = os.fspath(path)
    return "~/" + shlex.quote(text[2:]) if text.startswith("~/") else shlex.quote(text)
