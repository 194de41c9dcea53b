"""Checkpoints: lazy mappings from tensor names to tensors. What :func:`surgery.open` and every operation return.

Nothing is read until a tensor is looked at or the checkpoint is saved. ``checkpoint[name]`` gives one torch tensor;
``.lazy(name)`` its recipe; ``.specs`` all names, dtypes and shapes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery import execute, provenance
from surgery.errors import MismatchError, UnsupportedError, UsageError
from surgery.formats.delta_manifest import MANIFEST
from surgery.kept import Companion
from surgery.plan import NO_LIMIT, Plan, lay_out
from surgery.report import Table
from surgery.roles import role_of
from surgery.sources import folders, local, memory
from surgery.tensor import ARITHMETIC, LazyTensor, TensorSpec, human_bytes, human_count
from surgery.writer import Publication, is_one_file

if TYPE_CHECKING:
    import torch

Source = str | os.PathLike[str] | Mapping[str, Any]
"""What operations take for a checkpoint: a path or ``hf://org/name``, a state dict in memory, or a :class:`Checkpoint`."""

Record = Callable[[Mapping[str, str]], dict[str, Any]]
"""Composes an output's provenance from the fingerprints of its tensors."""


@dataclass
class Origin:
    """How a checkpoint came to be: what its record will say, and what is kept beside it."""

    record: Record
    kept: Mapping[str, Mapping[str, LazyTensor]] = field(default_factory=dict)
    """What is kept beside the weights: for each of our containers its tensors."""
    carried: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Recorded fingerprints of those tensors in ``kept`` that an earlier output kept."""
    watch: Callable[[], tuple[Mapping[str, LazyTensor], Companion]] | None = None
    """Begins a run under somebody's eyes: the tensors that are looked at while they are made, and who looks."""
    history: Any = None
    """What will be merged into it once it is saved: a :class:`surgery.history.History`."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Side files that differ from the input's."""
    counts: Mapping[str, int] = field(default_factory=dict)
    work: str | None = None
    """Everything beside the input files that decides the tensors' values: lets a run that was broken off continue."""
    bytes_read: int | None = None
    """What making it will read; its own size by default."""
    tables: Sequence[Table] = ()
    """What happens to which tensors, for people."""


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of one model, not yet read."""

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        *,
        label: str,
        stored: Sequence[local.StoredWeights] = (),
        shards: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        side_files: Mapping[str, Path] | None = None,
        notes: Sequence[str] = (),
        origin: Origin | None = None,
    ) -> None:
        """Hold lazy tensors and what is known about them.

        Args:
            tensors: by name.
            label: a short name for messages and records.
            stored: the files it reads from, at any depth.
            shards: the file each tensor came from.
            config: ``config.json``.
            side_files: files that travel with it.
            notes: what a reader should know, one line each.
            origin: how an operation made it; ``None`` for a checkpoint as found.
        """
        self.tensors = dict(tensors)
        self.label = label
        self.stored = list(stored)
        self.shards = dict(shards or {})
        self.config = config
        self.side_files = dict(side_files or {})
        self.notes = list(notes)
        self.origin = origin
        self.quantised: dict[str, str] | None = None
        """What :func:`quantised_modules` found, once it has looked."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor's name, dtype and shape."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of floating-point elements: what people call parameters."""
        return sum(spec.numel for spec in self.specs.values() if spec.dtype.startswith(("F", "BF")))

    @property
    def pinned(self) -> dict[str, str]:
        """What a record says of where it was, beside its name; see :func:`surgery.sources.local.pinned`."""
        return local.pinned(self.stored) if self.origin is None else {}

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor's recipe.

        Raises:
            KeyError: no such tensor.
        """
        return self.tensors[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read or compute one tensor."""
        from surgery import numerics

        return numerics.load(self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        """Name it and say how large it is."""
        size = f"{len(self)} tensors, {human_count(self.parameters)} parameters, {human_bytes(self.nbytes)}"
        return f"<Checkpoint {self.label!r}: {size}>"

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Read everything into memory."""
        return {name: self[name] for name in self}

    def load_into(self, module: torch.nn.Module, *, strict: bool = True) -> None:
        """Copy every tensor into a module's parameters and buffers, one at a time.

        Raises:
            MismatchError: with ``strict``, names that do not meet; always, shapes that differ.
        """
        own = module.state_dict(keep_vars=True)
        shared = {id(own[name]) for name in own.keys() & self.keys()}  # a tied weight has two names and is loaded once
        missing = {name for name in own.keys() - self.keys() if id(own[name]) not in shared}
        extra = self.keys() - own.keys()
        if strict and (missing or extra):
            name = min(missing or extra)
            side = "is in the module only" if missing else "is in the checkpoint only"
            raise MismatchError(side, tensor=name, mend="strict=False loads what meets")
        for name in own.keys() & self.keys():
            if tuple(own[name].shape) != self.tensors[name].spec.shape:
                raise MismatchError(
                    f"has shape {self.tensors[name].spec.shape}, the module {tuple(own[name].shape)}", tensor=name
                )
        for name in own.keys() & self.keys():
            own[name].data.copy_(self[name])

    def plan(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        max_shard_size: int | None = None,
        jobs: int | None = None,
        max_memory: int | None = None,
    ) -> Plan:
        """Lay the output out without reading data: what ``--dry-run`` prints. See :meth:`save` for the arguments."""
        origin = self.origin or Origin(self._copy_record, counts={"copied": len(self)})
        single = _whole_file(out, max_shard_size)
        weights = lay_out(
            self._watched(origin)[0],
            shards=None if single else self.shards,
            max_shard_size=NO_LIMIT if single else max_shard_size,
            workers=jobs or default_jobs(),
            max_memory=max_memory,
            bytes_read=self.nbytes if origin.bytes_read is None else origin.bytes_read,
            counts=origin.counts,
        )
        if single:
            return weights
        kept = [lay_out(content, workers=1) for content in origin.kept.values() if content]
        beside = [*map(len, origin.files.values()), *map(folders.size, self._copies(origin).values())]
        return replace(
            weights,
            bytes_written=weights.bytes_written + sum(plan.bytes_written for plan in kept) + sum(beside),
            peak_memory=max(weights.peak_memory, *(plan.peak_memory for plan in kept)) if kept else weights.peak_memory,
        )

    def _copies(self, origin: Origin) -> dict[str, Path]:
        return {name: path for name, path in self.side_files.items() if name not in origin.files}

    def save(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        max_shard_size: int | None = None,
        jobs: int | None = None,
        max_memory: int | None = None,
        restart: bool = False,
        finish: bool = False,
        progress: execute.Progress | None = None,
        into: Publication | None = None,
    ) -> dict[str, Any]:
        """Write the checkpoint, and publish it whole or not at all.

        Args:
            out: a folder, or one file where it ends in ``.safetensors``.
            overwrite: replace what is there.
            max_shard_size: bytes; the input's own split by default.
            jobs: threads; as many as there are cores by default. The bytes written do not depend on it.
            max_memory: refuse a plan that may need more bytes than this.
            restart: begin anew where an earlier run of the same merge was broken off; it is continued otherwise.
            finish: publish what :meth:`save_share` made, and refuse if any file is missing.
            progress: somebody who watches.
            into: where it goes in place of ``out``; see :func:`surgery.execute.publish`.

        Returns:
            The record that was written as ``surgery.json``, or into the single file's metadata.

        Raises:
            OutputError: ``out`` exists, is an input, is locked, or does not fit.
            NumericError: a value is NaN, infinite, or overflows.
        """
        single = _whole_file(out, max_shard_size)
        origin = self.origin or Origin(self._copy_record)
        tensors, companion = self._watched(origin)
        return execute.publish(
            tensors,
            out,
            record=origin.record,
            shards=None if single else self.shards,
            max_shard_size=NO_LIMIT if single else max_shard_size,
            workers=jobs or default_jobs(),
            max_memory=max_memory,
            overwrite=overwrite,
            sources=self.stored,
            files={} if single else origin.files,
            copies={} if single else {name: folders.here(path) for name, path in self._copies(origin).items()},
            kept={} if single else origin.kept,
            carried=origin.carried,
            companion=companion,
            work=self._work(),
            restart=restart,
            finish=finish,
            progress=progress,
            into=into,
        )

    def save_share(
        self,
        out: str | os.PathLike[str],
        share: tuple[int, int],
        *,
        overwrite: bool = False,
        max_shard_size: int | None = None,
        jobs: int | None = None,
        max_memory: int | None = None,
        progress: execute.Progress | None = None,
    ) -> list[str]:
        """Write some of the output's files beside it; ``save(…, finish=True)`` publishes them once all are there.

        Args:
            out: the folder that will be published; its neighbourhood must be writable for every machine that shares.
            share: ``(k, n)``: the ``k``-th of ``n`` parts, from 1 on.
            overwrite: whether an existing output will be replaced.
            max_shard_size: as in :meth:`save`, the same for all shares.
            jobs: threads.
            max_memory: refuse a plan that may need more bytes than this.
            progress: somebody who watches.

        Returns:
            The names of this share's files.
        """
        work = self._work()
        if work is None:
            raise UsageError("only merges of files can be shared")
        plan = self.plan(max_shard_size=max_shard_size, jobs=jobs, max_memory=max_memory)
        tensors, companion = self._watched(self.origin)
        return execute.run_share(
            plan, tensors, out, share, work=work, overwrite=overwrite, sources=self.stored, companion=companion,
            progress=progress,
        )  # fmt: skip

    def _watched(self, origin: Origin | None) -> tuple[dict[str, LazyTensor], Companion | None]:
        if origin is None or origin.watch is None:
            return self.tensors, None
        tensors, companion = origin.watch()
        return {**self.tensors, **tensors}, companion

    def digest(self, *, max_shard_size: int | None = None) -> str:
        """Return what an output in the making is known by: the same for the same work, inputs and layout."""
        return self.plan(max_shard_size=max_shard_size).digest(self._work() or "")

    def _work(self) -> str | None:
        if self.origin is None or self.origin.work is None:
            return None
        return "\n".join([self.origin.work, *(stored.state() for stored in self.stored)])

    def _copy_record(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        return provenance.record(
            "save",
            parameters={},
            inputs=[{"role": "source", "name": self.label, **self.pinned}],
            tensors=fingerprints,
        )

    def close(self) -> None:
        """Close the files it reads from."""
        for stored in self.stored:
            stored.close()


def _whole_file(out: str | os.PathLike[str] | None, max_shard_size: int | None) -> bool:
    """Say whether an output is a file of its own, and refuse to cut one.

    Raises:
        UsageError: it is, and shards were asked for.
    """
    single = out is not None and is_one_file(out)
    if single and max_shard_size is not None:
        raise UsageError("one file has no shards", file=out, mend="drop --max-shard-size, or name a folder")
    return single


def work_of(members: Iterable[Checkpoint], *own: object) -> str | None:
    """Say what a merge of checkpoints does, for :attr:`Origin.work`; ``None`` where one of them is not made of files alone.

    Args:
        members: the inputs.
        own: everything else that decides the values; its ``repr`` must say all of it.
    """
    inherited = []
    for member in members:
        if not member.stored or (member.origin is not None and member.origin.work is None):
            return None
        inherited.append(member.origin.work if member.origin else "")
    return repr((own, inherited))


def default_jobs() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_checkpoint(source: Source, *, follow_links: bool = False) -> Checkpoint:
    """Open a checkpoint: headers are read and checked, data is not.

    Args:
        source: a folder, a ``.safetensors``, ``.bin`` or ``.pt`` file, ``hf://org/name@revision``, a state dict, or a
            :class:`Checkpoint`.
        follow_links: accept links that lead out of a folder.

    Raises:
        UsageError: neither a path nor a state dict.
        FormatError: malformed, incomplete, or nothing there.
        HubError: the Hub refuses, or does not answer.
        MismatchError: two weight sets in one folder.
        UnsafeError: a pickle that would run code, or a path that leads outside.

    >>> import numpy
    >>> open_checkpoint({"w": numpy.zeros((2, 3), "float32")}).specs
    {'w': TensorSpec(name='w', dtype='F32', shape=(2, 3))}
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        tensors, notes = memory.open_mapping(source)
        return Checkpoint(tensors, label="(in memory)", notes=notes)
    _require_path(source)
    stored = local.open_weights(source, follow_links=follow_links)
    if MANIFEST in stored.tensors:
        mend = "surgery merge BASE DELTA restores the fine-tune that it was made from"
        raise UsageError("is an exact delta, not a checkpoint", file=stored.path, mend=mend)
    whole = folders.is_folder(stored.path)
    return Checkpoint(
        stored.tensors,
        label=stored.label,
        stored=[stored],
        shards=stored.shards if whole else None,
        config=local.read_config(stored.path) if whole else None,
        side_files=local.side_files(stored.path) if whole else None,
        notes=stored.notes,
    )


def _require_path(source: object) -> None:
    """Refuse what callers pass against the signature, a module in place of its state dict above all."""
    if not isinstance(source, str | os.PathLike):
        mend = "pass its state_dict()" if hasattr(source, "state_dict") else None
        raise UsageError(f"a checkpoint is a path or a state dict, not of class {type(source).__name__}", mend=mend)


def tied_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """Find an output head that is stored although it is tied: equal to the input embedding to the last byte.

    Returns:
        Each of the two names → the other; empty where the configuration unties them, or they differ.
    """
    if (checkpoint.config or {}).get("tie_word_embeddings") is False:
        return {}
    specs = checkpoint.specs
    heads = [name for name in specs if name.endswith(("lm_head.weight", "embed_out.weight"))]
    for head in heads:
        for name, spec in specs.items():
            alike = role_of(spec) == "embedding" and (spec.shape, spec.dtype) == (specs[head].shape, specs[head].dtype)
            prints = [provenance.fingerprint(checkpoint.tensors[n]) for n in (name, head)] if alike else [0, 1]
            if prints[0] == prints[1]:
                return {name: head, head: name}
    return {}


_QUANTISED_MARKS = (
    ("weight_scale_inv", "FP8 blocks with scales"), ("weight_scale", "quantised weights with scales"),
    ("SCB", "bitsandbytes int8"), ("quant_state.bitsandbytes__nf4", "bitsandbytes NF4"),
    ("quant_state.bitsandbytes__fp4", "bitsandbytes FP4"), ("qweight", "GPTQ or AWQ packed weights"),
    ("weight_packed", "compressed-tensors packed weights"), ("_blocks", "MXFP4 blocks"), ("scales", "quantised weights"),
)  # fmt: skip


def quantised_modules(checkpoint: Checkpoint) -> dict[str, str]:
    """Map every module whose weight is stored as codes to the name of the scheme; looked for once a checkpoint."""
    if checkpoint.quantised is not None:
        return checkpoint.quantised
    declared = (checkpoint.config or {}).get("quantization_config") or {}
    scheme = declared.get("quant_method") if isinstance(declared, dict) else None
    modules: dict[str, str] = {}
    for name in checkpoint.tensors:
        for mark, what in _QUANTISED_MARKS:
            if name.endswith("." + mark) or (mark.startswith("_") and name.endswith(mark)):
                modules.setdefault(name.removesuffix(mark).rstrip(".").removesuffix(".weight"), str(scheme or what))
                break
    checkpoint.quantised = modules
    return modules


def quantised_error(checkpoint: Checkpoint, name: str, what: str) -> UnsupportedError:
    """Compose the refusal of a quantised tensor."""
    return UnsupportedError(
        f"is quantised ({what}): its codes are not numbers to compute with",
        file=checkpoint.label,
        tensor=name,
        mend="dequantise it first",
    )


def refuse_quantised(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse to compute on tensors whose values are codes, not numbers.

    Args:
        checkpoint: where they are.
        names: the tensors that arithmetic would touch; they need not be there.

    Raises:
        UnsupportedError: one of them is quantised; the scheme is named.
    """
    modules = quantised_modules(checkpoint)
    for name in names:
        if found := _scheme_of(checkpoint, modules, name):
            raise quantised_error(checkpoint, name, found)


def quantised_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Map every tensor of a quantised module, and every weight of a dtype without arithmetic, to its scheme."""
    modules = quantised_modules(checkpoint)
    found = {name: _scheme_of(checkpoint, modules, name) for name in checkpoint.tensors}
    return {name: what for name, what in found.items() if what}


def _scheme_of(checkpoint: Checkpoint, modules: Mapping[str, str], name: str) -> str | None:
    found = modules.get(name.rpartition(".")[0]) or modules.get(name)
    spec = checkpoint.tensors[name].spec if name in checkpoint.tensors else None
    if found is None and spec and spec.dtype.startswith("F") and spec.dtype not in ARITHMETIC:
        return f"{spec.dtype} without scales"
    return found


def require_arithmetic(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Refuse to compute on integers, booleans and quantised values.

    Raises:
        UnsupportedError: by name.
    """
    refuse_quantised(checkpoint, names)
    for name in names:
        spec = checkpoint.tensors[name].spec
        if spec.dtype not in ARITHMETIC:
            raise UnsupportedError(
                f"is {spec.dtype}; surgery computes with {', '.join(ARITHMETIC)}", file=checkpoint.label, tensor=name
            )
