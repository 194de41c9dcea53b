"""Laying out: the chosen components take the names and shapes that PEFT gives them, beside what it stores in full."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery import numerics
from surgery.errors import MismatchError, VerificationError
from surgery.formats import peft, servers, serving
from surgery.names import module_of
from surgery.operations.extraction_measure import Found, Measurement
from surgery.operations.extraction_plan import Extraction
from surgery.operations.extraction_report import Row
from surgery.operations.extraction_units import EXPERTS, Factors, Unit
from surgery.roles import role_of
from surgery.tensor import LazyTensor, renamed


@dataclass(frozen=True, slots=True)
class Kept:
    """What is stored in full."""

    names: tuple[str, ...]
    modules: frozenset[str]
    """Modules that are saved whole, but for the heads of tasks."""
    biases: bool
    """Whether biases are stored: all of them, then."""


def kept_in_full(plan: Extraction, found: Mapping[str, Found]) -> Kept:
    """Decide what is stored in full: biases if any of them moved, and every module of which something else did."""
    biases = {name for name in plan.full if found[name].row.role == "bias"}
    moved = {module_of(n) for n in plan.full if n not in biases and found[n].row.energy and not plan.in_head(n)}
    moved |= {module_of(name) for name in plan.resized}
    saved = _closed(moved, {module_of(name) for name in plan.base.tensors})
    saved = {module for module in saved if not plan.in_head(f"{module}.")}
    keep_biases = any(found[name].row.energy for name in biases)
    names = [
        name for name in plan.base.tensors
        if (keep_biases and name in biases) or module_of(name) in saved or plan.in_head(name)
    ]  # fmt: skip
    return Kept(tuple(names), frozenset(saved), keep_biases)


def stem_of(plan: Extraction, unit: Unit, adapted: Collection[str]) -> str:
    """Name a unit's factors up to PEFT's suffix: of two parameters of one module the first is wrapped innermost.

    Args:
        plan: spells names.
        unit: one of those in ``adapted``.
        adapted: names of all factored weights.
    """
    if unit.kind != "experts":
        return f"{peft.PREFIX}{plan.module(unit.name)}"
    home = unit.name.rpartition(".")[0]
    siblings = sorted((name for name in adapted if name.rpartition(".")[0] == home), key=peft.parameter_order)
    wrappers = ".base_layer" * (len(siblings) - 1 - siblings.index(unit.name))
    return f"{peft.PREFIX}{plan.spelled(unit.name).rpartition('.')[0]}{wrappers}"


def unit_of(plan: Extraction, found: Mapping[str, Found], name: str) -> Unit:
    """Return a factored unit, or make one of a weight that only carries zeros."""
    one = found.get(name)
    if one and one.factors:
        return one.factors.unit
    return Unit(plan.base.specs[name], "linear", name in plan.transposed)


def full_key(plan: Extraction, name: str, adapted: Collection[str]) -> str:
    """Name a tensor that is stored in full: inside of PEFT's wrapper where its module's weight is factored."""
    module, _, leaf = plan.spelled(name).rpartition(".")
    wrapped = f"{module_of(name)}.weight" in adapted and name in plan.full
    return f"{peft.PREFIX}{module}{'.base_layer' if wrapped else ''}.{leaf}"


class Layout:
    """The adapter in the making: its tensors by PEFT's key, its configuration, and each weight's row of the report."""

    def __init__(self, measured: Measurement, ranks: Mapping[str, int], whole: Collection[str], kept: Kept) -> None:
        self.measured = measured
        self.plan = measured.plan
        self.found = measured.found
        self.ranks = dict(ranks)
        self.whole = whole
        self.kept = kept
        self.tensors: dict[str, LazyTensor] = dict(measured.rows)

    def compose(self) -> dict[str, Any]:
        """Lay everything out and return the configuration.

        Raises:
            MismatchError: nothing can be stored.
            VerificationError: the adapter would not load.
        """
        plan = self.plan
        self._store_whole_embeddings()
        self._lay_out_factors()
        saved = self._keep_in_full()
        if not self.tensors:
            raise MismatchError("nothing that differs can be stored in an adapter", file=plan.tuned_label)
        if not self.ranks:
            self._add_carrier()
        document = self._config(saved)
        self._check_loads(document)
        return document

    def _lay_out_factors(self) -> None:
        for name, rank in self.ranks.items():
            found, unit = self.found.get(name), unit_of(self.plan, self.found, name)
            factors = found.factors if found else None
            parts = factors.leading(rank) if factors else _zeros(unit, rank, self.plan.dtype)
            stem = stem_of(self.plan, unit, self.ranks)
            stored = [
                self.measured.store(stem + suffix, part)
                for suffix, part in zip(unit.suffixes, unit.dress(*parts), strict=True)
            ]
            if factors and factors.magnitude is not None:
                stored.append(renamed(factors.magnitude, f"{stem}.lora_magnitude_vector"))
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

    def _store_whole_embeddings(self) -> None:
        """Store tied embeddings as trained tokens, all of them: the one form that is right both merged and unmerged."""
        for name in sorted(self.whole):
            found, spec = self.found[name], self.plan.base.tensors[name].spec
            key = peft.token_rows_key(self.plan.module(name))
            self.tensors[key] = renamed(self.plan.tuned[name], key)
            found.token_rows = list(range(spec.shape[0]))
            found.row = Row(name, found.row.role, "rows", 0, found.row.energy, 0.0, 0.0, spec.nbytes, "all rows moved")

    def _keep_in_full(self) -> list[str]:
        """Store norms and biases that moved; return the modules to save."""
        plan = self.plan
        kept = self.kept
        for name in kept.names:
            if name in plan.full or name in plan.resized:
                self._keep(name)
            else:
                self._keep_sibling(name)
        lost = [name for name in plan.full if self.found[name].row.energy and name not in kept.names]
        assert not lost, f"{lost[0]} moved and found no place"
        modules = {plan.module(f"{module}.weight") for module in {*kept.modules, *plan.heads}}
        if plan.tied and plan.resized:
            modules.add(self._tie_head())
        return sorted(modules)

    def _tie_head(self) -> str:
        """Store the head of a resized, tied embedding too: PEFT unties the two when it saves one of them whole."""
        name = next(name for name in self.plan.resized if self.plan.is_input_embedding(name))
        key = f"{peft.PREFIX}lm_head.weight"
        self.tensors[key] = renamed(self.plan.tuned[name], key)
        return "lm_head"

    def _keep(self, name: str) -> None:
        found = self.found[name]
        key = full_key(self.plan, name, self.ranks)
        tuned = self.plan.tuned[name]
        self.tensors[key] = renamed(tuned, key)
        how = "full" if found.row.energy or name in self.plan.resized else "unchanged"
        found.row = Row(name, found.row.role, how, 0, found.row.energy, 0.0, 0.0, tuned.spec.nbytes, found.row.why)

    def _keep_sibling(self, name: str) -> None:
        """PEFT saves a module whole: every tensor it has must be there, buffers too, and the base's where not wanted."""
        key = full_key(self.plan, name, self.ranks)
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
        stem = stem_of(self.plan, unit, self.ranks)
        parts = unit.dress(*_zeros(unit, 1, plan.dtype))
        for suffix, part in zip(unit.suffixes, parts, strict=True):
            self.tensors[stem + suffix] = self.measured.store(stem + suffix, part)
        self.ranks[unit.name] = 1
        if f"{stem}.bias" in self.tensors:  # the module is adapted now, and PEFT calls its bias differently
            key = f"{stem}.base_layer.bias"
            self.tensors[key] = renamed(self.tensors.pop(f"{stem}.bias"), key)
        plan.notes.append(
            f"no linear weight changed: {self.plan.module(unit.name)} carries a LoRA of zeros, which PEFT needs to load the rest"
        )

    def _config(self, saved: Sequence[str]) -> dict[str, Any]:
        plan = self.plan
        experts = {n for n in self.ranks if n in plan.units and plan.units[n].kind == "experts"}
        adapted = {self.plan.module(name): rank for name, rank in self.ranks.items() if name not in experts}
        parameters = {plan.spelled(name): self.ranks[name] for name in experts}
        modules = [plan.module(n) for n, s in plan.base.specs.items() if n.endswith(".weight") and len(s.shape) >= 2]
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
            revision=plan.base.pinned.get("revision") if plan.base_name == plan.base.label else None,
            task=peft.task_type(plan.base.config),
            bias=self.kept.biases,
            modules_to_save=saved,
            fan_in_fan_out=any(unit.flipped and unit.kind == "linear" for unit in plan.units.values()),
            dora=plan.settings.dora,
            token_indices={plan.module(n): found.token_rows for n, found in self.found.items() if found.token_rows},
        )

    def _check_loads(self, document: Mapping[str, Any]) -> None:
        """Hold the adapter against what its server loads, as ``surgery verify --for`` would.

        Raises:
            VerificationError: it would not load, or do something else.
        """
        specs = {key: tensor.spec for key, tensor in self.tensors.items()}
        server = self.plan.settings.server
        for problem in serving.problems(server, document, specs):
            if problem.level != "note":
                raise VerificationError(
                    f"the adapter would not do in {servers.server_named(server).title} what it should: {problem}",
                    file=self.plan.tuned_label,
                )


def _zeros(unit: Unit, rank: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Make factors of zeros."""
    kind = numerics.DTYPES[dtype]
    return tuple(torch.zeros(unit.experts, rank, side, dtype=kind) for side in unit.matrix)  # type: ignore[return-value]


def _closed(modules: set[str], all_modules: set[str]) -> set[str]:
    """Add the modules that PEFT would wrap too, because it compares name endings without a dot."""
    return {module for module in all_modules for entry in modules if module.endswith(entry)}
