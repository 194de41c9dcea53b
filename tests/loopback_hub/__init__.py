"""A Hugging Face Hub on this machine, for tests: the unmodified client talks to it over sockets.

It speaks the part of the Hub's protocol that models need: repositories, commits with a parent check, LFS (basic and
multipart), trees, and ``resolve`` with a redirect to a second port, which stands for the CDN: requests there must
carry no token. Every request is logged with the bytes that travelled, and faults can be put in the way of any of them.

The fixture ``loopback`` of ``tests/conftest.py`` gives a running one that the client of this process uses.
"""

from tests.loopback_hub.faults import Fault, Seen
from tests.loopback_hub.repos import Commit, File, Repo
from tests.loopback_hub.server import LoopbackHub

__all__ = ["Commit", "Fault", "File", "LoopbackHub", "Repo", "Seen"]
