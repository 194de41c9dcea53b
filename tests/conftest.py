"""Fixtures that several tests share."""

from __future__ import annotations

import os

# No test asks the real Hub; its client reads this when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tests.loopback_hub import LoopbackHub


@pytest.fixture
def loopback(tmp_path_factory, monkeypatch):
    """Run a loopback Hub that the Hub's client in this process uses, as user ``t``.

    The client reads its environment when it is imported, so its constants are set as well. ``loopback.environment`` is
    what a subprocess needs. Its home and cache are empty folders of their own; timeouts are three seconds here, and the
    usual ones in a subprocess.
    """
    from huggingface_hub import close_session, constants

    from surgery.sources import http
    from surgery.sources import hub as reading

    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub(folder) as hub:
        home = folder / "home"
        hub.home, hub.cache = home, home / "hub"
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(hub.cache),
            "HF_TOKEN": hub.token,
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        for name in ("HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(hub.cache),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DOWNLOAD_TIMEOUT": 3,
            "HF_HUB_ETAG_TIMEOUT": 3,
            "DEFAULT_REQUEST_TIMEOUT": 3,
        }.items():
            assert hasattr(constants, name), name
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(http, "PAUSE", 0.01)
        monkeypatch.setattr(reading, "_STREAMED", False)
        hub.environment = dict(os.environ)
        close_session()
        reading.forget()
        yield hub
        close_session()


@pytest.fixture
def loopback_xet(loopback, monkeypatch):
    """Run a loopback Hub whose large files travel by Xet, through the client's own local store."""
    from huggingface_hub import constants
    from huggingface_hub.utils._xet import abort_xet_session

    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    monkeypatch.setenv("HF_XET_CACHE", str(loopback.home / "xet"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    loopback.environment = dict(os.environ)
    abort_xet_session()
    yield loopback
    abort_xet_session()
