"""References to the Hugging Face Hub: ``hf://org/name``, with a revision and a place inside where they are wanted."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from surgery.errors import UsageError

SCHEME = "hf://"
_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_LONG_REVISION = re.compile(r"refs/(?:pr|convert|heads|tags)/[^/]+")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository on the Hub at a revision, or a file or folder in it."""

    repo: str
    """``org/name``, or ``name`` for the few that have no owner."""
    revision: str | None = None
    """A branch, a tag, a pull request (``refs/pr/3``) or a commit; the main branch where it is ``None``."""
    path: str = ""
    """Inside the repository."""

    def __str__(self) -> str:
        """Write it as it is typed."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}{'/' if self.path else ''}{self.path}"


def is_hub_reference(ref: object) -> bool:
    """Say whether ``ref`` is written as a reference to the Hub."""
    return isinstance(ref, str | os.PathLike) and os.fspath(ref).startswith(("hf://", "hf:/"))


def is_repository(text: str) -> bool:
    """Say whether ``text`` could name a repository.

    >>> is_repository("org/name"), is_repository("./folder"), is_repository("a/b/c"), is_repository("a/b--c")
    (True, False, False, False)
    """
    return _ID.fullmatch(text) is not None and not re.search(r"--|\.\.|\.git$|[.-]$|[.-]/", text)


def parse_reference(ref: str | os.PathLike[str]) -> HubReference:
    """Take a reference apart.

    Raises:
        UsageError: it does not name a repository, or leads out of it.

    >>> parse_reference("hf://org/name@v1.0/unet")
    HubReference(repo='org/name', revision='v1.0', path='unet')
    >>> str(parse_reference("hf://org/name@refs/pr/3"))
    'hf://org/name@refs/pr/3'
    """
    text = os.fspath(ref)
    # A path made of it loses one of the two slashes.
    rest = re.sub(r"^hf:/{1,2}(?:models/)?", "", text).rstrip("/")
    before, at, after = rest.partition("@")
    revision = None
    if at:
        long = _LONG_REVISION.match(after)
        revision = long[0] if long else after.partition("/")[0]
        repo, path = before, after[len(revision) :].lstrip("/")
    else:
        parts = before.split("/")
        repo, path = "/".join(parts[:2]), "/".join(parts[2:])
    if not is_repository(repo):
        raise UsageError(f"{repo!r} is not the name of a repository", file=text, mend="write hf://org/name@revision")
    if at and (not revision or re.search(r"[\s\0\\?#]|\.\.", revision)):
        raise UsageError(f"{revision!r} is not a revision", file=text, mend="write hf://org/name@revision")
    if any(part in ("", ".", "..") for part in path.split("/") if path) or "\0" in path or "\\" in path:
        raise UsageError("leads out of its repository", file=text)
    return HubReference(repo, revision, path)
