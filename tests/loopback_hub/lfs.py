"""Large files: Git LFS's batch call on the Hub, and the store behind the second port."""

from __future__ import annotations

import hashlib
import secrets
import threading
from typing import Any

from tests.loopback_hub.wire import Reply, Request, of_json, refusal


class Store:
    """Objects by SHA-256, uploads under way, and signed addresses on the CDN's port."""

    def __init__(self) -> None:
        self.url = ""
        """Where the CDN listens."""
        self.chunk_size: int | None = None
        """Larger uploads are asked for in parts of this size; never, where it is ``None``."""
        self.objects: dict[str, bytes] = {}
        self.stored: list[str] = []
        """The objects that were uploaded, in order."""
        self._parts: dict[str, dict[int, bytes]] = {}
        self._signature = secrets.token_hex(8)
        self._lock = threading.Lock()

    def add(self, content: bytes) -> str:
        """Store an object as if it had been uploaded long ago."""
        name = hashlib.sha256(content).hexdigest()
        self.objects[name] = content
        return name

    def address(self, sha256: str, name: str = "") -> str:
        """Sign the address of an object; without a signature nothing is given."""
        return f"{self.url}/{sha256}?X-Signature={self._signature}&filename={name}"

    def batch(self, request: Request, verify: str) -> Reply:
        """Tell a client what to upload, and how."""
        objects = [self._instruct(item["oid"], item["size"], verify) for item in request.json()["objects"]]
        return of_json({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def _instruct(self, oid: str, size: int, verify: str) -> dict[str, Any]:
        if oid in self.objects:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": self.address(oid)}
        if self.chunk_size is not None and size > self.chunk_size:
            numbers = range(1, -(-size // self.chunk_size) + 1)
            upload["header"] = {f"{number:05d}": f"{self.address(oid)}&part={number}" for number in numbers}
            upload["header"]["chunk_size"] = str(self.chunk_size)
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": verify}}}

    def verify(self, request: Request) -> Reply:
        """Confirm that an object arrived whole."""
        document = request.json()
        found = self.objects.get(document["oid"])
        if found is None or len(found) != document["size"]:
            return refusal(404, "the object was not uploaded")
        return of_json({})

    def answer(self, request: Request) -> Reply:
        """Answer on the CDN's port."""
        if request.headers.get("Authorization"):
            return refusal(400, "only one authentication mechanism is allowed: a token was sent to the CDN")
        if request.query.get("X-Signature") != [self._signature]:
            return refusal(403, "the address is not signed")
        oid = request.path.lstrip("/")
        if request.method == "PUT":
            return self._take(oid, request)
        if request.method == "POST":
            return self._join(oid, request)
        content = self.objects.get(oid)
        if content is None:
            return refusal(404, "no such object")
        return Reply(200, content, {"ETag": f'"{oid}"'}, partial=True)

    def _take(self, oid: str, request: Request) -> Reply:
        if "part" not in request.query:
            return self._finish(oid, request.body)
        with self._lock:
            self._parts.setdefault(oid, {})[int(request.query["part"][0])] = request.body
        return Reply(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def _join(self, oid: str, request: Request) -> Reply:
        listed = [(part["partNumber"], part["etag"].strip('"')) for part in request.json()["parts"]]
        with self._lock:
            parts = self._parts.pop(oid, {})
        held = [(number, hashlib.md5(data).hexdigest()) for number, data in sorted(parts.items())]
        if listed != held:
            return refusal(400, "the parts listed are not those that were uploaded")
        return self._finish(oid, b"".join(data for _, data in sorted(parts.items())))

    def _finish(self, oid: str, content: bytes) -> Reply:
        if hashlib.sha256(content).hexdigest() != oid:
            return refusal(400, "the content does not have the SHA-256 it was announced with")
        with self._lock:
            self.objects[oid] = content
            self.stored.append(oid)
        return Reply(200, b"", {"ETag": f'"{oid}"'})
