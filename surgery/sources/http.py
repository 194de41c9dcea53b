"""Reading over HTTP as the Hub's client does, with every answer checked.

The session, the token and the endpoint are huggingface_hub's own, which is imported when the first reference to the Hub
is opened. A request that fails for a reason that may pass is made again, after a pause that doubles; one that breaks off
goes on at the byte where it broke. Nothing that holds a token leaves this room: errors are made anew, with the status
and the place.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urljoin, urlsplit

from surgery import __version__
from surgery.errors import FormatError, HubError, IOFailure, UnsafeError, printable

PAUSE = 0.5
"""Seconds before a request is made again; twice as many each further time."""
TRIES = 5
"""Attempts in a row that may bring nothing."""
LONGEST_PAUSE = 60.0
"""Seconds: whoever asks for a longer pause is not waited for."""
CHUNK = 1 << 18
ANSWER_LIMIT = 100_000_000
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may pass."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Patience:
    """Counts the attempts at one thing, and waits between them."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._failures = 0

    def renew(self) -> None:
        """Begin counting anew: something arrived."""
        self._failures = 0

    def spend(self, why: str, wait: float | None = None) -> None:
        """Wait before the next attempt.

        Args:
            why: what failed.
            wait: seconds that the server asked for.

        Raises:
            HubError: there will be no next attempt.
        """
        self._failures += 1
        if self._failures >= TRIES:
            raise HubError(f"{why}, {TRIES} times in a row", file=self._what, mend="try again later")
        pause = PAUSE * 2 ** (self._failures - 1)
        if wait is not None and wait > LONGEST_PAUSE:
            raise HubError(f"{why}, and asks to wait {wait:.0f} seconds", file=self._what, mend="try again then")
        time.sleep(max(pause, wait or 0.0))


def endpoint() -> str:
    """Return the Hub's address.

    Raises:
        UnsafeError: it would have the token sent in the clear.
    """
    from huggingface_hub import constants, get_token

    address = str(constants.ENDPOINT)
    parts = urlsplit(address)
    if parts.scheme != "https" and parts.hostname not in _LOOPBACK and get_token():
        raise UnsafeError("HF_ENDPOINT is not https, so the token would travel in the clear", mend="use https")
    return address


def is_offline() -> bool:
    """Say whether ``HF_HUB_OFFLINE`` forbids all requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def get_json(url: str, what: str) -> Any:
    """Fetch and parse a JSON document.

    Raises:
        HubError: the server refuses, or does not answer.
        FormatError: the answer is not JSON.
    """
    raw = get_bytes(url, what, limit=ANSWER_LIMIT)
    try:
        return json.loads(raw)
    except ValueError:
        raise FormatError("the Hub's answer is not JSON", file=what) from None


def get_bytes(url: str, what: str, *, limit: int, check: Callable[[bytes], bool] = lambda _: True) -> bytes:
    """Fetch a small document whole.

    Args:
        url: on the Hub.
        what: its name in messages.
        limit: bytes that it may have at most.
        check: says whether it arrived as it should.

    Raises:
        HubError: the server refuses, does not answer, or with something else.
    """
    patience = Patience(what)
    while True:
        data = bytearray()
        try:
            with _stream("GET", url, _headers(), follow=True) as answer:
                _judge(answer, what)
                for piece in answer.iter_bytes(CHUNK):
                    data += piece
                    if len(data) > limit:
                        raise HubError(f"is larger than {limit:,} bytes", file=what)
            if not check(bytes(data)):
                raise Passing("arrived otherwise than the Hub lists it")
        except Passing as error:
            patience.spend(str(error), error.wait)
        except _network_errors() as error:
            patience.spend(describe(error))
        else:
            return bytes(data)


class RangeReader:
    """A file on the Hub, read in ranges: the redirect is followed once, the rest goes to where it led."""

    def __init__(self, url: str, size: int, what: str, commit: str) -> None:
        """Name a file; nothing is requested yet.

        Args:
            url: where the Hub resolves it, at a commit.
            size: bytes that it has.
            what: its name in messages.
            commit: the commit, which the answer must name as well.
        """
        self.size = size
        self._url, self.what, self._commit = url, what, commit
        self._place: tuple[str, bool] | None = None
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes:
        """Read a range whole."""
        return b"".join(self.stream(start, stop))

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of a range in order, from as many answers as it takes.

        Raises:
            HubError: the server refuses, does not answer, or not with what was asked for.
        """
        patience, place, moved = Patience(self.what), start, False
        while place < stop:
            url, trusted = self._locate()
            headers = {**_headers(token=trusted), "Range": f"bytes={place}-{stop - 1}"}
            try:
                with _stream("GET", url, headers, follow=True) as answer:
                    if answer.status_code == 403 and not trusted and not moved:
                        moved, self._place = True, None  # the signature of the address has run out
                        continue
                    _judge(answer, self.what)
                    self._check(answer, place, stop)
                    for piece in answer.iter_raw(CHUNK):
                        if len(piece) > stop - place:
                            raise Passing("sent more bytes than were asked for")
                        place += len(piece)
                        patience.renew()
                        moved = False
                        yield piece
                if place < stop:
                    raise Passing("closed the connection early")
            except Passing as error:
                patience.spend(str(error), error.wait)
            except _network_errors() as error:
                patience.spend(describe(error))

    def _check(self, answer: Any, start: int, stop: int) -> None:
        """Refuse any answer but 206 with exactly the range that was asked for."""
        if answer.status_code != 206:
            raise HubError(
                f"the server answers {answer.status_code} to a request for a range", file=self.what,
                mend="download the model with `hf download`, and pass the folder",
            )  # fmt: skip
        wanted, found = f"bytes {start}-{stop - 1}/{self.size}", answer.headers.get("Content-Range", "")
        length = answer.headers.get("Content-Length")
        if found != wanted or (length is not None and length != str(stop - start)):
            raise Passing(f"answered with {found or 'no range'} and {length} bytes where {wanted} was asked for")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError("the server encodes ranges", file=self.what)

    def _locate(self) -> tuple[str, bool]:
        """Follow the Hub's redirects once: where the bytes are, and whether the token may go there."""
        with self._lock:
            if self._place is None:
                self._place = self._follow()
            return self._place

    def _follow(self) -> tuple[str, bool]:
        patience, url = Patience(self.what), self._url
        for _ in range(8):
            while True:
                try:
                    with _stream("HEAD", url, _headers()) as answer:
                        _judge(answer, self.what)
                        location = answer.headers.get("Location")
                        self._check_identity(answer.headers)
                        break
                except Passing as error:
                    patience.spend(str(error), error.wait)
                except _network_errors() as error:
                    patience.spend(describe(error))
            if not 300 <= answer.status_code < 400 or not location:
                return url, True
            url = urljoin(url, location)
            if _origin(url) != _origin(self._url):
                return url, False
        raise HubError("is redirected in a circle", file=self.what)

    def _check_identity(self, headers: Mapping[str, str]) -> None:
        commit = headers.get("X-Repo-Commit", self._commit)
        size = headers.get("X-Linked-Size", str(self.size))
        if commit != self._commit or size != str(self.size):
            raise HubError(
                f"the Hub answers with {size} bytes of commit {printable(commit)[:40]}, not {self.size} of {self._commit}",
                file=self.what,
            )


class Passing(Exception):
    """An answer that another attempt may better."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def _stream(method: str, url: str, headers: dict[str, str], *, follow: bool = False) -> Any:
    """Open a request; the answer's body is read piece by piece."""
    from huggingface_hub import constants, get_session

    return get_session().stream(
        method, url, headers=headers, follow_redirects=follow, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )


def _headers(*, token: bool = True) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it is documented

    found = build_hf_headers(
        token=None if token else False, library_name="checkpoint-surgery", library_version=__version__
    )
    # What is compressed on the way has another length than what was asked for.
    return {**found, "Accept-Encoding": "identity"}


_REFUSALS = {
    "RepoNotFound": (
        "there is no such repository, or it is private", "check the name; `hf auth login` or HF_TOKEN opens private ones",
    ),
    "GatedRepo": ("its owner grants access on request", "ask for it on the model's page, and log in"),
    "RevisionNotFound": ("there is no such revision", None),
    "EntryNotFound": ("there is no such file", None),
}  # fmt: skip
_STATUSES = {
    401: ("the Hub wants a token, or does not accept this one", "log in with `hf auth login`, or correct HF_TOKEN"),
    403: ("the token does not give access", "check what the token may do"),
}


def _judge(answer: Any, what: str) -> None:
    """Let good answers and redirects through; tell what may pass from what will not.

    Raises:
        HubError: it refuses.
    """
    if answer.status_code < 400:
        return
    if answer.status_code in PASSING:
        raise Passing(f"the server answered {answer.status_code}", _wait(answer.headers))
    raise refusal(answer, what)


def refusal(answer: Any, what: str) -> HubError:
    """Say in our own words why the Hub refused: its own may be of any length.

    Args:
        answer: what it answered.
        what: the name of what was asked for.
    """
    code = answer.headers.get("X-Error-Code", "")
    said, mend = _REFUSALS.get(code) or _STATUSES.get(answer.status_code) or ("the server refuses", None)
    request = printable(answer.headers.get("X-Request-Id", "unknown"))[:60]
    return HubError(f"{said} (status {answer.status_code}, request {request})", file=what, mend=mend)


def _wait(headers: Mapping[str, str]) -> float | None:
    """Read how many seconds a server wants to be left alone."""
    asked = headers.get("Retry-After", "")
    reset = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    if asked.isdecimal():
        return float(asked)
    return float(reset[1]) if reset else None


def _network_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # it is documented

    return (httpx.TransportError, httpx.DecodingError, httpx.RemoteProtocolError)


def describe(error: Exception) -> str:
    """Name what happened to a connection; the library's own words may hold an address with a signature."""
    name = type(error).__name__
    known = {
        "ConnectError": "the server cannot be reached", "ConnectTimeout": "the server cannot be reached",
        "ReadTimeout": "the server says nothing more", "RemoteProtocolError": "the server closed the connection",
        "ReadError": "the connection broke",
    }  # fmt: skip
    return known.get(name, f"the connection failed ({name})")


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


@contextmanager
def client_errors(what: str) -> Iterator[None]:
    """Turn what the Hub's client raises into errors of ours: its own carry the request, and with it the token.

    Raises:
        Passing: another attempt may help.
        HubError: the Hub refused.
        IOFailure: the cache cannot be written.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # it is documented

    try:
        yield
    except errors.HfHubHTTPError as error:
        if error.response.status_code in PASSING:
            raise Passing(f"the server answered {error.response.status_code}") from None
        raise refusal(error.response, what) from None
    except (errors.LocalEntryNotFoundError, httpx.TransportError):
        raise Passing("the download failed") from None
    except errors.OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set", file=what) from None
    except errors.XetDownloadError:
        raise HubError(
            "cannot be downloaded by Xet", file=what, mend="try again, or set HF_HUB_DISABLE_XET=1"
        ) from None
    except errors.FileMetadataError:
        raise HubError("the Hub does not describe it", file=what) from None
    except OSError as error:
        raise IOFailure(f"cannot be downloaded: {error.strerror or type(error).__name__}", file=what) from None
