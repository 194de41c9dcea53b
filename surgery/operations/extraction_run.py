"""Running an extraction: measure, choose ranks, lay out.

*Measure*: every tensor is read once, before and after; what LoRA can hold is factored as deep as the rule first looks,
into the spool. *Choose*: the rule sees all spectra; where it used all that is known of one, that weight is read again
and factored twice as deep, until the choice stands. *Lay out*: the chosen components take the names and shapes that
PEFT gives them, beside what it stores in full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from surgery import execute, provenance
from surgery.adapter import Adapter
from surgery.errors import MismatchError
from surgery.formats import model_card as card_file
from surgery.operations.card import Subject, model_card
from surgery.operations.extraction_choice import Choice
from surgery.operations.extraction_layout import Layout, kept_in_full
from surgery.operations.extraction_measure import Found, Measurement, in_parallel, largest_first
from surgery.operations.extraction_plan import Extraction
from surgery.operations.extraction_report import ExtractionReport
from surgery.report import join_shown
from surgery.sources.local import pinned
from surgery.sources.remote import expect

REACHED = 1e-3
"""Relative distance from the error asked for that counts as having reached it."""


def run_extraction(plan: Extraction, progress: execute.Progress) -> Adapter:
    """Do all three steps for one fine-tune; see :meth:`surgery.operations.extract_lora.Extraction.run`."""
    measured = Measurement(plan)

    def work(name: str) -> None:
        measured.examine(name, plan.base.tensors[name])
        progress.advance(plan.base.tensors[name].spec.nbytes + plan.tuned[name].spec.nbytes)

    expect(side[name] for name in plan.names for side in (plan.base.tensors, plan.tuned))
    progress.start(plan.bytes_read)
    try:
        in_parallel(largest_first(plan.base, plan.names), work, plan.settings.jobs)
    finally:
        progress.finish()
    return compose(measured)


def compose(measured: Measurement) -> Adapter:
    """Choose ranks and lay the adapter out, once every tensor was examined.

    Raises:
        MismatchError: nothing differs, nothing of it fits, or the budget is too small.
    """
    plan = measured.plan
    measured.found = {name: measured.found[name] for name in plan.names}  # threads finish in any order
    found = measured.found
    plan.notes.extend(one.note for one in found.values() if one.note)
    if not plan.resized and not any(one.row.energy for one in found.values()):
        raise _nothing_to_extract(plan, found)
    kept = kept_in_full(plan, found)
    choice = Choice(measured, kept)
    ranks = choice.ranks()
    layout = Layout(measured, ranks, choice.whole, kept)
    document = layout.compose()
    rows = tuple(one.row for one in found.values())
    weight = math.fsum(one.weight_energy for one in found.values())
    report = ExtractionReport(plan.rule.name, rows, math.sqrt(weight), plan.settings.tolerance, tuple(plan.notes))
    if plan.rule.error is not None and report.error > plan.rule.error * (1 + REACHED):
        missed = f"the error asked for, {plan.rule.error:g}, is out of reach: {report.error:.4g} is left; {_in_the_way(plan)}"
        report = replace(report, notes=(*report.notes, missed))
    prints = {name: one.prints for name, one in sorted(found.items())}
    return Adapter(
        layout.tensors,
        document,
        label=f"{plan.tuned_label}-lora-{plan.rule.slug}",
        stored=[*plan.base.stored, *plan.tuned_stored],
        files={
            card_file.FILE: card_file.compose(
                model_card(Subject("adapter", _record(plan, {}, report, prints), document))
            )
        },
        record=lambda outputs: _record(plan, outputs, report, prints),
        taken_from={name: before for name, (before, _) in prints.items()},
        report=report,
    )


def _in_the_way(plan: Extraction) -> str:
    """Say what keeps an error from being reached, and how to mend it."""
    if plan.rule.portable or plan.rule.max_rank is not None or plan.rule.noise_floor or plan.left_out:
        return "what is left out or bounded is the rest"
    return (
        f"factors are rounded to {plan.dtype}, --dtype F32 rounds least"
        if plan.dtype != "F32"
        else "rounding is the rest"
    )


def _nothing_to_extract(plan: Extraction, found: Mapping[str, Found]) -> MismatchError:
    codes = [name for name, one in found.items() if one.note]
    if codes:
        return MismatchError(
            f"only tensors that an adapter cannot hold differ: {join_shown(codes)}", file=plan.tuned_label
        )
    return MismatchError(f"no differences: all {len(found)} compared tensors are equal", file=plan.tuned_label)


def _record(
    plan: Extraction, outputs: Mapping[str, str], report: ExtractionReport, prints: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    settings = plan.settings
    before = {name: pair[0] for name, pair in prints.items()}
    after = {name: pair[1] for name, pair in prints.items()}
    return provenance.record(
        "extract-lora",
        parameters={
            "rank": plan.rule.name, "dtype": plan.dtype, "seed": settings.seed, "tolerance": settings.tolerance,
            "exact": settings.exact, "for": settings.server,
        },
        inputs=[
            {"role": "base", "name": plan.base.label, **plan.base.pinned, "fingerprint": provenance.combine(before)},
            {"role": "fine-tune", "name": plan.tuned_label, **pinned(plan.tuned_stored), "fingerprint": provenance.combine(after)},
        ],
        tensors=outputs,
        base=before,
        report=report.document(),
    )  # fmt: skip
