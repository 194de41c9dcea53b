"""Every error that surgery raises on purpose, and the exit code each one ends the command line with.

::

    SurgeryError                 1   never raised itself
    ├── UsageError               2   the command or call is wrong (options, patterns, rank ≤ 0)
    ├── FormatError              3   a file is malformed or incomplete
    ├── MismatchError            4   well-formed inputs that do not belong together
    │   └── UnsupportedError     4   well-formed, but of a kind that surgery does not operate on
    ├── UnsafeError              5   a file would run code, or reaches outside its own folder
    ├── NumericError             6   NaN, Inf, or overflow in the output's dtype
    ├── OutputError              7   the output exists, is locked, lies in an input, or does not fit
    ├── IOFailure                8   the system failed to read or write; a file changed while read
    ├── HubError                 9   the Hugging Face Hub refused or did not answer
    └── VerificationError       10   bytes on disk are not those that were recorded

Code 1 is left to ``--exit-code`` commands ("differs"), 70 to internal errors, 130 to Ctrl-C.

A message has three parts: *what* is wrong, *where* (file, then tensor), and *how to mend it*. Low rooms
raise what they know; a room that knows more adds it with :meth:`SurgeryError.at`, and only the command
line prints. Nothing but this tree may live here.
"""

from __future__ import annotations

import os
from typing import Self


class SurgeryError(Exception):
    """Base of every deliberate error.

    Args:
        what: one clause that says what is wrong, with the expected and the found value.
        file: the file or folder concerned.
        tensor: the tensor concerned.
        mend: one clause that says what to do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        mend: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.file = None if file is None else os.fspath(file)
        self.tensor = tensor
        self.mend = mend

    def at(
        self,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        mend: str | None = None,
    ) -> Self:
        """Add the place where it happened, keeping what a lower room already said."""
        if self.file is None and file is not None:
            self.file = os.fspath(file)
        self.tensor = self.tensor or tensor
        self.mend = self.mend or mend
        return self

    def __str__(self) -> str:
        """Render one line: ``file: tensor: what; mend``, with control characters escaped."""
        places = [part for part in (self.file, self.tensor) if part is not None]
        line = ": ".join([*places, self.what])
        if self.mend:
            line = f"{line}; {self.mend}"
        return printable(line)


class UsageError(SurgeryError):
    """The command or call itself is wrong."""

    exit_code = 2


class FormatError(SurgeryError):
    """A file is malformed or incomplete."""

    exit_code = 3


class MismatchError(SurgeryError):
    """Inputs are well-formed but do not belong together."""

    exit_code = 4


class UnsupportedError(MismatchError):
    """An input is well-formed but of a kind that surgery does not operate on."""


class UnsafeError(SurgeryError):
    """A file would run code, or names a path outside its own folder."""

    exit_code = 5


class NumericError(SurgeryError):
    """A value is NaN or infinite, or overflows the output's dtype."""

    exit_code = 6


class OutputError(SurgeryError):
    """The output exists, is locked, lies in an input, or does not fit on the disk."""

    exit_code = 7


class IOFailure(SurgeryError):
    """The system failed to read or write, or a file changed while it was read."""

    exit_code = 8


class HubError(SurgeryError):
    """The Hugging Face Hub refused or did not answer."""

    exit_code = 9


class VerificationError(SurgeryError):
    """Bytes on disk are not those that were recorded, or an adapter does not load where it should."""

    exit_code = 10


def printable(text: str) -> str:
    r"""Escape control characters, so that a hostile tensor name can neither break a line nor colour it.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
