"""``push``: put a model, an adapter or an exact delta on the Hub, in one commit.

Everything is decided and checked before the first byte travels: what lies here is verified, what lies there is looked
at, the card is written, and the commit is known file by file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import HubError, UsageError
from surgery.execute import Progress, Silent
from surgery.formats import hub_files, model_card
from surgery.operations.card import model_card as compose_card
from surgery.operations.push_files import Contents, contents
from surgery.operations.verify import verify
from surgery.report import Table, join_shown
from surgery.sources.hub_client import Deadline, check_name
from surgery.sources.hub_repository import LARGE, File, Pushed, Repository, State
from surgery.tensor import human_bytes

LOOKING = 60.0
"""Seconds that looking at a repository may take."""
PATIENCE = 600.0
"""Seconds that a push may take, beside a second for every ``_SPEED`` bytes."""
_SPEED = 1_000_000
_WHAT = {"adapter": "an adapter", "model": "a model", "delta": "an exact delta"}


@dataclass(frozen=True)
class Destination:
    """A repository, looked at, that a push may go to."""

    repository: Repository
    state: State
    private: bool

    @property
    def name(self) -> str:
        """``org/name``."""
        return self.repository.name

    def allow(self, nbytes: int, timeout: float | None = None) -> None:
        """Begin to count the time for ``nbytes`` now: it may have been looked at long before there was anything to send."""
        self.repository.deadline = Deadline(PATIENCE + nbytes / _SPEED if timeout is None else timeout)

    def refuse_other_kind(self, kind: str) -> None:
        """Refuse to put something beside weights of another kind.

        Raises:
            HubError: there are some.
        """
        other = hub_files.kinds_in(self.state.files) - {kind}
        if other:
            held = " and ".join(_WHAT[name] for name in sorted(other))
            raise HubError(
                f"holds {held}; {_WHAT[kind]} beside it would confuse whoever loads it", file=self.name,
                mend="push to another repository, or to a branch of its own with --revision",
            )  # fmt: skip


@dataclass(frozen=True)
class Commit:
    """What a commit will add and delete."""

    kind: str
    files: tuple[File, ...]
    deletions: tuple[str, ...]
    title: str
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Push:
    """A push that is planned and not yet made."""

    destination: Destination
    commit: Commit

    def table(self) -> Table:
        """Show the commit."""
        rows = [("add", file.name, human_bytes(file.size)) for file in self.commit.files]
        rows += [("delete", name, "") for name in self.commit.deletions]
        return Table("", ("", "file", "bytes"), tuple(rows))

    @property
    def heading(self) -> str:
        """The commit's title, the repository, and how it stands."""
        state = self.destination.state
        how = "private" if self.destination.private else "public"
        branch = f" at {self.destination.repository.revision}" if self.destination.repository.revision else ""
        return (
            f"commit to {self.destination.name}{branch} ({how}{'' if state.exists else ', new'}): {self.commit.title}"
        )

    def document(self) -> dict[str, Any]:
        """Return the plan, for ``--json``."""
        return {
            "schema": "surgery.push/1", "repository": self.destination.name,
            "revision": self.destination.repository.revision, "private": self.destination.private,
            "new": not self.destination.state.exists, "kind": self.commit.kind, "message": self.commit.title,
            "add": {file.name: file.size for file in self.commit.files}, "delete": list(self.commit.deletions),
            "bytes": self.commit.nbytes, "notes": self.commit.notes,
        }  # fmt: skip

    def run(self, progress: Progress | None = None) -> Pushed:
        """Make the commit, and the repository if there is none.

        Raises:
            HubError: the Hub refused, somebody else pushed meanwhile, or the time is over.
        """
        progress = progress or Silent()
        repository = self.destination.repository
        parent = repository.prepare(self.destination.state, private=self.destination.private)
        large = [file for file in self.commit.files if file.size > LARGE]
        progress.start(self.commit.nbytes)
        try:
            for number, file in enumerate(large, 1):
                repository.send(file)
                progress.advance(file.size)
                progress.shard(file.name, number, len(large))
            small = [file for file in self.commit.files if file.size <= LARGE]
            return repository.commit(small, self.commit.deletions, self.commit.title, parent=parent)
        finally:
            progress.finish()

    def _repr_html_(self) -> str:
        return self.table().html()


def destination(
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    timeout: float | None = None,
) -> Destination:
    """Look at a repository before anything is made for it.

    Args:
        repo: ``org/name``.
        private: what it is to be; an existing one of the other kind is refused.
        revision: a branch, made if there is none; ``main`` by default.
        create_pr: open a pull request in place of committing to the branch.
        timeout: seconds for the whole push.

    Raises:
        UsageError: no repository id.
        HubError: offline, no token, no access, or the wrong visibility.
    """
    deadline = Deadline(LOOKING if timeout is None else timeout)
    repository = Repository(check_name(repo), revision, deadline=deadline, create_pr=create_pr)
    state = repository.look()
    if state.exists and state.private != private:
        how, mend = (
            ("public", "--public pushes there all the same") if private
            else ("private", "leave --public out, or change its visibility in its settings")
        )  # fmt: skip
        raise HubError(f"exists, and is {how}", file=repository.name, mend=mend)
    if create_pr and not state.exists:
        raise HubError("does not exist, so there is nothing to open a pull request for", file=repository.name)
    return Destination(repository, state, private)


def plan_push(
    path: str | os.PathLike[str],
    to: str | Destination,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    include: Sequence[str] = (),
    include_undo: bool = False,
    base_id: str | Sequence[str] = (),
    licence: str | None = None,
    timeout: float | None = None,
) -> Push:
    """Plan a push: verify what is here, look at what is there, write the card. Nothing is sent.

    Args:
        path: a folder with a model or an adapter, or an exact delta.
        to: ``org/name``, or what :func:`destination` returned.
        private: see :func:`destination`, as ``revision`` and ``create_pr``.
        revision: a branch.
        create_pr: open a pull request.
        message: the commit's title.
        include: patterns of files that would be refused as unknown.
        include_undo: take along what an unmerge needs.
        base_id: Hub ids of what it was made from, where that lay on a disk.
        licence: as the Hub spells it; by default that of the card, else of the bases if they agree.
        timeout: seconds for the whole push; by default ten minutes and one for every megabyte.

    Raises:
        UsageError: stray files, an adapter whose base has no id, licences that differ.
        UnsafeError: secrets, pickled weights, links that lead outside.
        VerificationError: the folder is not what its record says.
        HubError: see :func:`destination`; or the repository holds something of another kind.
    """
    found = contents(path, include, include_undo=include_undo)
    if found.record is not None or found.kind == "model":
        verify(path)
    if isinstance(to, Destination):
        to.allow(0, timeout)
    else:
        to = destination(to, private=private, revision=revision, create_pr=create_pr, timeout=timeout)
    commit = plan_commit(found, to, message=message, base_id=base_id, licence=licence)
    if timeout is None:
        to.allow(commit.nbytes)
    return Push(to, commit)


def plan_commit(
    found: Contents,
    to: Destination,
    *,
    message: str | None = None,
    base_id: str | Sequence[str] = (),
    licence: str | None = None,
    sent: Sequence[str] = (),
) -> Commit:
    """Decide what a commit adds and deletes, and write the card; see :func:`plan_push`.

    Args:
        found: what lies here.
        to: where it goes.
        message: the title.
        base_id: Hub ids of the bases.
        licence: as the Hub spells it.
        sent: weights that are there already, waiting for the commit.
    """
    bases = tuple(check_name(name) for name in ([base_id] if isinstance(base_id, str) else base_id))
    to.refuse_other_kind(found.kind)
    files, notes = list(found.prepared(bases)), list(found.notes)
    card = _card(found, to, bases, licence, notes)
    if card is not None:
        hub_files.refuse_secrets(model_card.FILE, card.decode(), os.path.expanduser("~"))
        files.append(File(model_card.FILE, card))
    kept = {*sent, *(file.name for file in files)}
    stale = (
        ()
        if found.kind == "delta"
        else [name for name in to.state.files if hub_files.is_weights(name) and name not in kept]
    )
    files.sort(key=lambda file: file.name)
    return Commit(found.kind, tuple(files), tuple(stale), _title(message, found), notes)


def push(path: str | os.PathLike[str], to: str, *, progress: Progress | None = None, **options: Any) -> Pushed:
    """Push a folder or a delta to the Hub in one commit: private, unless ``private=False``.

    Args:
        path: a folder with a model or an adapter, or an exact delta.
        to: ``org/name``.
        progress: somebody who watches.
        **options: see :func:`plan_push`.

    Returns:
        The commit.

    Raises:
        UsageError: no repository id, stray files, an adapter whose base has no id on the Hub, licences that differ.
        UnsafeError: secrets, pickled weights, links that lead outside.
        VerificationError: the folder is not what its record says.
        HubError: offline, no access, the wrong visibility, something of another kind there, or somebody else pushed.
    """
    return plan_push(path, to, **options).run(progress)


def _card(
    found: Contents, to: Destination, bases: tuple[str, ...], licence: str | None, notes: list[str]
) -> bytes | None:
    """Write the card: ours into the one that is here or there, the one with somebody's words first."""
    there = to.repository.read(model_card.FILE, to.state) if model_card.FILE in to.state.files else None
    here = found.card
    existing = here if here is not None and (there is None or model_card.has_own_words(here)) else there or here
    subject = found.subject(to.name, bases, None)
    if subject is None:
        notes.append("surgery did not make this: the card is left as it is" if existing else "there is no card")
        return existing
    known = licence or (model_card.metadata(existing).get("license") if existing else None)
    known = known or _licence_of(subject.bases, to)
    if known is None:
        notes.append("the card names no licence; --license sets one")
    if not subject.bases:
        notes.append("the card names no base model; --base-id org/name sets it")
    card = compose_card(found.subject(to.name, bases, known) or subject)
    return model_card.compose(card) if existing is None else model_card.revise(existing, card)


def _licence_of(bases: Sequence[str], to: Destination) -> str | None:
    licences = {base: found for base in bases if (found := to.repository.licence_of(base))}
    if len(set(licences.values())) > 1:
        said = join_shown([f"{base}: {found}" for base, found in licences.items()])
        raise UsageError(f"its bases have different licences ({said})", mend="--license says which one applies")
    return next(iter(licences.values()), None)


def _title(message: str | None, found: Contents) -> str:
    if message is None:
        return f"Upload {_WHAT[found.kind].split(' ', 1)[1]} with surgery"
    lines = message.strip().splitlines()
    if not lines:
        raise UsageError("the commit message is empty", mend="-m says what was done")
    return lines[0]
