"""What a push takes from a folder: its kind, its files, and each file's bytes as they should be on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery import provenance
from surgery.errors import FormatError, UnsafeError, UsageError
from surgery.exact import is_delta, open_delta
from surgery.formats import hub_files, model_card, peft
from surgery.history import read_record
from surgery.operations.add import TRAINABLE
from surgery.operations.card import Subject, hub_id
from surgery.report import join_shown
from surgery.sources import local
from surgery.sources.hub_repository import File

_REWRITTEN = ("config.json", "generation_config.json", "tokenizer_config.json", peft.CONFIG)


@dataclass(frozen=True)
class Contents:
    """What lies in a folder, or in a delta file, that is to be pushed."""

    kind: str
    """``adapter``, ``model`` or ``delta``."""
    path: Path
    files: dict[str, Path]
    """By their paths in the repository, without the card."""
    record: Mapping[str, Any] | None
    config: Mapping[str, Any]
    card: bytes | None
    """The README that is there."""
    notes: list[str] = field(default_factory=list)

    def subject(self, repo: str, base_ids: tuple[str, ...], licence: str | None) -> Subject | None:
        """Say what a card would be about; ``None`` where surgery did not make it."""
        if self.record is None:
            return None
        return Subject(self.kind, self.record, self.config, base_ids, repo, self.path.name, licence)

    def prepared(self, base_ids: Sequence[str]) -> Iterator[File]:
        """Give every file as it goes to the Hub: configurations name no paths, the base is an id.

        Raises:
            UnsafeError: a secret, or a path of this machine.
            UsageError: an adapter's base has no id.
        """
        rewritten = {name: self._rewritten(name, path, base_ids) for name, path in self.files.items()}
        changed = {name: data for name, data in rewritten.items() if data is not None}
        if self.record is not None and provenance.RECORD in self.files:
            changed[provenance.RECORD] = provenance.encode(_told_of(changed, self.record))
        for name, path in sorted(self.files.items()):
            if name.endswith(hub_files.SCANNED):
                text = changed[name] if name in changed else _small(path, name)
                hub_files.refuse_secrets(name, text.decode("utf-8", "replace"), os.path.expanduser("~"))
            yield File(name, changed.get(name, path))

    def _rewritten(self, name: str, path: Path, base_ids: Sequence[str]) -> bytes | None:
        if name not in _REWRITTEN:
            return None
        changes = {}
        if name == peft.CONFIG and "base_model_name_or_path" in self.config:
            changes["base_model_name_or_path"] = self._base(base_ids)
        return hub_files.configuration(_small(path, name), name, changes)

    def _base(self, base_ids: Sequence[str]) -> str:
        named = self.config.get("base_model_name_or_path")
        base = base_ids[0] if base_ids else hub_id(str(named))
        if base is None:
            raise UsageError(
                f"its base is {named!r}, which is no id on the Hub: nobody could load the adapter",
                file=peft.CONFIG, mend="--base-id org/name says which model it belongs to",
            )  # fmt: skip
        return base


def contents(path: str | os.PathLike[str], include: Sequence[str] = (), *, include_undo: bool = False) -> Contents:
    """Look at what is to be pushed.

    Args:
        path: a model's or adapter's folder, or an exact delta.
        include: patterns of further files.
        include_undo: take along what a later unmerge needs.

    Raises:
        UsageError: something else, or files that nobody asked for.
        UnsafeError: a link that leads outside.
    """
    real = local.resolve(path)
    if is_delta(real):
        return _delta(real)
    if not real.is_dir():
        raise UsageError(
            "is one file; a repository is made from a folder", file=path, mend="surgery convert FILE -o FOLDER"
        )
    config = local.read_config(real, peft.CONFIG)
    adapter = config is not None or (real / TRAINABLE).is_file()
    found = dict(_walk(real))
    weights = _weights(real, adapter=config is not None) if _has_weights(found) or not adapter else set()
    undo = {name for name in found if name.startswith(f"{hub_files.UNDO}/")}
    taken = {
        name
        for name in found
        if name in weights
        or hub_files.is_known(name)
        or hub_files.is_included(name, include)
        or (name in undo and include_undo)
    }
    if stray := sorted(found.keys() - taken - undo):
        raise UsageError(
            f"holds files that no checkpoint needs: {join_shown(stray)}", file=path,
            mend="take them out, or name them with --include",
        )  # fmt: skip
    card = (real / model_card.FILE).read_bytes() if model_card.FILE in found else None
    files = {name: found[name] for name in sorted(taken - {model_card.FILE})}
    notes = [f"{hub_files.UNDO}/ stays here; --include-undo takes it along"] if undo and not include_undo else []
    record = _shortened(read_record(real))
    return Contents(
        "adapter" if adapter else "model", real, files, record, config or local.read_config(real) or {}, card, notes
    )


def contents_of_parts(folder: Path) -> Contents:
    """Look at a model's folder whose weights are on the Hub already."""
    found = {
        name: path
        for name, path in _walk(folder)
        if hub_files.is_known(name) or name.endswith(".safetensors.index.json")
    }
    card = found.pop(model_card.FILE, None)
    return Contents(
        "model", folder, found, _shortened(read_record(folder)), local.read_config(folder) or {},
        None if card is None else card.read_bytes(),
    )  # fmt: skip


def _shortened(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Take the folders out of a record's paths."""
    if record is None:
        return None
    shortened = {**hub_files.without_paths({**record, "tensors": None}), "tensors": record["tensors"]}
    return shortened if shortened == record else provenance.sealed(shortened)


def _told_of(changed: Mapping[str, bytes], record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put the digests of files that are sent otherwise than they lie here into their record."""
    known = record.get("files", {})
    found = {
        name: {"bytes": len(data), "digest": provenance.digest_of(data)}
        for name, data in changed.items()
        if name in known
    }
    if not found:
        return record
    tensors = record["tensors"]
    return provenance.sealed({**record, "files": {**known, **found}, "tensors": tensors})


def _delta(path: Path) -> Contents:
    manifest = open_delta(path).manifest
    record = {
        "operation": "extract-delta",
        "parameters": {},
        "inputs": [
            {"role": "base", "name": manifest.base.name},
            {"role": "fine-tune", "name": manifest.task.name},
        ],
    }
    return Contents("delta", path, {path.name: path}, record, {}, None)


def _has_weights(found: Mapping[str, Path]) -> bool:
    return any(name.endswith((".safetensors", *local.PICKLE_SUFFIXES)) for name in found)


def _weights(folder: Path, *, adapter: bool) -> set[str]:
    """Name the weight files and their index, opened and checked."""
    stored = local.open_weights(folder, adapter=adapter)
    names = {file.path.name for file in stored.files}
    pickled = sorted(name for name in names if not name.endswith(".safetensors"))
    if pickled:
        raise UnsafeError(
            f"its weights are pickled ({join_shown(pickled)})",
            file=folder,
            mend="surgery convert makes safetensors of them",
        )
    stored.close()
    return names | {path.name for path in folder.glob("*.safetensors.index.json")}


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file by its path in the repository."""
    pending = [folder]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.name in hub_files.IGNORED:
                continue
            if not path.resolve().is_relative_to(folder):
                raise UnsafeError("is a link that leads out of the folder", file=name, mend="put the file itself there")
            if path.is_dir():
                pending.append(path)
            elif path.is_file():
                yield name, path
            else:
                raise UsageError("is neither a file nor a folder", file=name)


def _small(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=name) from None
