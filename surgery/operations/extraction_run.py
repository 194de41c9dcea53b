"""Running an extraction: measure, choose ranks, lay out.

*Measure*: every tensor is read once, before and after; what LoRA can hold is factored as deep as the rule first looks,
into the spool. *Choose*: the rule sees all spectra; where it used all that is known of one, that weight is read again
and factored twice as deep, until the choice stands. *Lay out*: the chosen components take the names and shapes that
PEFT gives them, beside what it stores in full.

Tensors are independent, so they are the parallelism: each is worked on by one thread, and torch adds none of its own.
The result is then the same for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from surgery import execute, numerics, provenance
from surgery.adapter import Adapter
from surgery.algorithms.compare import SMALL_TABLE, RowMoments
from surgery.algorithms.lowrank import component_products, truncated_svd
from surgery.algorithms.ranks import Spectrum
from surgery.checkpoint import Checkpoint
from surgery.delta import Cast
from surgery.errors import MismatchError, NumericError, SurgeryError, VerificationError
from surgery.formats import peft, safetensors, servers, serving
from surgery.names import module_of
from surgery.operations.extraction_report import ExtractionReport, Row, card
from surgery.operations.extraction_units import EXPERTS, Factors, Unit
from surgery.operations.pairs import Pair
from surgery.report import join_shown
from surgery.roles import role_of
from surgery.sources.spool import Spool
from surgery.tensor import ARITHMETIC, LazyTensor, Renamed, TensorSpec, human_bytes, renamed

if TYPE_CHECKING:
    from surgery.operations.extract_lora import Extraction

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


class Run:
    """One extraction being run."""

    def __init__(self, plan: Extraction) -> None:
        self.plan = plan
        self.settings = plan.settings
        self.spool = Spool()
        self.found: dict[str, Found] = {}
        self.tensors: dict[str, LazyTensor] = {}
        self.ranks: dict[str, int] = {}
        """Rank of every factored unit, by its weight's name."""

    def adapter(self, progress: execute.Progress) -> Adapter:
        """Run everything and compose the adapter."""
        plan = self.plan

        def work(name: str) -> None:
            self.examine(name, plan.base.tensors[name])
            progress.advance(plan.base.tensors[name].spec.nbytes + plan.tuned[name].spec.nbytes)

        progress.start(plan.bytes_read)
        try:
            in_parallel(largest_first(plan.base, plan.names), work, self.settings.jobs)
        finally:
            progress.finish()
        return self.compose()

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
            pair = Pair(base, plan.tuned[name], (plan.base.label, plan.tuned_label))
            if name in plan.units:
                unit = plan.units[name]
                self.found[name] = self._factor(pair, unit, plan.rule.first_depth(unit.limit))
            elif name in plan.full:
                self.found[name] = self._entry(pair, Row(name, pair.role, "unchanged", 0, pair.energy(), 0.0, 0.0, 0))
            elif name in plan.embeddings:
                self.found[name] = self._embedding(pair)
            else:
                self.found[name] = self._left_out(pair)
        except SurgeryError as error:
            raise error.at(tensor=name) from None

    def compose(self) -> Adapter:
        """Choose ranks and lay the adapter out, once every tensor was examined.

        Raises:
            MismatchError: nothing differs, nothing of it fits, or the budget is too small.
        """
        plan = self.plan
        self.found = {name: self.found[name] for name in plan.names}  # threads finish in any order
        plan.notes.extend(found.note for found in self.found.values() if found.note)
        moved = [name for name, found in self.found.items() if found.row.energy]
        if not moved:
            raise MismatchError(
                f"no differences: all {len(self.found)} compared tensors are equal", file=plan.tuned_label
            )
        self._choose()
        self._store_whole_embeddings()
        self._lay_out_factors()
        saved, biases = self._keep_in_full()
        if not self.tensors:
            raise MismatchError(
                f"nothing that differs can be stored in an adapter: {join_shown(moved)}", file=plan.tuned_label
            )
        carrier = not self.ranks
        if carrier:
            self._add_carrier()
        rows = tuple(found.row for found in self.found.values())
        weight = math.fsum(found.weight_energy for found in self.found.values())
        report = ExtractionReport(plan.rule.name, rows, math.sqrt(weight), plan.settings.tolerance, tuple(plan.notes))
        document = self._config(saved, biases)
        self._check_loads(document)
        prints = {name: found.prints for name, found in sorted(self.found.items())}
        return Adapter(
            self.tensors,
            document,
            label=f"{plan.tuned_label}-lora-{plan.rule.slug}",
            stored=[*plan.base.stored, *plan.tuned_stored],
            files={"README.md": card(report, document, plan.base.label, plan.tuned_label)},
            record=lambda outputs: self._record(outputs, report, prints),
            taken_from={name: before for name, (before, _) in prints.items()},
            report=report,
        )

    # --- measuring ---------------------------------------------------------------------------------------------------

    def _entry(self, pair: Pair, row: Row, **more: Any) -> Found:
        return Found(row, (pair.base.fingerprint(), pair.tuned.fingerprint()), pair.weight_energy, **more)

    def _factor(self, pair: Pair, unit: Unit, depth: int) -> Found:
        """Factor a weight's delta to ``depth`` components a matrix, and round them to the adapter's dtype."""
        delta = pair.delta().view(unit.experts, *unit.matrix)
        name, settings = unit.name, self.settings
        lefts, rights, products = [], [], np.zeros(depth)
        squares, energy, residual, beyond, excess = np.zeros(depth), 0.0, 0.0, 0.0, 0.0
        for expert, one in enumerate(delta):
            generator = numerics.generator(settings.seed, name, f"sketch {expert}" if unit.experts > 1 else "sketch")
            svd = truncated_svd(
                one.to(settings.device), depth, generator, tolerance=settings.tolerance, exact=settings.exact
            )
            left, right = (self._rounded(factor.cpu(), name) for factor in svd.factors(depth))
            found, rest = component_products(one, left, right, energy=svd.energy)
            lefts.append(left.T)
            rights.append(right)
            products += found.numpy()
            squares += svd.sigma[:depth].square().cpu().numpy()
            energy += svd.energy
            residual += min(rest, svd.energy)
            beyond += max(svd.energy - svd.captured(2 * depth), 0.0)
            excess = max(excess, svd.excess)
        numerics.release_freed_memory()
        factors = Factors(
            unit, self._spooled(name, lefts), self._spooled(name, rights), squares, energy, products, residual, excess
        )
        row = Row(name, pair.role, "unchanged", 0, energy, 0.0, 0.0, 0)
        return self._entry(pair, row, factors=factors, following=min(beyond, residual))

    def _rounded(self, values: torch.Tensor, name: str) -> torch.Tensor:
        rounded = numerics.round_scalar(values, self.plan.dtype)
        if not rounded.isfinite().all():
            raise NumericError(
                f"its factors overflow {self.plan.dtype}", file=self.plan.tuned_label, mend="--dtype F32"
            )
        return rounded

    def _spooled(self, name: str, parts: Sequence[torch.Tensor]) -> LazyTensor:
        return self._store(name, torch.stack(list(parts)))

    def _store(self, key: str, values: torch.Tensor) -> LazyTensor:
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
                return self._factor(pair, unit, plan.rule.first_depth(unit.limit))
            why = f"{len(rows):,} of {count:,} rows moved and it is tied to the head; --embeddings full stores it"
            return self._entry(pair, replace(left_out, why=why), whole=True)
        key = f"{peft.PREFIX}{self._module(name)}.token_adapter.trainable_tokens_delta"
        spec = TensorSpec(key, pair.tuned.spec.dtype, (len(rows), width))
        stored: LazyTensor = self.spool.add(spec, self._pick_rows(pair, rows.tolist()))
        rest = max(total - float(energy[rows].sum()), 0.0)
        if settings.dtype not in (None, spec.dtype):
            rounded = Cast(stored, str(settings.dtype), label=plan.tuned_label)
            rest += numerics.squared_norm(numerics.load_wide(rounded) - numerics.load_wide(stored))
            stored = rounded
        self.tensors[key] = stored
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
        if pair.spec.dtype in ARITHMETIC and pair.tuned.spec.dtype in ARITHMETIC:
            energy = pair.energy()
            if energy:
                return self._entry(pair, Row(name, pair.role, "left out", 0, energy, energy, energy, 0, why))
        found = self._entry(pair, Row(name, pair.role, "unchanged", 0, 0.0, 0.0, 0.0, 0))
        if found.prints[0] != found.prints[1] and pair.spec.dtype not in ARITHMETIC:
            found.note = f"differs but is {pair.spec.dtype}, so not in the adapter: {name}"
        return found

    # --- choosing ----------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Choose the rank of every unit, deepening spectra that the rule used up."""
        while True:
            groups = self._groups()
            spectra = [self._spectrum(group) for group in groups]
            ranks = self._ranks(groups, spectra)
            short = [g for g, s, rank in zip(groups, spectra, ranks, strict=True) if s.open_at(rank)]
            if not short:
                break
            self._deepen({unit: 2 * self._depth(unit) for group in short for unit in group})
        for group, rank in zip(groups, ranks, strict=True):
            for unit in group if rank else ():
                self.ranks[unit.name] = rank if len(group) > 1 else min(rank, unit.limit)
        if self.plan.rule.portable and self.ranks:
            self._even_out()

    def _even_out(self) -> None:
        """Give all modules one rank, and those zeros that the server cannot do without."""
        server = self.plan.settings.server
        rank = servers.one_rank(self.ranks.values(), server)
        if not self.plan.rule.noise_floor:  # what would be padded with zeros may as well be more of the delta
            self._deepen({self._factors(name).unit: rank for name in self.ranks})
        weights = {self._module(name): name for name in self.plan.base.tensors if name.endswith(".weight")}
        partners = servers.missing_partners(server, [self._module(name) for name in self.ranks], weights)
        for name in [*self.ranks, *(weights[module] for module in partners)]:
            self.ranks[name] = rank
        title, option = servers.server_named(server).title, servers.start_with(server, rank)
        if option:
            self.plan.notes.append(f"{title} must be started with {option}")
        if partners:
            self.plan.notes.append(f"{title} needs them too, so they have factors of zeros: {join_shown(partners)}")

    def _groups(self) -> list[list[Unit]]:
        """Collect the units that moved, by group; of a group that moved at all, every member."""
        groups: dict[str, list[Unit]] = {}
        for found in self.found.values():
            if found.factors is not None:
                unit = found.factors.unit
                groups.setdefault(unit.group or unit.name, []).append(unit)
        return [units for units in groups.values() if any(self.found[unit.name].row.energy for unit in units)]

    def _depth(self, unit: Unit) -> int:
        return self._factors(unit.name).depth

    def _factors(self, name: str) -> Factors:
        factors = self.found[name].factors
        assert factors is not None  # only units that were factored are asked for
        return factors

    def _spectrum(self, group: Sequence[Unit]) -> Spectrum:
        members = [self._factors(unit.name) for unit in group]
        known = min((f.depth for f in members if f.depth < f.unit.limit), default=max(f.depth for f in members))
        squares = np.zeros(known)
        for factors in members:
            part = factors.squares[:known]
            squares[: len(part)] += part
        limit = max(unit.limit for unit in group)
        item = TensorSpec("", self.plan.dtype, ()).itemsize
        cost = item * sum(unit.cost for unit in group)
        return self.plan.rule.spectrum(squares, math.fsum(f.energy for f in members), cost, limit)

    def _deepen(self, depths: Mapping[Unit, int]) -> None:
        """Factor some units again, as deep as they are asked to be and can be."""
        plan = self.plan

        def work(unit: Unit) -> None:
            depth = min(depths[unit], plan.rule.limit(unit.limit))
            if depth <= self._depth(unit):
                return
            pair = Pair(plan.base.tensors[unit.name], plan.tuned[unit.name], (plan.base.label, plan.tuned_label))
            again, before = self._factor(pair, unit, depth), self.found[unit.name]
            self.found[unit.name] = replace(again, prints=before.prints, note=before.note)

        in_parallel(sorted(depths, key=lambda unit: -unit.spec.numel), work, self.settings.jobs)

    def _ranks(self, groups: Sequence[Sequence[Unit]], spectra: Sequence[Spectrum]) -> list[int]:
        rule = self.plan.rule
        energy = math.fsum(found.row.energy for found in self.found.values())
        factored = math.fsum(spectrum.energy for spectrum in spectra)
        fixed = math.fsum(found.row.residual for found in self.found.values() if found.factors is None)
        if rule.budget is None:
            return rule.choose(spectra, fixed=fixed, energy=energy)
        room = rule.budget - self._fixed_bytes()
        while room > 0:
            ranks = rule.choose(spectra, budget=room, energy=energy)
            over = self._total_bytes(groups, ranks) - rule.budget
            if over <= 0:
                return ranks
            room -= over  # the header, which grows with the number of tensors
        if factored and room <= 0:
            raise MismatchError(
                f"biases, norms and trained rows alone take {human_bytes(self._fixed_bytes())} of --budget {human_bytes(rule.budget)}",
                file=self.plan.tuned_label,
                mend="raise it, or --exclude some",
            )
        return [0] * len(spectra)

    def _fixed_bytes(self) -> int:
        """Bytes of everything that is no factor."""
        kept = self._full_names()[0]
        rows = sum(tensor.spec.nbytes for tensor in self.tensors.values())
        return rows + sum(self.plan.tuned[name].spec.nbytes for name in kept if name in self.plan.tuned)

    def _total_bytes(self, groups: Sequence[Sequence[Unit]], ranks: Sequence[int]) -> int:
        """Size of the weights file at these ranks, header included."""
        specs = [tensor.spec for tensor in self.tensors.values()]
        for group, rank in zip(groups, ranks, strict=True):
            for unit in group if rank else ():
                for suffix, side in zip(unit.suffixes, unit.matrix, strict=True):
                    key = f"{peft.PREFIX}{self._module(unit.name)}{suffix}"
                    specs.append(TensorSpec(key, self.plan.dtype, (rank * unit.experts, side)))
        for name in self._full_names()[0]:
            tensor = self.plan.tuned.get(name) or self.plan.base.tensors[name]
            specs.append(TensorSpec(f"{peft.PREFIX}{name}.base_layer", tensor.spec.dtype, tensor.spec.shape))
        prefix, _ = safetensors.build_header(specs, {"format": "pt"})
        return len(prefix) + sum(spec.nbytes for spec in specs)

    # --- laying out --------------------------------------------------------------------------------------------------

    def _module(self, name: str) -> str:
        return module_of(self.plan.spelled(name))

    def _lay_out_factors(self) -> None:
        for name, rank in self.ranks.items():
            found, unit = self.found.get(name), self._unit(name)
            factors = found.factors if found else None
            parts = factors.leading(rank) if factors else _zeros(unit, rank, self.plan.dtype)
            stem = self._stem(unit)
            stored = [
                self._store(stem + suffix, part) for suffix, part in zip(unit.suffixes, unit.dress(*parts), strict=True)
            ]
            self.tensors |= {tensor.spec.name: tensor for tensor in stored}
            if found and factors:
                nbytes = sum(tensor.spec.nbytes for tensor in stored)
                found.row = self._factored_row(found, factors, rank, nbytes)
        for name, found in self.found.items():
            energy = found.row.energy
            if found.factors is not None and name not in self.ranks and energy:
                found.row = Row(
                    name, found.row.role, "left out", 0, energy, energy, energy, 0, "not worth its bytes"
                )  # fmt: skip

    def _factored_row(self, found: Found, factors: Factors, rank: int, nbytes: int) -> Row:
        residual = min(factors.residual_at(rank), factors.energy)
        following = found.following if rank >= factors.depth else factors.residual_at(min(2 * rank, factors.depth))
        return Row(
            factors.unit.name, found.row.role, "lora", rank, factors.energy, residual, min(following, residual),
            nbytes, excess=factors.excess,
        )  # fmt: skip

    def _unit(self, name: str) -> Unit:
        """Return a factored unit, or make one of a weight that only carries zeros."""
        found = self.found.get(name)
        if found and found.factors:
            return found.factors.unit
        return Unit(self.plan.base.specs[name], "linear", name in self.plan.transposed)

    def _stem(self, unit: Unit) -> str:
        """Name a unit's factors up to PEFT's suffix: of two parameters of one module the first is wrapped innermost."""
        if unit.kind != "experts":
            return f"{peft.PREFIX}{self._module(unit.name)}"
        module = self.plan.spelled(unit.name).rpartition(".")[0]
        siblings = sorted(
            (name for name in self.ranks if name.rpartition(".")[0] == unit.name.rpartition(".")[0]),
            key=peft.parameter_order,
        )
        return f"{peft.PREFIX}{module}" + ".base_layer" * (len(siblings) - 1 - siblings.index(unit.name))

    def _store_whole_embeddings(self) -> None:
        """Store a tied embedding that moved all over where a byte of it brings at least what the factors' last one does.

        As trained tokens, all of them: the one form that is right for tied weights both merged and unmerged.
        """
        rates = [
            float(factors.squares[min(rank, factors.depth) - 1]) / factors.unit.cost
            for name, rank in self.ranks.items() for factors in [self._factors(name)] if factors.energy
        ]  # fmt: skip
        for name, found in self.found.items():
            spec = self.plan.base.tensors[name].spec
            if (
                not found.whole
                or self.plan.rule.budget is not None
                or found.row.energy / spec.numel < min(rates, default=0.0)
            ):
                continue
            key = f"{peft.PREFIX}{self._module(name)}.token_adapter.trainable_tokens_delta"
            self.tensors[key] = renamed(self.plan.tuned[name], key)
            found.token_rows = list(range(spec.shape[0]))
            found.row = Row(name, found.row.role, "rows", 0, found.row.energy, 0.0, 0.0, spec.nbytes, "all rows moved")

    def _full_names(self) -> tuple[list[str], set[str], bool]:
        """Return the tensors stored in full, the modules saved whole, and whether biases are stored."""
        plan = self.plan
        biases = {name for name in plan.full if self.found[name].row.role == "bias"}
        moved = {
            module_of(n) for n in plan.full if n not in biases and self.found[n].row.energy and not plan.in_head(n)
        }
        moved |= {module_of(name) for name in plan.resized}
        saved = _closed(moved, {module_of(name) for name in plan.base.tensors})
        saved = {module for module in saved if not plan.in_head(f"{module}.")}
        keep_biases = any(self.found[name].row.energy for name in biases)
        kept = [
            name for name in plan.base.tensors
            if (keep_biases and name in biases) or module_of(name) in saved or plan.in_head(name)
        ]  # fmt: skip
        return kept, saved, keep_biases

    def _keep_in_full(self) -> tuple[list[str], bool]:
        """Store norms and biases that moved; return the modules to save, and whether biases are stored."""
        plan = self.plan
        kept, saved, biases = self._full_names()
        for name in kept:
            if name in plan.full or name in plan.resized:
                self._keep(name)
            else:
                self._keep_sibling(name)
        lost = [name for name in plan.full if self.found[name].row.energy and name not in kept]
        assert not lost, f"{lost[0]} moved and found no place"
        modules = {self._module(f"{module}.weight") for module in {*saved, *plan.heads}}
        if plan.tied and plan.resized:
            modules.add(self._tie_head())
        return sorted(modules), biases

    def _tie_head(self) -> str:
        """Store the head of a resized, tied embedding too: PEFT unties the two when it saves one of them whole."""
        name = next(name for name in self.plan.resized if self.plan.is_input_embedding(name))
        key = f"{peft.PREFIX}lm_head.weight"
        self.tensors[key] = renamed(self.plan.tuned[name], key)
        return "lm_head"

    def _keep(self, name: str) -> None:
        found = self.found[name]
        module, _, leaf = self.plan.spelled(name).rpartition(".")
        key = f"{peft.PREFIX}{module}{'.base_layer' if self._is_factored(name) else ''}.{leaf}"
        tuned = self.plan.tuned[name]
        self.tensors[key] = renamed(tuned, key)
        how = "full" if found.row.energy or name in self.plan.resized else "unchanged"
        found.row = Row(name, found.row.role, how, 0, found.row.energy, 0.0, 0.0, tuned.spec.nbytes, found.row.why)

    def _is_factored(self, name: str) -> bool:
        return f"{module_of(name)}.weight" in self.ranks

    def _keep_sibling(self, name: str) -> None:
        """PEFT saves a module whole: every tensor it has must be there, buffers too, and the base's where not wanted."""
        key = peft.PREFIX + self.plan.spelled(name)
        base = self.plan.base.tensors[name]
        wanted = name not in self.plan.unwanted and name in self.plan.tuned
        self.tensors[key] = renamed(self.plan.tuned[name] if wanted else base, key)
        if wanted and name in self.found:
            row = self.found[name].row
            how = "full" if row.energy else "unchanged"
            self.found[name].row = Row(name, row.role, how, 0, row.energy, 0.0, 0.0, base.spec.nbytes)

    def _add_carrier(self) -> None:
        """PEFT loads no adapter without a LoRA module: give it one of rank 1 that is zero."""
        plan = self.plan
        linear = [
            Unit(spec, "linear", name in plan.transposed)
            for name, spec in plan.base.specs.items()
            if len(spec.shape) == 2 and role_of(spec) != "embedding" and name.endswith(".weight")
        ]
        candidates = [unit for unit in plan.units.values() if unit.kind == "linear"] or linear
        if not candidates:
            raise MismatchError("the model has no linear weight that could carry an adapter", file=plan.base.label)
        unit = min(candidates, key=lambda unit: (unit.cost, unit.name))
        stem = self._stem(unit)
        parts = unit.dress(*_zeros(unit, 1, plan.dtype))
        for suffix, part in zip(unit.suffixes, parts, strict=True):
            self.tensors[stem + suffix] = self._store(stem + suffix, part)
        self.ranks[unit.name] = 1
        if f"{stem}.bias" in self.tensors:  # the module is adapted now, and PEFT calls its bias differently
            key = f"{stem}.base_layer.bias"
            self.tensors[key] = renamed(self.tensors.pop(f"{stem}.bias"), key)
        plan.notes.append(
            f"no linear weight changed: {self._module(unit.name)} carries a LoRA of zeros, which PEFT needs to load the rest"
        )

    def _config(self, saved: Sequence[str], biases: bool) -> dict[str, Any]:
        plan = self.plan
        experts = {n for n in self.ranks if n in plan.units and plan.units[n].kind == "experts"}
        adapted = {self._module(name): rank for name, rank in self.ranks.items() if name not in experts}
        parameters = {plan.spelled(name): self.ranks[name] for name in experts}
        modules = [self._module(n) for n, s in plan.base.specs.items() if n.endswith(".weight") and len(s.shape) >= 2]
        experts_r = {
            self.ranks[name] for name in self.ranks if name in plan.units and plan.units[name].group == EXPERTS
        }
        asked = {plan.rule.rank} & set(self.ranks.values())
        return peft.lora_config(
            r=next(iter(experts_r or asked), None) or max(self.ranks.values()),
            targets=peft.target_modules(sorted(adapted), modules) if adapted else [],
            parameters=sorted(parameters),
            ranks=adapted | parameters,
            base_name=plan.base_name,
            task=peft.task_type(plan.base.config),
            bias=biases,
            modules_to_save=saved,
            fan_in_fan_out=any(unit.flipped and unit.kind == "linear" for unit in plan.units.values()),
            token_indices={self._module(n): found.token_rows for n, found in self.found.items() if found.token_rows},
        )

    def _check_loads(self, document: Mapping[str, Any]) -> None:
        """Hold the adapter against what its server loads, as ``surgery verify --for`` would.

        Raises:
            VerificationError: it would not load, or do something else.
        """
        specs = {key: tensor.spec for key, tensor in self.tensors.items()}
        server = self.settings.server
        for problem in serving.problems(server, document, specs):
            if problem.level != "note":
                raise VerificationError(
                    f"the adapter would not do in {servers.server_named(server).title} what it should: {problem}",
                    file=self.plan.tuned_label,
                )

    def _record(
        self, outputs: Mapping[str, str], report: ExtractionReport, prints: Mapping[str, tuple[str, str]]
    ) -> dict[str, Any]:
        plan, settings = self.plan, self.settings
        before = {name: pair[0] for name, pair in prints.items()}
        after = {name: pair[1] for name, pair in prints.items()}
        return provenance.record(
            "extract-lora",
            parameters={
                "rank": plan.rule.name, "dtype": plan.dtype, "seed": settings.seed,
                "tolerance": settings.tolerance, "exact": settings.exact,
            },
            inputs=[
                {"role": "base", "name": plan.base.label, "fingerprint": provenance.combine(before)},
                {"role": "fine-tune", "name": plan.tuned_label, "fingerprint": provenance.combine(after)},
            ],
            tensors={name: {"fingerprint": value} for name, value in outputs.items()},
            base=before,
            report=report.document(),
        )  # fmt: skip


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


def _zeros(unit: Unit, rank: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Make factors of zeros."""
    kind = numerics.DTYPES[dtype]
    return tuple(torch.zeros(unit.experts, rank, side, dtype=kind) for side in unit.matrix)  # type: ignore[return-value]


def _leading_rows(tensor: LazyTensor, shape: tuple[int, int]) -> LazyTensor:
    return Renamed(tensor, TensorSpec(tensor.spec.name, tensor.spec.dtype, shape))


def _closed(modules: set[str], all_modules: set[str]) -> set[str]:
    """Add the modules that PEFT would wrap too, because it compares name endings without a dot."""
    return {module for module in all_modules for entry in modules if module.endswith(entry)}
