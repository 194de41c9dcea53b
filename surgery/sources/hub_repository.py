"""A repository on the Hub to push to: what is there, and one commit of new files and deletions.

A commit is made on the commit that was there when the push was planned (``parent_commit``): if somebody pushed in
between, the Hub refuses. It is never sent twice. Where its answer was lost, the branch is looked at instead: a head with
our title on our parent is our commit. Large files travel before it, each once; what arrived is kept by the Hub and not
sent again by a further try.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from surgery.errors import HubError
from surgery.sources.hub_client import Deadline, client, client_errors, in_our_words, status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy

T = TypeVar("T")
LARGE = 1_000_000
"""Files above this many bytes are sent one by one before the commit, so that progress can be shown."""
_GRACE = 20.0
"""Seconds for finding out what became of a commit whose answer was lost."""


@dataclass(frozen=True, slots=True)
class State:
    """What a repository is before a push."""

    exists: bool
    private: bool = True
    head: str | None = None
    """The branch's commit; ``None`` where there is no such repository or branch."""
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class File:
    """A file to push."""

    name: str
    """Its path in the repository."""
    source: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push came to."""

    url: str
    commit: str
    pull_request: str | None = None
    changed: bool = True
    """Whether there was anything to commit."""


class Repository:
    """One model repository, seen at one branch.

    Args:
        name: ``org/name``.
        revision: the branch; ``main`` by default.
        deadline: by which everything must be done.
        create_pr: whether the commit will be a pull request.
    """

    def __init__(self, name: str, revision: str | None = None, *, deadline: Deadline, create_pr: bool = False) -> None:
        self.name = name
        self.revision = revision
        self._create_pr = create_pr
        self.deadline = deadline
        self._api = client()
        self._sent: dict[str, CommitOperationAdd] = {}

    def look(self) -> State:
        """See what is there.

        Raises:
            HubError: there is no token, or the Hub does not know it, or does not answer.
        """
        from huggingface_hub import errors, get_token

        if get_token() is None:
            raise HubError("there is no token to push with", file=self.name, mend="hf auth login, or set HF_TOKEN")
        with in_our_words(self.name, "look at it"):
            try:
                info = self._call(lambda: self._api.model_info(self.name, revision=self.revision))
            except errors.GatedRepoError:
                raise
            except errors.RevisionNotFoundError:
                return State(exists=True, private=bool(self._call(lambda: self._api.model_info(self.name)).private))
            except errors.RepositoryNotFoundError:
                self._call(self._api.whoami)  # a wrong token sees nothing either
                return State(exists=False)
        files = tuple(sibling.rfilename for sibling in info.siblings or ())
        return State(exists=True, private=bool(info.private), head=info.sha, files=files)

    def licence_of(self, name: str) -> str | None:
        """Return the licence that a model's card states; ``None`` where it cannot be seen."""
        try:
            with in_our_words(name, "read its card"):
                found = self._call(lambda: self._api.model_info(name)).card_data
        except HubError:
            return None
        licence = None if found is None else found.get("license")
        return licence if isinstance(licence, str) else None

    def read(self, path: str, state: State) -> bytes:
        """Read a small file as it is at the state's commit."""
        with in_our_words(self.name, f"read {path}"):
            found = self._call(lambda: self._api.hf_hub_download(self.name, path, revision=state.head))
            return Path(found).read_bytes()

    def prepare(self, state: State, *, private: bool) -> str:
        """Make the repository and the branch, where they are missing, and return the branch's commit."""
        if state.head is not None:
            return state.head
        with in_our_words(self.name, "create it"):
            if not state.exists:
                self._call(lambda: self._api.create_repo(self.name, private=private, exist_ok=False))
            if self.revision not in (None, "main"):
                branch = str(self.revision)
                self._call(lambda: self._api.create_branch(self.name, branch=branch))
            head = self._call(lambda: self._api.model_info(self.name, revision=self.revision)).sha
        if head is None:
            raise HubError("has no commit to build on", file=self.name)
        return str(head)

    def send(self, file: File) -> None:
        """Send a large file ahead of the commit that will name it; afterwards it may be deleted."""
        operation = self._addition(file)
        with in_our_words(self.name, f"push {file.name} to it"):
            self._call(
                lambda: self._api.preupload_lfs_files(
                    self.name, [operation], revision=self.revision, create_pr=self._create_pr
                )
            )
        self._sent[file.name] = operation

    def commit(self, files: Sequence[File], deletions: Sequence[str], title: str, *, parent: str) -> Pushed:
        """Commit what was sent, further files, and deletions, in one.

        Args:
            files: files not sent yet.
            deletions: paths that are in the repository and are to go.
            title: the commit's first line.
            parent: the commit that it must stand on.

        Raises:
            HubError: the Hub refused, or nobody knows whether it did.
        """
        from huggingface_hub import CommitOperationDelete

        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *self._sent.values(),
            *map(self._addition, files),
            *(CommitOperationDelete(path_in_repo=path, is_folder=False) for path in deletions),
        ]
        with in_our_words(self.name, "push to it"):
            try:
                made = self._call(
                    lambda: self._api.create_commit(
                        self.name, operations, commit_message=title, revision=self.revision,
                        parent_commit=parent, create_pr=self._create_pr,
                    )
                )  # fmt: skip
            except client_errors() as error:
                return self._after_a_lost_answer(error, title, parent)
        return self._pushed(made, parent)

    def _pushed(self, made: CommitInfo, parent: str) -> Pushed:
        return Pushed(made.commit_url, made.oid, made.pr_url, changed=made.oid != parent)

    def _after_a_lost_answer(self, error: Exception, title: str, parent: str) -> Pushed:
        """Say what became of a commit that failed; raise ``error`` where the Hub surely refused it."""
        status = status_of(error)
        if status is not None and status < 500 and status != 408:
            raise error
        if self._create_pr:
            raise HubError(
                "the Hub's answer was lost: a pull request may have been opened or not",
                mend="look at its discussions before pushing again",
            )
        self.deadline = Deadline(_GRACE)
        try:
            last = self._call(lambda: self._api.list_repo_commits(self.name, revision=self.revision))
        except client_errors():
            raise HubError(
                "the Hub's answer was lost: the commit may have been made or not",
                mend="the same command finds out, and commits only what is missing",
            ) from None
        if len(last) > 1 and last[0].title == title and last[1].commit_id == parent:
            return Pushed(f"{self._api.endpoint}/{self.name}/commit/{last[0].commit_id}", last[0].commit_id)
        raise error

    def _addition(self, file: File) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        source = file.source if isinstance(file.source, bytes) else str(file.source)
        return CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=source)

    def _call(self, call: Callable[[], T]) -> T:
        return self.deadline.run(call)
