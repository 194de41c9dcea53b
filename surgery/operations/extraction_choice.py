"""Choosing: the rule sees all spectra, and what it used up is measured deeper until the choice stands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from surgery.algorithms.ranks import Spectrum
from surgery.errors import MismatchError
from surgery.formats import peft, safetensors, servers
from surgery.operations.extraction_layout import Kept, full_key, stem_of, unit_of
from surgery.operations.extraction_measure import Measurement
from surgery.operations.extraction_units import Unit
from surgery.report import join_shown
from surgery.tensor import TensorSpec, human_bytes


class Choice:
    """The rank of every unit, by its weight's name; none for what is left out."""

    def __init__(self, measured: Measurement, kept: Kept) -> None:
        self.measured = measured
        self.kept = kept
        self.plan = measured.plan
        self.found = measured.found

        self.whole: set[str] = set()
        """Tied embeddings that are worth storing in full, once :meth:`ranks` was asked for."""

    def ranks(self) -> dict[str, int]:
        """Choose, deepening spectra that the rule used up.

        Raises:
            MismatchError: the budget is too small for what is no factor.
        """
        while True:
            groups = self._groups()
            spectra = [self._spectrum(group) for group in groups]
            chosen = self._choose(groups, spectra)
            short = [g for g, s, rank in zip(groups, spectra, chosen, strict=True) if s.open_at(rank)]
            if not short:
                break
            self.measured.deepen({unit: 2 * self._depth(unit) for group in short for unit in group})
        ranks = {
            unit.name: rank if len(group) > 1 else min(rank, unit.limit)
            for group, rank in zip(groups, chosen, strict=True) if rank
            for unit in group
        }  # fmt: skip
        if not self._weighs_wholes:
            self.whole = self._worth_their_bytes(ranks)
        self._note_floors()
        return self._evened(ranks) if self.plan.rule.portable and ranks else ranks

    def _note_floors(self) -> None:
        if not self.plan.rule.noise_floor:
            return
        unsure = {name: f.factors.doubt for name, f in self.found.items() if f.factors and f.factors.doubt}
        if unsure:
            example = next(iter(unsure))
            self.plan.notes.append(
                f"the noise floor is uncertain for {len(unsure)} weights, as for {example}: {unsure[example]}"
            )

    def _evened(self, ranks: dict[str, int]) -> dict[str, int]:
        """Give all modules one rank, and those zeros that the server cannot do without."""
        plan, server = self.plan, self.plan.settings.server
        rank = servers.one_rank(ranks.values(), server)
        if not plan.rule.noise_floor:  # what would be padded with zeros may as well be more of the delta
            self.measured.deepen({self.measured.factors(name).unit: rank for name in ranks})
        partners = self._partners(ranks)
        title, option = servers.server_named(server).title, servers.start_with(server, rank)
        if option:
            plan.notes.append(f"{title} must be started with {option}")
        if partners:
            modules = join_shown([plan.module(name) for name in partners])
            plan.notes.append(f"{title} needs them too, so they have factors of zeros: {modules}")
        return dict.fromkeys([*ranks, *partners], rank)

    def _partners(self, names: Iterable[str]) -> list[str]:
        """Name the weights that get zeros because the server cannot do without them."""
        plan = self.plan
        weights = {plan.module(name): name for name in plan.base.tensors if name.endswith(".weight")}
        modules = servers.missing_partners(plan.settings.server, [plan.module(name) for name in names], weights)
        return [weights[module] for module in modules]

    def _stored(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Return the ranks that factors are written with: padded to one where the layout asks for it."""
        if not self.plan.rule.portable or not ranks:
            return dict(ranks)
        return dict.fromkeys([*ranks, *self._partners(ranks)], max(ranks.values()))

    def _groups(self) -> list[list[Unit]]:
        """Collect the units that moved, by group; of a group that moved at all, every member."""
        groups: dict[str, list[Unit]] = {}
        for found in self.found.values():
            if found.factors is not None:
                unit = found.factors.unit
                groups.setdefault(unit.group or unit.name, []).append(unit)
        return [units for units in groups.values() if any(self.found[unit.name].row.energy for unit in units)]

    def _depth(self, unit: Unit) -> int:
        return self.measured.factors(unit.name).depth

    def _spectrum(self, group: Sequence[Unit]) -> Spectrum:
        members = [self.measured.factors(unit.name) for unit in group]
        known = min((f.depth for f in members if f.depth < f.unit.limit), default=max(f.depth for f in members))
        squares = np.zeros(known)
        for factors in members:
            part = factors.squares[:known]
            squares[: len(part)] += part
        limit = max(unit.limit for unit in group)
        floors = [f.noise_rank for f in members if f.noise_rank is not None]
        if floors and max(floors) < known:  # the edge of the noise was found
            limit = max(floors)
            squares = squares[:limit]
        item = TensorSpec("", self.plan.dtype, ()).itemsize
        cost = item * sum(unit.cost for unit in group)
        return self.plan.rule.spectrum(squares, math.fsum(f.energy for f in members), cost, limit)

    @property
    def _weighs_wholes(self) -> bool:
        """Whether the rule itself weighs whole embeddings against components of factors."""
        rule = self.plan.rule
        return (rule.budget is not None or rule.error is not None) and not rule.portable

    def _wholes(self) -> list[str]:
        """Name the tied embeddings that moved all over."""
        return [name for name, found in self.found.items() if found.whole]

    def _worth_their_bytes(self, ranks: Mapping[str, int]) -> set[str]:
        """Choose the whole embeddings of which a byte brings at least what the factors' last one does."""
        rates = [
            float(factors.squares[min(rank, factors.depth) - 1]) / factors.unit.cost
            for name, rank in ranks.items() for factors in [self.measured.factors(name)] if factors.energy
        ]  # fmt: skip
        price = math.inf if self.plan.rule.budget is not None else min(rates, default=0.0)
        return {name for name in self._wholes() if self.found[name].row.energy / self._numel(name) >= price}

    def _numel(self, name: str) -> int:
        return self.plan.base.tensors[name].spec.numel

    def _choose(self, groups: Sequence[Sequence[Unit]], spectra: Sequence[Spectrum]) -> list[int]:
        rule, wholes = self.plan.rule, self._wholes() if self._weighs_wholes else []
        energy = math.fsum(found.row.energy for found in self.found.values())
        fixed = math.fsum(
            found.row.residual for name, found in self.found.items() if found.factors is None and name not in wholes
        )
        # A whole embedding is one item: all of its energy for all of its bytes.
        items = [*spectra, *map(self._as_item, wholes)]
        if rule.budget is None:
            return self._parted(wholes, rule.choose(items, fixed=fixed, energy=energy))
        room = rule.budget - self._bytes_at(groups, [0] * len(groups))
        if room <= 0 and items:
            raise MismatchError(
                f"biases, norms and trained rows alone take {human_bytes(rule.budget - room)} of the budget's "
                f"{human_bytes(rule.budget)}",
                file=self.plan.tuned_label,
                mend="raise --budget, or --exclude some",
            )
        # The header grows with the number of tensors: the most room that leaves enough for it is looked for from above.
        fits, too_much, trial = 0, room + 1, room
        while too_much - fits > max(rule.budget // 1000, 16):
            ranks = self._parted(wholes, rule.choose(items, budget=trial, energy=energy))
            over = self._bytes_at(groups, ranks) - rule.budget
            if over > 0:
                too_much, trial = trial, max(trial - over, (fits + trial) // 2)
            else:
                fits, trial = trial, (trial + too_much) // 2
        return self._parted(wholes, rule.choose(items, budget=fits, energy=energy))

    def _as_item(self, name: str) -> Spectrum:
        energy = self.found[name].row.energy
        return Spectrum(np.array([energy]), energy, self.plan.tuned[name].spec.nbytes, 1)

    def _parted(self, wholes: Sequence[str], chosen: list[int]) -> list[int]:
        """Take the whole embeddings that were chosen, and leave the ranks."""
        count = len(chosen) - len(wholes)
        if self._weighs_wholes:
            self.whole = {name for name, taken in zip(wholes, chosen[count:], strict=True) if taken}
        return chosen[:count]

    def _bytes_at(self, groups: Sequence[Sequence[Unit]], ranks: Sequence[int]) -> int:
        """Size of the weights file at these ranks, header included."""
        plan = self.plan
        specs = [tensor.spec for tensor in self.measured.rows.values()]
        for name in self.whole if any(ranks) else ():
            tuned = plan.tuned[name].spec
            specs.append(TensorSpec(peft.token_rows_key(plan.module(name)), tuned.dtype, tuned.shape))
        chosen = {unit.name: rank for group, rank in zip(groups, ranks, strict=True) if rank for unit in group}
        adapted = self._stored(chosen)
        for name, rank in adapted.items():
            unit = unit_of(plan, self.found, name)
            for suffix, shape in zip(unit.suffixes, unit.shapes(rank), strict=True):
                specs.append(TensorSpec(stem_of(plan, unit, adapted) + suffix, plan.dtype, shape))
        for name in self.kept.names:
            tensor = plan.tuned.get(name) or plan.base.tensors[name]
            specs.append(TensorSpec(full_key(plan, name, adapted), tensor.spec.dtype, tensor.spec.shape))
        prefix, _ = safetensors.build_header(specs, {"format": "pt"})
        return len(prefix) + sum(spec.nbytes for spec in specs)
