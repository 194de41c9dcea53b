"""Folders that are only partly here: a snapshot of a repository lists files that have not been fetched.

To the rest of the program such a folder is a path like any other. Whoever looks into it asks this room, which answers
from the disk where the file is there, and from where the folder was declared to come from where it is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from surgery.sources.files import OpenFile, StoredFile


class Elsewhere(Protocol):
    """Where the files of a folder are that are not in it yet."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Path in the folder → bytes, of every file."""
        ...

    def open(self, name: str) -> StoredFile:
        """Open a file where it is."""
        ...

    def fetch(self, name: str) -> None:
        """Put a small file into the folder."""
        ...


_DECLARED: dict[Path, Elsewhere] = {}


def declare(folder: Path, files: Elsewhere) -> None:
    """Say where the files of ``folder`` come from. A snapshot's path names its commit, so this holds for good."""
    _DECLARED[folder] = files


def members(folder: Path) -> list[tuple[str, bool]]:
    """List a folder: every name, and whether it is a folder itself."""
    found = {entry.name: entry.is_dir() for entry in os.scandir(folder)} if folder.is_dir() else {}
    home = _home(folder)
    if home:
        files, inside = home
        for name in files.sizes:
            if name.startswith(inside):
                first, below, _ = name[len(inside) :].partition("/")
                found.setdefault(first, bool(below))
    return sorted(found.items())


def is_folder(path: Path) -> bool:
    """Say whether ``path`` is a folder, here or elsewhere."""
    home = _home(path)
    return path.is_dir() or (home is not None and any(name.startswith(home[1]) for name in home[0].sizes))


def exists(path: Path) -> bool:
    """Say whether a file is there, or elsewhere."""
    return os.path.lexists(path) or _absent(path) is not None


def size(path: Path) -> int:
    """Return a file's size, without fetching it."""
    absent = _absent(path)
    return path.stat().st_size if absent is None else absent[0].sizes[absent[1]]


def open_file(path: Path) -> StoredFile:
    """Open a file for reading, here or elsewhere."""
    absent = _absent(path)
    return OpenFile(path) if absent is None else absent[0].open(absent[1])


def here(path: Path) -> Path:
    """Fetch a small file, if it is elsewhere."""
    absent = _absent(path)
    if absent is not None:
        absent[0].fetch(absent[1])
    return path


def is_absent(path: Path) -> bool:
    """Say whether a file is elsewhere only."""
    return _absent(path) is not None


def _absent(path: Path) -> tuple[Elsewhere, str] | None:
    """Find where a file is that is not here."""
    home = None if os.path.lexists(path) else _home(path.parent)
    if home is None:
        return None
    name = home[1] + path.name
    return (home[0], name) if name in home[0].sizes else None


def _home(folder: Path) -> tuple[Elsewhere, str] | None:
    """Find where a folder's files come from, and what their names there begin with."""
    if not _DECLARED:
        return None
    ancestors: Iterable[Path] = (folder, *folder.parents)
    for ancestor in ancestors:
        if ancestor in _DECLARED:
            inside = folder.relative_to(ancestor).as_posix()
            return _DECLARED[ancestor], "" if inside == "." else f"{inside}/"
    return None
