"""Running an extraction: read both models, factor what LoRA holds, keep what PEFT stores in full, account for the rest.

Tensors are independent, so they are the parallelism: each is worked on by one thread, and torch adds none of its own.
The result is then the same for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from surgery import execute, numerics, provenance
from surgery.adapter import Adapter
from surgery.algorithms.compare import SMALL_TABLE, RowMoments
from surgery.algorithms.lowrank import residual_energy, truncated_svd
from surgery.errors import MismatchError, NumericError, SurgeryError
from surgery.formats import peft
from surgery.names import module_of
from surgery.operations.extraction_report import ExtractionReport, Row, card
from surgery.report import join_shown
from surgery.roles import role_of
from surgery.sources.spool import Spool
from surgery.tensor import ARITHMETIC, LazyTensor, TensorSpec, renamed

if TYPE_CHECKING:
    from surgery.operations.extract_lora import Extraction

ROWS_SHARE = 0.25
"""An embedding of which more than this share of rows was trained is not worth storing row by row."""


class Pair:
    """One tensor before and after, read once, block by block, and fingerprinted on the way."""

    def __init__(self, base: LazyTensor, tuned: LazyTensor, labels: tuple[str, str]) -> None:
        self._labels = labels
        self.base = provenance.Traced(base)
        self.tuned = provenance.Traced(tuned)
        self.spec = base.spec
        self.role = role_of(base.spec)
        self.weight_energy = 0.0
        """‖W‖² of the blocks read so far."""

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.base.spec.nbytes + self.tuned.spec.nbytes

    def blocks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (start, W, ΔW) in float64: whole rows, and valid until the next.

        Raises:
            NumericError: a value is NaN or infinite.
        """
        spec = self.spec
        unit = math.lcm(self.base.unit, self.tuned.unit, max(spec.shape[-1], 1) if spec.shape else 1)
        step = max(numerics.BLOCK // unit, 1) * unit
        for start in range(0, spec.numel, step):
            stop = min(start + step, spec.numel)
            old = numerics.widen(self.base, start, stop, numerics.scratch("old", stop - start))
            delta = numerics.widen(self.tuned, start, stop, numerics.scratch("delta", stop - start)).sub_(old)
            if not math.isfinite(float(delta.sum())):
                where = self._labels[bool(old.isfinite().all())]
                raise NumericError(
                    "holds NaN or Inf", file=where, tensor=spec.name, mend="--exclude it, or mend the model"
                )
            self.weight_energy += float(old @ old)
            yield start, old, delta

    def energy(self) -> float:
        """Return ‖ΔW‖²."""
        return math.fsum(float(delta @ delta) for _, _, delta in self.blocks())

    def matrix(self) -> torch.Tensor:
        """Return ΔW whole, in float32: valid until this thread's next matrix."""
        flat = numerics.scratch("matrix", self.spec.numel, torch.float32)
        for start, _, delta in self.blocks():
            flat[start : start + delta.numel()] = delta
        if not math.isfinite(float(flat.abs().max())):
            raise NumericError("the difference overflows float32", file=self._labels[1], tensor=self.spec.name)
        return flat.view(self.spec.shape)


@dataclass
class Found:
    """What became of one tensor."""

    row: Row
    pair: Pair
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    token_rows: list[int] = field(default_factory=list)
    note: str | None = None


class Run:
    """One extraction being run."""

    def __init__(self, plan: Extraction, progress: execute.Progress) -> None:
        self.plan = plan
        self.progress = progress
        self.spool = Spool()
        self.found: dict[str, Found] = {}
        self.tensors: dict[str, LazyTensor] = {}
        self.ranks: dict[str, int] = {}

    def adapter(self) -> Adapter:
        """Run everything and compose the adapter."""
        plan = self.plan
        self._examine()
        self._collect_factors()
        saved, biases = self._keep_in_full()
        rows = tuple(found.row for found in self.found.values())
        moved = [row.name for row in rows if row.energy]
        if not moved:
            raise MismatchError(f"no differences: all {len(rows)} compared tensors are equal", file=plan.tuned_label)
        if not self.tensors:
            raise MismatchError(
                f"nothing that differs can be stored in an adapter: {join_shown(moved)}", file=plan.tuned_label
            )
        carrier = not self.ranks
        if carrier:
            self._add_carrier()
        weight = math.fsum(found.pair.weight_energy for found in self.found.values())
        report = ExtractionReport(self._rank_name(), rows, math.sqrt(weight), tuple(plan.notes))
        document = self._config(saved, biases, carrier)
        return Adapter(
            self.tensors,
            document,
            label=f"{plan.tuned_label}-lora-r{self._rank_name()}",
            stored=[*plan.base.stored, *plan.tuned_stored],
            files={"README.md": card(report, document, plan.base.label, plan.tuned_label)},
            record=lambda prints: self._record(prints, report),
            taken_from=self._base_prints(),
            report=report,
        )

    def _rank_name(self) -> str:
        return "full" if self.plan.rank is None else str(self.plan.rank)

    def _module(self, name: str) -> str:
        return module_of(self.plan.spelled(name))

    def _base_prints(self) -> dict[str, str]:
        return {name: found.pair.base.fingerprint() for name, found in sorted(self.found.items())}

    def _examine(self) -> None:
        """Work through all tensors; each thread takes the largest one left."""
        plan = self.plan
        work = dict.fromkeys(plan.matrices, self._factor)
        work |= dict.fromkeys(plan.full, self._measure) | dict.fromkeys(plan.embeddings, self._embedding)
        work |= dict.fromkeys(plan.left_out, self._left_out)
        order = sorted(work, key=lambda name: -plan.base.tensors[name].spec.numel)

        def examine(name: str) -> Found:
            pair = Pair(plan.base.tensors[name], plan.tuned[name], (plan.base.label, plan.tuned_label))
            try:
                found = work[name](pair)
            except SurgeryError as error:
                raise error.at(tensor=name) from None
            self.progress.advance(pair.nbytes)
            return found

        self.progress.start(plan.bytes_read)
        with ThreadPoolExecutor(plan.jobs, thread_name_prefix="surgery") as pool, numerics.single_threaded():
            try:
                results = dict(zip(order, pool.map(examine, order), strict=True))
            finally:
                pool.shutdown(cancel_futures=True)
                self.progress.finish()
        self.found = {name: results[name] for name in work}
        plan.notes.extend(found.note for found in self.found.values() if found.note)

    def _factor(self, pair: Pair) -> Found:
        name = pair.spec.name
        delta = pair.matrix()
        rank = self.plan.rank_of(name)
        generator = numerics.generator(self.plan.seed, name, "sketch")
        svd = truncated_svd(delta.to(self.plan.device), rank, generator)
        if not svd.energy:
            return Found(Row(name, pair.role, "unchanged", 0, 0.0, 0.0, 0.0, 0), pair)
        left, right = (factor.cpu() for factor in svd.factors(rank))
        flipped = name in self.plan.transposed
        b, a = (right.T, left.T) if flipped else (left, right)
        stem = f"{peft.PREFIX}{self._module(name)}"
        stored_a, lazy_a = self._store(f"{stem}.lora_A.weight", a)
        stored_b, lazy_b = self._store(f"{stem}.lora_B.weight", b)
        left, right = (stored_a.T, stored_b.T) if flipped else (stored_b, stored_a)
        residual = min(residual_energy(delta, left, right), svd.energy)
        numerics.release_freed_memory()
        following = min(max(svd.energy - svd.captured(2 * rank), 0.0), residual)
        nbytes = lazy_a.spec.nbytes + lazy_b.spec.nbytes
        row = Row(name, pair.role, "lora", rank, svd.energy, residual, following, nbytes)
        return Found(row, pair, {lazy.spec.name: lazy for lazy in (lazy_a, lazy_b)})

    def _store(self, key: str, values: torch.Tensor) -> tuple[torch.Tensor, LazyTensor]:
        """Round a factor to the adapter's dtype and put it into the spool."""
        rounded = numerics.round_scalar(values, self.plan.dtype).contiguous()
        if not rounded.isfinite().all():
            raise NumericError(
                f"its factors overflow {self.plan.dtype}", file=self.plan.tuned_label, mend="--dtype F32"
            )
        spec = TensorSpec(key, self.plan.dtype, tuple(rounded.shape))
        return rounded, self.spool.add(spec, rounded.view(torch.uint8).numpy().tobytes())

    def _measure(self, pair: Pair) -> Found:
        """Measure what will be stored in full, or not at all, once all of its kind are measured."""
        return Found(Row(pair.spec.name, pair.role, "unchanged", 0, pair.energy(), 0.0, 0.0, 0), pair)

    def _embedding(self, pair: Pair) -> Found:
        """Store the rows of an embedding that training moved further than the common shrink of weight decay."""
        name, width = pair.spec.name, pair.spec.shape[1]
        moments = RowMoments(pair.spec.shape[0])
        for _, old, delta in pair.blocks():
            moments.update(old.view(-1, width), delta.view(-1, width))
        rows, shrink, energy = moments.trained(pair.spec.dtype)
        if self.plan.rank is None:
            rows = energy.nonzero().flatten()  # full rank leaves nothing out: every row that moved at all
        total, count = float(energy.sum()), len(energy)
        if not total:
            return Found(Row(name, pair.role, "unchanged", 0, 0.0, 0.0, 0.0, 0), pair)
        too_many = self.plan.rank is not None and len(rows) > max(ROWS_SHARE * count, SMALL_TABLE)
        if too_many or not len(rows):
            why = f"{len(rows):,} of {count:,} rows were trained" if len(rows) else f"a common shrink by {-shrink:.3g}"
            return Found(Row(name, pair.role, "left out", 0, total, total, total, 0, why), pair)
        picked = self._pick_rows(pair, rows.tolist())
        key = f"{peft.PREFIX}{self._module(name)}.token_adapter.trainable_tokens_delta"
        spec = TensorSpec(key, pair.tuned.spec.dtype, (len(rows), width))
        rest = max(total - float(energy[rows].sum()), 0.0)
        why = f"{len(rows):,} of {count:,} rows" + (f"; all shrank by {-shrink:.3g}" if shrink else "")
        row = Row(name, pair.role, "rows", 0, total, rest, rest, spec.nbytes, why)
        return Found(row, pair, {key: self.spool.add(spec, picked)}, rows.tolist())

    def _pick_rows(self, pair: Pair, rows: Sequence[int]) -> bytes:
        tuned, width, size = pair.tuned.source, pair.spec.shape[1], pair.tuned.spec.itemsize
        if width % tuned.unit:
            return numerics.load(tuned)[rows].contiguous().view(torch.uint8).numpy().tobytes()
        out = bytearray(len(rows) * width * size)
        for place, row in enumerate(rows):
            tuned.read_into(row * width, (row + 1) * width, memoryview(out)[place * width * size :][: width * size])
        return bytes(out)

    def _left_out(self, pair: Pair) -> Found:
        name = pair.spec.name
        why = self.plan.left_out[name]
        if pair.spec.dtype in ARITHMETIC and pair.tuned.spec.dtype in ARITHMETIC:
            energy = pair.energy()
            if energy:
                return Found(Row(name, pair.role, "left out", 0, energy, energy, energy, 0, why), pair)
        note = None
        if pair.base.fingerprint() != pair.tuned.fingerprint() and pair.spec.dtype not in ARITHMETIC:
            note = f"differs but is {pair.spec.dtype}, so not in the adapter: {name}"
        return Found(Row(name, pair.role, "unchanged", 0, 0.0, 0.0, 0.0, 0), pair, note=note)

    def _collect_factors(self) -> None:
        for name, found in self.found.items():
            self.tensors |= found.tensors
            if found.row.how == "lora":
                self.ranks[self._module(name)] = found.row.rank

    def _keep_in_full(self) -> tuple[list[str], bool]:
        """Store norms and biases that moved; return the modules to save, and whether biases are stored."""
        plan = self.plan
        biases = {name for name in plan.full if self.found[name].row.role == "bias"}
        moved = {
            module_of(n) for n in plan.full if n not in biases and self.found[n].row.energy and not plan.in_head(n)
        }
        saved = _closed(moved, {module_of(name) for name in plan.base.tensors})
        saved = {module for module in saved if not plan.in_head(f"{module}.")}
        keep_biases = any(self.found[name].row.energy for name in biases)
        for name in plan.full:
            if (keep_biases and name in biases) or module_of(name) in saved or plan.in_head(name):
                self._keep(name)
            elif self.found[name].row.energy:
                raise AssertionError(f"{name} moved and found no place")
        for name in plan.base.tensors:
            if name not in plan.full and (module_of(name) in saved or plan.in_head(name)):
                self._keep_sibling(name)
        return sorted(self._module(f"{module}.weight") for module in {*saved, *plan.heads}), keep_biases

    def _keep(self, name: str) -> None:
        found = self.found[name]
        module, _, leaf = self.plan.spelled(name).rpartition(".")
        key = f"{peft.PREFIX}{module}{'.base_layer' if module in self.ranks else ''}.{leaf}"
        tuned = self.plan.tuned[name]
        self.tensors[key] = renamed(tuned, key)
        how = "full" if found.row.energy else "unchanged"
        found.row = Row(name, found.row.role, how, 0, found.row.energy, 0.0, 0.0, tuned.spec.nbytes)

    def _keep_sibling(self, name: str) -> None:
        """PEFT saves a module whole: every tensor it has must be there, buffers too, and the base's where not wanted."""
        key = peft.PREFIX + self.plan.spelled(name)
        base = self.plan.base.tensors[name]
        wanted = name not in self.plan.unwanted and name in self.plan.tuned
        self.tensors[key] = renamed(self.plan.tuned[name] if wanted else base, key)
        if wanted and name in self.found:
            row = self.found[name].row
            energy, nbytes = row.energy, base.spec.nbytes
            self.found[name].row = Row(name, row.role, "full" if energy else "unchanged", 0, energy, 0.0, 0.0, nbytes)

    def _add_carrier(self) -> None:
        """PEFT loads no adapter without a LoRA module: give it one of rank 1 that is zero."""
        plan = self.plan
        linear = [n for n, s in plan.base.specs.items() if len(s.shape) == 2 and role_of(s) != "embedding"]
        candidates = plan.matrices or [name for name in linear if name.endswith(".weight")]
        if not candidates:
            raise MismatchError("the model has no linear weight that could carry an adapter", file=plan.base.label)
        name = min(candidates, key=lambda n: (sum(plan.base.specs[n].shape), n))
        module = self._module(name)
        m, n = plan.base.specs[name].shape
        out, into = (n, m) if name in plan.transposed else (m, n)
        stem = f"{peft.PREFIX}{module}"
        for key, shape in ((f"{stem}.lora_A.weight", (1, into)), (f"{stem}.lora_B.weight", (out, 1))):
            self.tensors[key] = self._store(key, torch.zeros(shape))[1]
        self.ranks[module] = 1
        if f"{stem}.bias" in self.tensors:  # the module is adapted now, and PEFT calls its bias differently
            key = f"{stem}.base_layer.bias"
            self.tensors[key] = renamed(self.tensors.pop(f"{stem}.bias"), key)
        plan.notes.append(
            f"no linear weight changed: {module} carries a LoRA of zeros, which PEFT needs to load the rest"
        )

    def _config(self, saved: Sequence[str], biases: bool, carrier: bool) -> dict[str, Any]:
        plan = self.plan
        r = max(self.ranks.values()) if plan.rank is None or carrier else plan.rank
        modules = [self._module(n) for n, s in plan.base.specs.items() if n.endswith(".weight") and len(s.shape) >= 2]
        return peft.lora_config(
            r=r,
            targets=peft.target_modules(sorted(self.ranks), modules),
            ranks=self.ranks,
            base_name=plan.base_name,
            task=peft.task_type(plan.base.config),
            bias=biases,
            modules_to_save=saved,
            fan_in_fan_out=bool(plan.transposed & set(plan.matrices)),
            token_indices={self._module(n): found.token_rows for n, found in self.found.items() if found.token_rows},
        )

    def _record(self, prints: Mapping[str, str], report: ExtractionReport) -> dict[str, Any]:
        plan = self.plan
        base_prints = self._base_prints()
        tuned_prints = {name: found.pair.tuned.fingerprint() for name, found in self.found.items()}
        return provenance.record(
            "extract-lora",
            parameters={"rank": self._rank_name(), "dtype": plan.dtype, "seed": plan.seed},
            inputs=[
                {"role": "base", "name": plan.base.label, "fingerprint": provenance.combine(base_prints)},
                {"role": "fine-tune", "name": plan.tuned_label, "fingerprint": provenance.combine(tuned_prints)},
            ],
            tensors={name: {"fingerprint": value} for name, value in prints.items()},
            base=base_prints,
            report=report.document(),
        )


def _closed(modules: set[str], all_modules: set[str]) -> set[str]:
    """Add the modules that PEFT would wrap too, because it compares name endings without a dot."""
    return {module for module in all_modules for entry in modules if module.endswith(entry)}
