"""What a delta can be, and a tensor with deltas applied.

An *update* adds ``coeff · Δ`` to the float64 values of a range of one weight:

* :class:`LowRank`: ``Δ = scaling · B @ A`` (LoRA), for linear weights, transposed ones, embeddings and convolutions;
* :class:`ExpertsLowRank`: the same for every matrix of a fused 3-D weight;
* :class:`Magnitude`: DoRA, ``Δ = m / ‖W + s·BA‖ ∘ (W + s·BA) − W``;
* :class:`Dense`: ``Δ`` itself;
* :class:`Replacement`: ``Δ = new − base`` (biases, norms, whole modules);
* :class:`Rows`: ``Δ = new − base`` on some rows (trained tokens).

:class:`Applied` is a lazy tensor: the base's values widened to float64, all updates added, rounded once. Every product
of two bfloat16, float16 or float32 values is exact in float64 or off by 2⁻⁵³, so neither threads nor the BLAS decide
a bit of the result.

No file, no name rule and no PEFT configuration may enter this room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from surgery import numerics
from surgery.errors import NumericError, SurgeryError
from surgery.tensor import LazyTensor, TensorSpec, any_range, byte_range


class Update(Protocol):
    """Something that changes one weight."""

    @property
    def unit(self) -> int:
        """Elements that can only be updated together."""
        ...

    @property
    def resident(self) -> int:
        """Bytes held while its weight is worked on."""
        ...

    def load(self) -> Loaded:
        """Read what it needs, once for a weight and thread."""
        ...


class Loaded(Protocol):
    """An update whose values are in memory."""

    def add_to(self, values: torch.Tensor, base: torch.Tensor, start: int) -> None:
        """Add ``coeff · Δ`` to ``values``, the float64 elements from ``start`` on; ``base`` has them untouched."""
        ...


class Sight(Protocol):
    """What a witness is shown of one range of a weight."""

    def block(self, start: int, loaded: Sequence[Loaded], made: Made) -> None:
        """Be shown the elements from ``start`` on; all buffers are used again for the next block."""
        ...

    def end(self) -> None:
        """Be told that the range is done."""
        ...


class Witness(Protocol):
    """Somebody who looks on while a weight with deltas is made."""

    resident: int
    """Bytes that looking on takes while a range is made."""

    def begin(self, start: int, stop: int) -> Sight:
        """Be told that a range is about to be made; called from several threads."""
        ...


@dataclass(frozen=True, slots=True)
class Made:
    """One block of a weight, before and after."""

    base: torch.Tensor
    """Old values, float64."""
    values: torch.Tensor
    """``W + Σ coeff·Δ`` before rounding, float64."""
    known: torch.Tensor
    """The old block in its own dtype."""
    merged: torch.Tensor
    """The new one."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``Δ = scaling · B @ A``, laid out as the weight is.

    Args:
        a: ``(r, in)``, or for convolutions ``(r, in, …)``.
        b: ``(out, r)``, or for convolutions ``(out, r, 1, …)``.
        scaling: ``alpha / r`` or what the configuration says.
        transposed: the weight is ``(in, out)``: Conv1D layers, and embeddings ``(vocab, dim)``.
        coeff: the adapter's coefficient in the merge.
    """

    a: LazyTensor
    b: LazyTensor
    scaling: float
    transposed: bool = False
    coeff: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """The delta's shape as a matrix, in the weight's layout."""
        out, into = self.b.spec.shape[0], self.a.spec.numel // max(self.a.spec.shape[0], 1)
        return (into, out) if self.transposed else (out, into)

    @property
    def unit(self) -> int:
        """One row of the weight."""
        return max(self.shape[1], 1)

    @property
    def resident(self) -> int:
        """Both factors in float64."""
        return 8 * (self.a.spec.numel + self.b.spec.numel)

    def load(self) -> LoadedLowRank:
        """Read the factors and fold scaling and coefficient into the left one."""
        a = numerics.load_wide(self.a).reshape(self.a.spec.shape[0], -1)
        b = numerics.load_wide(self.b).reshape(self.b.spec.shape[0], -1)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return LoadedLowRank(left, right, self.scaling * self.coeff)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedLowRank:
    """Factors in float64: ``Δ[i:j] = scale · left[i:j] @ right``."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @property
    def terms(self) -> int:
        """Products summed for one element."""
        return self.right.shape[0]

    def reach(self) -> float:
        """Bound ``Σ |products|`` of any element: rows' norms times columns' (Cauchy and Schwarz)."""
        return abs(self.scale) * _largest_norm(self.left, 1) * _largest_norm(self.right, 0)

    def add_to(self, values: torch.Tensor, base: torch.Tensor, start: int) -> None:
        """Add the product of the range's rows."""
        width = self.right.shape[1]
        rows = values.view(-1, width)
        first = start // width
        torch.addmm(rows, self.left[first : first + rows.shape[0]], self.right, alpha=self.scale, out=rows)


def _largest_norm(matrix: torch.Tensor, dim: int) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=dim).max()) if matrix.numel() else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsLowRank:
    """``Δ_e = scaling · B_e @ A_e`` for each expert ``e`` of a fused weight ``(E, ·, ·)``, as PEFT lays factors out.

    Args:
        a: ``(E·r, in)``: row ``e·r + k``.
        b: ``(out, r·E)``: column ``k·E + e``.
        experts: ``E``.
        scaling: ``alpha / r``.
        transposed: the weight is ``(E, in, out)``.
        coeff: the adapter's coefficient in the merge.
    """

    a: LazyTensor
    b: LazyTensor
    experts: int
    scaling: float
    transposed: bool = False
    coeff: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """The delta's shape, in the weight's layout."""
        out, into = self.b.spec.shape[0], self.a.spec.shape[1]
        return (self.experts, into, out) if self.transposed else (self.experts, out, into)

    @property
    def unit(self) -> int:
        """One row of one expert."""
        return max(self.shape[2], 1)

    @property
    def resident(self) -> int:
        """Both factors in float64."""
        return 8 * (self.a.spec.numel + self.b.spec.numel)

    def load(self) -> LoadedExperts:
        """Read the factors, one pair an expert."""
        a = numerics.load_wide(self.a).reshape(self.experts, -1, self.a.spec.shape[1])
        b = numerics.load_wide(self.b).reshape(self.b.spec.shape[0], -1, self.experts).permute(2, 0, 1)
        left, right = (a.transpose(1, 2), b.transpose(1, 2)) if self.transposed else (b, a)
        return LoadedExperts(left.contiguous(), right.contiguous(), self.scaling * self.coeff)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedExperts:
    """Factors in float64: ``Δ_e[i:j] = scale · left[e, i:j] @ right[e]``."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @property
    def terms(self) -> int:
        """Products summed for one element."""
        return self.right.shape[1]

    def reach(self) -> float:
        """Bound ``Σ |products|`` of any element."""
        return abs(self.scale) * _largest_norm(self.left, 2) * _largest_norm(self.right, 1)

    def add_to(self, values: torch.Tensor, base: torch.Tensor, start: int) -> None:
        """Add the product of the range's rows, expert by expert."""
        height, width = self.left.shape[1], self.right.shape[2]
        rows = values.view(-1, width)
        first = start // width
        done = 0
        while done < len(rows):
            expert, row = divmod(first + done, height)
            count = min(height - row, len(rows) - done)
            part = rows[done : done + count]
            torch.addmm(part, self.left[expert, row : row + count], self.right[expert], alpha=self.scale, out=part)
            done += count


@dataclass(frozen=True, slots=True, eq=False)
class Magnitude:
    """DoRA: ``W' = m / ‖W + s·BA‖ ∘ (W + s·BA)``, norms over each output's weights (Liu et al. 2024, eq. 5).

    Args:
        low_rank: the direction's update (its coefficient is not used).
        magnitude: ``(out,)``.
        weight: the base weight, needed whole where its layout is transposed.
        coeff: the coefficient ``c`` of ``W + c·(W' − W)``.
    """

    low_rank: LowRank
    magnitude: LazyTensor
    weight: LazyTensor
    coeff: float = 1.0

    @property
    def unit(self) -> int:
        """One row, which is one output, or the whole weight where outputs are columns."""
        return max(self.weight.spec.numel, 1) if self.low_rank.transposed else self.low_rank.unit

    @property
    def resident(self) -> int:
        """Factors and magnitudes in float64, and a copy of the range."""
        extra = 16 * self.weight.spec.numel if self.low_rank.transposed else 16 * numerics.BLOCK
        return self.low_rank.resident + 8 * self.magnitude.spec.numel + extra

    def load(self) -> LoadedMagnitude:
        """Read factors and magnitudes."""
        low_rank = self.low_rank.load()
        plain = LoadedLowRank(low_rank.left, low_rank.right, self.low_rank.scaling)
        return LoadedMagnitude(
            plain, numerics.load_wide(self.magnitude).reshape(-1), self.low_rank.transposed, self.coeff
        )


@dataclass(frozen=True, slots=True, eq=False)
class LoadedMagnitude:
    """DoRA's parts in float64."""

    low_rank: LoadedLowRank
    magnitude: torch.Tensor
    transposed: bool
    coeff: float

    def add_to(self, values: torch.Tensor, base: torch.Tensor, start: int) -> None:
        """Add ``coeff · (W' − W)`` for the range's rows."""
        direction = base.clone()
        self.low_rank.add_to(direction, base, start)
        matrix = direction.view(-1, self.low_rank.right.shape[1])
        if self.transposed:
            factor = (self.magnitude / matrix.norm(dim=0)).unsqueeze(0)
        else:
            first = start // matrix.shape[1]
            factor = (self.magnitude[first : first + matrix.shape[0]] / matrix.norm(dim=1)).unsqueeze(1)
        matrix.mul_(factor)
        values.add_(direction.sub_(base), alpha=self.coeff)


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """``Δ = new − base``: a tensor stored in full."""

    new: LazyTensor
    coeff: float = 1.0
    unit: int = 1

    @property
    def resident(self) -> int:
        """A widened block of the new values."""
        return 8 * numerics.BLOCK

    def load(self) -> Replacement:
        """Nothing to read ahead: values come range by range."""
        return self

    def add_to(self, values: torch.Tensor, base: torch.Tensor, start: int) -> None:
        """Add ``coeff · (new − base)``."""
        new = numerics.widen(self.new, start, start + values.numel(), numerics.scratch("new", values.numel()))
        if self.coeff == 1.0:
            values.sub_(base).add_(new)  # exactly ``new`` where nothing was added before
        else:
            values.add_(new.sub_(base), alpha=self.coeff)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """``Δ`` itself, stored in full: a trained bias of LoRA (``lora_bias``)."""

    values: LazyTensor
    coeff: float = 1.0
    unit: int = 1

    @property
    def resident(self) -> int:
        """A widened block."""
        return 8 * numerics.BLOCK

    terms = 1

    def load(self) -> Dense:
        """Nothing to read ahead: values come range by range."""
        return self

    def reach(self) -> float:
        """Return the largest ``|coeff · Δ|``."""
        largest = 0.0
        for start in range(0, self.values.spec.numel, numerics.BLOCK):
            count = min(numerics.BLOCK, self.values.spec.numel - start)
            block = numerics.widen(self.values, start, start + count, numerics.scratch("new", count))
            largest = max(largest, float(block.abs().max()))
        return abs(self.coeff) * largest

    def add_to(self, values: torch.Tensor, base: torch.Tensor, start: int) -> None:
        """Add ``coeff · Δ``."""
        delta = numerics.scratch("new", values.numel())
        values.add_(numerics.widen(self.values, start, start + values.numel(), delta), alpha=self.coeff)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """``Δ = new − base`` on the rows ``indices`` of a ``(vocab, dim)`` weight; zero elsewhere.

    Args:
        indices: row numbers.
        new: ``(len(indices), dim)``.
        coeff: the adapter's coefficient.
        absolute: put ``new`` there whatever other updates did to these rows: how an unmerge restores them.
    """

    indices: tuple[int, ...]
    new: LazyTensor
    coeff: float = 1.0
    absolute: bool = False

    @property
    def unit(self) -> int:
        """One row."""
        return max(self.new.spec.shape[-1], 1)

    @property
    def resident(self) -> int:
        """The rows in float64."""
        return 8 * self.new.spec.numel

    def load(self) -> LoadedRows:
        """Read the rows, sorted by index."""
        order = sorted(range(len(self.indices)), key=self.indices.__getitem__)
        rows = numerics.load_wide(self.new)[order]
        indices = torch.tensor([self.indices[k] for k in order], dtype=torch.int64)
        return LoadedRows(indices, rows, self.coeff, self.absolute)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedRows:
    """Sorted row numbers and their new values in float64."""

    indices: torch.Tensor
    rows: torch.Tensor
    coeff: float
    absolute: bool

    def add_to(self, values: torch.Tensor, base: torch.Tensor, start: int) -> None:
        """Add the rows that lie in the range."""
        width = self.rows.shape[1]
        first, matrix = start // width, values.view(-1, width)
        low, high = torch.searchsorted(self.indices, torch.tensor([first, first + matrix.shape[0]])).tolist()
        if low < high:
            local, old = self.indices[low:high] - first, base.view(-1, width)
            if self.absolute:
                matrix[local] = self.rows[low:high]
            elif self.coeff == 1.0:
                matrix[local] = self.rows[low:high] + (matrix[local] - old[local])  # exactly the row where alone
            else:
                matrix.index_add_(0, local, self.rows[low:high] - old[local], alpha=self.coeff)


ADDITIVE = (LowRank, ExpertsLowRank, Dense)
"""Updates that do not depend on the weight, so that adding them with the coefficient negated takes them out again."""
ADDITIVE_LOADED = (LoadedLowRank, LoadedExperts, Dense)
"""The same, in memory."""


class Applied:
    """A weight with updates: ``round(W + Σ coeff·Δ)``, rounded once to the output's dtype.

    Args:
        base: the weight.
        updates: what to add, in any order: float64 sums do not depend on it beyond 2⁻⁵³.
        dtype: the output's dtype; the base's by default.
        allow_nonfinite: let NaN, Inf and overflow through.
        labels: where the base and each update come from, for messages.
        witness: somebody who looks on.
    """

    scratch = 0

    def __init__(
        self,
        base: LazyTensor,
        updates: Sequence[Update],
        dtype: str | None = None,
        *,
        allow_nonfinite: bool = False,
        labels: Sequence[str] = (),
        witness: Witness | None = None,
    ) -> None:
        self._labels = labels
        self._witness = witness
        self.updates = tuple(updates)
        rows = max((update.unit for update in self.updates), default=1)
        fits = base.unit % rows == 0 or rows % base.unit == 0
        self.base = base if fits else any_range(base)
        self.spec = TensorSpec(base.spec.name, dtype or base.spec.dtype, base.spec.shape)
        self._allow_nonfinite = allow_nonfinite

    def watched(self, witness: Witness) -> Applied:
        """Return the same weight, made under somebody's eyes."""
        return Applied(
            self.base, self.updates, self.spec.dtype, allow_nonfinite=self._allow_nonfinite, labels=self._labels,
            witness=witness,
        )  # fmt: skip

    @property
    def unit(self) -> int:
        """The largest unit of its parts, which the others divide: rows of one weight have one length."""
        return max([self.base.unit, *(update.unit for update in self.updates)])

    @property
    def resident(self) -> int:
        """What the updates hold, plus the float64 and float32 working blocks."""
        block = max(numerics.BLOCK, min(self.unit, self.spec.numel))
        looking = 0 if self._witness is None else self._witness.resident
        return self.base.resident + sum(update.resident for update in self.updates) + 40 * block + looking

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Compute the range.

        Raises:
            NumericError: a value is NaN or infinite, or overflows the dtype.
        """
        size = self.spec.itemsize
        step = max(numerics.BLOCK // self.unit, 1) * self.unit
        try:
            with numerics.deeper():
                loaded = numerics.thread_memo(self, self._load)
                sight = None if self._witness is None else self._witness.begin(start, stop)
                for low in range(start, stop, step):
                    high = min(low + step, stop)
                    made = self._compute(loaded, low, high, out[(low - start) * size : (high - start) * size])
                    if sight is not None:
                        sight.block(low, loaded, made)
                if sight is not None:
                    sight.end()
        except SurgeryError as error:
            raise error.at(tensor=self.spec.name) from None

    def _load(self) -> list[Loaded]:
        return [update.load() for update in self.updates]

    def _compute(self, loaded: Sequence[Loaded], start: int, stop: int, out: memoryview) -> Made:
        low, high = byte_range(self.base.spec, start, stop)
        data = numerics.byte_buffer("base bytes", high - low)
        self.base.read_into(start, stop, data)
        known = numerics.view(self.base.spec, data, stop - start)
        base = numerics.scratch("base", stop - start).copy_(known)
        values = numerics.scratch("values", stop - start).copy_(base)
        for update in loaded:
            update.add_to(values, base, start)
        try:
            numerics.narrow(values, self.spec, out, allow_nonfinite=self._allow_nonfinite)
        except NumericError as error:
            raise error.at(file=self._culprit(loaded, base, start)) from None
        return Made(base, values, known, numerics.view(self.spec, out, stop - start))

    def _culprit(self, loaded: Sequence[Loaded], base: torch.Tensor, start: int) -> str | None:
        """Name the input that brought NaN or Inf; the base where a sum overflows."""
        if not self._labels:
            return None
        for label, update in zip(self._labels[1:], loaded, strict=True) if base.isfinite().all() else ():
            values = base.clone()
            update.add_to(values, base, start)
            if not values.isfinite().all():
                return label
        return self._labels[0]


class Checked:
    """A tensor copied as bytes, and refused if it holds NaN or Inf.

    Args:
        source: the tensor, of a dtype that surgery computes with.
        label: where it comes from, for the message.
    """

    def __init__(self, source: LazyTensor, label: str) -> None:
        self.source = source
        self.spec = source.spec
        self.unit, self.scratch, self.resident = source.unit, source.scratch, source.resident
        self._label = label

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the range and look at it.

        Raises:
            NumericError: a value is NaN or infinite.
        """
        self.source.read_into(start, stop, out)
        values = numerics.view(self.spec, out, stop - start)
        if not math.isfinite(float(values.sum(dtype=torch.float64))):
            count = int(values.numel() - values.isfinite().sum())
            raise NumericError(
                f"{count:,} values are NaN or infinite",
                file=self._label,
                tensor=self.spec.name,
                mend="--allow-nonfinite lets them through",
            )


class Cast:
    """A tensor in another dtype, rounded once.

    Args:
        source: the tensor, of a dtype that surgery computes with.
        dtype: the new dtype.
        allow_nonfinite: let NaN, Inf and overflow through.
        label: where it comes from, for messages.
    """

    scratch = 0
    unit = 1

    def __init__(
        self, source: LazyTensor, dtype: str, *, allow_nonfinite: bool = False, label: str | None = None
    ) -> None:
        self.source = source
        self.unit = source.unit
        self.spec = TensorSpec(source.spec.name, dtype, source.spec.shape)
        labels = () if label is None else (label,)
        self._plain = Applied(source, (), dtype, allow_nonfinite=allow_nonfinite, labels=labels)

    @property
    def resident(self) -> int:
        """Working blocks."""
        return self._plain.resident

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read, widen and round the range."""
        self._plain.read_into(start, stop, out)
