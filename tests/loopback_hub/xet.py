"""Xet: the client's own ``local://`` store does the work; the Hub only hands out its address and looks into it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from tests.loopback_hub.wire import Reply, of_json

if TYPE_CHECKING:
    from tests.loopback_hub.lfs import Store
    from tests.loopback_hub.repos import File

_BOOKEND = b"\xff" * 32
_HEADER, _ENTRY = 48, 48
_HAS_VERIFICATION, _HAS_METADATA = 1 << 31, 1 << 30
_EXPIRES = 4_000_000_000


class Xet:
    """A content-addressed store in a folder, read and written by ``hf_xet`` itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def token(self) -> Reply:
        """Answer with the store's address: in the body for ``hf_xet``, in headers for ``huggingface_hub``."""
        url = f"local://{self.folder}"
        document = {"accessToken": "xet", "exp": _EXPIRES, "casUrl": url}
        return of_json(document, X_Xet_Cas_Url=url, X_Xet_Access_Token="xet", X_Xet_Token_Expiration=str(_EXPIRES))

    def files(self) -> dict[str, tuple[str, int]]:
        """List the files in the store: SHA-256 → Xet's own hash, and the size."""
        found = {}
        for shard in sorted(self.folder.rglob("*.mdb")):
            found.update(_files_of(shard.read_bytes()))
        return found

    def nbytes(self) -> int:
        """Size of the blocks of content in the store: what uploads have added."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".mdb")

    def hash_of(self, sha256: str) -> str | None:
        """Return Xet's hash of a file; ``None`` where it is not in the store."""
        found = self.files().get(sha256)
        return None if found is None else found[0]

    def restore(self, file: File, store: Store) -> None:
        """Put a file that came by Xet where the CDN can serve it, as the Hub's bridge does."""
        if file.sha256 is None or file.xet_hash is None or file.sha256 in store.objects:
            return
        import hf_xet

        group = hf_xet.XetSession().new_download_stream_group(endpoint=f"local://{self.folder}")
        pieces = group.download_stream(hf_xet.XetFileInfo(file.xet_hash, file.size))
        assert store.add(b"".join(map(bytes, pieces))) == file.sha256
        group.finish()


def _files_of(shard: bytes) -> dict[str, tuple[str, int]]:
    """Read the file section of a shard of metadata."""
    found, position = {}, _HEADER
    while shard[position : position + 32] not in (_BOOKEND, b""):
        name = shard[position : position + 32]
        flags, count = struct.unpack_from("<II", shard, position + 32)
        position += _HEADER
        size = sum(struct.unpack_from("<I", shard, position + number * _ENTRY + 36)[0] for number in range(count))
        position += count * _ENTRY * (2 if flags & _HAS_VERIFICATION else 1)
        if flags & _HAS_METADATA:
            found[_hex(shard[position : position + 32])] = (_hex(name), size)
            position += _HEADER
    return found


def _hex(digest: bytes) -> str:
    """Write a hash as Xet does: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
