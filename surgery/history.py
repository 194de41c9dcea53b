"""History: what was merged into a checkpoint, read from its record and from the originals that merges keep.

A merge is a *step*. Its originals lie in ``.surgery/originals``, a safetensors container that no loader takes for
weights: ``3/tensor/NAME`` holds a tensor that step 3 replaced, ``3/rows/NAME`` and ``3/values/NAME`` the numbers and
values of the rows it replaced. What takes the other weights back lies in ``.surgery/undo``: ``3/NAME`` is the undo record of
a weight that step 3 changed (:mod:`surgery.formats.undo_record`). Later merges carry both along, so that steps can be
undone in reverse order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery import provenance
from surgery.checkpoint import Checkpoint
from surgery.errors import SurgeryError, VerificationError
from surgery.formats import safetensors, undo_record
from surgery.formats.undo_record import Undo
from surgery.kept import KEPT_FILE, UNDO_FILE
from surgery.plan import container_prefix
from surgery.sources import folders, local
from surgery.sources.files import OpenFile
from surgery.sources.local import StoredWeights
from surgery.tensor import LazyTensor, read_bytes, renamed


@dataclass
class History:
    """What is merged into a checkpoint."""

    known: bool = False
    """Whether there is a record at all."""
    adapters: list[dict[str, Any]] = field(default_factory=list)
    """One entry an adapter, oldest first: name, fingerprint, coeff, step, and the tensors it touched."""
    base_prints: dict[str, str] = field(default_factory=dict)
    """Tensor → fingerprint of what it was before the first merge."""
    prints: dict[str, str] = field(default_factory=dict)
    """Tensor → its fingerprint as recorded."""
    kept: dict[str, LazyTensor] = field(default_factory=dict)
    """The originals, by their names in the container."""
    undo: dict[str, LazyTensor] = field(default_factory=dict)
    """The undo records, by theirs."""
    kept_prints: dict[str, dict[str, str]] = field(default_factory=dict)
    """The recorded fingerprints of both containers' contents, by the container's name."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know of the folder."""
    stored: list[StoredWeights] = field(default_factory=list)
    """The files that ``kept`` and ``undo`` read from."""

    @property
    def next_step(self) -> int:
        """Number of the step that a further merge would be."""
        return 1 + max((entry["step"] for entry in self.adapters), default=0)

    def original(self, step: int, name: str) -> LazyTensor | None:
        """Return a tensor as it was before ``step`` replaced it."""
        found = self.kept.get(f"{step}/tensor/{name}")
        return None if found is None else renamed(found, name)

    def original_rows(self, step: int, name: str) -> tuple[LazyTensor, LazyTensor] | None:
        """Return the numbers and values of the rows of a tensor that ``step`` replaced."""
        rows, values = self.kept.get(f"{step}/rows/{name}"), self.kept.get(f"{step}/values/{name}")
        return None if rows is None or values is None else (rows, values)

    def undo_of(self, step: int, name: str, numel: int) -> tuple[Undo, LazyTensor] | None:
        """Return the head of the undo record of a weight that ``step`` changed, and the whole of it.

        Raises:
            FormatError: it is malformed.
            VerificationError: it was changed.
        """
        record = self.undo.get(f"{step}/{name}")
        if record is None:
            return None
        try:
            return read_undo(record, numel), record
        except SurgeryError as error:
            raise error.at(file=UNDO_FILE, tensor=name) from None

    def without(self, places: Collection[int], touched: Collection[str], *, exact: bool) -> History:
        """Return the history that remains when adapters come out, with the originals and records that still matter to it.

        Args:
            places: of their entries in :attr:`adapters`, all of one step.
            touched: the weights that change.
            exact: whether those are again what they were, to the bit; else no record of them fits any more.
        """
        adapters = [entry for place, entry in enumerate(self.adapters) if place not in places]
        gone = {self.adapters[place]["step"] for place in places}
        steps = {str(entry["step"]) for entry in adapters}
        undo = {}
        for key, record in self.undo.items():
            step, _, name = key.partition("/")
            if step in steps and not (name in touched and (not exact or int(step) in gone)):
                undo[key] = record
        kept = {name: tensor for name, tensor in self.kept.items() if name.partition("/")[0] in steps}
        return replace(self, adapters=adapters, prints={}, kept=kept, undo=undo)


def read_undo(record: LazyTensor, numel: int | None = None) -> Undo:
    """Read the head of an undo record.

    Args:
        record: all of it.
        numel: elements of its weight, where they are known.

    Raises:
        FormatError: it is malformed.
        VerificationError: it was changed.
    """
    size = record.spec.numel
    length = undo_record.head_length(bytes(read_bytes(record, 0, min(12, size))), size)
    return undo_record.parse_head(bytes(read_bytes(record, 0, length)), size, numel)


def history_of(checkpoint: Checkpoint) -> History:
    """Read the history of a checkpoint, saved or still lazy.

    Raises:
        FormatError: the record or the originals are malformed.
        VerificationError: they were changed.
    """
    if checkpoint.origin is not None:
        made = checkpoint.origin.history
        return made if isinstance(made, History) else History()
    if len(checkpoint.stored) != 1:
        return History()
    path = checkpoint.stored[0].path
    document = read_record(path)
    if document is None:
        return History()
    history = History(known=True, adapters=[dict(entry) for entry in document.get("adapters", [])])
    for name, entry in document["tensors"].items():
        history.prints[name] = entry["fingerprint"]
        if "base" in entry:
            history.base_prints[name] = entry["base"]
    history.kept_prints = dict(document.get("kept", {}))
    if folders.is_folder(path):
        open_kept(history, path)
        history.notes = _check_files(checkpoint.stored[0], document.get("files", {}))
    return history


def weight_headers(stored: StoredWeights, *, fetch: bool = False) -> dict[str, tuple[int, str]]:
    """Map weight files to their sizes and the digests of their headers; with ``fetch``, those on the Hub too."""
    found = {}
    for name, file in zip(dict.fromkeys(stored.shards.values()), stored.files, strict=False):
        if not fetch and not isinstance(file, OpenFile):
            continue  # elsewhere: its header came over a connection that has checks of its own
        length = 8 + int.from_bytes(file.read(0, min(8, file.size)), "little")
        found[name] = file.size, provenance.digest_of(file.read(0, min(length, file.size)))
    return found


def _check_files(stored: StoredWeights, recorded: Mapping[str, Any]) -> list[str]:
    """Look at what no fingerprint covers. Other sizes are other files: re-sharded, converted, or edited on purpose.

    Returns:
        Notes on small files that are of the same size, and not the same.

    Raises:
        VerificationError: so is the header of a weight file.
    """
    for name, (size, digest) in weight_headers(stored).items():
        entry = recorded.get(name, {})
        if entry.get("bytes") == size and entry.get("header", digest) != digest:
            raise VerificationError("its header was changed since it was written", file=stored.path / name)
    notes = []
    for name, entry in recorded.items():
        path = stored.path / name
        same_size = "digest" in entry and path.is_file() and path.stat().st_size == entry.get("bytes")
        if same_size and provenance.digest_of(path.read_bytes()) != entry["digest"]:
            notes.append(f"{stored.label}: {name} was changed since it was written; surgery verify tells what is whole")
    return notes


def open_kept(history: History, folder: Path) -> None:
    """Open what merges kept in a folder; headers are read and checked, data is not.

    Raises:
        FormatError: a container is malformed.
        VerificationError: it is not what the record lists.
    """
    history.kept = _open_container(history, folder, KEPT_FILE)
    history.undo = _open_container(history, folder, UNDO_FILE)


def _open_container(history: History, folder: Path, name: str) -> dict[str, LazyTensor]:
    """Open what a merge kept, and hold its header against how it is written and what the record lists."""
    recorded = history.kept_prints.get(name)
    path = folder / name
    if not folders.exists(path):
        return {}  # a copy without it, as it is pushed
    stored = StoredWeights(path, path.name, {}, {}, [])
    local.add_file(stored, path, path.name)
    history.stored = [*history.stored, stored]
    if recorded is not None:
        specs = [tensor.spec for tensor in stored.tensors.values()]
        prefix = container_prefix(specs)
        if recorded.keys() != stored.tensors.keys() or stored.files[0].read(0, len(prefix)) != prefix:
            raise VerificationError("its header was changed", file=path, mend="fetch it again")
    return stored.tensors


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the provenance record of a saved checkpoint or adapter; ``None`` where there is none.

    Raises:
        FormatError: it is malformed or of a later version.
        VerificationError: it was changed.
    """
    try:
        if folders.is_folder(path):
            data = local.read_config_bytes(path, provenance.RECORD)
        else:
            text = local.open_weights(path).metadata.get(provenance.METADATA_KEY)
            data = None if text is None else text.encode(errors="backslashreplace")
        if data is None:
            return None
        document = safetensors.strict_object(data)
        provenance.check_schema(document)
        provenance.check_seal(document, data)
    except SurgeryError as error:
        raise error.at(file=path / provenance.RECORD if folders.is_folder(path) else path) from None
    return document
