"""The journal of an output in the making: which of its files are finished, so that a later run need not make them again.

It lies in the staging folder, one small file for every finished file, and belongs to one *digest*: of the layout, the
work, and the inputs. A file is entered after its bytes were synced, by a rename, so that whatever is entered is whole;
processes on several machines may enter files side by side. The journal is erased before the output is published.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from surgery import __version__
from surgery.errors import OutputError

NAME = ".surgery-journal"
_DIGEST = "digest"


def digest_of(work: str, prefixes: Mapping[str, bytes]) -> str:
    """Return the digest of a run: the same for the same version, work and layout.

    Args:
        work: everything that decides the values, and the identity of every input file.
        prefixes: the header of every output file, which holds names, dtypes, shapes and places.
    """
    total = xxhash.xxh3_128(f"{__version__}\0{work}\0".encode())
    for name, prefix in prefixes.items():
        total.update(f"{name}\0{len(prefix)}\0".encode() + prefix)
    return f"xxh3-128:{total.hexdigest()}"


class Journal:
    """The finished files of one staging folder."""

    def __init__(self, staging: Path, digest: str) -> None:
        self.staging = staging
        self.digest = digest
        self.folder = staging / NAME

    def belongs(self) -> bool:
        """Say whether the staging folder was begun by a run of the same digest."""
        try:
            return (self.folder / _DIGEST).read_text(encoding="ascii") == self.digest
        except (OSError, UnicodeDecodeError):
            return False

    def begin(self) -> None:
        """Claim the staging folder for this digest, if nobody has.

        Raises:
            OutputError: it belongs to another.
        """
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / _DIGEST).exists():
            self._enter(_DIGEST, [self.digest.encode()])
        if not self.belongs():
            raise OutputError("holds finished files of another plan", file=self.staging, mend="--restart discards them")

    def finished(self) -> dict[str, dict[str, str]]:
        """Return the finished files that are there in full, each with its tensors' fingerprints."""
        found: dict[str, dict[str, str]] = {}
        for path in sorted(self.folder.glob("*.json")):
            name = path.name.removesuffix(".json")
            entry = _entry(path)
            with suppress(OSError):
                if entry is not None and (self.staging / name).stat().st_size == entry["size"]:
                    found[name] = entry["tensors"]
        return found

    def finish(
        self, name: str, size: int, fingerprints: Mapping[str, str], notes: Iterable[bytes] | None = None
    ) -> None:
        """Enter a file whose bytes are synced, and before it what was noted while it was made."""
        if notes is not None:
            self._enter(f"{name}.notes", notes)
        self._enter(f"{name}.json", [json.dumps({"size": size, "tensors": fingerprints}).encode()])

    def notes(self, name: str) -> bytes:
        """Return what was noted while a finished file was made."""
        return (self.folder / f"{name}.notes").read_bytes()

    def drop_unfinished(self) -> None:
        """Remove what a dead run left half-written beside the finished files."""
        keep = {NAME, *self.finished()}
        for path in self.staging.iterdir():
            if path.name not in keep:
                _remove(path)
        for path in self.folder.glob("*.lock"):
            path.unlink()

    def claim(self, name: str) -> Callable[[], None]:
        """Hold one unfinished file against other processes, and clear away what a dead one left of it.

        Returns:
            What lets go of it.

        Raises:
            OutputError: somebody is writing it, or has just finished it.
        """
        descriptor = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise OutputError("another run is writing it", file=name, mend="wait for it") from None
        if name in self.finished():
            os.close(descriptor)
            raise OutputError("another run finished it meanwhile", file=name, mend="the same command goes on")
        (self.staging / name).unlink(missing_ok=True)
        return lambda: os.close(descriptor)

    def erase(self) -> None:
        """Remove the journal: what it stands beside is about to be published."""
        _remove(self.folder)

    def _enter(self, name: str, pieces: Iterable[bytes]) -> None:
        draft = self.folder / f"{name}.{os.getpid()}.draft"
        with open(draft, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.folder / name)
        for folder in (self.folder, self.staging):
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _entry(path: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("tensors"), dict)
    return entry if whole else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            _remove(inner)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
