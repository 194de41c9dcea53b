"""Pairs: one tensor before and after, read block by block and fingerprinted on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from surgery import numerics, provenance
from surgery.algorithms.noise import RoundingNoise
from surgery.errors import NumericError
from surgery.roles import role_of
from surgery.tensor import LazyTensor

BLOCK = 1 << 18
"""Elements at a time: fewer, and what Python does for each block takes longer than reading it."""


class Pair:
    """One tensor before and after.

    Differences are taken in float32, which holds every bfloat16 and float16 exactly: they are right to 2⁻²⁴ of
    themselves. Where a side is float64 they are taken in float64.

    Args:
        base: before.
        tuned: after, of the same shape.
        labels: names of the two checkpoints, for messages.
    """

    def __init__(self, base: LazyTensor, tuned: LazyTensor, labels: tuple[str, str]) -> None:
        self._labels = labels
        self.base = base if isinstance(base, provenance.Held) else provenance.Traced(base)
        self.tuned = provenance.Traced(tuned)
        self.spec = base.spec
        self.role = role_of(base.spec)
        self.weight_energy = 0.0
        """‖W‖², once all blocks were read."""
        self.delta_energy = 0.0
        """‖ΔW‖², once all blocks were read."""

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.base.spec.nbytes + self.tuned.spec.nbytes

    def blocks(
        self, out: torch.Tensor | None = None, noises: Sequence[RoundingNoise] = ()
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (start, W, ΔW), flat: whole rows, valid until the next.

        Args:
            out: where ΔW goes, whole: flat, float32. By default each block of it is forgotten.
            noises: told of the fine-tune's rows: one for each of the equal matrices that the tensor consists of.

        Raises:
            NumericError: a value is NaN or infinite, or a difference overflows.
        """
        spec, weights, deltas = self.spec, [], []
        wide = torch.float64 if "F64" in (self.base.spec.dtype, self.tuned.spec.dtype) else torch.float32
        unit = math.lcm(self.base.unit, self.tuned.unit, _width(spec.shape, noises))
        step = max(BLOCK // unit, 1) * unit
        for start in range(0, spec.numel, step):
            stop = min(start + step, spec.numel)
            old = numerics.widen(self.base, start, stop, numerics.scratch("old", stop - start, wide))
            direct = out is not None and wide == torch.float32
            place = out[start:stop] if direct and out is not None else numerics.scratch("delta", stop - start, wide)
            delta = numerics.widen(self.tuned, start, stop, place)
            _tell(noises, delta, start)
            delta.sub_(old)
            self._check(old, delta)
            weights.append(float(old @ old))  # to set ‖ΔW‖ in proportion: float32 will do
            deltas.append(numerics.squared_norm(delta))
            if out is not None and not direct:
                self._check(old, out[start:stop].copy_(delta))
            yield start, old, delta
        self.weight_energy, self.delta_energy = math.fsum(weights), math.fsum(deltas)

    def _check(self, old: torch.Tensor, delta: torch.Tensor) -> None:
        low, high = delta.aminmax()
        if math.isfinite(low) and math.isfinite(high):
            return
        if not old.isfinite().all():
            what, where = "holds NaN or Inf", self._labels[0]
        elif delta.isnan().any() or delta.dtype == torch.float64:
            what, where = "holds NaN or Inf", self._labels[1]
        else:
            what, where = "holds NaN or Inf, or differs by more than float32 can hold", self._labels[1]
        raise NumericError(what, file=where, tensor=self.spec.name, mend="--exclude it, or mend the model")

    def energy(self) -> float:
        """Return ‖ΔW‖²."""
        for _ in self.blocks():
            pass
        return self.delta_energy

    def delta(self, *noises: RoundingNoise) -> torch.Tensor:
        """Return ΔW whole, in float32 and its own shape: valid until this thread's next; see :meth:`blocks`."""
        flat = numerics.scratch("whole delta", self.spec.numel, torch.float32)
        for _ in self.blocks(flat, noises):
            pass
        return flat.view(self.spec.shape)


def _width(shape: tuple[int, ...], noises: Sequence[RoundingNoise]) -> int:
    """Elements that belong together: a row of the tensor, or of the matrices that it is taken for."""
    return noises[0].shape[1] if noises else max(shape[-1], 1) if shape else 1


def _tell(noises: Sequence[RoundingNoise], tuned: torch.Tensor, start: int) -> None:
    """Give each matrix's noise the rows of it that are in a block."""
    if not noises:
        return
    height, width = noises[0].shape
    rows = tuned.view(-1, width)
    done, first = 0, start // width
    while done < len(rows):
        number, row = divmod(first + done, height)
        count = min(height - row, len(rows) - done)
        noises[number].update(rows[done : done + count].to(torch.float64, copy=True))
        done += count
