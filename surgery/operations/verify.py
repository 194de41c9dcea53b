"""``verify``: hold a checkpoint or adapter on disk against its own record, index and configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from surgery import provenance
from surgery.checkpoint import Source, default_jobs
from surgery.errors import FormatError, UsageError, VerificationError
from surgery.exact import Delta, is_delta, open_delta, read_block
from surgery.execute import Progress, Silent
from surgery.formats import peft, peft_scalings
from surgery.formats.delta_manifest import Coded
from surgery.history import read_record
from surgery.operations.verify_beside import verify_beside
from surgery.operations.verify_serving import Serving, verify_serving
from surgery.report import Table, join_shown
from surgery.roles import layer_of, role_of
from surgery.sources import folders, local
from surgery.sources.remote import expect
from surgery.tensor import LazyTensor, human_bytes


@dataclass(frozen=True)
class Verification:
    """What was checked, and held."""

    label: str
    checks: tuple[tuple[str, str], ...]
    """What was checked → what was found."""
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[tuple[str, str], ...]:
        """The checks."""
        return self.checks

    def table(self) -> Table:
        """Show the checks."""
        return Table(f"{self.label} verifies", ("check", "found"), self.checks)

    def document(self) -> dict[str, Any]:
        """Return everything, for ``--json``."""
        return {
            "schema": "surgery.verify/1",
            "checkpoint": self.label,
            "checks": dict(self.checks),
            "notes": list(self.notes),
        }

    def _repr_html_(self) -> str:
        return self.table().html()


@overload
def verify(
    path: str | os.PathLike[str], *, jobs: int | None = None, progress: Progress | None = None
) -> Verification: ...
@overload
def verify(
    path: str | os.PathLike[str],
    *,
    server: str | Sequence[str],
    base: Source | None = None,
    max_rank: int | None = None,
) -> Serving: ...
def verify(
    path: str | os.PathLike[str],
    *,
    server: str | Sequence[str] | None = None,
    base: Source | None = None,
    max_rank: int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Verification | Serving:
    """Check a folder or file: headers, index and shards agree, every tensor has the fingerprint that was recorded.

    With ``server``, say instead whether an adapter, anybody's, loads there, from its headers alone: the answer is
    returned, and :meth:`Serving.require` raises where it is no.

    Args:
        path: a checkpoint, an adapter or an exact delta.
        server: ``peft``, ``vllm``, ``sglang``, ``llamacpp``, several of them, or ``all``.
        base: the adapter's base, to hold names and shapes against; with ``server`` only.
        max_rank: the ``--max-lora-rank`` that the server is started with; with ``server`` only.
        jobs: threads; as many as there are cores by default.
        progress: somebody who watches.

    Raises:
        FormatError: a file is malformed, or index and shards disagree.
        UsageError: no server is called so, or ``base`` or ``max_rank`` without one.
        VerificationError: a tensor is missing, or its bytes are not those that were recorded; it is named.
    """
    if server is not None:
        return verify_serving(path, [server] if isinstance(server, str) else server, base=base, max_rank=max_rank)
    if base is not None or max_rank is not None:
        raise UsageError("a base or a largest rank says nothing without a server", mend="--for vllm")
    real = local.resolve(path)
    if is_delta(real):
        return _verify_delta(open_delta(real), jobs or default_jobs(), progress or Silent())
    adapter = folders.is_folder(real) and folders.exists(real / peft.CONFIG)
    stored = local.open_weights(real, adapter=adapter)
    checks = [
        (
            "structure",
            f"{len(stored.tensors):,} tensors in {len(stored.files)} file(s), {human_bytes(_size(stored.tensors))}",
        )
    ]
    notes = list(stored.notes)
    if adapter:
        checks.append(("adapter", _check_adapter(real, stored)))
    else:
        notes += _check_config(real, stored)
    record = read_record(real)
    if record is None:
        notes.append("there is no record of surgery: fingerprints could not be checked")
    else:
        _check_fingerprints(real, stored.tensors, record, jobs or default_jobs(), progress or Silent())
        checks.append(("fingerprints", f"all {len(record['tensors']):,} as recorded by {record.get('made_by')}"))
        checks += verify_beside(real, stored, record)
    return Verification(stored.label, tuple(checks), tuple(notes))


def _verify_delta(delta: Delta, jobs: int, progress: Progress) -> Verification:
    """Hold every coded block against its digest; opening has done so with the manifest that names them."""
    items, offset = [], 0
    for (name, _), blocks in delta.manifest.runs():
        for block in blocks:
            items.append((name, offset, block))
            offset += block.size

    def check(item: tuple[str, int, Coded]) -> int:
        name, offset, block = item
        try:
            read_block(delta.data, offset, block)
        except VerificationError as error:
            raise error.at(file=delta.label, tensor=name) from None
        return block.size

    expect([delta.data])
    progress.start(delta.manifest.data_bytes)
    with ThreadPoolExecutor(jobs, thread_name_prefix="surgery") as pool:
        try:
            for done in pool.map(check, items):
                progress.advance(done)
        finally:
            pool.shutdown(cancel_futures=True)
            progress.finish()
    manifest = delta.manifest
    checks = (
        ("exact delta", f"{manifest.base.name} → {manifest.task.name}, {len(manifest.changes):,} tensors"),
        ("coded blocks", f"all {len(items):,} as recorded, {human_bytes(manifest.data_bytes)}"),
    )
    return Verification(delta.label, checks)


def _size(tensors: dict[str, LazyTensor]) -> int:
    return sum(tensor.spec.nbytes for tensor in tensors.values())


METHODS_OF_PEFT = (*peft_scalings.KINDS, "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "AdapterHub's")
"""Kinds that ``surgery add`` writes beside LoRA, whose tensors are held against the record alone."""


def _check_adapter(folder: Path, stored: local.StoredWeights) -> str:
    document = local.read_config(folder, peft.CONFIG)
    if document is None:
        raise FormatError(f"has no {peft.CONFIG}", file=folder)
    kind = document.get("peft_type", "AdapterHub's" if "config" in document else None)
    if kind in METHODS_OF_PEFT:
        return f"{kind}, {len(stored.tensors)} tensors"
    config = peft.parse_config(document)
    parts = peft.collect(stored.tensors)
    for module, roles in parts.low_rank.items():
        config.scaling(module, stored.tensors[roles.get("a") or roles["embedding_a"]].spec.shape[0])
    return f"rank {config.r}, {len(parts.low_rank)} modules, {len(parts.full)} full tensors, {len(parts.rows)} tables of rows"


def _check_config(path: Path, stored: local.StoredWeights) -> list[str]:
    config = local.read_config(path) if folders.is_folder(path) else None
    if config is None:
        return ["there is no config.json to hold the tensors against"] if folders.is_folder(path) else []
    specs = {name: tensor.spec for name, tensor in stored.tensors.items()}
    vocabulary, hidden = config.get("vocab_size"), config.get("hidden_size")
    for name, spec in specs.items():
        leaf = name.rpartition(".")[0].rpartition(".")[2]
        if role_of(spec) == "embedding" and leaf in ("embed_tokens", "wte", "word_embeddings") and len(spec.shape) == 2:
            wanted = (vocabulary, hidden)
            if all(isinstance(size, int) for size in wanted) and spec.shape != wanted:
                raise VerificationError(
                    f"is {spec.describe()}, config.json says {list(wanted)}", file=stored.label, tensor=name
                )
    layers = config.get("num_hidden_layers")
    found = {layer_of(name) for name in specs} - {""}
    stems = {layer.rpartition(".")[0] for layer in found}
    if isinstance(layers, int) and len(stems) == 1 and len(found) != layers:
        raise VerificationError(f"holds {len(found)} blocks, config.json says {layers}", file=stored.label)
    return []


def _check_fingerprints(
    path: Path, tensors: dict[str, LazyTensor], record: dict[str, Any], jobs: int, progress: Progress
) -> None:
    recorded = record["tensors"]
    missing, extra = sorted(recorded.keys() - tensors.keys()), sorted(tensors.keys() - recorded.keys())
    if missing or extra:
        name = (missing or extra)[0]
        what = "is in the record but not in the files" if missing else "is in the files but not in the record"
        raise VerificationError(what, file=path, tensor=name)
    expect(tensors.values())
    progress.start(_size(tensors))

    def check(name: str) -> str | None:
        found = provenance.fingerprint(tensors[name])
        progress.advance(tensors[name].spec.nbytes)
        return None if found == recorded[name].get("fingerprint") else name

    with ThreadPoolExecutor(jobs, thread_name_prefix="surgery") as pool:
        wrong: Sequence[str] = [name for name in pool.map(check, tensors) if name is not None]
    progress.finish()
    if wrong:
        raise VerificationError(
            f"does not have the bytes that were recorded ({len(wrong)} tensors in all: {join_shown(wrong)})",
            file=path,
            tensor=wrong[0],
            mend="make it again, or fetch it again",
        )
