"""Local files: one descriptor a file, positioned reads into the caller's buffer, never an mmap.

A mapped file that somebody truncates kills the process (SIGBUS) and its pages count as resident memory; a positioned
read does neither. A file that changed between opening and the end of the work is an error, not a wrong result.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Protocol, Self

from surgery.errors import FormatError, IOFailure, SurgeryError
from surgery.tensor import TensorSpec, byte_range


class StoredFile(Protocol):
    """A file that is read at any place, from any thread, wherever it is; see :class:`OpenFile`."""

    path: Path
    size: int

    @property
    def identity(self) -> tuple[int, int]:
        """The same for the same file, however it is called."""
        ...

    @property
    def state(self) -> tuple[int, int]:
        """What differs once the file was rewritten."""
        ...

    def learn(self, starts: Iterable[int]) -> None:
        """Be told where tensors begin."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly so many bytes."""
        ...

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out``."""
        ...

    def check_unchanged(self) -> None:
        """Refuse if it was rewritten since it was opened."""
        ...

    def close(self) -> None:
        """Read no more from it."""
        ...


class OpenFile:
    """A regular file, open for positioned reads from any thread."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            FormatError: it is not there, or is a folder, a pipe or a device.
            IOFailure: the system refuses.
        """
        self.path = path
        try:
            # O_NONBLOCK: opening a FIFO that nobody writes to would wait for ever.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            raise FormatError("no such file", file=path) from None
        except OSError as error:
            raise IOFailure(f"cannot be opened: {error.strerror}", file=path) from None
        self._closer = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self._closer()
            raise FormatError(f"is {_kind(status.st_mode)}, not a regular file", file=path)
        self.size = status.st_size
        self._identity = _identity(status)

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes at ``offset``."""
        out = bytearray(length)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def learn(self, starts: Iterable[int]) -> None:
        """Be told where tensors begin, which does not matter here."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes at ``offset``.

        Raises:
            IOFailure: the file ends before ``out`` is full, or the system fails.
        """
        done, total = 0, len(out)
        while done < total:
            try:
                count = os.preadv(self._descriptor, [out[done:]], offset + done)
            except OSError as error:
                raise IOFailure(f"cannot be read at byte {offset + done:,}: {error.strerror}", file=self.path) from None
            if count == 0:
                raise IOFailure(
                    f"ends at byte {offset + done:,} while being read", file=self.path, mend="was it rewritten?"
                )
            done += count

    @property
    def identity(self) -> tuple[int, int]:
        """Device and number of the file, the same however it is called."""
        return self._identity[:2]

    @property
    def state(self) -> tuple[int, int]:
        """Size, and time of the last change: what differs where the file was rewritten, on whichever machine."""
        return self._identity[2:]

    def check_unchanged(self) -> None:
        """Refuse if the file was replaced, truncated or rewritten since it was opened.

        Raises:
            IOFailure: it changed.
        """
        try:
            same = _identity(os.fstat(self._descriptor)) == self._identity == _identity(os.stat(self.path))
        except OSError:
            same = False
        if not same:
            raise IOFailure("changed while it was read", file=self.path, mend="run again when nobody writes to it")

    def close(self) -> None:
        """Close the descriptor; further reads fail. A file that nothing reads from any more closes itself."""
        self._closer()
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor that lies contiguously in a file."""

    spec: TensorSpec
    file: StoredFile
    offset: int
    unit: ClassVar[int] = 1
    scratch: ClassVar[int] = 0
    resident: ClassVar[int] = 0

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the range from the file."""
        low, _ = byte_range(self.spec, start, stop)
        try:
            self.file.read_into(self.offset + low, out)
        except SurgeryError as error:
            raise error.at(tensor=self.spec.name) from None


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")
