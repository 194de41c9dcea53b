"""Writing to the Hugging Face Hub: its client, a deadline, and errors in our own words.

Nothing here keeps a token: the client finds it where huggingface_hub does (``HF_TOKEN``, or the file that
``hf auth login`` wrote). The library's errors hold the request, and with it the token, so none of them is passed on or
chained: what is raised is a :class:`HubError` of plain words.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from surgery import __version__
from surgery.errors import HubError, SurgeryError, UsageError
from surgery.sources import http
from surgery.sources.references import SCHEME, is_repository

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
_PRIVATE = re.compile(r"hf_\w{8,}|\w+://\S+")
_LIMIT = 200
"""Characters of a server's own words that are passed on."""


def client() -> HfApi:
    """Return the Hub's client.

    Raises:
        HubError: offline mode.
        UnsafeError: an endpoint that a token must not be sent to.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if http.is_offline():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed", mend="unset it")
    disable_progress_bars()  # surgery shows its own, and says itself when there is nothing to commit
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return HfApi(endpoint=http.endpoint(), library_name="checkpoint-surgery", library_version=__version__)


def check_name(text: str) -> str:
    """Return a repository's id, ``org/name``.

    Raises:
        UsageError: it is none.

    >>> check_name("hf://org/name")
    'org/name'
    """
    name = text.removeprefix(SCHEME)
    if "/" not in name or len(name) > 96 or not is_repository(name):
        raise UsageError(
            f"{text!r} is no repository id like org/name", mend="letters, digits, '-', '_' and '.', up to 96"
        )
    return name


class Deadline:
    """A time by which everything must be done. A call that hangs is left behind, not waited for."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def run(self, call: Callable[[], T]) -> T:
        """Return what ``call`` returns, or raise what it raises.

        Raises:
            HubError: the time is over.
        """
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answer.put((True, call()))
            except BaseException as error:  # noqa: BLE001  it is raised again in the thread that waits
                answer.put((False, error))

        # A daemon: storage behind the Hub can retry for minutes in code that nothing interrupts.
        threading.Thread(target=work, name="surgery-hub", daemon=True).start()
        try:
            done, value = answer.get(timeout=max(self._end - time.monotonic(), 0.0))
        except queue.Empty:
            what = f"did not answer within {self.seconds:.0f} s"
            raise HubError(
                what, mend="the same command goes on where this one stopped; --timeout waits longer"
            ) from None
        if not done:
            raise value
        found: T = value
        return found


@contextmanager
def in_our_words(name: str, doing: str) -> Iterator[None]:
    """Turn whatever the client raises into one line about the repository ``name``.

    Args:
        name: the repository.
        doing: what was tried, as in ``"push to it"``.
    """
    try:
        yield
    except SurgeryError as error:
        raise error.at(file=name) from None
    except client_errors() as error:
        raise _translate(error, name, doing) from None


def client_errors() -> tuple[type[Exception], ...]:
    """Return what a call of the client raises: its own errors, the transport's, Xet's, the system's, and a deadline's."""
    import huggingface_hub.utils as library

    httpx: Any = library.httpx  # type: ignore[attr-defined]  # httpx2 from version 2 on
    return (HubError, OSError, ValueError, RuntimeError, httpx.HTTPError, httpx.InvalidURL)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error of the client stands for."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _translate(error: Exception, name: str, doing: str) -> SurgeryError:
    status = status_of(error)
    if status is None:
        return HubError(f"could not be reached to {doing}: {_said(error)}", file=name, mend="check the network")
    if status in (409, 412):
        what = "somebody else pushed meanwhile, so nothing was committed"
        return HubError(what, file=name, mend="look at it, and push again")
    if status == 400:
        return HubError(f"the Hub refused to {doing}: {_said(error)}", file=name)
    if status == 403:
        return HubError(f"this token may not {doing}", file=name, mend="use one with write access")
    if status == 429:
        return HubError("the Hub asks to wait: too many requests", file=name, mend="try again in a few minutes")
    if status >= 500:
        return HubError(f"the Hub failed to {doing} (status {status})", file=name, mend="try again later")
    return http.refusal(getattr(error, "response", None), name)


def _said(error: Exception) -> str:
    """Quote what the server or the client said, without addresses, which may be signed, and tokens."""
    words = getattr(error, "server_message", None) or str(error)
    first = next((line.strip() for line in words.splitlines() if line.strip()), "")
    known = http.describe(error)
    return known if not first or "failed (" not in known else _PRIVATE.sub("…", first)[:_LIMIT]
