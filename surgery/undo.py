"""Undoing merges to the last bit: what is noted of each weight while it is merged, and the weight restored from it.

*What must be reproduced.* Both ways compute ``v = W' − Σ c·Δ`` in float64: the merge, to note where ``round(v)`` is not the
old weight, and the way back, to predict it. Their sums run in different orders (blocks, threads, another machine's BLAS),
so that their ``v`` differ, by at most ``τ`` (:func:`slack`): the textbook bound of a float64 sum in any order. Rounding is
monotone: where ``round(v − τ)`` and ``round(v + τ)`` are both the old weight, *every* order of summation predicts it. All other
elements are noted. So the bits that come back do not depend on how either sum was made; fingerprints prove them.

*Rounding* here is torch's plain conversion (float64 → float32 → 16 bits). It rounds twice, which no matter: it is monotone,
and what it misses is noted.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from surgery import numerics
from surgery.delta import ADDITIVE_LOADED, Loaded, LoadedRows, Made, Update
from surgery.errors import MismatchError, SurgeryError, VerificationError
from surgery.formats import undo_record
from surgery.formats.undo_record import CODED, LISTED, Bits, Missed, Part, Undo
from surgery.provenance import BlockDigests, fingerprint
from surgery.rounding import Sums
from surgery.sources.spool import Spool
from surgery.tensor import BITS, LazyTensor, TensorSpec, Wrapper, byte_range, read_bytes

SPOOL_MEMORY = 16 << 20
"""Bytes of coded parts that wait in memory; more wait in a temporary file."""
_PATTERNS = {"F64": np.uint64, "F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}
_MAGNITUDE = {"F32": 0x7FFFFFFF, "BF16": 0x7FFF, "F16": 0x7FFF}
_INFINITE = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Patterns of magnitude from here on are infinite or NaN. Dtypes that are not here are not predicted: float64 sums are
no finer than float64 weights."""


def slack(reach: float, terms: int, largest: float) -> float:
    """Bound how far two float64 sums of one element may lie apart, whatever their order.

    A sum of ``n`` products is off by at most ``n·2⁻⁵³ / (1 − n·2⁻⁵³)`` of ``Σ |products|`` (Higham 2002, "Accuracy and Stability
    of Numerical Algorithms", eq. 3.5). Two of them, scaling, and the steps to and from the weight make less than the
    factor of 16 that stands here.

    Args:
        reach: a bound of ``Σ |products|``.
        terms: the number of products.
        largest: the largest magnitude of any old or new weight.
    """
    return 2.0**-49 * (largest + reach) * (8 + terms)


def _reach(loaded: Sequence[Loaded]) -> tuple[float, int] | None:
    """Return what :func:`slack` must know of all that is added; ``None`` where some of it cannot be taken away again."""
    if not all(isinstance(update, (*ADDITIVE_LOADED, LoadedRows)) for update in loaded):
        return None
    additive = [update for update in loaded if isinstance(update, ADDITIVE_LOADED)]
    return sum(update.reach() for update in additive), sum(update.terms for update in additive)


@dataclass(frozen=True, slots=True)
class _Note:
    """What is kept of one range."""

    sums: Sums
    part: Part | None = None
    data: LazyTensor | None = None


@dataclass
class Ledger:
    """What is noted in one run, of all weights that are merged.

    Args:
        undoable: the weights whose way back is noted; of all others only sums are kept.
    """

    undoable: frozenset[str] = frozenset()
    _notes: dict[str, dict[int, _Note]] = field(default_factory=dict)
    _spool: Spool = field(default_factory=lambda: Spool(SPOOL_MEMORY))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def witness(self, spec: TensorSpec) -> Looking:
        """Return who looks on while a weight is made."""
        return Looking(self, spec, undoable=spec.name in self.undoable)

    def enter(self, name: str, start: int, sums: Sums, part: Part | None = None, data: bytes = b"") -> None:
        """Note one range, from any thread."""
        stored = None
        if part is not None:
            stored = self._spool.add(TensorSpec(name, "U8", (len(data),)), data)
        with self._lock:
            self._notes.setdefault(name, {})[start] = _Note(sums, part, stored)

    def sums(self) -> dict[str, Sums]:
        """Add up the sums of every weight, in the order of its elements."""
        return {
            name: Sums.total([notes[start].sums for start in sorted(notes)])
            for name, notes in sorted(self._notes.items())
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all coded parts."""
        return sum(note.part.size for notes in self._notes.values() for note in notes.values() if note.part is not None)

    def records(self, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, LazyTensor]:
        """Compose the undo record of every weight that has one.

        Args:
            before: fingerprints of the old weights, by name.
            after: of the merged ones.
        """
        found: dict[str, LazyTensor] = {}
        for name in sorted(self.undoable & self._notes.keys()):
            notes = self._notes[name]
            ordered = [note for _, note in sorted(notes.items())]
            parts = tuple(note.part for note in ordered if note.part is not None)
            head = undo_record.build_head(Undo(before[name], after[name], parts))
            found[name] = Joined(name, head, [note.data for note in ordered if note.data is not None])
        return found

    def pack(self, names: Iterable[str]) -> Iterator[bytes]:
        """Write what is noted of some weights, for a run that goes on where this one is broken off."""
        for name in sorted(set(names) & self._notes.keys()):
            for start, note in sorted(self._notes[name].items()):
                part = note.part
                shown = None if part is None else [part.start, part.stop, part.coding, part.size, part.digest]
                head = json.dumps([name, start, note.sums.as_list(), shown]).encode()
                yield struct.pack("<I", len(head)) + head
                if note.data is not None and note.data.spec.numel:
                    yield bytes(read_bytes(note.data))

    def unpack(self, data: bytes) -> None:
        """Take over what :meth:`pack` wrote."""
        place = 0
        while place < len(data):
            (length,) = struct.unpack_from("<I", data, place)
            name, start, sums, shown = json.loads(data[place + 4 : place + 4 + length])
            place += 4 + length
            part = None if shown is None else Part(*shown)
            size = 0 if part is None else part.size
            self.enter(name, start, Sums.from_list(sums), part, data[place : place + size])
            place += size


class Looking:
    """Looks on while one weight is made."""

    def __init__(self, ledger: Ledger, spec: TensorSpec, *, undoable: bool) -> None:
        self.ledger = ledger
        self.spec = spec
        self.undoable = undoable
        self.predictable = undoable and spec.dtype in _MAGNITUDE
        self.resident = 40 * numerics.BLOCK + (8 << 20 if undoable else 0)
        self._known_reach: tuple[float, int] | None = None

    def reach(self, loaded: Sequence[Loaded]) -> tuple[float, int] | None:
        """Return :func:`_reach`, found once: it is the same for every range, whichever thread asks."""
        if self._known_reach is None:
            self._known_reach = _reach(loaded)
        return self._known_reach

    def begin(self, start: int, stop: int) -> _Sight:
        """Begin a range."""
        return _Sight(self, start, stop)


class _Sight:
    """What is seen of one range."""

    def __init__(self, looking: Looking, start: int, stop: int) -> None:
        self._looking = looking
        self._start, self._stop = start, stop
        self._sums: list[Sums] = []
        self._predicted = looking.predictable
        self._missed: list[tuple[Bits, ...]] = []
        if looking.undoable:
            size = (stop - start) * looking.spec.itemsize
            pattern = _PATTERNS[looking.spec.dtype]
            self._known = np.frombuffer(numerics.byte_buffer("undo known", size), pattern)
            self._merged = np.frombuffer(numerics.byte_buffer("undo merged", size), pattern)

    def block(self, start: int, loaded: Sequence[Loaded], made: Made) -> None:
        """Look at one block."""
        known, merged = _patterns(made.known, self._looking.spec), _patterns(made.merged, self._looking.spec)
        error = numerics.scratch("undo error", made.values.numel()).copy_(made.merged).sub_(made.values)
        changed = int(np.count_nonzero(known != merged))
        partial = any(isinstance(update, LoadedRows) for update in loaded)
        self._sums.append(Sums.of(error, made.base, made.values, changed, partial=partial))
        if not self._looking.undoable:
            return
        place = slice(start - self._start, start - self._start + known.size)
        self._known[place], self._merged[place] = known, merged
        if self._predicted:
            self._look(start, loaded, made.base, error, known, merged)

    def _look(
        self, start: int, loaded: Sequence[Loaded], base: torch.Tensor, error: torch.Tensor, known: Bits, merged: Bits
    ) -> None:
        """Note the elements of a block that some order of summation would not predict."""
        dtype = self._looking.spec.dtype
        reach, old, new = self._looking.reach(loaded), _largest(known, dtype), _largest(merged, dtype)
        if reach is None or old is None or new is None:
            self._predicted = False
            return
        tau = slack(*reach, max(old, new))
        guess = error.add_(base)  # W' − (W + ΔW) + W
        low = numerics.scratch("undo low", guess.numel(), numerics.DTYPES[dtype]).copy_(guess.sub_(tau))
        high = numerics.scratch("undo high", guess.numel(), numerics.DTYPES[dtype]).copy_(guess.add_(2 * tau))
        lows, highs = _patterns(low, self._looking.spec), _patterns(high, self._looking.spec)
        for update in loaded:
            if isinstance(update, LoadedRows):
                _take_rows(update, start, (lows, highs), known)
        places = np.flatnonzero((lows != known) | (highs != known))
        if places.size:
            offset = start - self._start
            self._missed.append((places + offset, known[places], lows[places], highs[places], merged[places]))

    def end(self) -> None:
        """Enter the range into the ledger."""
        looking, sums = self._looking, Sums.total(self._sums)
        if not looking.undoable:
            looking.ledger.enter(looking.spec.name, self._start, sums)
            return
        if self._predicted:
            columns = (
                zip(*self._missed, strict=True)
                if self._missed
                else ([np.empty(0, self._known.dtype)] for _ in range(5))
            )
            missed = Missed(*(np.concatenate(column) for column in columns))
            coding, data = undo_record.encode(missed, self._known, self._merged, looking.spec.dtype)
        else:
            coding, data = CODED, undo_record.encode_against(self._known, self._merged, looking.spec.dtype)
        part = Part.of(self._start, self._stop, coding, data)
        looking.ledger.enter(looking.spec.name, self._start, sums, part, data)


def _patterns(values: torch.Tensor, spec: TensorSpec) -> Bits:
    return values.view(torch.uint8).numpy().view(_PATTERNS[spec.dtype])


def _largest(patterns: Bits, dtype: str) -> float | None:
    """Return the largest magnitude; ``None`` where something is infinite or NaN."""
    top = int((patterns & patterns.dtype.type(_MAGNITUDE[dtype])).max(initial=0))
    if top >= _INFINITE[dtype]:
        return None
    data = bytearray(np.array([top], patterns.dtype).tobytes())
    return float(numerics.view(TensorSpec("", dtype, (1,)), data)[0])


def _take_rows(rows: LoadedRows, start: int, predictions: Sequence[Bits], known: Bits) -> None:
    """Count replaced rows as predicted: they are kept in full."""
    width = rows.rows.shape[1]
    first = start // width
    inside = rows.indices[(rows.indices >= first) & (rows.indices < first + known.size // width)].numpy() - first
    for prediction in predictions:
        prediction.reshape(-1, width)[inside] = known.reshape(-1, width)[inside]


@dataclass(frozen=True, slots=True)
class Joined:
    """Bytes made of a head and tensors of bytes, one after the other."""

    name: str
    head: bytes
    pieces: Sequence[LazyTensor]
    unit: int = 1
    scratch: int = 1
    resident: int = 0

    @property
    def spec(self) -> TensorSpec:
        """Name and length."""
        return TensorSpec(self.name, "U8", (len(self.head) + sum(piece.spec.numel for piece in self.pieces),))

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Copy the range."""
        place = len(self.head)
        if start < place:
            out[: min(stop, place) - start] = self.head[start:stop]
        for piece in self.pieces:
            low, high = max(start, place), min(stop, place + piece.spec.numel)
            if low < high:
                piece.read_into(low - place, high - place, out[low - start : high - start])
            place += piece.spec.numel


class Undone(Wrapper):
    """A weight as it was before it was merged, to the bit.

    Args:
        source: the merged weight.
        updates: what was added to it, with the coefficients negated.
        undo: the head of its undo record.
        record: the whole record.
        rows: numbers and values of the rows that were replaced.
    """

    def __init__(
        self,
        source: LazyTensor,
        updates: Sequence[Update],
        undo: Undo,
        record: LazyTensor,
        rows: tuple[LazyTensor, LazyTensor] | None = None,
    ) -> None:
        self.source = source
        self.spec = source.spec
        self._updates = tuple(updates)
        self._undo = undo
        self._record = record
        self._rows = rows
        self._offsets = np.cumsum([undo.offset, *(part.size for part in undo.parts)]).tolist()

    @property
    def unit(self) -> int:
        """The largest unit of its parts."""
        width = self.spec.shape[-1] if self._rows is not None else 1
        return max([self.source.unit, width, *(update.unit for update in self._updates)])

    @property
    def resident(self) -> int:
        """What the updates hold, a part of the merged weight and of the old one, and what its list unpacks to."""
        largest = max((part.stop - part.start for part in self._undo.parts), default=0)
        held = self.source.resident + sum(update.resident for update in self._updates)
        return held + 40 * numerics.BLOCK + (3 * self.spec.itemsize + 16) * largest

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Restore the range, part by part."""
        try:
            with numerics.deeper():
                for number, part in enumerate(self._undo.parts):
                    low, high = max(start, part.start), min(stop, part.stop)
                    if low < high:
                        old = self._part(number, part)[low - part.start : high - part.start].view(np.uint8)
                        begin, end = (
                            place - byte_range(self.spec, 0, start)[1] for place in byte_range(self.spec, low, high)
                        )
                        out[begin:end] = old.data
            self._put_rows(start, stop, out)
            if (start, stop) == (0, self.spec.numel):
                self._prove(out)
        except SurgeryError as error:
            raise error.at(tensor=self.spec.name) from None

    def _prove(self, out: memoryview) -> None:
        """Hold a weight that was restored whole against its fingerprint."""
        digests = BlockDigests(self.spec)
        digests.stream(0).update(out)
        if digests.fingerprint() != self._undo.before:
            raise self.failure(fingerprint(self.source))

    def failure(self, merged: str) -> SurgeryError:
        """Say why the weight did not come back as it was, given the fingerprint of the merged one."""
        if merged != self._undo.after:
            return MismatchError(
                "is not what was merged: its bits differ from those that its undo record is for", tensor=self.spec.name,
                mend="fetch the output again; --approximate takes the adapter out of what is there, to rounding",
            )  # fmt: skip
        return VerificationError(
            "did not come back as it was before the merge", tensor=self.spec.name,
            mend="is the adapter unchanged, its configuration included? --base BASE restores it all the same",
        )  # fmt: skip

    def _part(self, number: int, part: Part) -> Bits:
        data = bytes(read_bytes(self._record, self._offsets[number], self._offsets[number + 1]))
        undo_record.check_part(part, data)
        size = (part.stop - part.start) * self.spec.itemsize
        buffer = numerics.byte_buffer("undo merged", size)
        self.source.read_into(part.start, part.stop, buffer)
        merged: Bits = np.frombuffer(buffer, _PATTERNS[self.spec.dtype])
        if part.coding == CODED:
            return undo_record.decode_against(data, merged, self.spec.dtype)
        predicted = self._predict(part, buffer)
        if part.coding == LISTED:
            undo_record.correct(data, predicted, merged)
        return predicted

    def _predict(self, part: Part, merged: memoryview) -> Bits:
        """Return ``round(W' − Σ c·Δ)``."""
        loaded = numerics.thread_memo(self, lambda: [update.load() for update in self._updates])
        size, unit = self.spec.itemsize, self.unit
        predicted = numerics.byte_buffer("undo predicted", (part.stop - part.start) * size)
        step = max(numerics.BLOCK // unit, 1) * unit
        for low in range(0, part.stop - part.start, step):
            high = min(low + step, part.stop - part.start)
            base = numerics.view(self.spec, merged[low * size : high * size], high - low)
            values = numerics.scratch("values", high - low).copy_(base)
            for update in loaded:
                update.add_to(values, values, part.start + low)
            numerics.view(self.spec, predicted[low * size : high * size], high - low).copy_(values)
        return np.frombuffer(predicted, _PATTERNS[self.spec.dtype])

    def _put_rows(self, start: int, stop: int, out: memoryview) -> None:
        if self._rows is None:
            return
        numbers, values = self._rows
        width = self.spec.shape[-1]
        length = width * BITS[self.spec.dtype] // 8
        indices = np.frombuffer(bytes(read_bytes(numbers)), np.int64)
        first, last = start // width, stop // width
        for place in np.flatnonzero((indices >= first) & (indices < last)).tolist():
            row = int(indices[place]) - first
            values.read_into(place * width, (place + 1) * width, out[row * length : (row + 1) * length])
