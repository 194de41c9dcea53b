"""Running a plan: workers take jobs, make each tensor block by block, and write it at its place.

This room knows tensors only by the protocol. It adds the place to errors, once, and reports progress.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import OutputError, SurgeryError
from surgery.formats.safetensors import build_header, build_index
from surgery.kept import UNDO_FILE, Companion, check_carried, digests_beside, tensors_last
from surgery.plan import NO_LIMIT, FileLayout, Job, Piece, Plan, block_of, lay_out
from surgery.provenance import METADATA_KEY, PLACEHOLDER, RECORD, SEAL, BlockDigests, encode, sealed
from surgery.sources.remote import expect
from surgery.tensor import LazyTensor, TensorSpec, byte_range
from surgery.writer import OutputFile, Publication, Share, is_one_file


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
    only: Collection[int] | None = None,
    companion: Companion | None = None,
) -> dict[str, str]:
    """Write every tensor of a plan into a publication's staging folder, but those whose files are finished already.

    Args:
        plan: what goes where.
        tensors: the values.
        publication: the output in the making.
        progress: somebody who watches.
        names: other names for the plan's files, which are then small, and not entered in the journal.
        only: the numbers of the files to make; all by default.
        companion: somebody who notes what goes by; told what an earlier run noted of the files that it finished.

    Returns:
        The fingerprint of every tensor in the files that are finished now, by name.

    Raises:
        SurgeryError: whatever a tensor raises, with file and tensor named. The first error stops all workers.
    """
    watcher = progress or Silent()
    found: dict[str, str] = {}
    with ExitStack() as stack:
        files: dict[int, _File] = {}
        for number, layout in enumerate(plan.files):
            name = publication.out.name if publication.single else (names or {}).get(layout.name, layout.name)
            if name in publication.finished:
                found |= publication.finished[name]
                if companion is not None:
                    companion.unpack(publication.notes(name))
            elif only is None or number in only:
                output = stack.enter_context(publication.create(name, layout.size))
                output.write_at(0, memoryview(layout.prefix))
                files[number] = _File(
                    name, layout, output, {each: BlockDigests(plan.specs[each]) for each in layout.offsets}
                )
        jobs = [job for job in plan.jobs if job.file in files]
        expect(tensors[name] for file in files.values() for name in file.layout.offsets)
        watcher.start(sum(job.nbytes for job in jobs))
        shards = _Shards(jobs, files, publication, watcher, companion, enter=not names)
        try:
            _run_jobs(plan.workers, jobs, tensors, files, shards, watcher)
        finally:
            watcher.finish()
    for file in files.values():
        found |= file.fingerprints()
    return found


@dataclass(frozen=True, slots=True)
class _File:
    """One file while it is written."""

    name: str
    layout: FileLayout
    output: OutputFile
    digests: Mapping[str, BlockDigests]

    def start_writing(self, job: Job) -> None:
        """Have a finished job brought to disk."""
        first = job.pieces[0]
        low, _ = byte_range(self.digests[first.tensor].spec, first.start, first.stop)
        self.output.start_writing(self.layout.offsets[first.tensor] + low, job.nbytes)

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of its tensors, all of whose blocks are written."""
        found: dict[str, str] = {}
        for name, digest in self.digests.items():
            fingerprint = digest.fingerprint()
            if fingerprint is None:
                raise AssertionError(f"the plan left blocks of {name} unwritten")
            found[name] = fingerprint
        return found


def _run_jobs(
    workers: int,
    jobs: Sequence[Job],
    tensors: Mapping[str, LazyTensor],
    files: Mapping[int, _File],
    shards: _Shards,
    progress: Progress,
) -> None:
    stop = threading.Event()

    def work(job: Job) -> None:
        for piece in job.pieces:
            if stop.is_set():
                return
            _write_piece(piece, tensors[piece.tensor], files[job.file])
            low, high = byte_range(tensors[piece.tensor].spec, piece.start, piece.stop)
            progress.advance(high - low)
        # The disk works while the next jobs are made; in a thread of its own, for it may have to wait for its turn.
        disk.submit(files[job.file].start_writing, job)
        shards.job_done(job)

    with (
        ThreadPoolExecutor(1, thread_name_prefix="surgery-disk") as disk,
        ThreadPoolExecutor(workers, thread_name_prefix="surgery") as pool,
        _torch_on_one_thread(),
    ):
        futures: list[Future[None]] = [pool.submit(work, job) for job in jobs]
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

    def __init__(
        self,
        jobs: Sequence[Job],
        files: Mapping[int, _File],
        publication: Publication,
        progress: Progress,
        companion: Companion | None,
        *,
        enter: bool,
    ) -> None:
        self._enter = enter
        self._companion = companion
        self._files = files
        self._publication = publication
        self._progress = progress
        self._left = Counter(job.file for job in jobs)
        self._done = 0
        self._lock = threading.Lock()

    def job_done(self, job: Job) -> None:
        """Enter a file into the journal when its last job is done, and tell the watcher."""
        with self._lock:
            self._left[job.file] -= 1
            if self._left[job.file]:
                return
        file = self._files[job.file]
        if self._enter:
            prints = file.fingerprints()
            notes = None if self._companion is None else self._companion.pack(prints.keys())
            self._publication.finish(file.name, file.output, prints, notes)
        with self._lock:
            self._done += 1
            done = self._done
        self._progress.shard(file.layout.name, done, len(self._files))


def _write_piece(piece: Piece, tensor: LazyTensor, file: _File) -> None:
    spec = tensor.spec
    low, high = byte_range(spec, piece.start, piece.stop)
    position, step = file.layout.offsets[spec.name] + low, block_of(tensor)
    stream = file.digests[spec.name].stream(low)
    buffer = _buffer(_bytes_of(spec, min(step, piece.stop - piece.start)))
    try:
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            data = buffer[: _bytes_of(spec, stop - start)]
            tensor.read_into(start, stop, data)
            stream.update(data)
            file.output.write_at(position, data)
            position += len(data)
    except SurgeryError as error:
        raise error.at(tensor=spec.name) from None
    if position != file.layout.offsets[spec.name] + high:
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
    kept: Mapping[str, Mapping[str, LazyTensor]] | None = None,
    carried: Mapping[str, Mapping[str, str]] | None = None,
    companion: Companion | None = None,
    check: Callable[[Path, Mapping[str, str]], None] | None = None,
    work: str | None = None,
    restart: bool = False,
    finish: bool = False,
    progress: Progress | None = None,
    into: Publication | None = None,
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
        kept: tensors that a later unmerge needs: for each of our containers its content.
        carried: the fingerprints that tensors in ``kept`` are recorded to have, where they come from an earlier output.
        companion: somebody who notes what goes by; what it composes goes into the undo container and the record.
        check: told where the finished output lies and its tensors' fingerprints, just before it is published.
        work: what decides the tensors' values, and the identity of the inputs: a run that was broken off with the same
            work and layout is continued. ``None``: every run begins anew.
        restart: begin anew in any case.
        finish: refuse unless all files are finished already.
        progress: somebody who watches.
        into: where it goes instead of being renamed to ``out``: a publication that does not stay on this disk.

    Returns:
        The record.

    Raises:
        OutputError: it exists, does not fit, or with ``finish`` is not finished.
    """
    single = is_one_file(out)
    # A single file carries its record in its header, whose length must be known first: fingerprints have one length.
    draft = {**record(dict.fromkeys(tensors, PLACEHOLDER)), SEAL: PLACEHOLDER} if single else None
    metadata = {METADATA_KEY: encode(draft).decode()} if draft else None
    plan = lay_out(
        tensors, shards=shards, stem=stem, max_shard_size=max_shard_size, metadata=metadata,
        workers=workers, max_memory=max_memory,
    )  # fmt: skip
    extra = sum(lay_out(each).bytes_written for each in (kept or {}).values() if each)
    digest = None if work is None else plan.digest(work)
    inputs = [source.path for source in sources]
    with into or Publication(out, overwrite=overwrite, inputs=inputs, digest=digest, restart=restart) as publication:
        if finish:
            _refuse_unfinished(plan, publication)
        sizes = sum(len(data) for data in (files or {}).values()) + extra
        ready = sum(file.size for file in plan.files if file.name in publication.finished)
        sizes += companion.allowance() if companion is not None and not single else 0
        publication.check_space(
            plan.bytes_written - ready + sizes + sum(path.stat().st_size for path in (copies or {}).values())
        )
        turns = [[number] for number in range(len(plan.files))] if publication.one_at_a_time else [None]
        fingerprints: dict[str, str] = {}
        for only in turns:
            fingerprints |= run(plan, tensors, publication, progress, only=only, companion=companion)
        containers = {name: dict(content) for name, content in (kept or {}).items()}
        if companion is not None and not single:
            containers.setdefault(UNDO_FILE, {}).update(companion.records(fingerprints))
        prints = _write_containers(containers, publication, workers, carried or {})
        for name, path in (copies or {}).items():
            publication.copy(name, path)
        for name, data in (files or {}).items():
            publication.write(name, data)
        document = tensors_last({**record(fingerprints), **(companion.report() if companion else {})})
        if single:
            _rewrite_header(
                plan, publication, sealed({key: value for key, value in document.items() if key in (draft or {})})
            )
        else:
            if plan.index:
                members = {file.name: [plan.specs[name] for name in file.offsets] for file in plan.files}
                publication.write(plan.index, build_index(members))
            document |= {**({"kept": prints} if prints else {}), "files": digests_beside(plan, publication.staging)}
            document = sealed(tensors_last(document))
            publication.write(RECORD, encode(document))
        for source in sources:
            source.check_unchanged()
        if check is not None:
            check(publication.staging, fingerprints)
        publication.commit()
    return document


def _write_containers(
    containers: Mapping[str, Mapping[str, LazyTensor]],
    publication: Publication,
    workers: int,
    carried: Mapping[str, Mapping[str, str]],
) -> dict[str, dict[str, str]]:
    """Write our own containers beside the weights, and return the fingerprints of what is in them.

    Raises:
        VerificationError: something carried over from an earlier output is not what was recorded.
    """
    found: dict[str, dict[str, str]] = {}
    for container, content in containers.items():
        if not content:
            continue
        plan = lay_out(content, max_shard_size=NO_LIMIT, workers=workers)
        prints = run(plan, content, publication, names={plan.files[0].name: container})
        check_carried(container, prints, carried.get(container, {}))
        found[container] = dict(sorted(prints.items()))
    return found


def _refuse_unfinished(plan: Plan, publication: Publication) -> None:
    missing = [file.name for file in plan.files if file.name not in publication.finished]
    if missing:
        if publication.finished:
            publication.keep()
        raise OutputError(
            f"{len(missing)} of its {len(plan.files)} files are not finished, {missing[0]} among them",
            file=publication.out.name, mend="run the jobs that make them",
        )  # fmt: skip


def run_share(
    plan: Plan,
    tensors: Mapping[str, LazyTensor],
    out: str | os.PathLike[str],
    share: tuple[int, int],
    *,
    work: str,
    overwrite: bool = False,
    sources: Sequence[Sources] = (),
    companion: Companion | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Make some of an output's files, beside other processes or machines that make the rest.

    Args:
        plan: of the whole output.
        tensors: the output's tensors.
        out: the folder that will be published.
        share: ``(k, n)``: the ``k``-th of ``n`` parts, from 1 on.
        work: see :func:`publish`, which publishes the output in the end.
        overwrite: whether an existing output will be replaced.
        sources: files being read.
        companion: somebody who notes what goes by.
        progress: somebody who watches.

    Returns:
        The names of the files of this share, all of them finished now.

    Raises:
        OutputError: somebody else writes one of them, or the finished files are those of another plan.
    """
    own = plan.members(share)
    inputs = [source.path for source in sources]
    with Share(out, overwrite=overwrite, inputs=inputs, digest=plan.digest(work)) as staging:
        todo = [number for number in own if plan.files[number].name not in staging.finished]
        staging.check_space(sum(plan.files[number].size for number in todo))
        if todo:
            run(plan, tensors, staging, progress, only=todo, companion=companion)
        for source in sources:
            source.check_unchanged()
    return [plan.files[number].name for number in own]


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
