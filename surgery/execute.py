"""Running a plan: workers take jobs, make each tensor block by block, and write it at its place.

This room knows tensors only by the protocol. It adds the place to errors, once, and reports progress.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import SurgeryError
from surgery.formats.safetensors import build_header, build_index
from surgery.plan import FileLayout, Job, Piece, Plan, block_of, lay_out
from surgery.provenance import METADATA_KEY, PLACEHOLDER, RECORD, BlockDigests, encode
from surgery.tensor import LazyTensor, TensorSpec, byte_range
from surgery.writer import OutputFile, Publication, is_one_file

KEPT = "originals"
KEPT_FILE = ".surgery/originals"
"""Where a merge keeps what it replaced: not ``*.safetensors``, so that no loader takes it for weights."""


class Progress(Protocol):
    """Somebody who watches a run."""

    def start(self, total: int) -> None:
        """Be told how many bytes there will be."""
        ...

    def advance(self, nbytes: int) -> None:
        """Be told that so many more are done; called from several threads."""
        ...

    def shard(self, name: str, done: int, total: int) -> None:
        """Be told that a file is finished, the ``done``-th of ``total``."""
        ...

    def finish(self) -> None:
        """Be told that it is over."""
        ...


class Silent:
    """Watches nothing."""

    def start(self, total: int) -> None:
        """Ignore."""

    def advance(self, nbytes: int) -> None:
        """Ignore."""

    def shard(self, name: str, done: int, total: int) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""


def run(
    plan: Plan,
    tensors: Mapping[str, LazyTensor],
    publication: Publication,
    progress: Progress | None = None,
    *,
    names: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write every tensor of a plan into a publication's staging folder.

    Args:
        plan: what goes where.
        tensors: the values.
        publication: the output in the making.
        progress: somebody who watches.
        names: other names for the plan's files.

    Returns:
        The fingerprint of every tensor, by name.

    Raises:
        SurgeryError: whatever a tensor raises, with file and tensor named. The first error stops all workers.
    """
    watcher = progress or Silent()
    digests = {name: BlockDigests(tensor.spec) for name, tensor in tensors.items()}
    with ExitStack() as stack:
        outputs = []
        for file in plan.files:
            name = publication.out.name if publication.single else (names or {}).get(file.name, file.name)
            output = stack.enter_context(publication.create(name, file.size))
            output.write_at(0, memoryview(file.prefix))
            outputs.append(output)
        watcher.start(sum(job.nbytes for job in plan.jobs))
        try:
            _run_jobs(plan, tensors, outputs, digests, watcher)
        finally:
            watcher.finish()
    found: dict[str, str] = {}
    for name, digest in digests.items():
        fingerprint = digest.fingerprint()
        if fingerprint is None:
            raise AssertionError(f"the plan left blocks of {name} unwritten")
        found[name] = fingerprint
    return found


def _run_jobs(
    plan: Plan,
    tensors: Mapping[str, LazyTensor],
    outputs: list[OutputFile],
    digests: Mapping[str, BlockDigests],
    progress: Progress,
) -> None:
    stop = threading.Event()
    shards = _Shards(plan, progress)

    def work(job: Job) -> None:
        for piece in job.pieces:
            if stop.is_set():
                return
            _write_piece(piece, tensors[piece.tensor], outputs[job.file], plan.files[job.file], digests[piece.tensor])
            spec = tensors[piece.tensor].spec
            low, high = byte_range(spec, piece.start, piece.stop)
            progress.advance(high - low)
        shards.job_done(job)

    with ThreadPoolExecutor(plan.workers, thread_name_prefix="surgery") as pool, _torch_on_one_thread():
        futures: list[Future[None]] = [pool.submit(work, job) for job in plan.jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise


class _Shards:
    """Counts the jobs that each file still waits for."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan = plan
        self._progress = progress
        self._left = [sum(job.file == number for job in plan.jobs) for number in range(len(plan.files))]
        self._done = 0
        self._lock = threading.Lock()

    def job_done(self, job: Job) -> None:
        """Tell the watcher when a file's last job is done."""
        with self._lock:
            self._left[job.file] -= 1
            if self._left[job.file]:
                return
            self._done += 1
            done = self._done
        self._progress.shard(self._plan.files[job.file].name, done, len(self._plan.files))


def _write_piece(piece: Piece, tensor: LazyTensor, output: OutputFile, file: FileLayout, digests: BlockDigests) -> None:
    spec = tensor.spec
    low, high = byte_range(spec, piece.start, piece.stop)
    position, step = file.offsets[spec.name] + low, block_of(tensor)
    stream = digests.stream(low)
    buffer = _buffer(_bytes_of(spec, min(step, piece.stop - piece.start)))
    try:
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            data = buffer[: _bytes_of(spec, stop - start)]
            tensor.read_into(start, stop, data)
            stream.update(data)
            output.write_at(position, data)
            position += len(data)
    except SurgeryError as error:
        raise error.at(tensor=spec.name) from None
    if position != file.offsets[spec.name] + high:
        raise AssertionError(f"{spec.name} was not written to its end")


def _bytes_of(spec: TensorSpec, count: int) -> int:
    low, high = byte_range(spec, 0, count)
    return high - low


_local = threading.local()


def _buffer(size: int) -> memoryview:
    """Return this thread's buffer: allocated once, because fresh pages cost more than the copy into them."""
    held: bytearray | None = getattr(_local, "buffer", None)
    if held is None or len(held) < size:
        _local.buffer = held = bytearray(size)
    return memoryview(held)


def _torch_on_one_thread() -> AbstractContextManager[None]:
    """Keep torch, if the run uses it at all, from adding threads of its own to each worker's."""
    numerics = sys.modules.get("surgery.numerics")
    return numerics.single_threaded() if numerics else nullcontext()


def publish(
    tensors: Mapping[str, LazyTensor],
    out: str | os.PathLike[str],
    *,
    record: Callable[[Mapping[str, str]], dict[str, Any]],
    shards: Mapping[str, str] | None = None,
    stem: str = "model",
    max_shard_size: int | None = None,
    workers: int = 1,
    max_memory: int | None = None,
    overwrite: bool = False,
    sources: Sequence[Sources] = (),
    files: Mapping[str, bytes] | None = None,
    copies: Mapping[str, Path] | None = None,
    kept: Mapping[str, LazyTensor] | None = None,
    check: Callable[[Path, Mapping[str, str]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Plan, write and publish an output: weights, side files, then index and record last, then one rename.

    Args:
        tensors: the output's tensors.
        out: a folder, or one file where it ends in ``.safetensors``; its record then goes into ``__metadata__``.
        record: composes the provenance record from the tensors' fingerprints.
        shards: the file that each tensor should go to.
        stem: the start of weight files' names.
        max_shard_size: bytes a file.
        workers: threads.
        max_memory: refuse a plan that may need more.
        overwrite: replace an existing output.
        sources: files being read: checked for change before anything is published, and never written to.
        files: small files to write.
        copies: side files to copy.
        kept: tensors that a later unmerge needs, for ``.surgery/originals``.
        check: told where the finished output lies and its tensors' fingerprints, just before it is published.
        progress: somebody who watches.

    Returns:
        The record.
    """
    single = is_one_file(out)
    # A single file carries its record in its header, whose length must be known first: fingerprints have one length.
    draft = record(dict.fromkeys(tensors, PLACEHOLDER)) if single else None
    metadata = {METADATA_KEY: encode(draft).decode()} if draft else None
    plan = lay_out(
        tensors, shards=shards, stem=stem, max_shard_size=max_shard_size, metadata=metadata,
        workers=workers, max_memory=max_memory,
    )  # fmt: skip
    extra = lay_out(kept, stem=KEPT, workers=workers) if kept else None
    with Publication(out, overwrite=overwrite, inputs=[source.path for source in sources]) as publication:
        sizes = sum(len(data) for data in (files or {}).values()) + (extra.bytes_written if extra else 0)
        publication.check_space(
            plan.bytes_written + sizes + sum(path.stat().st_size for path in (copies or {}).values())
        )
        fingerprints = run(plan, tensors, publication, progress)
        if extra and kept:
            run(extra, kept, publication, names={extra.files[0].name: KEPT_FILE})
        for name, path in (copies or {}).items():
            publication.copy(name, path)
        for name, data in (files or {}).items():
            publication.write(name, data)
        document = record(fingerprints)
        if single:
            _rewrite_header(plan, publication, document)
        else:
            if plan.index:
                members = {file.name: [plan.specs[name] for name in file.offsets] for file in plan.files}
                publication.write(plan.index, build_index(members))
            publication.write(RECORD, encode(document))
        for source in sources:
            source.check_unchanged()
        if check is not None:
            check(publication.staging, fingerprints)
        publication.commit()
    return document


class Sources(Protocol):
    """Files that a run reads from."""

    path: Path

    def check_unchanged(self) -> None:
        """Raise if they changed since they were opened."""
        ...


def _rewrite_header(plan: Plan, publication: Publication, document: Mapping[str, Any]) -> None:
    (file,) = plan.files
    specs = [plan.specs[name] for name in file.offsets]
    prefix, _ = build_header(specs, {"format": "pt", METADATA_KEY: encode(document).decode()})
    if len(prefix) != len(file.prefix):
        raise AssertionError("the record's length changed between the plan and the end")
    publication.overwrite_start(publication.out.name, prefix)
