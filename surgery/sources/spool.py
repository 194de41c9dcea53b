"""A spool: results that must be measured before the output can be laid out wait here, in memory while they are few,
in an unlinked temporary file beyond that.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from dataclasses import dataclass

from surgery.errors import IOFailure
from surgery.tensor import TensorSpec, byte_range

MEMORY_LIMIT = 256 << 20


class Spool:
    """An append-only store of tensors' bytes."""

    def __init__(self, memory_limit: int = MEMORY_LIMIT) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=memory_limit)  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # when the last tensor in it is gone
        self._lock = threading.Lock()
        self._end = 0

    def add(self, spec: TensorSpec, data: bytes | memoryview) -> SpooledTensor:
        """Store a tensor's bytes and return it, lazily."""
        with self._lock:
            offset = self._end
            try:
                self._file.seek(offset)
                self._file.write(data)
            except OSError as error:
                raise IOFailure(f"the temporary folder cannot be written: {error.strerror}", tensor=spec.name) from None
            self._end += len(data)
        return SpooledTensor(spec, self, offset)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with stored bytes."""
        with self._lock:
            self._file.seek(offset)
            out[:] = self._file.read(len(out))


@dataclass(frozen=True, slots=True)
class SpooledTensor:
    """A tensor in a spool."""

    spec: TensorSpec
    spool: Spool
    offset: int
    unit: int = 1
    scratch: int = 1
    resident: int = 0

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the range."""
        low, _ = byte_range(self.spec, start, stop)
        self.spool.read_into(self.offset + low, out)
