"""``extract-delta --lossy``: a fine-tune as quantised factors beside its base, with the error that was measured."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from surgery import execute, numerics, provenance
from surgery.adapter import Adapter
from surgery.binding import bind
from surgery.checkpoint import Checkpoint, Source, default_jobs, open_checkpoint
from surgery.delta import Applied
from surgery.errors import UsageError
from surgery.lossy import BITS, OPERATION, SUFFIX, dequantised, is_factor, quantise
from surgery.names import align, parse_renames
from surgery.operations.extract_lora import extract_lora
from surgery.plan import NO_LIMIT
from surgery.tensor import LazyTensor, any_range, read_bytes


@dataclass(frozen=True)
class LossyDelta:
    """A lossy delta, measured: how near ``base + delta`` comes to the fine-tune, tensor by tensor."""

    adapter: Adapter
    """What it stands for; merges like any adapter."""
    tensors: Mapping[str, LazyTensor]
    """What is stored."""
    bits: str
    energies: Mapping[str, tuple[float, float]]
    """By tensor: ‖Δ‖², and ‖Δ − stored‖² before the output's rounding."""
    parameters: Mapping[str, Any]
    base: Checkpoint
    tuned: Checkpoint

    @property
    def error(self) -> float:
        """Relative error ‖Δ − stored‖ / ‖Δ‖ over everything, what is left out included."""
        total = math.fsum(energy for energy, _ in self.energies.values())
        return math.sqrt(math.fsum(left for _, left in self.energies.values()) / total) if total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Any]:
        """Write it as one file, whole or not at all.

        Raises:
            UsageError: the name does not end in ``.lossy.safetensors``.
        """
        check_lossy_name(out)
        return execute.publish(
            self.tensors, out, record=self._record, max_shard_size=NO_LIMIT, workers=default_jobs(), overwrite=overwrite,
            sources=[*self.base.stored, *self.tuned.stored],
        )  # fmt: skip

    def _record(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        return provenance.record(
            OPERATION,
            parameters={**self.parameters, "adapter": self.adapter.document},
            inputs=[{"role": "base", "name": self.base.label}, {"role": "fine-tune", "name": self.tuned.label}],
            tensors=fingerprints,
            base=self.adapter.taken_from,
            error={
                "relative": self.error,
                "tensors": {
                    name: math.sqrt(left / energy) for name, (energy, left) in sorted(self.energies.items()) if energy
                },
            },
        )  # fmt: skip


def check_lossy_name(out: str | os.PathLike[str]) -> None:
    """Refuse a name that does not say what the file is.

    Raises:
        UsageError: it does not end in ``.lossy.safetensors``.
    """
    if not os.fspath(out).endswith(SUFFIX):
        raise UsageError(f"a lossy delta's name ends in {SUFFIX}, so that nobody takes it for an exact one", file=out)


def extract_lossy(
    base: Source,
    tuned: Source,
    *,
    bits: str = "int8",
    rank: int = 64,
    rename: tuple[str, ...] = (),
    jobs: int | None = None,
    progress: execute.Progress | None = None,
) -> LossyDelta:
    r"""Keep a fine-tune as low-rank factors in small integers: a few hundredths of its bytes, and not exact.

    Every matrix's difference is factored, ``Δ ≈ B A``, and each component of ``B`` and ``A`` quantised to
    ``round(x / s)`` with ``s = max |x| / 127``; with ``int4`` all but the first eighth of the components to
    ``s = max |x| / 7``. What changed and is no matrix is stored as :func:`surgery.extract_lora` stores it. Then the error is
    measured against the fine-tune, from what is stored.

    Args:
        base: the checkpoint before training.
        tuned: the checkpoint after it.
        bits: ``int8`` or ``int4``.
        rank: components of each matrix.
        rename: ``OLD=NEW`` rules for the fine-tune's names.
        jobs: threads.
        progress: somebody who watches.

    Raises:
        UsageError: unknown ``bits``.
        MismatchError: nothing differs.

    Reference:
        Ping et al., "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models", 2024,
        arXiv:2406.08903: more bits for the first singular vectors. Departs from the paper: two widths, no calibration data.
    """
    if bits not in BITS:
        raise UsageError(f"--lossy takes {' or '.join(BITS)}, not {bits!r}")
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    adapter = extract_lora(before, after, rank=rank, dtype="F32", rename=rename, jobs=jobs, progress=progress)
    stored: dict[str, LazyTensor] = {}
    for key, tensor in adapter.tensors.items():
        if is_factor(key, tensor.spec):
            values = np.frombuffer(read_bytes(tensor), np.float32).reshape(tensor.spec.shape)
            stored |= quantise(key, values, bits)
        else:
            stored[key] = tensor
    quantised = Adapter(
        dequantised(stored), adapter.document, label=f"{after.label}-{bits}", stored=adapter.stored,
        taken_from=adapter.taken_from, report=adapter.report,
    )  # fmt: skip
    energies = {row.name: (row.energy, row.residual) for row in adapter.report.rows}
    energies |= _measured(before, after, quantised, rename)
    return LossyDelta(quantised, stored, bits, energies, {"bits": bits, "rank": rank}, before, after)


def _measured(
    base: Checkpoint, tuned: Checkpoint, adapter: Adapter, rename: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    """Measure ‖Δ‖² and ‖Δ − stored‖² of every weight that the adapter changes, in float64."""
    spelled = {known: name for name, known in align(base.tensors, tuned.tensors, parse_renames(rename)).names.items()}
    found = {}
    for name, updates in bind(adapter, base).updates.items():
        weight, wanted = base.tensors[name], tuned.tensors[spelled[name]]
        if weight.spec.shape != wanted.spec.shape:
            continue  # its rows were measured when they were stored
        made = Applied(any_range(weight), updates, "F64")
        found[name] = _squares(weight, wanted, made)
    return found


def _squares(weight: LazyTensor, wanted: LazyTensor, made: LazyTensor) -> tuple[float, float]:
    step = max(numerics.BLOCK // made.unit, 1) * made.unit
    weight, wanted = any_range(weight), any_range(wanted)
    energy = left = 0.0
    for start in range(0, weight.spec.numel, step):
        stop = min(start + step, weight.spec.numel)
        target = numerics.widen(wanted, start, stop, torch.empty(stop - start, dtype=torch.float64))
        old = numerics.widen(weight, start, stop, torch.empty(stop - start, dtype=torch.float64))
        new = torch.frombuffer(read_bytes(made, start, stop), dtype=torch.float64)
        energy += float((target - old).square().sum())
        left += float((target - new).square().sum())
    return energy, left
