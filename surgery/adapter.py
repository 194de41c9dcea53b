"""Adapters: stored deltas in PEFT form, read lazily: tensors under PEFT's keys, and a configuration.

:mod:`surgery.binding` finds the weights that they change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery import execute, numerics, provenance
from surgery.checkpoint import default_jobs
from surgery.errors import FormatError, SurgeryError, UsageError, VerificationError
from surgery.formats import peft, peft_scalings
from surgery.history import read_record
from surgery.plan import NO_LIMIT
from surgery.sources import folders, local
from surgery.sources.references import is_hub_reference
from surgery.tensor import LazyTensor, human_bytes

if TYPE_CHECKING:
    import torch


class Adapter:
    """A PEFT adapter: LoRA, IA³ or LayerNorm tuning.

    Args:
        tensors: by PEFT key.
        document: ``adapter_config.json``.
        label: a short name for messages and records.
        stored: the files it reads from.
        files: further files that belong into its folder (``README.md``).
        record: composes its provenance from its tensors' fingerprints.
        taken_from: fingerprints of the base tensors it was taken from, where they are known.
        report: how good it is, for adapters that were extracted.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        document: Mapping[str, Any],
        *,
        label: str,
        stored: Sequence[local.StoredWeights] = (),
        files: Mapping[str, bytes] | None = None,
        record: Callable[[Mapping[str, str]], dict[str, Any]] | None = None,
        taken_from: Mapping[str, str] | None = None,
        report: Any = None,
    ) -> None:
        self.tensors = dict(tensors)
        self.document = dict(document)
        self.label = label
        self.stored = list(stored)
        self.files = dict(files or {})
        self.taken_from = dict(taken_from or {})
        self.report = report
        self._record = record

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def __repr__(self) -> str:
        """Name it and say how large it is."""
        return f"<Adapter {self.label!r}: rank {self.document.get('r')}, {len(self.tensors)} tensors, {human_bytes(self.nbytes)}>"

    def _repr_html_(self) -> str:
        """Show the report in a notebook."""
        return self.report._repr_html_() if self.report is not None else f"<code>{self!r}</code>"

    def __getitem__(self, key: str) -> torch.Tensor:
        """Read one tensor."""
        return numerics.load(self.tensors[key])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Read all tensors, by PEFT key."""
        return {key: self[key] for key in self.tensors}

    def fingerprint(self) -> str:
        """Fingerprint its tensors and the settings that decide its scale."""
        values = {key: provenance.fingerprint(tensor) for key, tensor in self.tensors.items()}
        scale = {
            key: self.document.get(key) for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        }
        return provenance.combine({**values, "": repr(sorted(scale.items()))})

    def save(
        self, out: str | os.PathLike[str], *, overwrite: bool = False, progress: execute.Progress | None = None
    ) -> dict[str, Any]:
        """Write a folder that PEFT loads, whole or not at all; see :meth:`surgery.Checkpoint.save`."""
        if os.fspath(out).endswith(".safetensors"):
            raise UsageError("an adapter is a folder: its scale stands in a file of its own", file=os.fspath(out))
        return execute.publish(
            self.tensors,
            out,
            record=self._record or self._plain_record,
            stem=peft.STEM,
            max_shard_size=NO_LIMIT,
            workers=default_jobs(),
            overwrite=overwrite,
            sources=self.stored,
            files={peft.CONFIG: peft.encode_config(self.document), **self.files},
            check=_read_back,
            progress=progress,
        )

    @property
    def pinned(self) -> dict[str, str]:
        """What a record says of where it was, beside its name; see :func:`surgery.sources.local.pinned`."""
        return local.pinned(self.stored) if self._record is None else {}

    def _plain_record(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        return provenance.record(
            "save",
            parameters={},
            inputs=[{"role": "adapter", "name": self.label, **self.pinned}],
            tensors=fingerprints,
            base=self.taken_from,
        )


def _read_back(folder: Path, written: Mapping[str, str]) -> None:
    """Read what was written once more: the errors that its card states are of these bits.

    Raises:
        VerificationError: a tensor is not what was written.
    """
    stored = local.open_weights(folder, adapter=True)
    try:
        for key, value in written.items():
            if key not in stored.tensors or provenance.fingerprint(stored.tensors[key]) != value:
                raise VerificationError("is not what was written", file=stored.label, tensor=key, mend="check the disk")
    finally:
        stored.close()


def is_adapter(source: object) -> bool:
    """Say whether ``source`` is an adapter: an object, a folder with an adapter's files, or such a file."""
    if isinstance(source, Adapter):
        return True
    if not isinstance(source, (str, os.PathLike)):
        return False
    path = local.resolve(source) if is_hub_reference(source) else Path(source).expanduser()
    if folders.is_folder(path):
        names = [name for name, _ in folders.members(path)]
        return peft.CONFIG in names or (any(n.startswith(peft.STEM) for n in names) and "config.json" not in names)
    return path.name.startswith(peft.STEM) or path.name == peft.CONFIG


def open_adapter(source: str | os.PathLike[str] | Adapter) -> Adapter:
    """Open an adapter: its configuration and headers are checked, data is not read.

    Args:
        source: its folder, or a file in it.

    Raises:
        FormatError: a file is missing or malformed.
        UnsupportedError: of another method.
    """
    if isinstance(source, Adapter):
        return source
    path = local.resolve(source)
    folder = path if folders.is_folder(path) else path.parent
    document = local.read_config(folder, peft.CONFIG)
    if document is None:
        raise FormatError(f"has no {peft.CONFIG}, so the adapter's scale is not known", file=folder)
    try:
        peft_scalings.check(document) if document.get("peft_type") in peft_scalings.KINDS else peft.parse_config(
            document
        )
    except SurgeryError as error:
        raise error.at(file=folder / peft.CONFIG) from None
    stored = local.open_weights(folder, adapter=True)
    record = read_record(folder) or {}
    return Adapter(stored.tensors, document, label=stored.label, stored=[stored], taken_from=record.get("base", {}))
