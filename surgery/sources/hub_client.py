"""Talking to the Hugging Face Hub: one client, one deadline, and errors in our own words.

Nothing here keeps a token: the client finds it where huggingface_hub does (``HF_TOKEN``, or the file that
``hf auth login`` wrote). The library's errors hold the request, and with it the token, so none of them is passed on or
chained: what is raised is a :class:`HubError` of plain words.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from surgery import __version__
from surgery.errors import HubError, SurgeryError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TOKEN = re.compile(r"hf_\w{8,}")
_LIMIT = 300
"""Characters of a server's own words that are passed on."""


def client() -> HfApi:
    """Return the Hub's client.

    Raises:
        HubError: offline mode, or an endpoint that a token must not be sent to.
    """
    import logging

    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so the Hub cannot be reached", mend="unset it")
    where = urlsplit(constants.ENDPOINT)
    if where.scheme != "https" and where.hostname not in _LOOPBACK:
        raise HubError(f"HF_ENDPOINT is {constants.ENDPOINT}: a token is sent over https only", mend="use https://")
    disable_progress_bars()  # surgery shows its own, and says itself when there is nothing to commit
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return HfApi(library_name="surgery", library_version=__version__)


def check_name(text: str) -> str:
    """Return a repository's id, ``org/name``.

    Raises:
        UsageError: it is none.

    >>> check_name("hf://org/name")
    'org/name'
    """
    name = text.removeprefix("hf://").removeprefix("https://huggingface.co/")
    ok = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", name, re.ASCII) and not name.endswith(
        (".git", "-", ".")
    )
    if not ok or "--" in name or ".." in name or len(name) > 96:
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
        raise _translate(error, doing).at(file=name) from None


def client_errors() -> tuple[type[Exception], ...]:
    """Return what the client raises: errors of its own, of its transport, of Xet, of the system."""
    import huggingface_hub.utils as library

    httpx: Any = library.httpx  # type: ignore[attr-defined]  # httpx2 from version 2 on
    return (OSError, ValueError, RuntimeError, httpx.HTTPError, httpx.InvalidURL)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error of the client stands for."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _translate(error: Exception, doing: str) -> SurgeryError:
    from huggingface_hub import errors

    status, said = status_of(error), _words(error)
    if isinstance(error, errors.HFValidationError):
        return UsageError("is no repository id like org/name")
    if isinstance(error, errors.GatedRepoError):
        return HubError("is gated, and this token has no access", mend="ask for access on its page")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError("has no such revision", mend="name a branch, a tag or a commit of it")
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"lacks a file that is needed to {doing}{said}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError("does not exist, or this token may not see it", mend="check the name; hf auth login")
    if isinstance(error, errors.BadRequestError) or status == 400:
        return HubError(f"the Hub refused the request to {doing}{said}")
    if status == 401:
        return HubError("the Hub does not know this token", mend="hf auth login, or set HF_TOKEN")
    if status == 403:
        return HubError(f"this token may not {doing}", mend="use one with write access")
    if status in (409, 412):
        return HubError("somebody else pushed meanwhile, so nothing was committed", mend="look at it, and push again")
    if status == 429:
        return HubError("the Hub asks to wait: too many requests", mend="try again in a few minutes")
    if status is not None:
        return HubError(f"the Hub answered {status} to the request to {doing}{said}", mend="try again later")
    if isinstance(error, ValueError):
        return HubError(f"the Hub's client refused to {doing}{said}")
    return HubError(f"could not be reached to {doing}{said}", mend=f"check the network{_endpoint()}")


def _words(error: Exception) -> str:
    """Quote what the server or client said: its first line, without anything that looks like a token."""
    said = getattr(error, "server_message", None) or str(error)
    first = next((line.strip() for line in said.splitlines() if line.strip()), "")
    return f": {_TOKEN.sub('<token>', first)[:_LIMIT]}" if first else ""


def _endpoint() -> str:
    return " and HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else ""
