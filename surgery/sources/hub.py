"""The Hugging Face Hub: snapshots of repositories, of which only those files are fetched that are read.

A reference is resolved once, to a commit; everything else is asked for at that commit. Its folder is the one that the
Hub's client would make, ``models--org--name/snapshots/COMMIT`` in the cache, so that what is there already is read from
there and what is fetched whole is found by others. Small files are checked against the names that git or LFS gave them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from surgery.errors import HubError, IOFailure, UsageError, printable
from surgery.sources import folders, http, hub_cache
from surgery.sources.listing import Listed, is_content, resolve
from surgery.sources.references import HubReference
from surgery.sources.remote import RemoteFile

SMALL_LIMIT = 200_000_000
"""Files above this size, in bytes, are never fetched for what they say, only for their tensors."""


class Snapshot:
    """The files of a repository at a commit: what :func:`surgery.sources.folders.declare` is told."""

    def __init__(self, reference: HubReference, commit: str, files: Mapping[str, Listed], *, cached: bool) -> None:
        self._reference, self._commit, self._files, self._cached = reference, commit, files, cached
        self.sizes = {name: listed.size for name, listed in files.items()}
        self._home = (hub_cache.cache_folder() if cached else _passing_folder()) / hub_cache.folder_name(reference.repo)
        self.folder = self._home / "snapshots" / commit
        self._lock = threading.Lock()

    def open(self, name: str) -> RemoteFile:
        """Open a file to be read by ranges, or from the cache once most of it is wanted."""
        listed = self._files[name]
        reader = http.RangeReader(self._url(name), listed.size, self._shown(name), self._commit)
        identity = (-1, int(hashlib.sha256(listed.etag.encode()).hexdigest()[:15], 16))
        fetch = (lambda: self._download(name)) if self._cached else None
        return RemoteFile(self.folder / name, reader, identity, fetch)

    def fetch(self, name: str) -> None:
        """Put a small file into the folder, after its content was checked.

        Raises:
            HubError: it cannot be fetched, or is not what the Hub listed.
        """
        listed = self._files[name]
        with self._lock:
            if (self.folder / name).exists():
                return
            data = http.get_bytes(
                self._url(name), self._shown(name), limit=SMALL_LIMIT, check=lambda data: is_content(data, listed)
            )
            with _writing(self._home):
                self._keep(name, listed.etag, data)

    def _keep(self, name: str, etag: str, data: bytes) -> None:
        """Store a blob and link to it, as the client does."""
        blob, link = self._home / "blobs" / etag, self.folder / name
        if not blob.exists():
            _put(blob, data)
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another process was faster
            link.symlink_to(os.path.relpath(blob, link.parent))

    def _download(self, name: str) -> Path:
        """Have the client download a file into the cache, and note what the revision stood for."""
        from huggingface_hub import hf_hub_download

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of is tried again here
        shown, found = self._shown(name), None
        patience = http.Patience(shown)
        while found is None:
            try:
                with http.client_errors(shown):
                    found = hf_hub_download(
                        self._reference.repo, name, revision=self._commit, cache_dir=self._home.parent,
                        endpoint=http.endpoint(),
                    )  # fmt: skip
            except http.Passing as error:
                patience.spend(str(error), error.wait)
        with _writing(self._home):
            self.note_revision()
        return Path(found)

    def note_revision(self) -> None:
        """Let the cache say which commit the branch or tag stood for, so that it is found without the Hub."""
        revision = self._reference.revision or hub_cache.MAIN
        if revision == self._commit:
            return
        _put(self._home / "refs" / revision, self._commit.encode("ascii"))

    def _url(self, name: str) -> str:
        return f"{http.endpoint()}/{self._reference.repo}/resolve/{self._commit}/{quote(name)}"

    def _shown(self, name: str) -> str:
        return printable(str(HubReference(self._reference.repo, self._commit[:12], name)))


_STREAMED = False
"""Whether the cache is left alone, to be read and written by nobody."""


def leave_cache_alone() -> None:
    """Neither read from the Hugging Face cache nor fill it, from now on: ``--no-cache``."""
    global _STREAMED  # noqa: PLW0603  a setting of the process, as the cache itself is
    _STREAMED = True


_RESOLVED: dict[tuple[object, ...], Path] = {}
"""A branch means one commit for as long as the process lives: a repository may be asked for several times in one job."""
_RESOLVED_LOCK = threading.Lock()


def forget() -> None:
    """Resolve branches and tags anew from now on."""
    with _RESOLVED_LOCK:
        _RESOLVED.clear()


def locate(reference: HubReference) -> Path:
    """Find the file or folder that a reference names, without fetching it; see :func:`folder_of`.

    Raises:
        UsageError: the repository has no such file or folder.
        HubError: as for :func:`folder_of`.
    """
    key = (http.endpoint(), reference.repo, reference.revision, _STREAMED)
    with _RESOLVED_LOCK:
        if key not in _RESOLVED:
            _RESOLVED[key] = folder_of(reference, cached=not _STREAMED)
        folder = _RESOLVED[key]
    path = folder / reference.path
    if not folders.exists(path) and not folders.is_folder(path):
        raise UsageError("the repository has no such file or folder", file=str(reference))
    return path


def folder_of(reference: HubReference, *, cached: bool) -> Path:
    """Resolve a reference to the folder of its snapshot, whose files are fetched when they are read.

    Args:
        reference: what to resolve. A path in it is left to the caller.
        cached: read from the Hugging Face cache, and keep what is fetched there; else in a folder that goes with the
            process.

    Raises:
        HubError: the Hub refuses, does not answer, or must not be asked and the cache does not have it.
    """
    if http.is_offline():
        found = hub_cache.find_snapshot(reference.repo, reference.revision) if cached else None
        if found is None or not hub_cache.is_whole(found):
            raise HubError(
                "HF_HUB_OFFLINE is set, and it is not in the Hugging Face cache",
                file=str(reference),
                mend="unset it, or download it",
            )
        return Path(os.path.realpath(found))
    commit, files = resolve(reference)
    snapshot = Snapshot(reference, commit, files, cached=cached)
    with _writing(snapshot.folder):
        snapshot.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(os.path.realpath(snapshot.folder))
    folders.declare(folder, snapshot)
    return folder


def _put(path: Path, data: bytes) -> None:
    """Put a small file into the cache, whole, whichever threads and processes do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.incomplete")
    draft.write_bytes(data)
    os.replace(draft, path)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IOFailure(f"the cache cannot be written: {error.strerror}", file=folder, mend="pass --no-cache") from None


_PASSING: list[tempfile.TemporaryDirectory[str]] = []
_PASSING_LOCK = threading.Lock()


def _passing_folder() -> Path:
    """Return a folder in place of the cache, that goes with the process."""
    with _PASSING_LOCK:
        if not _PASSING:
            _PASSING.append(tempfile.TemporaryDirectory(prefix="surgery-"))
        return Path(_PASSING[0].name)
