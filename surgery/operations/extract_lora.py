"""``extract-lora``: take a LoRA adapter out of a pair of checkpoints.

What LoRA can hold (linear weights) is factored; biases and norms that moved are stored in full, in the forms that PEFT
loads; of embeddings the rows that training moved are stored, told apart from the uniform shrink of weight decay. What
is left out is listed with its share of ‖Δ‖², never lost in silence.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from surgery import execute, numerics, provenance
from surgery.adapter import Adapter
from surgery.algorithms.compare import SMALL_TABLE, RowMoments
from surgery.algorithms.lowrank import residual_energy, truncated_svd
from surgery.checkpoint import Checkpoint, Source, open_checkpoint, require_arithmetic
from surgery.errors import MismatchError, NumericError, UsageError
from surgery.formats import peft
from surgery.names import align, module_of, parse_patterns, parse_renames, select, undecorated
from surgery.report import Table, join_shown, percent
from surgery.roles import role_of, transposed_weights
from surgery.sources.spool import Spool
from surgery.tensor import LazyTensor, TensorSpec, human_bytes, renamed
from surgery.writer import Publication

ROWS_SHARE = 0.25
"""An embedding of which more than this share of rows was trained is not worth storing row by row."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one tensor's delta."""

    name: str
    role: str
    how: str
    """``lora``, ``full``, ``rows``, ``unchanged`` or ``left out``."""
    rank: int
    energy: float
    """‖Δ‖²."""
    residual: float
    """‖Δ − stored‖², from the values as stored."""
    next_residual: float
    """The same at twice the rank; what a further rank would leave."""
    nbytes: int
    why: str = ""


@dataclass(frozen=True)
class ExtractionReport:
    """How good an extracted adapter is."""

    rank: str
    rows: tuple[Row, ...]
    base_norm: float
    """‖W‖ of all compared base tensors."""
    notes: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """‖Δ‖² over everything that was compared."""
        return math.fsum(row.energy for row in self.rows)

    @property
    def kept(self) -> float:
        """Share of ‖Δ‖² that base + adapter reproduces."""
        return 1.0 - math.fsum(row.residual for row in self.rows) / self.energy if self.energy else 1.0

    @property
    def error(self) -> float:
        """Relative error ‖Δ − stored‖ / ‖Δ‖ over everything."""
        return math.sqrt(max(1.0 - self.kept, 0.0))

    @property
    def kept_by_lora(self) -> tuple[float, float]:
        """Share of the factored weights' ‖Δ‖² that is kept, and what twice the rank would keep."""
        rows = [row for row in self.rows if row.how == "lora"]
        total = math.fsum(row.energy for row in rows)
        if not total:
            return 1.0, 1.0
        return 1 - math.fsum(r.residual for r in rows) / total, 1 - math.fsum(r.next_residual for r in rows) / total

    def table(self) -> Table:
        """Summarise by kind of weight."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.how != "unchanged":
                groups.setdefault((row.role, row.how), []).append(row)
        lines = [_group_line(role, how, rows, self.energy) for (role, how), rows in groups.items()]
        total = human_bytes(sum(row.nbytes for row in self.rows))
        lines.append(("all", "", str(len(self.rows)), "100 %", percent(self.kept), f"{self.error:.4f}", total))
        columns = ("weights", "stored as", "tensors", "share of ‖Δ‖²", "kept", "rel. error", "bytes")
        return Table(f"What the adapter keeps (rank {self.rank})", columns, tuple(lines))

    def document(self) -> dict[str, Any]:
        """Return everything, for ``--json`` and the record."""
        kept, following = self.kept_by_lora
        return {
            "rank": self.rank,
            "energy_kept": self.kept,
            "relative_error": self.error,
            "lora_energy_kept": kept,
            "lora_energy_kept_at_twice_the_rank": following,
            "relative_delta": math.sqrt(self.energy) / self.base_norm if self.base_norm else 0.0,
            "tensors": [
                {
                    "name": row.name, "role": row.role, "stored_as": row.how, "rank": row.rank, "bytes": row.nbytes,
                    "share": row.energy / self.energy if self.energy else 0.0,
                    "relative_error": math.sqrt(row.residual / row.energy) if row.energy else 0.0,
                    **({"why": row.why} if row.why else {}),
                }
                for row in self.rows
            ],
        }  # fmt: skip

    def _repr_html_(self) -> str:
        return self.table().html()


def _group_line(role: str, how: str, rows: Sequence[Row], total: float) -> tuple[str, ...]:
    energy = math.fsum(row.energy for row in rows)
    residual = math.fsum(row.residual for row in rows)
    kept = 1 - residual / energy if energy else 1.0
    return (
        role, how, str(len(rows)), percent(energy / total if total else 0.0), percent(kept),
        f"{math.sqrt(max(1 - kept, 0.0)):.4f}", human_bytes(sum(row.nbytes for row in rows)),
    )  # fmt: skip


@dataclass
class Extraction:
    """What will be extracted, known from headers alone. :meth:`run` does it."""

    base: Checkpoint
    tuned: dict[str, LazyTensor]
    """The fine-tune's tensors under the base's names."""
    tuned_label: str
    tuned_stored: Sequence[Any]
    rank: int | None
    """``None`` for full rank."""
    dtype: str
    device: str
    seed: int
    base_name: str | None
    matrices: list[str] = field(default_factory=list)
    full: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    transposed: set[str] = field(default_factory=set)

    @property
    def bytes_read(self) -> int:
        """Bytes of both models that will be read."""
        names = [*self.matrices, *self.full, *self.embeddings, *self.left_out]
        return sum(
            self.base.tensors[name].spec.nbytes + self.tuned[name].spec.nbytes for name in names if name in self.tuned
        )

    @property
    def bytes_written(self) -> int:
        """Size of the factors, if every matrix changed."""
        item = TensorSpec("", self.dtype, ()).itemsize
        return sum(item * self.rank_of(name) * sum(self.base.tensors[name].spec.shape) for name in self.matrices)

    @property
    def peak_memory(self) -> int:
        """Bytes for the largest matrix and its factorisation, and the spooled factors."""
        costs = [0]
        for name in self.matrices:
            m, n = self.base.tensors[name].spec.shape
            side, rank = min(m, n), min(2 * self.rank_of(name) + 16, m, n)
            costs.append(
                4 * m * n + (8 * m * n + 24 * side * side if side <= 4096 else 4 * side * side) + 48 * rank * (m + n)
            )
        return 160 * (1 << 20) + max(costs) + min(self.bytes_written, 256 << 20)

    def rank_of(self, name: str) -> int:
        """Rank of one matrix: the rank asked for, clamped to what the matrix has."""
        side = min(self.base.tensors[name].spec.shape)
        return side if self.rank is None else min(self.rank, side)

    def check_output(self, out: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Refuse an output that could not be written, before the work is done.

        Raises:
            OutputError: see :class:`surgery.writer.Publication`.
        """
        Publication(out, overwrite=overwrite, inputs=[s.path for s in (*self.base.stored, *self.tuned_stored)])

    def run(self, progress: execute.Progress | None = None) -> Adapter:
        """Read both models, factor, and compose the adapter.

        Raises:
            NumericError: NaN or Inf in either model, by tensor.
            MismatchError: nothing differs.
        """
        return _Run(self, progress or execute.Silent()).adapter()


def extract_lora(
    base: Source,
    tuned: Source,
    *,
    rank: int | Literal["full"] = 8,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "cpu",
    rename: Sequence[str] = (),
    base_id: str | None = None,
    seed: int = 0,
    progress: execute.Progress | None = None,
) -> Adapter:
    r"""Extract a LoRA adapter: the best rank-``r`` approximation of every linear weight's delta.

    For ``ΔW = W_ft − W_base`` with truncated SVD ``U Σ Vᵀ``, ``B = U √Σ`` and ``A = √Σ Vᵀ``; ``lora_alpha = r``, so that
    the scale is 1. Differences are taken in float32.

    Args:
        base: the model before fine-tuning.
        tuned: the model after it.
        rank: 1 or more, clamped to each matrix; or ``"full"``.
        target: patterns of the weights to factor; all linear weights by default.
        exclude: patterns of weights to leave alone.
        dtype: of the factors; ``"F32"``, ``"BF16"`` or ``"F16"``. By default the fine-tune's own.
        device: where to factor, as torch names it.
        rename: ``OLD=NEW`` rules for the fine-tune's names.
        base_id: the base's Hub id, for the adapter's configuration; by default the base's folder name.
        seed: for random starts, which are keyed by tensor name.
        progress: somebody who watches.

    Returns:
        An adapter with ``.report``, ``.save(out)`` and ``.state_dict()``; pass it to :func:`surgery.merge`.

    Raises:
        UsageError: a rank below 1, or base and fine-tune are the same files.
        MismatchError: shapes differ, nothing matches, or nothing changed.
        NumericError: NaN or Inf, by tensor.

    Reference: Eckart and Young 1936; Hu et al. 2021, "LoRA", arXiv:2106.09685, eq. 3.
    """
    extraction = plan_extraction(
        base, tuned, rank=rank, target=target, exclude=exclude, dtype=dtype, device=device, rename=rename,
        base_id=base_id, seed=seed,
    )  # fmt: skip
    return extraction.run(progress)


def plan_extraction(
    base: Source,
    tuned: Source,
    *,
    rank: int | Literal["full"] = 8,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "cpu",
    rename: Sequence[str] = (),
    base_id: str | None = None,
    seed: int = 0,
) -> Extraction:
    """Decide from headers alone what :func:`extract_lora` will do; see there for the arguments."""
    if rank != "full" and (type(rank) is not int or rank < 1):
        raise UsageError(f"rank must be a whole number from 1, or 'full', not {rank!r}")
    if dtype is not None and dtype not in ("F32", "BF16", "F16"):
        raise UsageError(f"factors can be F32, BF16 or F16, not {dtype!r}")
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    _refuse_same(before, after)
    alignment = align(before.tensors.keys(), after.tensors.keys(), parse_renames(rename))
    renamed_tuned = {new: renamed(after.tensors[old], new) for old, new in alignment.names.items()}
    found = Extraction(
        before, {n: t for n, t in renamed_tuned.items() if n in before.tensors}, after.label, after.stored,
        None if rank == "full" else int(rank), dtype or _common_dtype(after), _device(device), seed,
        base_id or (None if before.label.startswith("(") else before.label),
        notes=[*before.notes, *after.notes, *alignment.notes],
    )  # fmt: skip
    if not found.tuned:
        raise MismatchError(
            f"has no tensor in common with {before.label}",
            file=after.label,
            mend="--rename OLD=NEW brings names together",
        )
    _note_unpaired(found, before.tensors.keys() - renamed_tuned.keys(), renamed_tuned.keys() - before.tensors.keys())
    _sort_tensors(found, target, exclude)
    return found


def _refuse_same(before: Checkpoint, after: Checkpoint) -> None:
    same_files = before.stored and {s.path for s in before.stored} == {s.path for s in after.stored}
    if before is after or (same_files and before.origin is None and after.origin is None):
        raise UsageError("base and fine-tune are the same files", file=after.label)


def _common_dtype(checkpoint: Checkpoint) -> str:
    sizes: dict[str, int] = {}
    for spec in checkpoint.specs.values():
        if spec.dtype in ("F32", "BF16", "F16"):
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default="F32")


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def _note_unpaired(found: Extraction, lost: set[str], added: set[str]) -> None:
    if lost:
        found.notes.append(f"only in the base, so not compared: {join_shown(sorted(lost))}")
    if added:
        found.notes.append(f"only in the fine-tune, so not in the adapter: {join_shown(sorted(added))}")


def _sort_tensors(found: Extraction, target: Sequence[str], exclude: Sequence[str]) -> None:
    """Decide for every tensor whether it is factored, stored in full, examined row by row, or left out."""
    specs = {name: found.base.tensors[name].spec for name in found.tuned}
    for name, spec in specs.items():
        if spec.shape != found.tuned[name].spec.shape:
            raise MismatchError(
                f"is {spec.describe()} in {found.base.label} and {found.tuned[name].spec.describe()} in {found.tuned_label}",
                tensor=name,
                mend="a resized vocabulary cannot be extracted yet; --rename or --exclude what does not belong together",
            )
    found.transposed = transposed_weights(found.base.specs, found.base.config)
    chosen = select(specs, parse_patterns(target), "--target") if target else None
    dropped = select(specs, parse_patterns(exclude), "--exclude") if exclude else set()
    for name, spec in specs.items():
        role = role_of(spec)
        if name in dropped:
            found.left_out[name] = "excluded"
        elif chosen is not None and name not in chosen:
            found.left_out[name] = "not targeted"
        elif not name.endswith((".weight", ".bias", ".gamma", ".beta")):
            found.left_out[name] = "PEFT has no place for a bare parameter or buffer"
        elif len(spec.shape) == 1 or not spec.numel:
            found.full.append(name)
        elif role == "embedding" and len(spec.shape) == 2:
            found.embeddings.append(name)
        elif len(spec.shape) == 2:
            found.matrices.append(name)
        else:
            found.left_out[name] = f"a {len(spec.shape)}-D weight"
    if chosen is not None and not found.matrices:
        raise MismatchError(
            "--target selects no linear weight", mend="LoRA factors 2-D weights; see surgery info --tensors"
        )
    if not found.matrices and not found.full and not found.embeddings:
        raise MismatchError("no tensor could be extracted", file=found.tuned_label)
    both = [*found.matrices, *found.embeddings, *found.full]
    for checkpoint, names in ((found.base, both), (Checkpoint(found.tuned, label=found.tuned_label), both)):
        require_arithmetic(checkpoint, names)


class _Run:
    """One extraction being run."""

    def __init__(self, plan: Extraction, progress: execute.Progress) -> None:
        self.plan = plan
        self.progress = progress
        self.spool = Spool()
        self.rows: list[Row] = []
        self.tensors: dict[str, LazyTensor] = {}
        self.ranks: dict[str, int] = {}
        self.token_rows: dict[str, list[int]] = {}
        self.base_prints: dict[str, str] = {}
        self.tuned_prints: dict[str, str] = {}
        self.base_energy = 0.0

    def adapter(self) -> Adapter:
        """Run everything."""
        plan = self.plan
        self.progress.start(plan.bytes_read)
        try:
            for name in plan.matrices:
                self._factor(name)
            saved, biases = self._full_tensors()
            for name in plan.embeddings:
                self._embedding(name)
            for name, why in plan.left_out.items():
                self._left_out(name, why)
        finally:
            self.progress.finish()
        moved = [row for row in self.rows if row.energy]
        if not moved:
            raise MismatchError(
                f"no differences: all {len(self.rows)} compared tensors are equal", file=plan.tuned_label
            )
        if not self.tensors:
            raise MismatchError(
                f"nothing that differs can be stored in an adapter: {join_shown([row.name for row in moved])}",
                file=plan.tuned_label,
            )
        carrier = self._carrier() if not self.ranks else []
        report = ExtractionReport(self._rank_name(), tuple(self.rows), math.sqrt(self.base_energy), tuple(plan.notes))
        document = self._config(saved, biases, carrier)
        return Adapter(
            self.tensors, document, label=f"{plan.tuned_label}-lora-r{self._rank_name()}",
            stored=[*plan.base.stored, *plan.tuned_stored], files={"README.md": card(plan, report, document)},
            record=lambda prints: self._record(prints, report), taken_from=self.base_prints, report=report,
        )  # fmt: skip

    def _rank_name(self) -> str:
        return "full" if self.plan.rank is None else str(self.plan.rank)

    def _pair(self, name: str) -> tuple[provenance.Traced, provenance.Traced]:
        return provenance.Traced(self.plan.base.tensors[name]), provenance.Traced(self.plan.tuned[name])

    def _done(self, name: str, base: provenance.Traced, tuned: provenance.Traced) -> None:
        self.base_prints[name], self.tuned_prints[name] = base.fingerprint(), tuned.fingerprint()
        self.progress.advance(base.spec.nbytes + tuned.spec.nbytes)

    def _blocks(self, base: LazyTensor, tuned: LazyTensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (start, W, ΔW) in float64, block by block; refuse what is not finite."""
        unit = max(math.lcm(base.unit, tuned.unit), base.spec.shape[-1] if base.spec.shape else 1)
        step = max(numerics.BLOCK // unit, 1) * unit
        for start in range(0, base.spec.numel, step):
            stop = min(start + step, base.spec.numel)
            old = numerics.widen(base, start, stop, numerics.scratch("old", stop - start))
            new = numerics.widen(tuned, start, stop, numerics.scratch("delta", stop - start))
            delta = new.sub_(old)
            if not math.isfinite(float(delta.sum())):
                which = "the base" if not torch.isfinite(old).all() else "the fine-tune"
                raise NumericError(
                    f"{which} holds NaN or Inf", tensor=base.spec.name, mend="--exclude it, or mend the model"
                )
            self.base_energy += float(old @ old)
            yield start, old, delta

    def _factor(self, name: str) -> None:
        base, tuned = self._pair(name)
        m, n = base.spec.shape
        matrix = torch.empty(m * n, dtype=torch.float32)
        for start, _, delta in self._blocks(base, tuned):
            matrix[start : start + delta.numel()] = delta
        self._done(name, base, tuned)
        delta, role, rank = matrix.view(m, n), role_of(base.spec), self.plan.rank_of(name)
        svd = truncated_svd(delta.to(self.plan.device), rank, self._generator(name))
        if not svd.energy:
            self.rows.append(Row(name, role, "unchanged", 0, 0.0, 0.0, 0.0, 0))
            return
        left, right = svd.factors(rank)
        b, a = (right.T, left.T) if name in self.plan.transposed else (left, right)
        module = peft_module(name)
        self.ranks[module] = rank
        stored_a = self._store(f"{peft.PREFIX}{module}.lora_A.weight", a)
        stored_b = self._store(f"{peft.PREFIX}{module}.lora_B.weight", b)
        left, right = (stored_a.T, stored_b.T) if name in self.plan.transposed else (stored_b, stored_a)
        residual = min(residual_energy(delta, left, right), svd.energy)
        following = max(svd.energy - svd.captured(2 * rank), 0.0)
        nbytes = stored_a.nbytes + stored_b.nbytes
        self.rows.append(Row(name, role, "lora", rank, svd.energy, residual, min(following, residual), nbytes))

    def _generator(self, name: str) -> torch.Generator:
        return numerics.generator(self.plan.seed, name, "sketch")

    def _store(self, key: str, values: torch.Tensor) -> torch.Tensor:
        rounded = numerics.round_scalar(values.cpu(), self.plan.dtype).contiguous()
        spec = TensorSpec(key, self.plan.dtype, tuple(rounded.shape))
        self.tensors[key] = self.spool.add(spec, rounded.view(torch.uint8).numpy().tobytes())
        return rounded

    def _measure(self, name: str) -> float:
        """Return ‖ΔW‖² of one tensor, streaming."""
        base, tuned = self._pair(name)
        energy = math.fsum(float(delta @ delta) for _, _, delta in self._blocks(base, tuned))
        self._done(name, base, tuned)
        return energy

    def _full_tensors(self) -> tuple[list[str], bool]:
        """Store norms and biases that moved in full; return the modules to save, and whether biases are stored."""
        plan = self.plan
        energies = {name: self._measure(name) for name in plan.full}
        biases = [
            name
            for name in plan.full
            if undecorated(name).endswith(".bias") and role_of(plan.base.specs[name]) != "norm"
        ]
        others = [name for name in plan.full if name not in biases]
        modules = sorted({module_of(name) for name in others if energies[name]})
        saved = _closed(modules, {module_of(name) for name in plan.base.tensors})
        keep_biases = any(energies[name] for name in biases)
        for name in plan.full:
            keep = (keep_biases and name in biases) or module_of(name) in saved
            self._keep_full(name, energies[name], keep)
        for module in sorted(saved):
            self._keep_siblings(module)
        return sorted(peft_module(f"{module}.weight") for module in saved), keep_biases

    def _keep_siblings(self, module: str) -> None:
        """PEFT wraps a saved module whole: every tensor it has must be there, buffers too."""
        for name in self.plan.base.tensors:
            if module_of(name) == module and name not in self.plan.full:
                key = peft.PREFIX + undecorated(name)
                self.tensors[key] = renamed(self.plan.tuned.get(name, self.plan.base.tensors[name]), key)

    def _keep_full(self, name: str, energy: float, keep: bool) -> None:
        spec = self.plan.base.specs[name]
        nbytes = 0
        if keep:
            module, _, leaf = undecorated(name).rpartition(".")
            key = f"{peft.PREFIX}{module}{'.base_layer' if module in self.ranks else ''}.{leaf}"
            self.tensors[key] = renamed(self.plan.tuned[name], key)
            nbytes = self.plan.tuned[name].spec.nbytes
        how = "full" if keep and energy else "unchanged"
        self.rows.append(Row(name, role_of(spec), how, 0, energy, 0.0, 0.0, nbytes))

    def _embedding(self, name: str) -> None:
        """Store the rows of an embedding that training moved further than the common shrink of weight decay."""
        base, tuned = self._pair(name)
        moments = RowMoments()
        width = base.spec.shape[1]
        for _, old, delta in self._blocks(base, tuned):
            moments.update(old.view(-1, width), delta.view(-1, width))
        self._done(name, base, tuned)
        rows, shrink, energy = moments.trained(base.spec.dtype)
        total = float(energy.sum())
        role = role_of(base.spec)
        if not total:
            self.rows.append(Row(name, role, "unchanged", 0, 0.0, 0.0, 0.0, 0))
            return
        if len(rows) > max(ROWS_SHARE * len(energy), SMALL_TABLE) or not len(rows):
            why = (
                f"{len(rows):,} of {len(energy):,} rows were trained"
                if len(rows)
                else f"a common shrink by {-shrink:.3g}"
            )
            self.rows.append(Row(name, role, "left out", 0, total, total, total, 0, why))
            return
        module = peft_module(name)
        picked = self._pick_rows(tuned, rows.tolist())
        key = f"{peft.PREFIX}{module}.token_adapter.trainable_tokens_delta"
        spec = TensorSpec(key, tuned.spec.dtype, (len(rows), base.spec.shape[1]))
        self.tensors[key] = self.spool.add(spec, picked)
        self.token_rows[module] = rows.tolist()
        rest = max(total - float(energy[rows].sum()), 0.0)
        why = f"{len(rows):,} of {len(energy):,} rows" + (f"; all shrank by {-shrink:.3g}" if shrink else "")
        self.rows.append(Row(name, role, "rows", 0, total, rest, rest, spec.nbytes, why))

    def _pick_rows(self, tuned: LazyTensor, rows: Sequence[int]) -> bytes:
        width, size = tuned.spec.shape[1], tuned.spec.itemsize
        out = bytearray(len(rows) * width * size)
        for place, row in enumerate(rows):
            view = memoryview(out)[place * width * size : (place + 1) * width * size]
            if tuned.unit <= 1:
                self.plan.tuned[tuned.spec.name].read_into(row * width, (row + 1) * width, view)
            else:
                view[:] = numerics.load(tuned)[row].contiguous().view(torch.uint8).numpy().tobytes()
        return bytes(out)

    def _left_out(self, name: str, why: str) -> None:
        base, tuned = self.plan.base.tensors[name].spec, self.plan.tuned[name].spec
        role = role_of(base)
        if base.dtype in ("F64", "F32", "BF16", "F16") and tuned.dtype in ("F64", "F32", "BF16", "F16"):
            energy = self._measure(name)
            how = "left out" if energy else "unchanged"
            self.rows.append(Row(name, role, how, 0, energy, energy, energy, 0, why if energy else ""))
            return
        old, new = self._pair(name)
        self._done(name, old, new)
        for traced in (old, new):
            traced.fingerprint()
        if self.base_prints[name] != self.tuned_prints[name]:
            self.plan.notes.append(f"differs but is {base.dtype}, so not in the adapter: {name}")

    def _carrier(self) -> list[str]:
        """PEFT loads no adapter without a LoRA module: give it one of rank 1 that is zero."""
        plan = self.plan
        candidates = plan.matrices or [
            n for n, s in plan.base.specs.items() if len(s.shape) == 2 and role_of(s) != "embedding"
        ]
        if not candidates:
            raise MismatchError("the model has no linear weight that could carry an adapter", file=plan.base.label)
        name = min(candidates, key=lambda n: (sum(plan.base.specs[n].shape), n))
        module = peft_module(name)
        m, n = plan.base.specs[name].shape
        out, into = (n, m) if name in plan.transposed else (m, n)
        self._store(f"{peft.PREFIX}{module}.lora_A.weight", torch.zeros(1, into))
        self._store(f"{peft.PREFIX}{module}.lora_B.weight", torch.zeros(out, 1))
        self.ranks[module] = 1
        bias = f"{peft.PREFIX}{module}.bias"
        if bias in self.tensors:  # the module is adapted now, and PEFT calls its bias differently
            key = f"{peft.PREFIX}{module}.base_layer.bias"
            self.tensors[key] = renamed(self.tensors.pop(bias), key)
        plan.notes.append(
            f"no linear weight changed: {module} carries a LoRA of zeros, which PEFT needs to load the rest"
        )
        return [module]

    def _config(self, saved: Sequence[str], biases: bool, carrier: Sequence[str]) -> dict[str, Any]:
        plan = self.plan
        r = max(self.ranks.values()) if plan.rank is None or carrier else plan.rank
        modules = [peft_module(n) for n, s in plan.base.specs.items() if n.endswith(".weight") and len(s.shape) >= 2]
        return peft.lora_config(
            r=r, targets=peft.target_modules(sorted(self.ranks), modules), ranks=self.ranks, base_name=plan.base_name,
            task=peft.task_type(plan.base.config), bias=biases, modules_to_save=saved,
            fan_in_fan_out=bool(plan.transposed & set(plan.matrices)), token_indices=self.token_rows,
        )  # fmt: skip

    def _record(self, prints: Mapping[str, str], report: ExtractionReport) -> dict[str, Any]:
        plan = self.plan
        return provenance.record(
            "extract-lora",
            parameters={"rank": self._rank_name(), "dtype": plan.dtype, "seed": plan.seed},
            inputs=[
                {"role": "base", "name": plan.base.label, "fingerprint": provenance.combine(self.base_prints)},
                {"role": "fine-tune", "name": plan.tuned_label, "fingerprint": provenance.combine(self.tuned_prints)},
            ],
            tensors={name: {"fingerprint": value} for name, value in prints.items()},
            base=dict(sorted(self.base_prints.items())),
            report=report.document(),
        )


def peft_module(name: str) -> str:
    """Name a weight's module as PEFT does: without the decorations of training tools."""
    return module_of(undecorated(name))


def _closed(modules: Sequence[str], all_modules: set[str]) -> set[str]:
    """Add the modules that PEFT would wrap too, because it compares name endings without a dot."""
    return {module for module in all_modules for entry in modules if module.endswith(entry)}


def card(plan: Extraction, report: ExtractionReport, document: Mapping[str, Any]) -> bytes:
    """Write the adapter's README: metadata, how good it is, and how to load it."""
    kept, following = report.kept_by_lora
    base = document["base_model_name_or_path"] or plan.base.label
    is_id = base.count("/") == 1 and not base.startswith((".", "/"))
    metadata = [
        "---",
        "library_name: peft",
        *([f"base_model: {base}"] if is_id else []),
        "tags:",
        "- lora",
        "- surgery",
        "---",
    ]
    rank = "full" if plan.rank is None else plan.rank
    body = f"""
# {plan.tuned_label} as a LoRA adapter of {base}

Extracted with [surgery](https://pypi.org/project/checkpoint-surgery/) from the fine-tune `{plan.tuned_label}`:
`surgery extract-lora {plan.base.label} {plan.tuned_label} --rank {rank}`

{report.table().markdown()}

The factored weights keep {percent(kept)} of their ‖Δ‖²; twice the rank would keep {percent(following)}.

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""
    left = [row for row in report.rows if row.how == "left out"]
    if left:
        share = math.fsum(row.energy for row in left) / report.energy
        body += f"\nLeft out ({percent(share)} of ‖Δ‖²): {join_shown([row.name for row in left], 10)}.\n"
    return ("\n".join(metadata) + "\n" + body).encode()


def default_output(tuned: str | os.PathLike[str], rank: int | str) -> str:
    """Name the default output: ``./<ft>-lora-r8``."""
    name = os.path.basename(os.path.abspath(os.fspath(tuned))).removesuffix(".safetensors")
    return f"./{name}-lora-r{rank}"


def summary(report: ExtractionReport) -> str:
    """Say in one line what the rank kept, and what the next one would."""
    kept, following = report.kept_by_lora
    rows = [row for row in report.rows if row.how == "lora"]
    rank = max((row.rank for row in rows), default=0)
    if not rows or report.rank == "full":
        return f"the adapter keeps {percent(report.kept)} of ‖Δ‖²"
    return (
        f"rank {rank} keeps {percent(kept)} of the factored weights' ‖Δ‖²; {2 * rank} would keep {percent(following)}"
    )
