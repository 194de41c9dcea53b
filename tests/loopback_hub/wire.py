"""HTTP: one handler for both ports, which logs, applies faults, and leaves the answers to a function."""

from __future__ import annotations

import json
import re
import select
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.loopback_hub.faults import Fault, Seen, Traffic

CHUNK = 1 << 16


@dataclass
class Request:
    """What a client asks."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Parse the body."""
        return json.loads(self.body)


@dataclass
class Reply:
    """What it is answered."""

    status: int = 200
    body: bytes | memoryview = b""
    headers: dict[str, str] = field(default_factory=dict)
    partial: bool = False
    """Whether a ``Range`` header chooses from the body."""


def of_json(document: Any, status: int = 200, **headers: str) -> Reply:
    """Answer with JSON."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps(document).encode(), {"Content-Type": "application/json", **named})


def refusal(status: int, message: str, code: str | None = None, **more: Any) -> Reply:
    """Answer with an error, as the Hub words them."""
    headers = {"Content-Type": "application/json", "X-Error-Message": message}
    if code is not None:
        headers["X-Error-Code"] = code
    return Reply(status, json.dumps({"error": message, **more}).encode(), headers)


Answer = Callable[[Request], Reply]


def serve(port: str, traffic: Traffic, answer: Answer, moved: Callable[[], None]) -> ThreadingHTTPServer:
    """Listen on a free port of the loopback interface; the caller runs and closes the server."""

    class Bound(_Handler):
        pass

    Bound.port, Bound.traffic, Bound.answer, Bound.moved = port, traffic, staticmethod(answer), staticmethod(moved)
    server = _Server(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    return server


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Leave broken connections unmentioned: clients that give up are what faults are for."""
        import sys

        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    port: str
    traffic: Traffic
    answer: Answer
    moved: Callable[[], None]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing: the log is ``traffic.seen``."""

    def _handle(self) -> None:
        body = self._read_body()
        seen = Seen(self.port, self.command, self.path, self.headers.get("Authorization"), self.headers.get("Range"))
        seen.received = len(body)
        fault = self.traffic.arrive(seen)
        kind = fault.kind if fault else None
        if kind == "stall":
            self._stall()
        if kind in ("drop", "stall"):
            return self._hang_up()
        if kind == "moved":
            self.moved()
        split = urlsplit(self.path)
        request = Request(self.command, split.path, parse_qs(split.query, keep_blank_values=True), self.headers, body)
        reply = self._refuse(fault) if isinstance(kind, int) else self.answer(request)
        if kind == "lost":
            return self._hang_up()
        if reply.partial and reply.status == 200:
            reply = _cut_out(reply, None if kind == "no-range" else self.headers.get("Range"), kind)
        self._send(reply, seen, kind)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815  the library looks for these names

    @staticmethod
    def _refuse(fault: Fault) -> Reply:
        reply = refusal(int(fault.kind), "a fault that was asked for")
        reply.headers.update(fault.headers)
        return reply

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, reply: Reply, seen: Seen, kind: str | int | None) -> None:
        seen.status = reply.status
        body = memoryview(reply.body)
        head = [f"HTTP/1.1 {reply.status} {self.responses.get(reply.status, ('',))[0]}"]
        headers = {
            "Content-Length": str(len(body)),
            "X-Request-Id": f"loopback-{len(self.traffic.seen)}",
            **reply.headers,
        }
        head += [f"{name}: {value}" for name, value in headers.items()]
        self._write("\r\n".join([*head, "", ""]).encode("latin-1"), seen, body=False)
        if self.command == "HEAD":
            return
        stop = len(body) // 2 if kind in ("cut", "stall-body") else len(body)
        for start in range(0, stop, CHUNK):
            self._write(body[start : min(start + CHUNK, stop)], seen)
        if kind == "stall-body":
            self._stall()
        if stop < len(body) or kind in ("cut", "stall-body"):
            self._hang_up()

    def _write(self, data: bytes | memoryview, seen: Seen, *, body: bool = True) -> None:
        seen.wire += len(data)
        seen.sent += len(data) if body else 0
        self.wfile.write(data)

    def _stall(self) -> None:
        """Wait for the client to go away, or for the hub to close."""
        self.wfile.flush()
        while not self.traffic.closed.wait(0.02):
            if select.select([self.connection], [], [], 0)[0]:
                return

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


def _cut_out(reply: Reply, wanted: str | None, kind: str | int | None) -> Reply:
    """Answer a range request, rightly or as the fault has it."""
    whole, size = memoryview(reply.body), len(reply.body)
    headers = {"Accept-Ranges": "bytes", **reply.headers}
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if found is None or found[1] + found[2] == "":
        return Reply(200, whole[: size // 2] if kind == "short" else whole, headers)
    start = int(found[1]) if found[1] else max(size - int(found[2]), 0)
    stop = min(int(found[2]) + 1, size) if found[1] and found[2] else size
    if start >= size or stop <= start:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    if kind == "wrong-range":
        start, stop = (start - 1, stop - 1) if start else (start + 1, min(stop + 1, size))
    piece = whole[start:stop]
    if kind == "short":
        stop = max(stop - max(len(piece) // 2, 1), start)
        piece = whole[start:stop]
    if kind == "long":
        piece = memoryview(bytes(piece) + b"more")
        stop += 4
    return Reply(206, piece, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})
