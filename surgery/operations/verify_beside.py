"""``verify``, beside the weights: what merges kept, small files, and the headers that no fingerprint covers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery import provenance
from surgery.errors import SurgeryError, VerificationError
from surgery.formats.safetensors import build_header
from surgery.formats.undo_record import check_part
from surgery.history import History, open_kept, read_undo, weight_headers
from surgery.kept import KEPT_FILE, UNDO_FILE
from surgery.report import join_shown
from surgery.sources import folders
from surgery.sources.local import StoredWeights
from surgery.tensor import LazyTensor, human_bytes, read_bytes


def verify_beside(path: Path, stored: StoredWeights, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Check everything of an output that is not a tensor of its weights.

    Returns:
        What was checked → what was found.

    Raises:
        VerificationError: a byte of it is not what was recorded; file and tensor are named.
        FormatError: something that merges kept is malformed.
    """
    if not folders.is_folder(path):
        _check_own_header(path, stored, record)
        return []
    checks = []
    history = History(known=True, kept_prints=dict(record.get("kept", {})))
    open_kept(history, path)
    for container, content in ((KEPT_FILE, history.kept), (UNDO_FILE, history.undo)):
        for name, tensor in content.items():
            _check_kept(container, name, tensor, history.kept_prints.get(container, {}))
        if content:
            size = sum(tensor.spec.nbytes for tensor in content.values())
            checks.append((container, f"all {len(content):,} as recorded, {human_bytes(size)}"))
    files = record.get("files")
    if files:
        checks.append(("files", _check_files(path, stored, files)))
    return checks


def _check_kept(container: str, name: str, tensor: LazyTensor, recorded: Mapping[str, str]) -> None:
    """Hold one kept tensor against its fingerprint, and an undo record against its own digests."""
    try:
        if container == UNDO_FILE:
            undo = read_undo(tensor)
            offset = undo.offset
            for part in undo.parts:
                check_part(part, bytes(read_bytes(tensor, offset, offset + part.size)))
                offset += part.size
        if recorded and provenance.fingerprint(tensor) != recorded[name]:
            raise VerificationError("does not have the bytes that were recorded", mend="fetch it again")
    except SurgeryError as error:
        raise error.at(file=container, tensor=name) from None


def _check_files(folder: Path, stored: StoredWeights, recorded: Mapping[str, Any]) -> str:
    """Hold small files against their digests, and weight files' headers, unless these are other files than were written."""
    weights = {name for name, entry in recorded.items() if "header" in entry}
    own = weights == set(stored.shards.values())
    headers = weight_headers(stored, fetch=True)
    absent, checked = [], 0
    for name, entry in recorded.items():
        if not own and (name in weights or name.endswith(".index.json")):
            continue  # the same tensors in other files: their fingerprints are all that must agree
        path = folder / name
        if name in headers:
            size, found = headers[name]
        elif folders.exists(path):
            data = folders.here(path).read_bytes()
            size, found = len(data), provenance.digest_of(data)
        else:
            absent.append(name)
            continue
        if (size, found) != (entry.get("bytes"), entry.get("header", entry.get("digest"))):
            part = "its header" if name in weights else "it"
            raise VerificationError(f"{part} was changed since it was written", file=path, mend="fetch it again")
        checked += 1
    return f"{checked} as recorded" + (f"; not here: {join_shown(absent)}" if absent else "")


def _check_own_header(path: Path, stored: StoredWeights, record: Mapping[str, Any]) -> None:
    """Hold the header of a single file against how it is written."""
    if provenance.SEAL not in record:
        return
    specs = [tensor.spec for tensor in stored.tensors.values()]
    prefix, _ = build_header(specs, {"format": "pt", provenance.METADATA_KEY: provenance.encode(record).decode()})
    if stored.files[0].read(0, min(len(prefix), stored.files[0].size)) != prefix:
        raise VerificationError("its header was changed since it was written", file=path, mend="fetch it again")
