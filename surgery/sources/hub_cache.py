"""The Hugging Face cache: finding a model that was downloaded before, by its name. Nothing is ever fetched.

A repository ``org/name`` lies in ``models--org--name``; ``refs/REVISION`` holds the commit that a branch or tag stood
for, and ``snapshots/COMMIT`` the files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(text: str) -> bool:
    """Say whether ``text`` could name a repository.

    >>> is_hub_name("org/name"), is_hub_name("./folder"), is_hub_name("a/b/c")
    (True, False, False)
    """
    return _NAME.fullmatch(text) is not None and ".." not in text


def cache_folder() -> Path:
    """Return the folder of the cache, as huggingface_hub finds it from the environment."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home, "hub").expanduser()


def find_snapshot(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a downloaded model; ``None`` where it is not in the cache.

    Args:
        name: ``org/name``, or ``name``.
        revision: a branch, a tag, or a commit or its first seven characters or more; ``main`` by default.
    """
    if not is_hub_name(name):
        return None
    repository = cache_folder() / f"models--{name.replace('/', '--')}"
    snapshots = repository / "snapshots"
    commit = revision or "main"
    reference = repository / "refs" / commit
    if ".." not in commit.split("/") and reference.is_file():
        commit = reference.read_text(encoding="ascii", errors="replace").strip()
    if re.fullmatch(r"[0-9a-f]{7,40}", commit) is None or not snapshots.is_dir():
        return None
    found = [path for path in sorted(snapshots.iterdir()) if path.name.startswith(commit) and path.is_dir()]
    return found[0] if len(found) == 1 else None
