"""Merged tensors: a lazy tensor made from several others by an algorithm, block by block.

What an algorithm must know of the whole tensor is learnt in passes of its own before the first block is made. Those
passes cut the tensor at places that depend on its shape alone, and sum in the order of the blocks, so that the bytes
are the same for any number of threads, any cut of the output into jobs, and any sharding of the inputs.

Algorithms are set up here and run; their arithmetic is in :mod:`surgery.algorithms`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from surgery import numerics
from surgery.algorithms.kernel import Block, Kernel, Setting, Totals
from surgery.algorithms.registry import COMPAT, PAPER, Algorithm, find, resolve
from surgery.errors import MismatchError, NumericError, SurgeryError, UnsupportedError, UsageError
from surgery.passes import Passes, Run
from surgery.tensor import ARITHMETIC, LazyTensor, TensorSpec, renamed

BLOCK = 1 << 18
"""Elements a block: half of it, and twice as much, take longer."""
_RUNS, _RUN = 64, 1024
"""Runs of a sample, and elements in each, at least."""
_SAMPLE_OF = 1 << 20
"""Smaller tensors are not worth a sample."""
_PASS_RUN = 1 << 19
"""Elements that a thread takes at a time in a pass: of no dtype that is computed with less than a fingerprint's block,
so that every block of an input is read by one thread."""


class Merged:
    """``round(algorithm(inputs, base))``, rounded once to the output's dtype.

    Values are computed in float32 where the output is float16 or bfloat16 and no input is wider than float32, else in
    float64.

    Args:
        name: the tensor's name, which also keys random draws.
        inputs: the models' tensors, all of one shape.
        base: the base's, for algorithms that take one.
        algorithm: a name, or a row of :data:`surgery.algorithms.registry.ALGORITHMS`.
        parameters: the merge's parameters; where each model has its own, the same value for all.
        per_model: for each input its own parameters (``coeff``, ``density`` …), which go before ``parameters``.
        dtype: the output's; the base's, or the first input's, by default.
        compat: ``paper``, or ``mergekit`` for what mergekit 0.1.5 does where it differs.
        seed: keys random draws, with the name.
        allow_nonfinite: let NaN, Inf and overflow through.
        labels: where the inputs come from, for messages: the base's first, if there is one.

    Raises:
        UsageError: parameters, or a number of inputs, that the algorithm does not take.
        MismatchError: shapes differ.
        UnsupportedError: a dtype that surgery does not compute with.

    >>> from surgery.checkpoint import open_checkpoint
    >>> import surgery.numerics
    >>> pair = open_checkpoint({"a": torch.zeros(2), "b": torch.ones(2)})
    >>> both = Merged("m", [pair.lazy("a"), pair.lazy("b")], None, "linear", per_model=[{"coeff": 1}, {"coeff": 3}])
    >>> surgery.numerics.load(both)
    tensor([0.7500, 0.7500])
    """

    scratch = 0

    def __init__(
        self,
        name: str,
        inputs: Sequence[LazyTensor],
        base: LazyTensor | None,
        algorithm: str | Algorithm,
        parameters: Mapping[str, Any] | None = None,
        per_model: Sequence[Mapping[str, Any]] = (),
        *,
        dtype: str | None = None,
        compat: str = PAPER,
        seed: int = 0,
        allow_nonfinite: bool = False,
        labels: Sequence[str] = (),
    ) -> None:
        self.algorithm = find(algorithm)
        self.inputs = tuple(inputs)
        self.base = base
        self._labels = tuple(labels)
        self._allow_nonfinite = allow_nonfinite
        if compat not in COMPAT:
            raise UsageError(f"compat is {' or '.join(COMPAT)}, not {compat!r}")
        self.algorithm.check_arity(len(inputs), base is not None)
        whole, each = resolve(self.algorithm, len(inputs), parameters or {}, per_model)
        first = self._sources[0].spec
        self.spec = TensorSpec(name, dtype or first.dtype, first.shape)
        self._check_specs()
        self._working = _working_dtype([source.spec.dtype for source in self._sources], self.spec.dtype)
        setting = Setting(name, first.shape, self._working, whole, each, compat, seed)
        self._kernel: Kernel = self.algorithm.make(setting)
        self._made, self._counting = 0, threading.Lock()
        self._passes = Passes(self._kernel, self._runs(), self._sample, self._observe)

    @property
    def _sources(self) -> tuple[LazyTensor, ...]:
        """The base, if there is one, and the inputs."""
        return self.inputs if self.base is None else (self.base, *self.inputs)

    @property
    def unit(self) -> int:
        """What the algorithm and all inputs can be cut at."""
        return math.lcm(self._kernel.unit, *(source.unit for source in self._sources))

    @property
    def resident(self) -> int:
        """What the inputs hold, plus a working block for each, for the algorithm, and for rounding."""
        block = min(max(BLOCK, self.unit), max(self.spec.numel, 1))
        width = self._working.itemsize
        blocks = len(self._sources) + self._kernel.buffers + 1
        reading = max(source.spec.itemsize * (1 + source.scratch) for source in self._sources)
        held = sum(source.resident for source in self._sources) + self._kernel.resident
        return held + block * (blocks * width + reading)

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Compute the range, after the passes over the whole tensor, if the algorithm needs any.

        Raises:
            NumericError: an input or a result is NaN or infinite, or overflows the dtype.
        """
        size = self.spec.itemsize
        try:
            with numerics.deeper():
                found = self._passes.get() if stop > start else []
                for low, high in self.cuts(start, stop):
                    self._make(low, high, found, out[(low - start) * size : (high - start) * size])
        except SurgeryError as error:
            raise error.at(tensor=self.spec.name) from None

    def cuts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut a range into blocks of whole units."""
        step = max(BLOCK // self.unit, 1) * self.unit
        for low in range(start, stop, step):
            yield low, min(low + step, stop)

    def _runs(self) -> list[Run]:
        """Cut the whole tensor for passes."""
        step = math.lcm(self.unit, _PASS_RUN)
        return [(low, min(low + step, self.spec.numel)) for low in range(0, self.spec.numel, step)]

    def _observe(self, run: Run, found: Sequence[Any]) -> Totals:
        """Observe a run for the stage that comes next."""
        totals: Totals = ()
        for low, high in self.cuts(*run):
            part = self._kernel.observe(self._block(low, high, check=not self._passes.looked), found)
            totals = tuple(map(np.add, totals, part)) if totals else part
        return totals

    def _make(self, start: int, stop: int, found: Sequence[Any], out: memoryview) -> None:
        """Make one block."""
        # What went through a pass was checked there, and what spoils the result shows in it.
        unchecked = self._passes.looked or self._kernel.spoilt_by_nonfinite
        values = self._kernel.combine(self._block(start, stop, check=not unchecked), found)
        try:
            numerics.narrow(values, self.spec, out, allow_nonfinite=self._allow_nonfinite)
        except NumericError as error:
            self._block(start, stop, check=True)  # it names the input that is to blame, if one is
            raise error.at(file=self._labels[0] if self._labels else None) from None
        with self._counting:
            self._made += stop - start
            if self._made >= self.spec.numel:
                self._kernel.forget()

    def _sample(self) -> None:
        if self.spec.numel > _SAMPLE_OF:
            self._kernel.sample(self.sample())

    def sample(self) -> Block:
        """Gather runs of elements from all over the tensor: the same wherever it lies, whatever it is merged with."""
        unit = self.unit
        run = max(_RUN // unit, 1) * unit
        step = max(self.spec.numel // (_RUNS * unit), 1) * unit
        starts = range(0, self.spec.numel - run + 1, max(step, run))[:_RUNS]
        blocks = []
        for number, source in enumerate(self._sources):
            values = numerics.scratch(f"input {number}", run * len(starts), self._working)
            for place, start in enumerate(starts):
                numerics.widen(source, start, start + run, values[place * run : (place + 1) * run])
            blocks.append(values)
        return Block(tuple(blocks if self.base is None else blocks[1:]), None if self.base is None else blocks[0], 0)

    def _block(self, start: int, stop: int, *, check: bool) -> Block:
        count = stop - start
        blocks = []
        for number, source in enumerate(self._sources):
            values = numerics.scratch(f"input {number}", count, self._working)
            numerics.widen(source, start, stop, values)
            if check and not self._allow_nonfinite and not math.isfinite(float(values.sum())):
                self._refuse_nonfinite(values, number, start)
            blocks.append(values)
        base = None if self.base is None else blocks.pop(0)
        return Block(tuple(blocks), base, start)

    def _refuse_nonfinite(self, values: torch.Tensor, number: int, start: int) -> None:
        bad = ~torch.isfinite(values)
        if not bad.any():
            return  # the sum overflowed, the values did not
        raise NumericError(
            f"is NaN or infinite at element {start + int(bad.nonzero()[0]):,}",
            file=self._labels[number] if self._labels else None,
            tensor=self._sources[number].spec.name,
            mend="--allow-nonfinite lets it through",
        )

    def _check_specs(self) -> None:
        first = self._sources[0].spec
        if self.spec.dtype not in ARITHMETIC:
            raise UnsupportedError(f"merges are written as {', '.join(ARITHMETIC)}, not {self.spec.dtype}")
        for number, source in enumerate(self._sources):
            label = self._labels[number] if self._labels else None
            if source.spec.dtype not in ARITHMETIC:
                what = f"is {source.spec.dtype}; surgery computes with {', '.join(ARITHMETIC)}"
                raise UnsupportedError(what, file=label, tensor=source.spec.name)
            if source.spec.shape != first.shape:
                where = self._labels[0] if self._labels else "the first input"
                raise MismatchError(
                    f"has shape {list(source.spec.shape)}, but {list(first.shape)} in {where}",
                    file=label, tensor=source.spec.name, mend="shapes must agree: nothing is stretched or cut",
                )  # fmt: skip


def _working_dtype(inputs: Sequence[str], output: str) -> torch.dtype:
    narrow = output in ("F16", "BF16") and "F64" not in inputs
    return torch.float32 if narrow else torch.float64


def merged(
    name: str,
    inputs: Sequence[LazyTensor],
    base: LazyTensor | None,
    algorithm: str | Algorithm,
    parameters: Mapping[str, Any] | None = None,
    per_model: Sequence[Mapping[str, Any]] = (),
    *,
    dtype: str | None = None,
    labels: Sequence[str] = (),
    **more: Any,
) -> LazyTensor:
    """Return the merge of one tensor, whatever it holds: :class:`Merged` for numbers, :class:`Agreed` for the rest.

    Args and errors are those of :class:`Merged`.
    """
    sources = [*([] if base is None else [base]), *inputs]
    if any(source.spec.dtype in ARITHMETIC for source in sources):
        return Merged(name, inputs, base, algorithm, parameters, per_model, dtype=dtype, labels=labels, **more)
    return renamed(Agreed(sources, labels), name)


class Agreed:
    """A tensor that is no number to merge (integers, booleans): copied as bytes where all inputs agree on it.

    Args:
        inputs: the tensors; the first one is copied.
        labels: where they come from, for messages.

    Raises:
        MismatchError: dtypes or shapes differ; when read, values.
    """

    def __init__(self, inputs: Sequence[LazyTensor], labels: Sequence[str] = ()) -> None:
        self.inputs = tuple(inputs)
        self.spec = inputs[0].spec
        self._labels = tuple(labels)
        for number, other in enumerate(inputs):
            if (other.spec.dtype, other.spec.shape) != (self.spec.dtype, self.spec.shape):
                raise self._error(number, f"is {other.spec.describe()}, but {self.spec.describe()} in {self._label(0)}")

    @property
    def unit(self) -> int:
        """What all inputs can be cut at."""
        return math.lcm(*(source.unit for source in self.inputs))

    @property
    def scratch(self) -> int:
        """The range of one more input, and what reading costs."""
        return 1 + max(source.scratch for source in self.inputs)

    @property
    def resident(self) -> int:
        """What the inputs hold."""
        return sum(source.resident for source in self.inputs)

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the range of the first input, and hold the others against it.

        Raises:
            MismatchError: their bytes differ.
        """
        with numerics.deeper():
            self.inputs[0].read_into(start, stop, out)
            mine = np.frombuffer(out, np.uint8)
            for number, other in enumerate(self.inputs[1:], 1):
                buffer = numerics.byte_buffer("agreed", len(out))
                other.read_into(start, stop, buffer)
                if not np.array_equal(mine, np.frombuffer(buffer, np.uint8)):
                    raise self._error(number, f"is {self.spec.dtype} and differs from {self._label(0)}'s")

    def _label(self, number: int) -> str:
        return self._labels[number] if self._labels else f"input {number + 1}"

    def _error(self, number: int, what: str) -> MismatchError:
        return MismatchError(
            what, file=self._label(number), tensor=self.inputs[number].spec.name,
            mend=f"{self.spec.dtype} is copied, not merged: all inputs must agree on it",
        )  # fmt: skip
