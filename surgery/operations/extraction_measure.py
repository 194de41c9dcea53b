"""Measuring: every tensor is read once, before and after, and what LoRA can hold is factored into the spool.

Tensors are independent, so they are the parallelism: each is worked on by one thread, and torch adds none of its own.
The result is then the same for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from surgery import numerics, provenance
from surgery.algorithms.compare import SMALL_TABLE, RowMoments
from surgery.algorithms.dora import fit_dora
from surgery.algorithms.lowrank import TruncatedSVD, component_products, truncated_svd
from surgery.algorithms.noise import RoundingNoise, floor_rank
from surgery.checkpoint import Checkpoint
from surgery.delta import Cast
from surgery.errors import NumericError, SurgeryError, UnsupportedError
from surgery.formats import peft
from surgery.operations.extraction_plan import Extraction
from surgery.operations.extraction_report import Row
from surgery.operations.extraction_units import Factors, Unit
from surgery.operations.pairs import Pair
from surgery.sources.spool import Spool
from surgery.tensor import ARITHMETIC, LazyTensor, Renamed, TensorSpec

T = TypeVar("T")
ROWS_SHARE = 0.25
"""An embedding of which more than this share of rows was trained is not worth storing row by row."""


@dataclass
class Found:
    """What became of one tensor."""

    row: Row
    prints: tuple[str, str]
    """Fingerprints of the base's and the fine-tune's tensor."""
    weight_energy: float
    """‖W‖²."""
    factors: Factors | None = None
    following: float = 0.0
    """Squared error at twice the depth, at most."""
    token_rows: list[int] = field(default_factory=list)
    whole: bool = False
    """An embedding that moved all over, and could be stored in full."""
    note: str | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """The factors of one matrix, rounded to the adapter's dtype."""

    svd: TruncatedSVD
    left: torch.Tensor
    right: torch.Tensor
    products: NDArray[np.float64]
    residual: float


class Measurement:
    """What was found of every tensor so far. Its methods may be called from many threads, one a tensor."""

    def __init__(self, plan: Extraction) -> None:
        self.plan = plan
        self.settings = plan.settings
        self.spool = Spool()
        self.found: dict[str, Found] = {}
        self.rows: dict[str, LazyTensor] = {}
        """Trained rows of embeddings, by PEFT's key."""

    def examine(self, name: str, base: LazyTensor) -> None:
        """Read one tensor before and after, and find what can be kept of its change. Safe to call from many threads.

        Args:
            name: its name.
            base: its values in the base, from wherever they are at hand.

        Raises:
            SurgeryError: the tensor is named.
        """
        plan = self.plan
        try:
            if name in plan.resized:
                self.found[name] = self._resized(name, base)
                return
            pair = plan.pair(name, base)
            if name in plan.units:
                unit = plan.units[name]
                self.found[name] = self.factor(pair, unit, plan.rule.first_depth(unit.limit))
            elif name in plan.full:
                self.found[name] = self._entry(pair, Row(name, pair.role, "unchanged", 0, pair.energy(), 0.0, 0.0, 0))
            elif name in plan.embeddings:
                self.found[name] = self._embedding(pair)
            else:
                self.found[name] = self._left_out(pair)
        except SurgeryError as error:
            raise error.at(tensor=name) from None

    def deepen(self, depths: Mapping[Unit, int]) -> None:
        """Factor some units again, as deep as they are asked to be and can be."""
        plan = self.plan

        def work(unit: Unit) -> None:
            depth = min(depths[unit], plan.rule.limit(unit.limit))
            if depth <= self.factors(unit.name).depth:
                return
            pair = plan.pair(unit.name)
            again, before = self.factor(pair, unit, depth), self.found[unit.name]
            self.found[unit.name] = replace(again, prints=before.prints, note=before.note)

        in_parallel(sorted(depths, key=lambda unit: -unit.spec.numel), work, self.settings.jobs)

    def factors(self, name: str) -> Factors:
        """Return what was factored of a unit."""
        factors = self.found[name].factors
        assert factors is not None  # only units that were factored are asked for
        return factors

    def _entry(self, pair: Pair, row: Row, **more: Any) -> Found:
        return Found(row, (pair.base.fingerprint(), pair.tuned.fingerprint()), pair.weight_energy, **more)

    def factor(self, pair: Pair, unit: Unit, depth: int) -> Found:
        """Factor a weight's delta to ``depth`` components a matrix, and round them to the adapter's dtype."""
        if self.settings.dora:
            return self._factor_dora(pair, unit, depth)
        floors = self._floors(pair, unit)
        delta = pair.delta(*floors).view(unit.experts, *unit.matrix)
        energy = pair.delta_energy if unit.experts == 1 else None  # known by the way, of a single matrix
        parts = [self._part(unit, expert, one, depth, energy) for expert, one in enumerate(delta)]
        numerics.release_freed_memory()
        energy = math.fsum(part.svd.energy for part in parts)
        residual = math.fsum(part.residual for part in parts)
        beyond = math.fsum(max(part.svd.energy - part.svd.captured(2 * depth), 0.0) for part in parts)
        ranks = [
            floor_rank(part.svd.sigma[:depth], part.svd.energy, floor)
            for part, floor in zip(parts, floors, strict=False)
        ]
        factors = Factors(
            unit,
            self._spooled(unit.name, [part.left.T for part in parts]),
            self._spooled(unit.name, [part.right for part in parts]),
            np.sum([part.svd.sigma[:depth].square().cpu().numpy() for part in parts], axis=0),
            energy,
            np.sum([part.products for part in parts], axis=0),
            residual,
            max(part.svd.excess for part in parts),
            max((floor.rank for floor in ranks), default=None),
            next((floor.why for floor in ranks if not floor.certain), ""),
        )
        row = Row(unit.name, pair.role, "unchanged", 0, energy, 0.0, 0.0, 0)
        return self._entry(pair, row, factors=factors, following=min(beyond, residual))

    def _part(self, unit: Unit, expert: int, delta: torch.Tensor, depth: int, energy: float | None) -> _Part:
        settings = self.settings
        generator = numerics.generator(settings.seed, unit.name, f"sketch {expert}" if unit.experts > 1 else "sketch")
        svd = truncated_svd(
            delta.to(settings.device),
            depth,
            generator,
            tolerance=settings.tolerance,
            exact=settings.exact,
            energy=energy,
        )
        left, right = (self._rounded(factor.cpu(), unit.name) for factor in svd.factors(depth))
        products, rest = component_products(delta, left, right, energy=svd.energy)
        return _Part(svd, left, right, products.numpy(), min(rest, svd.energy))

    def _floors(self, pair: Pair, unit: Unit) -> list[RoundingNoise]:
        """Return what measures the rounding noise of each matrix, where the rule asks for its floor."""
        if not self.plan.rule.noise_floor:
            return []
        return [RoundingNoise(unit.matrix, pair.tuned.spec.dtype) for _ in range(unit.experts)]

    def _factor_dora(self, pair: Pair, unit: Unit, rank: int) -> Found:
        """Fit direction and magnitude of a linear weight."""
        delta = pair.delta()
        weight = numerics.load(pair.base).to(torch.float32)
        tuned = weight + delta
        settings, energy = self.settings, numerics.squared_norm(delta)
        generator = numerics.generator(settings.seed, unit.name, "sketch")

        def factor(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            svd = truncated_svd(matrix.to(settings.device), rank, generator, tolerance=settings.tolerance)
            left, right = svd.factors(rank)
            return self._rounded(left.cpu(), unit.name), self._rounded(right.cpu(), unit.name)

        sides = (weight.T, tuned.T) if unit.flipped else (weight, tuned)
        fit = fit_dora(*sides, factor, lambda values: self._rounded(values, unit.name))
        left, right = (fit.right.T, fit.left.T) if unit.flipped else (fit.left, fit.right)
        residual = min(fit.residual, energy)
        factors = Factors(
            unit, self._spooled(unit.name, [left.T]), self._spooled(unit.name, [right]), np.zeros(rank), energy,
            np.zeros(rank), residual, 0.0, magnitude=self.store(unit.name, fit.magnitude),
        )  # fmt: skip
        row = Row(unit.name, pair.role, "unchanged", 0, energy, 0.0, 0.0, 0)
        return self._entry(pair, row, factors=factors if energy else None, following=residual)

    def _rounded(self, values: torch.Tensor, name: str) -> torch.Tensor:
        rounded = numerics.round_scalar(values, self.plan.dtype)
        if not rounded.isfinite().all():
            raise NumericError(
                f"its factors overflow {self.plan.dtype}", file=self.plan.tuned_label, mend="--dtype F32"
            )
        return rounded

    def _spooled(self, name: str, parts: Sequence[torch.Tensor]) -> LazyTensor:
        return self.store(name, torch.stack(list(parts)))

    def store(self, key: str, values: torch.Tensor) -> LazyTensor:
        """Put values into the spool under a name."""
        values = values.contiguous()
        spec = TensorSpec(key, numerics.NAMES[values.dtype], tuple(values.shape))
        return self.spool.add(spec, values.view(-1).view(torch.uint8).numpy().tobytes())

    def _embedding(self, pair: Pair) -> Found:
        """Store the rows of an embedding that training moved further than the common shrink of weight decay."""
        plan, settings, name, width = self.plan, self.settings, pair.spec.name, pair.spec.shape[1]
        moments = RowMoments(pair.spec.shape[0])
        for _, old, delta in pair.blocks():
            moments.update(old.view(-1, width), delta.view(-1, width))
        rows, shrink, energy = moments.trained(pair.spec.dtype)
        total, count = float(energy.sum()), len(energy)
        if not total:
            return self._entry(pair, Row(name, pair.role, "unchanged", 0, 0.0, 0.0, 0.0, 0))
        policy = settings.embeddings
        if plan.rule.full or policy == "full":
            rows = energy.nonzero().flatten()  # every row that moved at all
        left_out = Row(name, pair.role, "left out", 0, total, total, total, 0)
        if policy == "none":
            return self._entry(pair, replace(left_out, why="--embeddings none"))
        if not len(rows):
            return self._entry(pair, replace(left_out, why=f"only a common shrink by {-shrink:.3g}"))
        if len(rows) > max(ROWS_SHARE * count, SMALL_TABLE) and not plan.rule.full and policy == "auto":
            if not (plan.tied and plan.is_input_embedding(name)):
                unit = Unit(pair.spec, "embedding")
                return self.factor(pair, unit, plan.rule.first_depth(unit.limit))
            why = f"{len(rows):,} of {count:,} rows moved and it is tied to the head; --embeddings full stores it"
            return self._entry(pair, replace(left_out, why=why), whole=True)
        key = peft.token_rows_key(self.plan.module(name))
        spec = TensorSpec(key, pair.tuned.spec.dtype, (len(rows), width))
        stored: LazyTensor = self.spool.add(spec, self._pick_rows(pair, rows.tolist()))
        rest = max(total - float(energy[rows].sum()), 0.0)
        if settings.dtype not in (None, spec.dtype):
            rounded = Cast(stored, str(settings.dtype), label=plan.tuned_label)
            rest += numerics.squared_norm(numerics.load_wide(rounded) - numerics.load_wide(stored))
            stored = rounded
        self.rows[key] = stored
        why = f"{len(rows):,} of {count:,} rows" + (f"; all shrank by {-shrink:.3g}" if shrink else "")
        row = Row(name, pair.role, "rows", 0, total, rest, rest, stored.spec.nbytes, why)
        return self._entry(pair, row, token_rows=rows.tolist())

    def _pick_rows(self, pair: Pair, rows: Sequence[int]) -> bytes:
        tuned, width, size = pair.tuned.source, pair.spec.shape[1], pair.tuned.spec.itemsize
        if width % tuned.unit:
            return numerics.load(tuned)[rows].contiguous().view(torch.uint8).numpy().tobytes()
        out = bytearray(len(rows) * width * size)
        for place, row in enumerate(rows):
            tuned.read_into(row * width, (row + 1) * width, memoryview(out)[place * width * size :][: width * size])
        return bytes(out)

    def _resized(self, name: str, base: LazyTensor) -> Found:
        """Compare the rows that a resized vocabulary has in common; all of it will be stored."""
        tuned = self.plan.tuned[name]
        shape = (min(base.spec.shape[0], tuned.spec.shape[0]), base.spec.shape[1])
        common = [_leading_rows(tensor, shape) for tensor in (base, tuned)]
        pair = Pair(common[0], common[1], (self.plan.base.label, self.plan.tuned_label))
        row = Row(name, pair.role, "full", 0, pair.energy(), 0.0, 0.0, 0, "its number of rows changed")
        return Found(row, (provenance.fingerprint(base), provenance.fingerprint(tuned)), pair.weight_energy)

    def _left_out(self, pair: Pair) -> Found:
        name, why = pair.spec.name, self.plan.left_out[pair.spec.name]
        if name in self.plan.codes and name not in self.plan.unwanted:
            return self._unchanged_codes(pair)
        if pair.spec.dtype in ARITHMETIC and pair.tuned.spec.dtype in ARITHMETIC:
            energy = pair.energy()
            if energy:
                return self._entry(pair, Row(name, pair.role, "left out", 0, energy, energy, energy, 0, why))
        found = self._entry(pair, Row(name, pair.role, "unchanged", 0, 0.0, 0.0, 0.0, 0))
        codes = [spec.dtype for spec in (pair.spec, pair.tuned.spec) if spec.dtype not in ARITHMETIC]
        if codes and found.prints[0] != found.prints[1]:
            found.note = f"differs but is {codes[0]}, so not in the adapter: {name}"
        return found

    def _unchanged_codes(self, pair: Pair) -> Found:
        name = pair.spec.name
        found = self._entry(pair, Row(name, pair.role, "unchanged", 0, 0.0, 0.0, 0.0, 0))
        if found.prints[0] != found.prints[1]:
            raise UnsupportedError(
                f"differs, and is quantised ({self.plan.codes[name]}): its codes are not numbers to compute with",
                file=self.plan.tuned_label,
                mend="dequantise both models first, or --exclude it",
            )
        return found


def largest_first(base: Checkpoint, names: Iterable[str]) -> list[str]:
    """Order tensors so that no thread is left alone with a large one at the end."""
    return sorted(names, key=lambda name: (-base.tensors[name].spec.numel, name))


def in_parallel(items: Iterable[T], work: Callable[[T], None], jobs: int) -> None:
    """Do ``work`` on every item, one thread each; the first error ends it."""
    with ThreadPoolExecutor(jobs, thread_name_prefix="surgery") as pool, numerics.single_threaded():
        try:
            for _ in pool.map(work, items):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _leading_rows(tensor: LazyTensor, shape: tuple[int, int]) -> LazyTensor:
    return Renamed(tensor, TensorSpec(tensor.spec.name, tensor.spec.dtype, shape))
