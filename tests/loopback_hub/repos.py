"""What a Hub stores: repositories, commits, and large objects by their SHA-256."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".delta")
"""What a new repository's ``.gitattributes`` sends to LFS, whatever its size."""
LARGE_FROM = 10_000_000


def is_large(path: str, size: int) -> bool:
    """Say whether a file goes to LFS. An empty one never does."""
    return size > 0 and (path.endswith(LARGE) or size > LARGE_FROM)


@dataclass(frozen=True)
class File:
    """A file in a commit: small ones hold their content, large ones point to it."""

    size: int
    content: bytes | None = None
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def oid(self) -> str:
        """The name of git's blob: of the content, or of the LFS pointer."""
        if self.content is not None:
            return git_blob(self.content)
        return git_blob(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        )

    @property
    def etag(self) -> str:
        """What identifies the content to the client's cache."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: str | None
    title: str
    files: Mapping[str, File]


class Conflict(Exception):
    """The parent of a commit is not the head any more."""


@dataclass
class Repo:
    """A model repository."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: int = 0

    def __post_init__(self) -> None:
        if not self.refs:
            self.refs["main"] = self._store(None, "initial commit", {".gitattributes": File(0, b"")}).oid

    def commit_of(self, revision: str) -> Commit | None:
        """Find a branch, a tag, a pull request, or a commit by its first characters."""
        if revision in self.refs:
            return self.commits[self.refs[revision]]
        if revision == "HEAD":
            return self.commits[self.refs["main"]]
        if len(revision) < 5:
            return None
        found = [commit for oid, commit in self.commits.items() if oid.startswith(revision)]
        return found[0] if len(found) == 1 else None

    def commit(self, ref: str, files: Mapping[str, File], *, title: str = "", parent: str | None = None) -> Commit:
        """Put a new state on a branch.

        Raises:
            Conflict: ``parent`` is given and is not the head of the branch.
        """
        head = self.refs[ref]
        if parent is not None and not head.startswith(parent):
            raise Conflict(head)
        made = self._store(head, title, files)
        self.refs[ref] = made.oid
        return made

    def history(self, ref: str = "main") -> list[Commit]:
        """List the commits of a branch, the newest first."""
        found, oid = [], self.refs[ref]
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found

    def _store(self, parent: str | None, title: str, files: Mapping[str, File]) -> Commit:
        oid = hashlib.sha1(f"{self.id}/{next(_NUMBERS)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, dict(files))
        return self.commits[oid]


_NUMBERS = itertools.count()


def git_blob(content: bytes) -> str:
    """Name content as git does."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
