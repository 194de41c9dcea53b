"""History: what was merged into a checkpoint, read from its record and from the originals that merges keep.

A merge is a *step*. Its originals lie in ``.surgery/originals``, a safetensors container that no loader takes for
weights: ``3/tensor/NAME`` holds a tensor that step 3 replaced, ``3/rows/NAME`` and ``3/values/NAME`` the numbers and
values of the rows it replaced. Later merges carry the originals of earlier ones along, so that steps can be undone in
reverse order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery import provenance
from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, SurgeryError
from surgery.execute import KEPT_FILE
from surgery.formats import safetensors
from surgery.sources import folders, local
from surgery.sources.local import StoredWeights
from surgery.tensor import LazyTensor, renamed


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
    stored: list[StoredWeights] = field(default_factory=list)
    """The files that ``kept`` reads from."""

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

    def without(self, fingerprint: str) -> tuple[list[dict[str, Any]], dict[str, LazyTensor]]:
        """Return the adapters that remain when one comes out, once, and the originals that still matter to them."""
        last = max(place for place, entry in enumerate(self.adapters) if entry["fingerprint"] == fingerprint)
        adapters = [entry for place, entry in enumerate(self.adapters) if place != last]
        steps = {str(entry["step"]) for entry in adapters}
        return adapters, {name: tensor for name, tensor in self.kept.items() if name.partition("/")[0] in steps}


def history_of(checkpoint: Checkpoint) -> History:
    """Read the history of a checkpoint, saved or still lazy.

    Raises:
        FormatError: the record or the originals are malformed.
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
    history = History(known=True, adapters=_entries(document, path))
    for name, entry in document["tensors"].items():
        history.prints[name] = entry["fingerprint"]
        if "base" in entry:
            history.base_prints[name] = entry["base"]
    if folders.is_folder(path) and folders.exists(path / KEPT_FILE):
        stored = StoredWeights(path / KEPT_FILE, "originals", {}, {}, [])
        local.add_file(stored, path / KEPT_FILE, "originals")
        history.kept, history.stored = stored.tensors, [stored]
    return history


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the provenance record of a saved checkpoint or adapter; ``None`` where there is none.

    Raises:
        FormatError: it is malformed or of a later version.
    """
    try:
        if folders.is_folder(path):
            document = local.read_config(path, provenance.RECORD)
        else:
            text = local.open_weights(path).metadata.get(provenance.METADATA_KEY)
            document = None if text is None else safetensors.strict_object(text.encode())
        if document is not None:
            provenance.check_schema(document)
    except SurgeryError as error:
        raise error.at(file=path / provenance.RECORD if folders.is_folder(path) else path) from None
    return document


def _entries(document: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    entries = document.get("adapters", [])
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise FormatError("an entry of the record's adapters is malformed", file=path / provenance.RECORD)
    return [dict(entry) for entry in entries]


def _is_entry(entry: Any) -> bool:
    wanted = {"name": str, "fingerprint": str, "coeff": float, "step": int, "touched": list, "replaced": list}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in wanted.items()):
        return False
    return math.isfinite(entry["coeff"]) and all(isinstance(n, str) for n in (*entry["touched"], *entry["replaced"]))
