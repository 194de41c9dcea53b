"""The Hugging Face cache: finding a model that was downloaded before, by its name. Nothing is ever fetched.

A repository ``org/name`` lies in ``models--org--name``; ``refs/REVISION`` holds the commit that a branch or tag stood
for, and ``snapshots/COMMIT`` the files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.formats.safetensors import parse_index
from surgery.sources.references import is_repository

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".delta")
MAIN = "main"
"""The branch that is meant where none is named."""


def folder_name(name: str) -> str:
    """Name a repository's folder in the cache.

    >>> folder_name("org/name")
    'models--org--name'
    """
    return f"models--{name.replace('/', '--')}"


def cache_folder() -> Path:
    """Return the folder of the cache, as huggingface_hub finds it from the environment."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home, "hub").expanduser()


def is_whole(snapshot: Path) -> bool:
    """Say whether a snapshot has weights, and all shards that its indexes name: it may have been fetched in part."""
    names = {path.name for path in snapshot.iterdir()}
    for index in (name for name in names if name.endswith(".index.json")):
        try:
            shards = parse_index((snapshot / index).read_bytes()).values()
        except (OSError, SurgeryError):
            return True  # whoever opens it says what is wrong
        if not names.issuperset(shards):
            return False
    return any(name.endswith(WEIGHTS) for name in names)


def find_snapshot(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a downloaded model; ``None`` where it is not in the cache.

    Args:
        name: ``org/name``, or ``name``.
        revision: a branch, a tag, or a commit or its first seven characters or more; ``main`` by default.
    """
    if not is_repository(name):
        return None
    repository = cache_folder() / folder_name(name)
    snapshots = repository / "snapshots"
    commit = revision or MAIN
    reference = repository / "refs" / commit
    if ".." not in commit.split("/") and reference.is_file():
        commit = reference.read_text(encoding="ascii", errors="replace").strip()
    if re.fullmatch(r"[0-9a-f]{7,40}", commit) is None or not snapshots.is_dir():
        return None
    found = [path for path in sorted(snapshots.iterdir()) if path.name.startswith(commit) and path.is_dir()]
    return found[0] if len(found) == 1 else None
