"""Local checkpoints: which files make up the weights of a folder, and where each tensor lies in them.

A reference is a file, or a folder with one weight set: a safetensors file, shards with an index, or the pickled
twins of both. Everything that is ambiguous or incomplete is refused before a byte of data is read. A folder is
trusted no further than itself: files linked from elsewhere are refused, except inside a Hugging Face cache, whose
snapshots consist of links into the same cache's ``blobs/``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, MismatchError, SurgeryError, UnsafeError, UsageError, printable
from surgery.formats import pickle, safetensors
from surgery.names import unwrap
from surgery.sources import folders, references
from surgery.sources.files import FileTensor, OpenFile, StoredFile
from surgery.tensor import BITS, LazyTensor, TensorSpec

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_STEMS = ("adapter_model", "adapter")
SIDE_SUFFIXES = (".json", ".jsonl", ".txt", ".model", ".py", ".jinja", ".spm", ".bpe", ".tiktoken", ".vocab")
SIDE_NAMES = ("LICENSE", "NOTICE", "merges", "vocab")
SIDE_LIMIT = 200_000_000
"""Side files above this size, in bytes, are taken for data, not for configuration."""
OWN_FILES = ("surgery.json", "adapter_config.json")
CONFIG_LIMIT = 50_000_000


@dataclass
class StoredWeights:
    """The tensors of one checkpoint on disk."""

    path: Path
    """What the caller named, resolved: a folder or a file."""
    label: str
    """A short name for messages and records: never an absolute path."""
    tensors: dict[str, LazyTensor]
    shards: dict[str, str]
    """Tensor name → the name of the file that holds it."""
    files: list[StoredFile]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The folder that side files lie in."""
        return self.path if folders.is_folder(self.path) else self.path.parent

    @property
    def revision(self) -> str | None:
        """The commit, where the files are of a repository on the Hub."""
        snapshot = _snapshot_of(self.path)
        return snapshot.name if snapshot and cached_name(snapshot) else None

    def state(self) -> str:
        """Name the files and their states: another text once any of them was changed."""
        return repr([(self.label, file.path.name, *file.state) for file in self.files])

    def check_unchanged(self) -> None:
        """Refuse if any file changed since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()


def pinned(stored: Sequence[StoredWeights]) -> dict[str, str]:
    """Return what a record says of where a checkpoint's files were beside its name: the commit, of one from the Hub."""
    revisions = [weights.revision for weights in stored]
    return {"revision": revisions[0]} if len(revisions) == 1 and revisions[0] else {}


def open_weights(ref: str | os.PathLike[str], *, adapter: bool = False, follow_links: bool = False) -> StoredWeights:
    """Open a checkpoint's weights: headers are read and checked, data is not.

    Args:
        ref: a file or a folder.
        adapter: look for an adapter's weights (``adapter_model.*``) in place of a model's.
        follow_links: accept links that lead out of the folder.

    Raises:
        FormatError: nothing there, a malformed file, a missing shard, or an index that disagrees with its shards.
        MismatchError: two weight sets in one folder.
        UnsafeError: a link or an index entry that leads outside, or a pickle that would run code.
    """
    path = resolve(ref)
    stored = StoredWeights(path, _label(ref, path), {}, {}, [])
    try:
        if folders.is_folder(path):
            _open_folder(stored, adapter=adapter, follow_links=follow_links)
        else:
            add_file(stored, path, path.name)
        if adapter and not stored.tensors:
            raise FormatError("holds no tensors", file=path)
    except SurgeryError as error:
        if references.is_hub_reference(ref) and error.file is not None:  # where it is cached means nothing to anybody
            error.file = error.file.replace(os.fspath(path), os.fspath(ref))
        raise
    return stored


def resolve(ref: str | os.PathLike[str]) -> Path:
    """Turn a reference into an existing absolute path.

    Raises:
        UsageError: an empty reference, a scheme that this version does not read, or nothing there.
        HubError: the Hub does not give the repository that is named.
    """
    text = os.fspath(ref)
    if not text or "\0" in text:
        raise UsageError("the path is empty" if not text else "the path holds a NUL")
    if references.is_hub_reference(text):
        from surgery.sources import hub

        return _or_its_delta(hub.locate(references.parse_reference(text)))
    scheme = re.match(r"([a-z0-9]+)://", text)
    if scheme:
        raise UsageError(f"{scheme[1]}:// references are not read", file=text, mend="download it and pass the folder")
    path = Path(os.path.expanduser(text))
    if not os.path.lexists(path):
        hint = f"on the Hub it is hf://{text}" if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else None
        raise UsageError("no such file or folder", file=text, mend=hint)
    if path.is_dir():
        return _or_its_delta(Path(os.path.realpath(path)))
    # A file keeps the name it was called by: in a Hugging Face cache it is a link to a blob, whose name says nothing.
    return Path(os.path.realpath(path.parent)) / path.name


DELTA_SUFFIX = ".delta"


def _or_its_delta(path: Path) -> Path:
    """Return the exact delta that a folder holds in place of weights, as a repository of one does; else ``path``."""
    if not folders.is_folder(path):
        return path
    names = [name for name, is_folder in folders.members(path) if not is_folder]
    deltas = [name for name in names if name.endswith(DELTA_SUFFIX)]
    weights = any(name.endswith((".safetensors", *PICKLE_SUFFIXES)) for name in names)
    return path / deltas[0] if len(deltas) == 1 and not weights else path


def stem_of(source: str | os.PathLike[str]) -> str:
    """Name a checkpoint by its folder, its repository in a Hugging Face cache, or its file without the ending."""
    if references.is_hub_reference(source):
        named = references.parse_reference(source)
        return (named.path or named.repo).rpartition("/")[2].removesuffix(".safetensors")
    path = Path(os.path.abspath(os.path.expanduser(source)))
    cached = cached_name(Path(os.path.realpath(path)))
    return cached.rpartition("/")[2] if cached else path.name.removesuffix(".safetensors")


def _label(ref: str | os.PathLike[str], path: Path) -> str:
    """Name a checkpoint for people: ``org/name`` inside a Hugging Face cache, else the last part of what was typed."""
    named = references.parse_reference(ref).repo if references.is_hub_reference(ref) else cached_name(path)
    return printable(named or os.path.basename(os.path.abspath(os.path.expanduser(ref))))


def cached_name(path: Path) -> str | None:
    """Name the repository of a snapshot in a Hugging Face cache, ``org/name``; ``None`` for any other folder.

    >>> cached_name(Path("/cache/models--org--name/snapshots/0123abc"))
    'org/name'
    """
    found = re.fullmatch(r"models--(.+)", path.parent.parent.name) if path.parent.name == "snapshots" else None
    return found[1].replace("--", "/") if found else None


def _snapshot_of(path: Path) -> Path | None:
    """Find the snapshot of a Hugging Face cache that a file or folder lies in, or is."""
    return next((place for place in (path, *path.parents) if place.parent.name == "snapshots"), None)


def _open_folder(stored: StoredWeights, *, adapter: bool, follow_links: bool) -> None:
    folder = stored.path
    members = [name for name, _ in folders.members(folder) if not name.startswith(".")]
    index, singles = _weight_set(folder, members, adapter=adapter, notes=stored.notes)
    if index is None:
        for name in singles:
            add_file(stored, _inside(folder, name, follow_links), name)
        return
    weight_map = _read_index(_inside(folder, index, follow_links))
    shards = sorted(set(weight_map.values()))
    twins = [name for name in singles if name not in shards and name.partition(".")[0] == index.partition(".")[0]]
    if twins:
        raise MismatchError(
            f"holds two weight sets, {twins[0]} and {index}", file=folder, mend="remove one, or pass the file"
        )
    missing = [shard for shard in shards if not folders.exists(folder / shard)]
    if missing:
        raise FormatError(
            f"{len(missing)} of its {len(shards)} shards are not there: {', '.join(missing[:5])}",
            file=folder / index,
            mend="fetch them, the download is incomplete",
        )
    for shard in shards:
        add_file(stored, _inside(folder, shard, follow_links), shard)
    _check_index(folder / index, weight_map, stored.shards)


def _weight_set(folder: Path, members: list[str], *, adapter: bool, notes: list[str]) -> tuple[str | None, list[str]]:
    """Choose the one weight set of a folder: an index and the files that are no numbered shards, or files without one."""

    def wanted(name: str) -> bool:
        return name.startswith(ADAPTER_STEMS) == adapter and not name.startswith(
            ("optimizer", "training_args", "rng_state", "scheduler")
        )

    for suffixes in ((".safetensors",), PICKLE_SUFFIXES):
        files = [name for name in members if name.endswith(suffixes) and wanted(name)]
        indexes = [
            name for name in members if name.endswith(".index.json") and wanted(name)
            and name.removesuffix(".index.json").endswith(suffixes)
        ]  # fmt: skip
        if not files and not indexes:
            continue
        others = [name for name in members if name.endswith(PICKLE_SUFFIXES) and wanted(name)]
        if suffixes == (".safetensors",) and others:
            notes.append(f"{others[0]} and other pickled weights were ignored in favour of safetensors")
        return _one_set(folder, files, indexes)
    kind = "adapter" if adapter else "model"
    found = f"it holds {', '.join(members[:6])}" if members else "the folder is empty"
    mend = "an adapter is passed after the base" if not adapter and "adapter_config.json" in members else None
    if commits := sorted(path.name for path in folder.glob("snapshots/*") if path.is_dir()):
        mend = f"pass a snapshot in it: {', '.join(f'snapshots/{commit}' for commit in commits[:3])}"
    raise FormatError(f"holds no {kind} weights (*.safetensors, *.bin); {found}", file=folder, mend=mend)


def _one_set(folder: Path, files: list[str], indexes: list[str]) -> tuple[str | None, list[str]]:
    numbered = [name for name in files if re.search(r"-\d{5}-of-\d{5}\.", name)]
    singles = [name for name in files if name not in numbered]
    if len(indexes) > 1:
        raise MismatchError(f"holds several weight sets: {', '.join(indexes)}", file=folder, mend="pass one file")
    if indexes:
        return indexes[0], singles
    if numbered and not singles:
        _check_numbering(folder, numbered)
        return None, numbered
    if len(singles) == 1 and not numbered:
        return None, singles
    preferred = [name for name in singles if name.partition(".")[0] in ("model", "pytorch_model", "adapter_model")]
    if len(preferred) == 1 and not numbered:
        return None, preferred
    raise MismatchError(
        f"holds several weight files and no index: {', '.join(files[:5])}", file=folder, mend="pass one file"
    )


def _check_numbering(folder: Path, names: list[str]) -> None:
    parts = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\..+", name) for name in names]
    found = {(part[1], int(part[3])) for part in parts if part}
    numbers = sorted(int(part[2]) for part in parts if part)
    if len(found) != 1 or numbers != list(range(1, next(iter(found))[1] + 1)):
        raise FormatError("its shards are not complete and there is no index", file=folder, mend="fetch them all again")


def _inside(folder: Path, name: str, follow_links: bool) -> Path:
    """Resolve a member of ``folder`` and refuse it where it leads outside."""
    if folders.is_absent(folder / name):
        return folder / name
    real = Path(os.path.realpath(folder / name))
    homes = [folder]
    if snapshot := _snapshot_of(folder):
        repo = snapshot.parent.parent
        homes += [repo / "blobs", repo.parent / "blobs"]
    if not follow_links and not any(real.is_relative_to(home) for home in homes):
        raise UnsafeError(
            "is a link that leads out of its folder", file=folder / name, mend="put the file itself there"
        )
    return real


def _read_index(path: Path) -> dict[str, str]:
    try:
        return safetensors.parse_index(read_small(path))
    except SurgeryError as error:
        raise error.at(file=path) from None


def _check_index(index: Path, weight_map: Mapping[str, str], shards: Mapping[str, str]) -> None:
    for name, shard in weight_map.items():
        if shards.get(name) != shard:
            where = f"it is in {shards[name]}" if name in shards else "no shard holds it"
            raise FormatError(f"the index says it is in {shard}, {where}", file=index, tensor=name)
    extra = shards.keys() - weight_map.keys()
    if extra:
        name = min(extra)
        raise FormatError(f"is in {shards[name]} but not in the index", file=index, tensor=name)


def add_file(stored: StoredWeights, path: Path, shard: str) -> None:
    """Open one weight file and add its tensors under the shard name it goes by."""
    file = folders.open_file(path)
    stored.files.append(file)
    try:
        pickled = shard.endswith(PICKLE_SUFFIXES)
        found = _pickled(file, stored.notes) if pickled else _safetensors(file, stored.metadata)
    except SurgeryError as error:
        raise error.at(file=stored.folder / shard) from None
    for name, tensor in found.items():
        if name in stored.tensors:
            raise FormatError(f"is in {stored.shards[name]} and again in {shard}", file=stored.path, tensor=name)
        stored.tensors[name] = tensor
        stored.shards[name] = shard


def _safetensors(file: StoredFile, metadata: dict[str, str]) -> dict[str, LazyTensor]:
    length = safetensors.header_length(file.read(0, min(8, file.size)), file.size)
    header = safetensors.parse_header(file.read(8, length), file.size)
    metadata.update(header.metadata)
    file.learn(header.offsets.values())
    with safetensors.without_collector():
        return {name: FileTensor(spec, file, header.offsets[name]) for name, spec in header.specs.items()}


def _pickled(file: StoredFile, notes: list[str]) -> dict[str, LazyTensor]:
    tree = pickle.read_tree(file.read, file.size)
    found, more = unwrap(tree, lambda value: isinstance(value, pickle.StoredTensor))
    notes += more
    if not found:
        raise FormatError("holds no tensors")
    file.learn(value.storage[0] for value in found.values())
    return {name: _pickled_tensor(name, value, file) for name, value in found.items()}


def _pickled_tensor(name: str, value: pickle.StoredTensor, file: StoredFile) -> LazyTensor:
    try:
        safetensors.check_name(name)
    except SurgeryError as error:
        raise error.at(tensor=name) from None
    spec = TensorSpec(name, value.dtype, value.shape)
    if value.contiguous:
        return FileTensor(spec, file, value.offset)
    return StridedTensor(spec, file, value)


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """A transposed or expanded view of a pickled storage: read whole, and only then put in order."""

    spec: TensorSpec
    file: StoredFile
    stored: pickle.StoredTensor
    scratch: int = 0

    @property
    def unit(self) -> int:
        """All of it at once: its bytes are scattered over the storage."""
        return max(self.spec.numel, 1)

    @property
    def resident(self) -> int:
        """The storage beside the result."""
        low, high = self.stored.storage
        return high - low + self.spec.numel * BITS[self.spec.dtype] // 8

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Read the storage and gather the view's elements."""
        low, high = self.stored.storage
        ordered = pickle.gather(self.stored, self.file.read(low, high - low))
        size = self.spec.itemsize
        out[:] = memoryview(ordered)[start * size : stop * size]


def read_small(path: Path) -> bytes:
    """Read a configuration file whole, up to :data:`CONFIG_LIMIT` bytes."""
    if folders.size(path) > CONFIG_LIMIT:
        raise FormatError(f"{folders.size(path):,} bytes are too many for a configuration file", file=path)
    with OpenFile(folders.here(path)) as file:
        return file.read(0, file.size)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any] | None:
    """Read a folder's JSON configuration; ``None`` where there is none.

    Raises:
        FormatError: it is not a JSON object.
        UnsafeError: it is a link that leads out of the folder.
    """
    data = read_config_bytes(folder, name)
    if data is None:
        return None
    try:
        return safetensors.strict_object(data)
    except SurgeryError as error:
        raise error.at(file=folder / name) from None


def read_config_bytes(folder: Path, name: str) -> bytes | None:
    """Read a small file of a folder; ``None`` where there is none.

    Raises:
        UnsafeError: it is a link that leads out of the folder.
    """
    if not folders.exists(folder / name):
        return None
    try:
        return read_small(_inside(folder, name, follow_links=False))
    except SurgeryError as error:
        raise error.at(file=folder / name) from None


def side_files(folder: Path) -> dict[str, Path]:
    """List the files that travel with a model's weights: configuration, tokenizer, custom code, pooling modules.

    Never weights of the model itself, model cards, adapters' files or our own records. Numbered module folders of
    sentence-transformers (``1_Pooling/``) travel whole.

    Returns:
        Path relative to ``folder`` → the real file, or where :func:`surgery.sources.folders.here` puts it.
    """
    found: dict[str, Path] = {}
    for name, is_folder in folders.members(folder):
        if is_folder and re.fullmatch(r"\d+_\w+", name):
            inner = [f"{name}/{one}" for one, deeper in folders.members(folder / name) if not deeper]
            found.update({one: _inside(folder, one, follow_links=False) for one in inner})
        elif not is_folder and _is_side_file(name) and folders.size(folder / name) <= SIDE_LIMIT:
            found[name] = _inside(folder, name, follow_links=False)
    return found


def _is_side_file(name: str) -> bool:
    if name in OWN_FILES or name.startswith(".") or name.endswith(".index.json"):
        return False
    return name.endswith(SIDE_SUFFIXES) or name.startswith(SIDE_NAMES)
