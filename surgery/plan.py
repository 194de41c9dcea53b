"""Plans: what will be written where, before a byte of data is read.

Names, dtypes and shapes of every output tensor are known, so the shard files, each tensor's place, the total size
and the peak memory are too. A plan is plain frozen data: it can be printed, refused, cut into jobs and run in any
order, and gives the same bytes however it is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from surgery.errors import IOFailure, UsageError
from surgery.formats import safetensors
from surgery.journal import digest_of
from surgery.provenance import block_elements
from surgery.tensor import BITS, LazyTensor, TensorSpec, human_bytes

JOB_BYTES = 256_000_000
"""Largest job: small enough that a single-file model keeps every core busy."""
SMALLEST_JOB = 4_000_000
BLOCK_BYTES = 1 << 20
"""A worker's read and write buffer. 1 MiB was the fastest of 0.25 to 16 MiB: larger ones fall out of cache."""
WORKER_BYTES = 6 << 20
"""Allowance a worker for the interpreter, the allocator and torch's own per-thread state."""
FIXED_BYTES = 24 << 20
"""Allowance for what a run holds once: headers, the record, libraries touched for the first time."""
DEFAULT_SHARD = 5_000_000_000
NO_LIMIT = 1 << 62
"""A shard size that nothing exceeds: one file."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One weight file: its header bytes and the place of each tensor."""

    name: str
    prefix: bytes
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The elements ``[start, stop)`` of one tensor."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Job:
    """A run of pieces inside one file: independent of every other job, and the same bytes whenever it is repeated."""

    file: int
    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a run that is known before it."""

    files: tuple[FileLayout, ...]
    jobs: tuple[Job, ...]
    specs: dict[str, TensorSpec]
    index: str | None
    """Name of the index file; ``None`` where one file holds all."""
    workers: int
    peak_memory: int
    """Bytes above what the process held before, at most."""
    bytes_read: int
    bytes_written: int
    counts: dict[str, int] = field(default_factory=dict)
    """Tensors by what happens to them (copied, merged …), for people."""

    def members(self, share: tuple[int, int]) -> range:
        """Number the files of the ``k``-th of ``n`` parts, ``share = (k, n)``."""
        return range(share[0] - 1, len(self.files), share[1])

    def part(self, share: tuple[int, int]) -> Plan:
        """Return what one part of a run does, to be shown; its reads are estimated in proportion to its writes."""
        own = self.members(share)
        files = tuple(self.files[number] for number in own)
        written = sum(file.size for file in files)
        jobs = tuple(job for job in self.jobs if job.file in own)
        read = self.bytes_read * written // max(sum(file.size for file in self.files), 1)
        counts = {"made": sum(len(file.offsets) for file in files)}
        return replace(self, files=files, jobs=jobs, bytes_read=read, bytes_written=written, counts=counts)

    def digest(self, work: str) -> str:
        """Return the digest of a run: the same for the same version, work and layout."""
        return digest_of(work, {file.name: file.prefix for file in self.files})


def lay_out(
    tensors: Mapping[str, LazyTensor],
    *,
    shards: Mapping[str, str] | None = None,
    stem: str = "model",
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    workers: int = 2,
    max_memory: int | None = None,
    bytes_read: int = 0,
    counts: Mapping[str, int] | None = None,
) -> Plan:
    """Plan the output of ``tensors``.

    Args:
        tensors: the output's tensors by name.
        shards: the file that each tensor should go to (the input's own split); names it lacks join the last file.
        stem: the start of file names where ``shards`` is not used.
        max_shard_size: start a new file before one exceeds this many bytes; replaces ``shards``.
        metadata: for every file's ``__metadata__``.
        workers: threads.
        max_memory: refuse a plan that may need more bytes than this.
        bytes_read: what the inputs will have to give, for the record.
        counts: see :class:`Plan`.

    Raises:
        UsageError: nothing to write, or a shard size that no tensor fits.
        IOFailure: ``max_memory`` is too small even for one worker.
    """
    if not tensors:
        raise UsageError("nothing to write: no tensors are left")
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    split = _split(specs, shards, stem, max_shard_size)
    files = []
    for name, members in split.items():
        prefix, offsets = safetensors.build_header(members, {"format": "pt", **(metadata or {})})
        files.append(FileLayout(name, prefix, offsets, len(prefix) + sum(spec.nbytes for spec in members)))
    total = sum(file.size for file in files)
    jobs = _cut(tensors, list(split.values()), total)
    workers, peak = _fit(tensors, max(1, min(workers, len(jobs))), max_memory)
    index = f"{_stem_of(files[0].name, stem)}.safetensors.index.json" if len(files) > 1 else None
    return Plan(tuple(files), jobs, specs, index, workers, peak, bytes_read, total, dict(counts or {}))


def container_prefix(specs: Iterable[TensorSpec]) -> bytes:
    """Return the header of a file of our own that holds these tensors, as :func:`lay_out` has it."""
    return safetensors.build_header(sorted(specs, key=_order), {"format": "pt"})[0]


def _order(spec: TensorSpec) -> tuple[int, str]:
    """Widest dtype first, then by name: every tensor stays aligned, as the official writer has it."""
    return -BITS[spec.dtype], spec.name


def _split(
    specs: Mapping[str, TensorSpec], shards: Mapping[str, str] | None, stem: str, limit: int | None
) -> dict[str, list[TensorSpec]]:
    if limit is None and shards:
        kept = {name: _weight_file(shards[name]) for name in specs if name in shards}
        names = sorted(set(kept.values())) or safetensors.shard_names(stem, 1)
        groups: dict[str, list[TensorSpec]] = {name: [] for name in names}
        for name, spec in specs.items():
            groups[kept.get(name, names[-1])].append(spec)
        if len(groups) == len(set(map(_weight_file, shards.values()))):
            return {name: sorted(members, key=_order) for name, members in groups.items()}
        renumbered = safetensors.shard_names(_stem_of(names[0], stem), len(names))  # a whole shard was dropped
        return {new: sorted(groups[old], key=_order) for new, old in zip(renumbered, names, strict=True)}
    limit = limit or DEFAULT_SHARD
    runs: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in sorted(specs.values(), key=lambda spec: natural(spec.name)):
        if spec.nbytes > limit and limit != DEFAULT_SHARD:
            raise UsageError(
                f"{human_bytes(spec.nbytes)} do not fit into shards of {human_bytes(limit)}",
                tensor=spec.name,
                mend="raise --max-shard-size: a tensor is never cut",
            )
        if runs[-1] and filled + spec.nbytes > limit:
            runs.append([])
            filled = 0
        runs[-1].append(spec)
        filled += spec.nbytes
    names = safetensors.shard_names(stem, len(runs))
    return {name: sorted(run, key=_order) for name, run in zip(names, runs, strict=True)}


def natural(name: str) -> list[tuple[int, int | str]]:
    """Order names as people do: layer 2 before layer 10.

    >>> sorted(["h.10.w", "h.2.w", "a"], key=natural)
    ['a', 'h.2.w', 'h.10.w']
    """
    return [(0, int(part)) if part.isdecimal() and len(part) < 10 else (1, part) for part in name.split(".")]


def _weight_file(name: str) -> str:
    """Give a pickled shard the name its safetensors twin would have."""
    path = Path(name)
    if path.suffix == ".safetensors":
        return name
    return path.stem.replace("pytorch_model", "model") + ".safetensors"


def _stem_of(name: str, default: str) -> str:
    """Return what a numbered shard's name begins with; ``default``, which loaders know, for any other name."""
    numbered = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.safetensors", name)
    return numbered[1] if numbered else default


def _cut(tensors: Mapping[str, LazyTensor], split: Sequence[Sequence[TensorSpec]], total: int) -> tuple[Job, ...]:
    """Cut files into jobs. The cuts depend on the layout alone, never on the number of workers."""
    target = min(max(total // 32, SMALLEST_JOB), JOB_BYTES)
    jobs: list[Job] = []
    for number, members in enumerate(split):
        pieces: list[Piece] = []
        size = 0
        for spec in members:
            for piece, nbytes in _pieces(spec, tensors[spec.name].unit, target):
                pieces.append(piece)
                size += nbytes
                if size >= target:
                    jobs.append(Job(number, tuple(pieces), size))
                    pieces, size = [], 0
        if pieces:
            jobs.append(Job(number, tuple(pieces), size))
    return tuple(jobs)


def _pieces(spec: TensorSpec, unit: int, target: int) -> list[tuple[Piece, int]]:
    """Cut one tensor where both its rows and its fingerprint blocks end."""
    step = math.lcm(unit, block_elements(spec))
    per_job = max(target * 8 // BITS[spec.dtype] // step, 1) * step
    if spec.numel <= per_job:
        return [(Piece(spec.name, 0, spec.numel), spec.nbytes)]
    return [
        (Piece(spec.name, start, stop), (stop - start) * BITS[spec.dtype] // 8)
        for start in range(0, spec.numel, per_job)
        for stop in [min(start + per_job, spec.numel)]
    ]


def block_of(tensor: LazyTensor) -> int:
    """Elements that a worker makes at a time: whole units, about :data:`BLOCK_BYTES`."""
    per_block = BLOCK_BYTES * 8 // BITS[tensor.spec.dtype]
    return max(per_block // tensor.unit, 1) * tensor.unit


def working_bytes(tensor: LazyTensor) -> int:
    """Bytes that one worker needs to make ``tensor``."""
    block = min(block_of(tensor), max(tensor.spec.numel, 1)) * BITS[tensor.spec.dtype] // 8
    return tensor.resident + block * (2 + tensor.scratch)


def _fit(tensors: Mapping[str, LazyTensor], workers: int, max_memory: int | None) -> tuple[int, int]:
    """Count workers that the memory budget allows, and the peak they may reach."""
    # The costliest tensors may be worked on at the same time, one a worker.
    costs = sorted((working_bytes(tensor) for tensor in tensors.values()), reverse=True)
    bookkeeping = FIXED_BYTES + 2_000 * len(tensors)
    while True:
        peak = bookkeeping + sum(costs[:workers]) + workers * WORKER_BYTES
        if max_memory is None or peak <= max_memory:
            return workers, peak
        if workers == 1:
            raise IOFailure(
                f"the plan needs up to {human_bytes(peak)} of memory, --max-memory allows {human_bytes(max_memory)}"
            )
        workers -= 1
