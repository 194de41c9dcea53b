"""The Hub's own port: who may see what, and what each address answers."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import yaml

from tests.loopback_hub.lfs import Store
from tests.loopback_hub.repos import Commit, Conflict, File, Repo, is_large
from tests.loopback_hub.wire import Reply, Request, of_json, refusal
from tests.loopback_hub.xet import Xet

_ID = r"(?P<id>[\w.-]+(?:/[\w.-]+)?)"
_REV = r"(?P<rev>[^/]+)"


class Api:
    """Answers requests on the Hub's port from repositories and a store."""

    def __init__(self, store: Store, xet: Xet, tokens: dict[str, str], readers: set[str]) -> None:
        self.url = ""
        self.repos: dict[str, Repo] = {}
        self.describes_files = True
        """Whether a repository's description gives sizes and hashes when asked to; some mirrors do not."""
        self._store, self._xet, self._tokens, self._readers = store, xet, tokens, readers
        self._lock = threading.RLock()
        self._routes: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = [
            (method, re.compile(pattern), call)
            for method, pattern, call in (
                ("GET", r"/api/whoami-v2", self._who),
                ("GET", r"/api/agent-harnesses", lambda request, user: of_json([])),
                ("POST", r"/api/validate-yaml", self._validate),
                ("POST", r"/api/repos/create", self._create),
                ("DELETE", r"/api/repos/delete", self._delete),
                ("POST", rf"/api/models/{_ID}/preupload/{_REV}", self._preupload),
                ("POST", rf"/api/models/{_ID}/commit/{_REV}", self._commit),
                ("GET", rf"/api/models/{_ID}/revision/{_REV}", self._info),
                ("GET", rf"/api/models/{_ID}/tree/{_REV}(?:/(?P<path>.*))?", self._tree),
                ("POST", rf"/api/models/{_ID}/paths-info/{_REV}", self._paths_info),
                ("GET", rf"/api/models/{_ID}/commits/{_REV}", self._commits),
                ("GET", rf"/api/models/{_ID}/refs", self._refs),
                ("POST", rf"/api/models/{_ID}/branch/{_REV}", self._branch),
                ("POST", rf"/api/models/{_ID}/tag/{_REV}", self._tag),
                ("GET", rf"/api/models/{_ID}/xet-(?P<kind>write|read)-token/{_REV}", self._xet_token),
                ("GET", rf"/api/models/{_ID}", self._info),
                ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", self._batch),
                ("POST", rf"/{_ID}\.git/info/lfs/verify", self._verify),
                ("GET", rf"/{_ID}/resolve/{_REV}/(?P<path>.*)", self._resolve),
                ("GET", r"/api/resolve-cache/(?P<oid>[0-9a-f]{40})/(?P<path>.*)", self._never),
            )
        ]

    def answer(self, request: Request) -> Reply:
        """Find the route, check the token, and answer."""
        for method, pattern, call in self._routes:
            found = pattern.fullmatch(request.path)
            if found is None or request.method.replace("HEAD", "GET") != method:
                continue
            token = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token not in self._tokens:
                return refusal(401, "Invalid credentials in Authorization header")
            user = self._tokens.get(token)
            parts = {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
            with self._lock:
                if "id" not in parts:
                    return call(request, user, **parts)
                return self._about(call, request, user, parts)
        return refusal(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.path}")

    def _about(self, call: Callable[..., Reply], request: Request, user: str | None, parts: dict[str, str]) -> Reply:
        """Answer about one repository, if this user may see it."""
        repo = self.repos.get(parts.pop("id"))
        if repo is None or (repo.private and user != repo.id.split("/")[0]):
            if user is None:
                return refusal(401, "Invalid username or password.", "RepoNotFound")
            return refusal(404, "Repository not found", "RepoNotFound")
        if "rev" in parts and call not in (self._branch, self._xet_token):
            commit = repo.commit_of(parts["rev"])
            if commit is None:
                return refusal(404, f"Invalid rev id: {parts['rev']}", "RevisionNotFound")
        writes = call in (self._preupload, self._commit, self._branch, self._tag, self._batch, self._verify)
        if writes and user is None:
            return refusal(401, "Invalid username or password.")
        if writes and (user != repo.id.split("/")[0] or user in self._readers):
            return refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return call(request, user, repo, **parts)

    # --- users and repositories

    def _who(self, request: Request, user: str | None) -> Reply:
        if user is None:
            return refusal(401, "Invalid username or password.")
        role = "read" if user in self._readers else "write"
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return of_json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    def _validate(self, request: Request, user: str | None) -> Reply:
        """Check a card's metadata as the Hub does: most strictly that ``base_model`` names models."""
        import yaml

        content = request.json()["content"]
        found = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        try:
            card = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError as error:
            return of_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        bases = card.get("base_model") or []
        wrong = [name for name in ([bases] if isinstance(bases, str) else bases) if not _is_id(name)]
        if wrong:
            message = f'"base_model[0]" with value "{wrong[0]}" is not valid. Use a model id from https://hf.co/models.'
            return of_json({"errors": [{"message": message}], "warnings": []}, 400)
        return of_json({"errors": [], "warnings": []})

    def _create(self, request: Request, user: str | None) -> Reply:
        document = request.json()
        if user is None:
            return refusal(401, "Invalid username or password.")
        owner = document.get("organization") or user
        if owner != user or user in self._readers:
            return refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{document['name']}"
        url = f"{self.url}/{name}"
        if name in self.repos:
            return refusal(409, "You already created this model repo", url=url)
        private = document.get("visibility") == "private" or bool(document.get("private"))
        self.repos[name] = Repo(name, private=private)
        return of_json({"url": url, "name": name, "id": name})

    def _delete(self, request: Request, user: str | None) -> Reply:
        document = request.json()
        name = f"{document.get('organization') or user}/{document['name']}"
        if name.split("/", maxsplit=1)[0] != user or name not in self.repos:
            return refusal(404, "Repository not found", "RepoNotFound")
        del self.repos[name]
        return of_json({})

    def _info(self, request: Request, user: str | None, repo: Repo, rev: str = "main") -> Reply:
        commit = repo.commit_of(rev)
        assert commit is not None
        described = self.describes_files and request.query.get("blobs", ["false"])[0].lower() == "true"
        return of_json(
            {
                "_id": "0", "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid,
                "private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False,
                "downloads": 0, "likes": 0, "tags": [], "lastModified": _DATE, "createdAt": _DATE,
                "siblings": [_sibling(path, file, described) for path, file in commit.files.items()], "spaces": [],
                "cardData": _card(commit),
            }
        )  # fmt: skip

    # --- commits

    def _preupload(self, request: Request, user: str | None, repo: Repo, rev: str) -> Reply:
        commit = repo.commit_of(rev)
        assert commit is not None
        answers = []
        for item in request.json()["files"]:
            large = is_large(item["path"], item["size"])
            answer = {"path": item["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if item["path"] in commit.files:
                answer["oid"] = commit.files[item["path"]].etag
            answers.append(answer)
        return of_json({"files": answers})

    def _commit(self, request: Request, user: str | None, repo: Repo, rev: str) -> Reply:
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        ref = "main" if rev == "HEAD" else rev
        if "create_pr" in request.query:
            repo.discussions += 1
            ref = f"refs/pr/{repo.discussions}"
            base = repo.commit_of(rev)
            assert base is not None
            repo.refs[ref] = base.oid
        if ref not in repo.refs:
            return refusal(400, "commits go to a branch, not to a commit")
        files = dict(repo.commits[repo.refs[ref]].files)
        for line in lines:
            refused = self._apply(line["key"], line["value"], files)
            if refused is not None:
                return refused
        parent = header.get("parentCommit")
        if parent is not None and repo.commit_of(parent) is None:
            return refusal(400, f"the parent commit {parent} does not exist")
        try:
            made = repo.commit(ref, files, title=header.get("summary", ""), parent=parent)
        except Conflict:
            return refusal(412, "A commit has happened since. Please refresh and try again.")
        answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{self.url}/{repo.id}/commit/{made.oid}"}
        if "create_pr" in request.query:
            answer["pullRequestUrl"] = f"{self.url}/{repo.id}/discussions/{repo.discussions}"
        return of_json(answer)

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, File]) -> Reply | None:
        """Apply one operation of a commit, or say why it is refused."""
        path = value.get("path", "")
        if key == "file":
            content = base64.b64decode(value["content"])
            if is_large(path, len(content)):
                return refusal(400, f"{path} must be uploaded as a large file")
            files[path] = File(len(content), content)
        elif key == "lfsFile":
            sha256, xet_hash = value["oid"], None
            if sha256 not in self._store.objects:
                xet_hash = self._xet.hash_of(sha256)
                if xet_hash is None:
                    return refusal(400, f"the content of {path} was never uploaded")
            files[path] = File(value["size"], sha256=sha256, xet_hash=xet_hash)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                return refusal(400, f"{path} cannot be deleted: it is not there")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        elif key != "header":
            return refusal(400, f"operation {key} is not supported")
        return None

    def _branch(self, request: Request, user: str | None, repo: Repo, rev: str) -> Reply:
        start = repo.commit_of((request.json() if request.body else {}).get("startingPoint") or "main")
        if rev in repo.refs:
            return refusal(409, f"Reference already exists: refs/heads/{rev}")
        if start is None:
            return refusal(404, "Invalid rev id", "RevisionNotFound")
        repo.refs[rev] = start.oid
        return of_json({})

    def _tag(self, request: Request, user: str | None, repo: Repo, rev: str) -> Reply:
        commit = repo.commit_of(rev)
        assert commit is not None
        repo.refs[request.json()["tag"]] = commit.oid
        return of_json({})

    def _commits(self, request: Request, user: str | None, repo: Repo, rev: str) -> Reply:
        found = [
            {"id": commit.oid, "title": commit.title, "message": "", "authors": [{"user": user or "t"}], "date": _DATE}
            for commit in repo.history(rev)
        ]
        return of_json(found, X_Total_Count=str(len(found)))

    def _refs(self, request: Request, user: str | None, repo: Repo) -> Reply:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repo.refs.items()
            if not name.startswith("refs/")
        ]
        return of_json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    # --- files

    def _tree(self, request: Request, user: str | None, repo: Repo, rev: str, path: str = "") -> Reply:
        commit = repo.commit_of(rev)
        assert commit is not None
        inside = {name: file for name, file in commit.files.items() if not path or name.startswith(path + "/")}
        if path and not inside:
            return self._no_entry(commit, path)
        deep = request.query.get("recursive", ["false"])[0].lower() == "true"
        entries, folders = [], set()
        for name, file in sorted(inside.items()):
            below = name[len(path) + 1 if path else 0 :].split("/")
            folders.update("/".join([path, *below[:depth]]).strip("/") for depth in range(1, len(below)))
            if deep or len(below) == 1:
                entries.append(_entry(name, file))
        shown = folders if deep else {name for name in folders if "/" not in name[len(path) :].strip("/")}
        return of_json([{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in shown] + entries)

    def _paths_info(self, request: Request, user: str | None, repo: Repo, rev: str) -> Reply:
        from urllib.parse import parse_qs

        commit = repo.commit_of(rev)
        assert commit is not None
        paths = parse_qs(request.body.decode()).get("paths", [])
        return of_json([_entry(path, commit.files[path]) for path in paths if path in commit.files])

    def _resolve(self, request: Request, user: str | None, repo: Repo, rev: str, path: str) -> Reply:
        commit = repo.commit_of(rev)
        assert commit is not None
        if repo.gated and user != repo.id.split("/")[0]:
            return refusal(
                403, f"Access to model {repo.id} is restricted and you are not in the authorized list.", "GatedRepo"
            )
        file = commit.files.get(path)
        if file is None:
            return self._no_entry(commit, path)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
        if file.content is not None:
            return Reply(200, file.content, headers, partial=True)
        assert file.sha256 is not None
        self._xet.restore(file, self._store)
        headers.update({"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)})
        if file.xet_hash is not None:
            refresh = f"{self.url}/api/models/{repo.id}/xet-read-token/{commit.oid}"
            headers.update({"X-Xet-Hash": file.xet_hash, "Link": f'<{refresh}>; rel="xet-auth"'})
        location = self._store.address(file.sha256, path.rsplit("/", 1)[-1])
        return Reply(302, b"Found. Redirecting", {**headers, "Location": location})

    def _never(self, request: Request, user: str | None, oid: str, path: str) -> Reply:
        return refusal(404, "no such page")

    @staticmethod
    def _no_entry(commit: Commit, path: str) -> Reply:
        reply = refusal(404, "Entry not found", "EntryNotFound")
        reply.headers["X-Repo-Commit"] = commit.oid
        return reply

    # --- large files

    def _batch(self, request: Request, user: str | None, repo: Repo) -> Reply:
        return self._store.batch(request, f"{self.url}/{repo.id}.git/info/lfs/verify")

    def _verify(self, request: Request, user: str | None, repo: Repo) -> Reply:
        return self._store.verify(request)

    def _xet_token(self, request: Request, user: str | None, repo: Repo, kind: str, rev: str) -> Reply:
        if kind == "write" and (user != repo.id.split("/")[0] or user in self._readers):
            return refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return self._xet.token()


_DATE = "2026-01-01T00:00:00.000Z"


def _is_id(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def _sibling(path: str, file: File, described: bool) -> dict[str, Any]:
    """Describe a file as a repository's own description does."""
    if not described:
        return {"rfilename": path}
    found: dict[str, Any] = {"rfilename": path, "size": file.size, "blobId": file.oid}
    if file.sha256 is not None:
        found["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return found


def _entry(path: str, file: File) -> dict[str, Any]:
    """Describe a file as trees do."""
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
    if file.sha256 is not None:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    if file.xet_hash is not None:
        entry["xetHash"] = file.xet_hash
    return entry


def _card(commit: Commit) -> dict[str, object] | None:
    """Read the metadata of the card, as the Hub's model information has it."""
    card = commit.files.get("README.md")
    found = re.match(r"---\n(.*?)^---", (card.content or b"").decode(), re.DOTALL | re.MULTILINE) if card else None
    return yaml.safe_load(found[1]) if found else None
