"""Pushing a checkpoint as it is made: each file travels as soon as it is finished, and leaves the disk again.

The commit comes last, with the small files, so that the repository changes at once or not at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.execute import Progress
from surgery.operations.push import Commit, Destination, plan_commit
from surgery.operations.push_files import contents_of_parts
from surgery.sources.hub_repository import File, Pushed
from surgery.writer import OutputFile, Publication


class Streamed(Publication):
    """A publication whose files go to a repository one by one, and are published by its commit."""

    one_at_a_time = True

    def __init__(self, folder: Path, to: Destination, parent: str, largest: int, options: Mapping[str, Any]) -> None:
        super().__init__(folder / "model")
        self._to, self._parent, self._largest, self._options = to, parent, largest, options
        self._sent: list[File] = []
        self.pushed: Pushed | None = None
        self.planned: Commit | None = None

    def check_space(self, needed: int) -> None:
        """Refuse if the disk has no room for the largest file and the small ones."""
        super().check_space(min(needed, self._largest))

    def finish(
        self, name: str, file: OutputFile, fingerprints: Mapping[str, str], notes: Iterable[bytes] | None = None
    ) -> None:
        """Send a file, and free the disk of it."""
        path = self.staging / name
        self._to.allow(file.size)
        self._to.repository.send(File(name, path))
        self._sent.append(File(name, b""))
        path.unlink()

    def commit(self) -> None:
        """Commit what was sent, with the small files."""
        found = contents_of_parts(self.staging)
        self._to.allow(0)
        self.planned = plan_commit(found, self._to, sent=[file.name for file in self._sent], **self._options)
        self.pushed = self._to.repository.commit(
            self.planned.files, self.planned.deletions, self.planned.title, parent=self._parent
        )


def push_stream(
    checkpoint: Checkpoint,
    to: Destination,
    *,
    max_shard_size: int | None = None,
    jobs: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    base_id: Sequence[str] = (),
    **options: Any,
) -> tuple[Pushed, Commit]:
    """Make a checkpoint and push it file by file, on a disk that holds no more than one of them.

    Args:
        checkpoint: what to make, as :meth:`Checkpoint.save` would.
        to: where to, as :func:`surgery.operations.push.destination` returned it.
        max_shard_size: bytes a file.
        jobs: threads.
        max_memory: refuse a plan that may need more.
        progress: somebody who watches.
        base_id: see :func:`surgery.operations.push.plan_push`, as all other ``options``.
        **options: ``message``, ``licence``.

    Returns:
        The commit, and what went into it.

    Raises:
        OutputError: the disk has no room for the largest file.
        HubError: the Hub refused; nothing was committed.
    """
    plan = checkpoint.plan(max_shard_size=max_shard_size, jobs=jobs, max_memory=max_memory)
    to.refuse_other_kind("model")
    largest = max(file.size for file in plan.files)
    to.allow(0)
    parent = to.repository.prepare(to.state, private=to.private)
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        streamed = Streamed(Path(folder), to, parent, largest, {"base_id": base_id, **options})
        checkpoint.save(
            streamed.out, max_shard_size=max_shard_size, jobs=jobs, max_memory=max_memory, progress=progress,
            into=streamed,
        )  # fmt: skip
    assert streamed.pushed is not None  # save() ends with the commit
    assert streamed.planned is not None
    return streamed.pushed, streamed.planned
