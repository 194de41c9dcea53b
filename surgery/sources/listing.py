"""What the Hub says of a repository: the commit that a revision stands for, and its files with their sizes and hashes.

All of it comes from somebody else, so all of it is checked before it is used.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from surgery.errors import FormatError, UnsafeError
from surgery.sources import http
from surgery.sources.hub_cache import MAIN
from surgery.sources.references import HubReference

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as the Hub lists it."""

    size: int
    oid: str
    """Git's name of its content: of the pointer, for a large file."""
    sha256: str | None

    @property
    def etag(self) -> str:
        """What its blob is called in the cache."""
        return self.sha256 or self.oid


def resolve(reference: HubReference) -> tuple[str, dict[str, Listed]]:
    """Ask the Hub what a revision stands for now, and which files it has.

    Returns:
        The commit, and the files by their paths.

    Raises:
        HubError: the Hub refuses, or does not answer.
        FormatError: its answer makes no sense.
        UnsafeError: a path leads out of the repository.
    """
    revision = quote(reference.revision or MAIN, safe="")
    url = f"{http.endpoint()}/api/models/{reference.repo}/revision/{revision}?blobs=true"
    document = http.get_json(url, str(reference))
    commit = document.get("sha") if isinstance(document, dict) else None
    listed = document.get("siblings") if isinstance(document, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit) or not isinstance(listed, list):
        raise FormatError("the Hub's answer names no commit and files", file=str(reference))
    if any(isinstance(item, dict) and "size" not in item for item in listed):
        listed = _tree(reference, commit)  # a mirror that does not pass the question on
    return commit, dict(_entry(item, reference) for item in listed)


def _tree(reference: HubReference, commit: str) -> list[dict[str, Any]]:
    """List the files of a commit by the longer way, page by page."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    patience = http.Patience(str(reference))
    while True:
        try:
            with http.client_errors(str(reference)):
                tree = HfApi(endpoint=http.endpoint()).list_repo_tree(reference.repo, recursive=True, revision=commit)
                files = [item for item in tree if isinstance(item, RepoFile)]
        except http.Passing as error:
            patience.spend(str(error), error.wait)
        else:
            return [
                {
                    "rfilename": file.path, "size": file.size, "blobId": file.blob_id,
                    "lfs": {"sha256": file.lfs.sha256} if file.lfs else None,
                }
                for file in files
            ]  # fmt: skip


def _entry(item: Any, reference: HubReference) -> tuple[str, Listed]:
    """Check one file that the Hub lists.

    Raises:
        FormatError: it is not described as the Hub describes files.
        UnsafeError: its name leads out of the repository.
    """
    if not isinstance(item, dict):
        raise FormatError(f"the Hub lists {item!r:.80}", file=str(reference))
    name, size, oid, large = (item.get(key) for key in ("rfilename", "size", "blobId", "lfs"))
    sha256 = large.get("sha256") if isinstance(large, dict) else None
    if not isinstance(name, str) or type(size) is not int or size < 0:
        raise FormatError(f"the Hub lists {item!r:.80}", file=str(reference))
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        raise UnsafeError(f"the Hub lists {name!r}, outside the repository", file=str(reference))
    for digest, length in ((oid, 40), (sha256, 64)):
        if digest is not None and not (isinstance(digest, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", digest)):
            raise FormatError(f"the Hub lists {item!r:.80}", file=str(reference))
    if oid is None:
        raise FormatError(f"the Hub does not say which content {name!r} has", file=str(reference))
    return name, Listed(size, oid, sha256)


def is_content(data: bytes, listed: Listed) -> bool:
    """Say whether bytes are a file's content, by its length and the hash that git or LFS gave it."""
    if len(data) != listed.size:
        return False
    if listed.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == listed.sha256
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == listed.oid
