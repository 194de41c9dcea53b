"""How good an extracted adapter is: numbers by tensor, and tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import FormatError
from surgery.report import Table, join_shown, percent
from surgery.roles import ROLES
from surgery.tensor import human_bytes


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
    excess: float = 0.0
    """Certified bound on the relative excess of the error over the best of this rank, before rounding."""


@dataclass(frozen=True)
class ExtractionReport:
    """How good an extracted adapter is."""

    rank: str
    rows: tuple[Row, ...]
    base_norm: float
    """‖W‖ of all compared base tensors."""
    tolerance: float = 1e-3
    """Relative excess over the best possible that was allowed to each factorisation."""
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
    def excess(self) -> float:
        """Certified bound on the relative excess of any factorisation's error over the best possible at its rank."""
        return max((row.excess for row in self.rows), default=0.0)

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
        ordered = sorted(groups.items(), key=lambda item: (ROLES.index(item[0][0]), item[0][1]))
        lines = [_group_line(role, how, rows, self.energy) for (role, how), rows in ordered]
        total = human_bytes(sum(row.nbytes for row in self.rows))
        lines.append(("all", "", "", str(len(self.rows)), "100 %", percent(self.kept), f"{self.error:.4f}", total))
        columns = ("weights", "stored as", "rank", "tensors", "share of ‖Δ‖²", "kept", "rel. error", "bytes")
        return Table(f"What the adapter keeps ({self.title})", columns, tuple(lines))

    @property
    def title(self) -> str:
        """The rule, and the ranks that it came to."""
        ranks = sorted({row.rank for row in self.rows if row.how == "lora"})
        rule = f"rank {self.rank}" if self.rank.isdigit() or self.rank == "full" else self.rank
        if not ranks or self.rank == str(ranks[-1]):
            return rule
        return f"{rule}: rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")

    @property
    def option(self) -> str:
        """The rule as the command line takes it."""
        if self.rank == "noise floor":
            return "--noise-floor"
        kind, _, value = self.rank.partition(" ")
        return f"--{kind} {value.replace(' ', '')}" if value else f"--rank {self.rank}"

    def document(self) -> dict[str, Any]:
        """Return everything, for ``--json`` and the record."""
        kept, following = self.kept_by_lora
        return {
            "rank": self.rank,
            "energy_kept": self.kept,
            "relative_error": self.error,
            "lora_energy_kept": kept,
            "lora_energy_kept_at_twice_the_rank": following,
            "certified_excess": self.excess,
            "relative_delta": math.sqrt(self.energy) / self.base_norm if self.base_norm else 0.0,
            "tensors": [
                {
                    "name": row.name, "role": row.role, "stored_as": row.how, "rank": row.rank, "bytes": row.nbytes,
                    "share": row.energy / self.energy if self.energy else 0.0,
                    "relative_error": _relative(row.residual, row.energy),
                    **({"certified_excess": row.excess, "relative_error_at_twice_the_rank": _relative(row.next_residual, row.energy)}
                       if row.how == "lora" else {}),
                    **({"why": row.why} if row.why else {}),
                }
                for row in self.rows
            ],
        }  # fmt: skip

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> ExtractionReport:
        """Return a report from what :meth:`document` says, in units of the whole change.

        Raises:
            FormatError: it is not such a document.
        """
        try:
            rows = tuple(_row(entry) for entry in document["tensors"])
            change = float(document["relative_delta"])
            return cls(str(document["rank"]), rows, 1.0 / change if change else 0.0)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the record's report is malformed: {error}") from None

    def _repr_html_(self) -> str:
        return self.table().html()


def _row(entry: Mapping[str, Any]) -> Row:
    share = float(entry["share"])
    error = float(entry["relative_error"])
    following = float(entry.get("relative_error_at_twice_the_rank", error))
    return Row(
        str(entry["name"]), str(entry["role"]), str(entry["stored_as"]), int(entry["rank"]), share,
        share * error**2, share * following**2, int(entry["bytes"]), str(entry.get("why", "")),
        float(entry.get("certified_excess", 0.0)),
    )  # fmt: skip


def _relative(residual: float, energy: float) -> float:
    return math.sqrt(residual / energy) if energy else 0.0


def _group_line(role: str, how: str, rows: Sequence[Row], total: float) -> tuple[str, ...]:
    energy = math.fsum(row.energy for row in rows)
    residual = math.fsum(row.residual for row in rows)
    kept = 1 - residual / energy if energy else 1.0
    return (
        role, how, _span([row.rank for row in rows if row.rank]), str(len(rows)), percent(energy / total if total else 0.0), percent(kept),
        f"{math.sqrt(max(1 - kept, 0.0)):.4f}", human_bytes(sum(row.nbytes for row in rows)),
    )  # fmt: skip


def _span(ranks: Sequence[int]) -> str:
    """Write the ranks of several weights.

    >>> _span([8, 8]), _span([5, 21, 8]), _span([])
    ('8', '5–21', '')
    """
    if not ranks:
        return ""
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"


def bound(excess: float) -> str:
    """Write a certified excess, rounded up to a power of ten.

    >>> bound(0.00031), bound(0.0), bound(3e-9)
    ('0.1 %', '0.0001 %', '0.0001 %')
    """
    return percent(10.0 ** max(math.ceil(math.log10(max(excess, 1e-6)) - 1e-9), -6))


def left_out_line(report: ExtractionReport) -> str:
    """Say what an adapter lacks, and how much of the change that is; empty where it lacks nothing."""
    left = [row for row in report.rows if row.how == "left out"]
    if not left:
        return ""
    share = math.fsum(row.energy for row in left) / report.energy
    return f"Left out ({percent(share)} of ‖Δ‖²): {join_shown([row.name for row in left], 10)}."


def summary(report: ExtractionReport) -> str:
    """Say in one line what the rank kept, and what the next one would."""
    kept, following = report.kept_by_lora
    ranks = sorted({row.rank for row in report.rows if row.how == "lora"})
    if not ranks:
        return f"the adapter keeps {percent(report.kept)} of ‖Δ‖²"
    proof = f"within {bound(report.excess)} of the best possible, certified"
    if report.rank == "full":
        return f"the adapter keeps {percent(report.kept)} of ‖Δ‖², {proof}"
    if len(ranks) == 1:
        head, twice = f"rank {ranks[0]} keeps", f"{2 * ranks[0]}"
    else:
        head, twice = "these ranks keep", "twice as many"
    more = "" if percent(following) == percent(kept) else f"; {twice} would keep {percent(following)} or more"
    return f"{head} {percent(kept)} of the factored weights' ‖Δ‖²{more}\nevery error is {proof}"
