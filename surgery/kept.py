"""What an output holds beside its weights: our own containers, those who note what goes into them, and digests of files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import VerificationError
from surgery.plan import Plan
from surgery.provenance import digest_of
from surgery.tensor import LazyTensor

KEPT_FILE, UNDO_FILE = ".surgery/originals", ".surgery/undo"
"""Where a merge keeps what it replaced, and the undo records of the rest: not ``*.safetensors``, so that no loader takes
them for weights."""


class Companion(Protocol):
    """Somebody who notes what goes by while weights are made."""

    def pack(self, names: Collection[str]) -> Iterable[bytes]:
        """Write what was noted of some tensors, for a run that goes on where this one is broken off."""
        ...

    def unpack(self, data: bytes) -> None:
        """Take over what an earlier run packed."""
        ...

    def allowance(self) -> int:
        """Estimate the bytes of :meth:`records`, which are known only once all is written."""
        ...

    def records(self, fingerprints: Mapping[str, str]) -> Mapping[str, LazyTensor]:
        """Return what belongs into the undo container, once all is written and has these fingerprints."""
        ...

    def report(self) -> Mapping[str, Any]:
        """Return fields for the record."""
        ...


def check_carried(container: str, written: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """Hold what was carried over from an earlier output against that one's record.

    Raises:
        VerificationError: it is not what was recorded.
    """
    for name, value in recorded.items():
        if written.get(name, value) != value:
            raise VerificationError("was changed since it was kept", file=container, tensor=name, mend="fetch it again")


def tensors_last(document: Mapping[str, Any]) -> dict[str, Any]:
    """Put a record's tensors after everything else."""
    return {**{key: value for key, value in document.items() if key != "tensors"}, "tensors": document["tensors"]}


CARD = "README.md"
"""What people write into: no digest of it is kept."""


def digests_beside(plan: Plan, staging: Path) -> dict[str, dict[str, Any]]:
    """Digest all that no fingerprint covers: small files whole, weight files' headers.

    Args:
        plan: of the weight files.
        staging: the output's folder, all of it written but the record.
    """
    found: dict[str, dict[str, Any]] = {
        file.name: {"bytes": file.size, "header": digest_of(file.prefix)} for file in plan.files
    }
    for path in staging.rglob("*"):
        name = path.relative_to(staging).as_posix()
        if name not in found and path.is_file() and not name.startswith(".") and name != CARD:
            found[name] = {"bytes": path.stat().st_size, "digest": digest_of(path.read_bytes())}
    return dict(sorted(found.items()))
