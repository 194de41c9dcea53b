"""The whole Hub: two ports, and what tests may look at and change behind them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests.loopback_hub.api import Api
from tests.loopback_hub.faults import Fault, Seen, Traffic
from tests.loopback_hub.lfs import Store
from tests.loopback_hub.repos import Commit, File, Repo, is_large
from tests.loopback_hub.wire import serve
from tests.loopback_hub.xet import Xet


class LoopbackHub:
    """A running Hub; use it in a ``with`` statement.

    Args:
        folder: where the Xet store lies.

    Attributes:
        endpoint: what ``HF_ENDPOINT`` must be.
        token: the token of user ``t``, who may read and write ``t/…``.
        reader_token: a token of user ``r``, who may only read what is public.
    """

    def __init__(self, folder: Path) -> None:
        self.token = f"hf_{secrets.token_hex(17)}"
        self.reader_token = f"hf_{secrets.token_hex(17)}"
        self.traffic = Traffic()
        self.store = Store()
        self.xet = Xet(folder / "xet-store")
        self._api = Api(self.store, self.xet, {self.token: "t", self.reader_token: "r"}, {"r"})
        self._servers = [
            serve("hub", self.traffic, self._api.answer, self.move),
            serve("cdn", self.traffic, self.store.answer, self.move),
        ]
        self.endpoint, self.store.url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        self._api.url = self.endpoint

    def __enter__(self) -> Self:
        """Start listening."""
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop listening, and let go of clients that are being stalled."""
        self.traffic.closed.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # --- what it stores

    @property
    def repos(self) -> dict[str, Repo]:
        """Repositories by id."""
        return self._api.repos

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes] = {},  # noqa: B006  never changed
        *,
        private: bool = False,
        gated: bool = False,
    ) -> Commit:
        """Put files on the main branch, of a new repository where need be, without a client."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id, private=private, gated=gated))
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        added = {path: self._file(path, content) for path, content in files.items()}
        return repo.commit("main", {**repo.commits[repo.refs["main"]].files, **added}, title="added")

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Return a file's content, as the Hub has it."""
        commit = self.repos[repo_id].commit_of(revision)
        assert commit is not None
        file = commit.files[path]
        if file.content is not None:
            return file.content
        assert file.sha256 is not None
        self.xet.restore(file, self.store)
        return self.store.objects[file.sha256]

    def move(self) -> None:
        """Put a commit on every branch of every repository, as somebody else would: no file is changed but a note."""
        for repo in self.repos.values():
            for ref in repo.refs:
                files = repo.commits[repo.refs[ref]].files
                repo.commit(ref, {**files, "note.txt": File(4, secrets.token_bytes(4))}, title="somebody else's")

    def _file(self, path: str, content: bytes) -> File:
        if is_large(path, len(content)):
            return File(len(content), sha256=self.store.add(content))
        return File(len(content), content)

    # --- what passes

    @property
    def seen(self) -> list[Seen]:
        """Every request so far."""
        return self.traffic.seen

    @contextmanager
    def watch(self) -> Iterator[list[Seen]]:
        """Collect the requests of a ``with`` block."""
        start, found = len(self.seen), []
        try:
            yield found
        finally:
            found += self.seen[start:]

    def fault(
        self,
        kind: str | int,
        match: str = "",
        *,
        at: int = 0,
        times: int | None = 1,
        headers: Mapping[str, str] | None = None,
    ) -> Fault:
        """Put a fault in the way of requests to come; see :class:`Fault`. :meth:`heal` removes all of them."""
        made = Fault(kind, match, at, times, dict(headers or {}))
        self.traffic.faults.append(made)
        return made

    def heal(self) -> None:
        """Remove all faults."""
        self.traffic.faults.clear()
