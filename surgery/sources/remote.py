"""Files on the Hub, read in few requests: what will be read is announced, and arrives while others are at work.

A file keeps what arrived in a temporary file, at the place it has in the file itself: whatever is read twice travels
once. Announced ranges become runs (:func:`surgery.sources.ranges.requests`), one request each, several at a time. A
range that nobody announced is fetched when it is read, with the rest of its tensor.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from surgery.errors import HubError, IOFailure, SurgeryError
from surgery.sources.files import FileTensor, OpenFile
from surgery.sources.http import RangeReader
from surgery.sources.ranges import Range, difference, requests
from surgery.tensor import LazyTensor

IN_FLIGHT = 8
"""Requests at a time, over all files."""
NEARLY_ALL = 0.9
"""The share of a file from which on it is downloaded whole, into the cache."""


_GIVEN_UP = threading.Event()
_GLANCE = 0.2
"""Seconds between two looks at whether the program was interrupted."""


def give_up(*, now: bool = True) -> None:
    """Let everybody go who waits for bytes, because the program was interrupted; with ``now=False``, let them wait again.

    Threads that wait would hold up the program, which waits for its threads.
    """
    _GIVEN_UP.set() if now else _GIVEN_UP.clear()


@dataclass(eq=False)
class _Run:
    """Bytes that one request fetches, and how far it is."""

    start: int
    stop: int
    place: int
    error: SurgeryError | None = None


class RemoteFile:
    """A file in a repository, at a commit."""

    def __init__(
        self, path: Path, reader: RangeReader, identity: tuple[int, int], fetch: Callable[[], Path] | None
    ) -> None:
        """Name a file; nothing is requested yet.

        Args:
            path: where it would lie in its snapshot.
            reader: fetches its bytes.
            identity: tells it from all other files.
            fetch: downloads it whole and says where to; ``None`` if that is not wanted.
        """
        self.path, self.size, self.identity = path, reader.size, identity
        self._reader, self._fetch = reader, fetch
        self._changed = threading.Condition()
        self._runs: list[_Run] = []
        self._whole: OpenFile | None = None
        self._whole_run: _Run | None = None
        self._spool: int | None = None
        self._starts: Sequence[int] = (0,)
        self._closed = False

    @property
    def state(self) -> tuple[int, int]:
        """Size and content: a commit's files never change."""
        return self.size, self.identity[1]

    def check_unchanged(self) -> None:
        """Do nothing: see :attr:`state`."""

    def close(self) -> None:
        """Stop what is under way; further reads fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._whole is not None:
            self._whole.close()

    def learn(self, starts: Iterable[int]) -> None:
        """Be told where tensors begin: what one needs of a tensor is soon followed by the rest."""
        self._starts = sorted({0, *starts})

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes at ``offset``, with a request of their own: headers, above all."""
        if self._whole is not None:
            return self._whole.read(offset, length)
        return self._reader.read(offset, offset + length)

    def expect(self, ranges: Iterable[Range]) -> None:
        """Begin to fetch what will be read."""
        with self._changed:
            if self._whole is not None or self._whole_run is not None:
                return
            wanted = difference(ranges, [(run.start, run.stop) for run in self._runs])
            if self._fetch is not None and self._is_all(wanted):
                self._whole_run = run = _Run(0, self.size, 0)
                _WORKERS.give(partial(self._take_whole, run))
                return
            runs = [_Run(start, stop, start) for start, stop in requests(wanted)]
            self._runs += runs
        for run in runs:
            _WORKERS.give(partial(self._take, run))

    def _is_all(self, wanted: Iterable[Range]) -> bool:
        """Say whether so much is wanted that the rest does not matter."""
        return sum(stop - start for start, stop in wanted) >= NEARLY_ALL * self.size

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes at ``offset``, once they have arrived.

        Raises:
            HubError: they do not arrive.
        """
        if not len(out):
            return
        stop = offset + len(out)
        with self._changed:
            while self._whole is None:
                if self._closed or _GIVEN_UP.is_set():
                    raise HubError("was closed while it was read", file=self._reader.what)
                run = self._whole_run or self._run_of(offset, stop)
                if run is None:  # nobody announced it
                    first, last = self._piece(offset, stop)
                    run = _Run(first, last, first)
                    self._runs.append(run)
                    _WORKERS.give(partial(self._take, run))
                if run.error is not None:
                    raise run.error
                if run is not self._whole_run and run.place >= stop:
                    break
                self._changed.wait(_GLANCE)
        if self._whole is not None:
            self._whole.read_into(offset, out)
        else:
            _read_all(self._descriptor(), offset, out, self._reader.what)

    def _run_of(self, start: int, stop: int) -> _Run | None:
        return next((run for run in self._runs if run.start <= start and stop <= run.stop), None)

    def _piece(self, start: int, stop: int) -> Range:
        """Widen a range to the tensors that it lies in."""
        first, last = bisect_right(self._starts, start) - 1, bisect_right(self._starts, stop - 1)
        return self._starts[first], self._starts[last] if last < len(self._starts) else self.size

    def _take(self, run: _Run) -> None:
        """Fetch a run into the temporary file."""
        with self._ending(run):
            for piece in self._reader.stream(run.place, run.stop):
                if self._closed or _GIVEN_UP.is_set():
                    return
                _write_all(self._descriptor(), run.place, piece)
                with self._changed:
                    run.place += len(piece)
                    self._changed.notify_all()

    def _take_whole(self, run: _Run) -> None:
        """Have the file downloaded into the cache."""
        assert self._fetch is not None
        with self._ending(run):
            found = OpenFile(self._fetch())
            with self._changed:
                self._whole, run.place = found, run.stop

    @contextmanager
    def _ending(self, run: _Run) -> Iterator[None]:
        """However a run ends, tell those who wait for it."""
        try:
            yield
        except SurgeryError as error:
            run.error = error
        finally:
            with self._changed:
                if run.place < run.stop and run.error is None:
                    run.error = HubError("was not fetched to its end", file=self._reader.what)
                self._changed.notify_all()

    def _descriptor(self) -> int:
        """Open the temporary file, which nobody else can see and which goes with its last reader."""
        with self._changed:
            if self._spool is None:
                file = tempfile.TemporaryFile()  # noqa: SIM115  it is closed when this object goes
                self._spool = file.fileno()
                weakref.finalize(self, file.close)
            return self._spool


_PARTS = ("source", "sources", "base", "inputs", "updates", "a", "b", "new", "values", "magnitude", "weight")
"""What the tensors that are made of others call them."""


def expect(tensors: Iterable[LazyTensor]) -> None:
    """Announce that tensors will be read: what of them lies on the Hub is fetched from now on, in few requests."""
    wanted: dict[RemoteFile, list[Range]] = {}
    for tensor in tensors:
        for stored in _stored(tensor):
            if isinstance(stored.file, RemoteFile):
                span = (stored.offset, stored.offset + stored.spec.nbytes)
                wanted.setdefault(stored.file, []).append(span)
    for file, spans in wanted.items():
        file.expect(spans)


def is_remote(tensor: LazyTensor) -> bool:
    """Say whether reading a tensor means fetching it."""
    return any(isinstance(stored.file, RemoteFile) for stored in _stored(tensor))


def _stored(made: object) -> Iterator[FileTensor]:
    """Find the tensors in files that one is made of; one that is not found is fetched when it is read."""
    if isinstance(made, FileTensor):
        yield made
    elif isinstance(made, list | tuple):
        for part in made:
            yield from _stored(part)
    elif made is not None:
        for name in _PARTS:
            yield from _stored(getattr(made, name, None))


class _Workers:
    """Threads that fetch, begun when there is something to fetch. They hold nobody up who wants to leave."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._threads = 0
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def give(self, work: Callable[[], None]) -> None:
        """Do something soon."""
        with self._lock:
            self._work.put(work)
            if self._threads < self._count:
                self._threads += 1
                threading.Thread(target=self._run, name="surgery-fetch", daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                self._work.get()()
        finally:
            with self._lock:
                self._threads -= 1


_WORKERS = _Workers(IN_FLIGHT)


def _write_all(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            count = os.pwrite(descriptor, view, offset)
        except OSError as error:
            raise IOFailure(f"the temporary folder cannot be written: {error.strerror}", mend="set TMPDIR") from None
        view, offset = view[count:], offset + count


def _read_all(descriptor: int, offset: int, out: memoryview, what: str) -> None:
    while out:
        count = os.preadv(descriptor, [out], offset)
        if count == 0:
            raise IOFailure("the temporary folder lost what was fetched", file=what)
        out, offset = out[count:], offset + count
