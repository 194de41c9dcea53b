"""Hostile and mismatched inputs for ``test_hostile.py``, each with the exit code and the words its error must have.

A case builds its files in an empty folder and returns the commands that must all be refused in the same way. The
tables below follow one order: containers, indexes and links, pickles, names and shapes, numbers, quantised weights,
adapters, records, outputs, command lines; then what looks hostile and must be accepted.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import pickle
import shutil
import struct
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from surgery import provenance
from surgery.cli.main import main

Commands = list[list[str]]
Word = str | tuple[str, ...]
"""What the error line must hold: this text, or one of these."""

USAGE, FORMAT, MISMATCH, UNSAFE, NUMERIC, OUTPUT, IO, CHANGED = 2, 3, 4, 5, 6, 7, 8, 10


@dataclass(frozen=True)
class Case:
    """One hostile input: ``make`` builds it in the given folder and returns the commands to refuse."""

    id: str
    code: int
    says: tuple[Word, ...]
    make: Callable[[Path], Commands]


@dataclass(frozen=True)
class Twin:
    """An input that looks hostile and is not: every command must succeed, and ``check`` look at what it made."""

    id: str
    make: Callable[[Path], Commands]
    check: Callable[[Path, Result], None]


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


CASES: list[Case] = []
TWINS: list[Twin] = []


def refused(
    id: str, code: int, *says: Word
) -> Callable[[Callable[[Path], Commands]], Callable[[Path], Commands]]:  # fmt: skip
    """Register the decorated builder as a case."""

    def register(make: Callable[[Path], Commands]) -> Callable[[Path], Commands]:
        CASES.append(Case(id, code, says, make))
        return make

    return register


def run(*arguments: str) -> Result:
    """Run the command line in this process, with streams as strict as a terminal's."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=how) for how in ("strict", "backslashreplace"))
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "surrogateescape"))  # a path may be no UTF-8
    return Result(0 if code is None else code, *texts)


def done(*arguments: str) -> None:
    """Run a command that a case needs first."""
    result = run(*arguments)
    assert result.code == 0, result.err


# --- files


def pack(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Write a safetensors file by hand from a header, as an object, text or bytes, and data."""
    raw = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else None
    raw = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def unpack(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Read a safetensors file by hand: name → dtype, shape and bytes, of any dtype."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[8 + length :][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


LAYERS = 2
Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip


@functools.cache
def _weights() -> dict[str, torch.Tensor]:
    shapes = {EMBED: (64, 32), NORM: (32,), "lm_head.weight": (64, 32)}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{kind}_proj.weight": (32, 32) for kind in "qv"}
        shapes |= {f"{stem}.mlp.up_proj.weight": (48, 32), f"{stem}.mlp.down_proj.weight": (32, 48)}
        shapes |= {f"{stem}.input_layernorm.weight": (32,)}
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=draw) * 0.05 for name, shape in shapes.items()}


def base_weights() -> dict[str, torch.Tensor]:
    """Return a tiny Llama's weights."""
    return dict(_weights())


def tuned_weights() -> dict[str, torch.Tensor]:
    """Return the same weights with a change of rank 4 in every linear layer."""
    draw = torch.Generator().manual_seed(2)
    tuned = base_weights()
    for name, value in tuned.items():
        if "_proj" in name:
            left, right = (torch.randn(size, 4, generator=draw) for size in value.shape)
            tuned[name] = value + 0.01 * left @ right.T
    return tuned


def model(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, config: dict[str, Any] | None = None, **more: Any
) -> Path:  # fmt: skip
    """Write a model folder; ``more`` are changes of single tensors by name, ``None`` to take one away."""
    folder.mkdir(parents=True)
    changed = {**(base_weights() if tensors is None else tensors), **more.get("changes", {})}
    kept = {name: value.contiguous() for name, value in changed.items() if value is not None}
    (folder / "model.safetensors").write_bytes(save_bytes(kept, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    return folder


def pair(here: Path, **changes: torch.Tensor | None) -> None:
    """Write ``base-model``, and ``tuned-model`` with changes."""
    model(here / "base-model")
    model(here / "tuned-model", tuned_weights(), changes=changes)


def lora_tensors(rank: int = 4) -> dict[str, torch.Tensor]:
    """Return a LoRA of q_proj and v_proj in both layers, under PEFT's keys."""
    draw = torch.Generator().manual_seed(3)
    found = {}
    for layer in range(LAYERS):
        for kind in "qv":
            module = f"base_model.model.model.layers.{layer}.self_attn.{kind}_proj"
            found[f"{module}.lora_A.weight"] = torch.randn((rank, 32), generator=draw)
            found[f"{module}.lora_B.weight"] = torch.randn((32, rank), generator=draw) * 0.01
    return found


LORA_CONFIG = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none",
    "base_model_name_or_path": "base-model", "fan_in_fan_out": False, "modules_to_save": None,
}  # fmt: skip
A, B = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")


def adapter(folder: Path, *, config: Any = None, tensors: dict[str, Any] | None = None) -> Path:
    """Write an adapter folder with changes of configuration and tensors; ``...`` or ``None`` takes one away."""
    folder.mkdir(parents=True)
    changed = {**lora_tensors(), **(tensors or {})}
    kept = {name: value.contiguous() for name, value in changed.items() if value is not None}
    (folder / "adapter_model.safetensors").write_bytes(save_bytes(kept, {"format": "pt"}))
    document = {key: value for key, value in {**LORA_CONFIG, **(config or {})}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


# --- the container

NAME, OTHER = "blocks.7.q.weight", "blocks.8.k.weight"
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def one(**changes: Any) -> dict[str, Any]:
    """Compose the header of a file with one 2×2 tensor; ``...`` takes a field away."""
    return {NAME: {key: value for key, value in {**ENTRY, **changes}.items() if value is not ...}}


def two(first: tuple[int, int], second: tuple[int, int]) -> dict[str, Any]:
    """Compose the header of a file with two 2×2 tensors at these offsets."""
    return {NAME: {**ENTRY, "data_offsets": list(first)}, OTHER: {**ENTRY, "data_offsets": list(second)}}


def text(entry: str, name: str = f'"{NAME}"') -> str:
    """Compose a header of one tensor as text, for what ``json.dumps`` would not write."""
    return f"{{{name}:{{{entry}}}}}"


_FIELDS = '"dtype":"F32","shape":[2,2],"data_offsets":[0,16]'
FOUR = struct.pack("<4f", 1, 2, 3, 4)
GOOD = pack(one(), FOUR)


def _zip_of_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({NAME: torch.ones(2, 2)}, buffer)
    return buffer.getvalue()


CONTAINERS: dict[str, tuple[bytes | Callable[[], bytes], int, tuple[Word, ...]]] = {
    "empty file": (b"", FORMAT, ()),
    "seven bytes": (b"\x10\0\0\0\0\0\0", FORMAT, ()),
    "data truncated by a byte": (GOOD[:-1], FORMAT, (NAME,)),
    "data missing": (GOOD[:-16], FORMAT, (NAME,)),
    "header truncated": (GOOD[:40], FORMAT, ()),
    "trailing bytes": (GOOD + b"PK\x05\x06", FORMAT, ("4 bytes",)),
    "header length 2^64-1": (pack("{}", length=2**64 - 1), FORMAT, ()),
    "header length 2^63": (pack("{}", length=2**63), FORMAT, ()),
    "header length just above the limit": (pack("{}", length=100_000_001), FORMAT, ()),
    "header length 99 MB in a tiny file": (pack("{}", length=99_000_000), FORMAT, ()),
    "header length 0": (pack("", FOUR), FORMAT, ()),
    "overlapping tensors": (pack(two((0, 16), (8, 24)), bytes(24)), FORMAT, (NAME, OTHER)),
    "two names for one range": (pack(two((0, 16), (0, 16)), FOUR), FORMAT, (NAME, OTHER)),
    "gap between tensors": (pack(two((0, 16), (20, 36)), bytes(36)), FORMAT, (OTHER,)),
    "gap before the first tensor": (pack(one(data_offsets=[4, 20]), bytes(20)), FORMAT, (NAME,)),
    "negative offset": (pack(one(data_offsets=[-16, 0]), FOUR), FORMAT, (NAME,)),
    "negative dimension": (pack(one(shape=[-2, -2]), FOUR), FORMAT, (NAME,)),
    "minus zero as an offset": (pack(text('"dtype":"F32","shape":[2,2],"data_offsets":[-0,16]'), FOUR), FORMAT, (NAME,)),
    "float dimension": (pack(one(shape=[2.0, 2]), FOUR), FORMAT, (NAME,)),
    "float offset": (pack(one(data_offsets=[0, 16.0]), FOUR), FORMAT, (NAME,)),
    "exponent as a dimension": (pack(text('"dtype":"F32","shape":[4e0],"data_offsets":[0,16]'), FOUR), FORMAT, (NAME,)),
    "NaN as an offset": (pack(text('"dtype":"F32","shape":[2,2],"data_offsets":[NaN,16]'), FOUR), FORMAT, (NAME,)),
    "number of 5000 digits": (pack(text(f'"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,16]'), FOUR), FORMAT,
                              (NAME,)),
    "true as a dimension": (pack(one(shape=[True, 4]), FOUR), FORMAT, (NAME,)),
    "false as an offset": (pack(one(data_offsets=[False, 16]), FOUR), FORMAT, (NAME,)),
    "string as a shape": (pack(one(shape="22"), FOUR), FORMAT, (NAME,)),
    "three offsets": (pack(one(data_offsets=[0, 8, 16]), FOUR), FORMAT, (NAME,)),
    "offsets that end before they start": (pack(one(data_offsets=[16, 0]), FOUR), FORMAT, (NAME,)),
    "offsets beyond the file": (pack(one(shape=[2, 200], data_offsets=[0, 1600]), FOUR), FORMAT, (NAME,)),
    "shape smaller than its bytes": (pack(one(shape=[2, 1]), FOUR), FORMAT, (NAME, "8", "16")),
    "shape larger than its bytes": (pack(one(shape=[2, 3]), FOUR), FORMAT, (NAME, "24", "16")),
    "shape that overflows": (pack(one(shape=[2**33, 2**33]), FOUR), FORMAT, (NAME,)),
    "zero size with a dimension of 2^64-1": (pack(one(shape=[0, 2**64 - 1], data_offsets=[0, 0])), FORMAT, (NAME,)),
    "zero size with dimensions that overflow": (pack(one(shape=[2**62, 0, 2**62], data_offsets=[0, 0])), FORMAT, (NAME,)),
    "one name twice, other offsets": (pack(f'{{"{NAME}":{{{_FIELDS}}},"{NAME}":{{{_FIELDS}}}}}', FOUR), FORMAT,
                                      (NAME, "twice")),
    "one name twice, same offsets, other dtype": (
        pack(f'{{"{NAME}":{{{_FIELDS}}},"{NAME}":{{{_FIELDS.replace("F32", "I32")}}}}}', FOUR), FORMAT, (NAME, "twice")),
    "one field twice": (pack(text(_FIELDS + ',"dtype":"I32"'), FOUR), FORMAT, (NAME, "dtype")),
    "metadata twice": (pack(f'{{"__metadata__":{{}},"__metadata__":{{}},"{NAME}":{{{_FIELDS}}}}}', FOUR), FORMAT,
                       ("__metadata__",)),
    "metadata with a number": (pack({"__metadata__": {"epoch": 3}, **one()}, FOUR), FORMAT, ("__metadata__",)),
    "metadata with minus zero": (
        pack(f'{{"__metadata__":{{"a":-0}},"{NAME}":{{{_FIELDS}}}}}', FOUR), FORMAT, ("__metadata__",)),
    "metadata with a number of 25 digits": (
        pack({"__metadata__": {"a": 10**24}, **one()}, FOUR), FORMAT, ("__metadata__",)),
    "metadata that nests": (pack({"__metadata__": {"a": {"b": "c"}}, **one()}, FOUR), FORMAT, ("__metadata__",)),
    "metadata that is a list": (pack({"__metadata__": ["a"], **one()}, FOUR), FORMAT, ("__metadata__",)),
    "metadata with a lone surrogate": (pack({"__metadata__": {"surgery": "\ud800"}, **one()}, FOUR), FORMAT,
                                       ("__metadata__",)),
    "tensor named __metadata__": (pack({"__metadata__": ENTRY}, FOUR), FORMAT, ("__metadata__",)),
    "unknown dtype": (pack(one(dtype="Q4_K"), FOUR), MISMATCH, (NAME, "Q4_K")),
    "dtype in lower case": (pack(one(dtype="f32"), FOUR), MISMATCH, (NAME, "f32")),
    "dtype with escapes": (pack(one(dtype="\x1b[2J"), FOUR), MISMATCH, (NAME, "x1b[2J")),
    "dtype that is a number": (pack(one(dtype=32), FOUR), FORMAT, (NAME,)),
    "unknown field": (pack(one(scale=2), FOUR), FORMAT, (NAME, "scale")),
    "no data_offsets": (pack(one(data_offsets=...), FOUR), FORMAT, (NAME, "data_offsets")),
    "no shape": (pack(one(shape=...), FOUR), FORMAT, (NAME, "shape")),
    "entry that is a list": (pack({NAME: [1, 2]}, FOUR), FORMAT, (NAME,)),
    "33 dimensions": (pack(one(shape=[1] * 32 + [4]), FOUR), FORMAT, (NAME,)),
    "100,000 dimensions": (pack(one(shape=[1] * 100_000), FOUR), FORMAT, (NAME,)),
    "nesting bomb": (pack('{"a":' + "[" * 200_000), FORMAT, ()),
    "nesting bomb of objects": (pack('{"a":' * 200_000), FORMAT, ()),
    "header that is no JSON": (pack("{not json}"), FORMAT, ()),
    "header with text after it": (pack(json.dumps(one()) + "x", FOUR), FORMAT, ()),
    "header that is a list": (pack("[]"), FORMAT, ()),
    "header with a byte order mark": (pack("\ufeff" + json.dumps(one()), FOUR), FORMAT, ()),
    "header in UTF-16": (pack(json.dumps(one()).encode("utf-16-le"), FOUR), FORMAT, ()),
    "header with spaces before it": (pack(" " + json.dumps(one()), FOUR), FORMAT, ()),
    "header that is not UTF-8": (pack(text(_FIELDS).encode().replace(b"blocks", b"bl\xffcks"), FOUR), FORMAT, ()),
    "name with a lone surrogate": (pack({"a.\ud800.weight": ENTRY}, FOUR), FORMAT, ("a.", ".weight", "Unicode")),
    "name that is empty": (pack({"": ENTRY}, FOUR), FORMAT, ("name",)),
    "name with NUL": (pack({"a\0b.weight": ENTRY}, FOUR), FORMAT, ("a\\x00b.weight",)),
    "name of 1 MB": (pack({"a" * 1_000_000: ENTRY}, FOUR), FORMAT, ("aaaaaaaa",)),
    "name with terminal escapes": (pack({"\x1b[31m\x1b]0;owned\x07.weight": {**ENTRY, "shape": [9]}}, FOUR), FORMAT,
                                   ("x1b[31m",)),
    "name with a line break and a forged line": (pack({"a\nsurgery: error: b": {**ENTRY, "shape": [9]}}, FOUR), FORMAT,
                                                 ("a\\nsurgery",)),
    "name with an override of direction": (pack({"\u202egnp.weight": {**ENTRY, "shape": [9]}}, FOUR), FORMAT,
                                           ("u202egnp",)),
    "F4 with an odd number of elements": (pack(one(dtype="F4", shape=[3], data_offsets=[0, 2]), bytes(2)), FORMAT, (NAME,)),
    "F6 that fills no whole bytes": (pack(one(dtype="F6_E2M3", shape=[3], data_offsets=[0, 3]), bytes(3)), FORMAT, (NAME,)),
    "zip checkpoint of torch": (_zip_of_torch, FORMAT, ("zip",)),
    "pickle of protocol 2": (pickle.dumps({"a": 1}, 2), FORMAT, ("pickle",)),
    "pickle of protocol 5": (pickle.dumps({"a": 1}, 5), FORMAT, ("pickle",)),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", FORMAT, ("LFS",)),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), FORMAT, ("GGUF",)),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), FORMAT, ("HDF5",)),
    "HTML page of an error": (b"<!DOCTYPE html><html><title>429 Too Many Requests</title></html>", FORMAT, ()),
}  # fmt: skip


def _container(content: bytes | Callable[[], bytes]) -> Callable[[Path], Commands]:
    def make(here: Path) -> Commands:
        data = content if isinstance(content, bytes) else content()
        (here / "bad.safetensors").write_bytes(data)
        (here / "good.safetensors").write_bytes(GOOD)
        (here / "folder").mkdir()
        (here / "folder" / "bad.safetensors").write_bytes(data)
        adapter(here / "style-lora")
        (here / "broken-lora").mkdir()
        (here / "broken-lora" / "adapter_config.json").write_text(json.dumps(LORA_CONFIG))
        (here / "broken-lora" / "adapter_model-bad.safetensors").write_bytes(data)
        return [
            ["info", "bad.safetensors"],
            ["verify", "bad.safetensors"],
            ["diff", "good.safetensors", "bad.safetensors"],
            ["convert", "folder", "-o", "out"],
            ["convert", "bad.safetensors", "-o", "out.safetensors"],
            ["extract-lora", "good.safetensors", "folder", "-o", "out"],
            ["merge", "bad.safetensors", "style-lora", "-o", "out"],
            ["merge", "good.safetensors", "broken-lora", "-o", "out"],
        ]

    return make


for _id, (_content, _code, _says) in CONTAINERS.items():
    CASES.append(Case(f"container: {_id}", _code, ("bad.safetensors", *_says), _container(_content)))


@refused("container: half a million empty tensors", FORMAT, "bad.safetensors", "500,001")
def _(here: Path) -> Commands:
    entry = '":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    (here / "bad.safetensors").write_bytes(pack("{" + ",".join(f'"{n}{entry}' for n in range(500_001)) + "}"))
    return [["info", "bad.safetensors"]]


@refused("container: a folder called .safetensors", FORMAT, "bad.safetensors")
def _(here: Path) -> Commands:
    (here / "bad.safetensors").mkdir()
    return [["info", "bad.safetensors"], ["convert", "bad.safetensors", "-o", "out"]]


@refused("container: a folder in place of a model's file", FORMAT, "model.safetensors")
def _(here: Path) -> Commands:
    (here / "base-model" / "model.safetensors").mkdir(parents=True)
    return [["info", "base-model"], ["convert", "base-model", "-o", "out"]]


@refused("container: a pipe that nobody writes to", FORMAT, "bad.safetensors", "pipe")
def _(here: Path) -> Commands:
    os.mkfifo(here / "bad.safetensors")
    return [["info", "bad.safetensors"], ["convert", "bad.safetensors", "-o", "out"]]


@refused("container: a pipe in place of a configuration", FORMAT, "config.json", "pipe")
def _(here: Path) -> Commands:
    (model(here / "base-model") / "config.json").unlink()
    os.mkfifo(here / "base-model" / "config.json")
    return [["info", "base-model"], ["convert", "base-model", "-o", "out"]]


@refused("container: a device", FORMAT, ("bad.safetensors", "/dev/zero"), "device")
def _(here: Path) -> Commands:
    (here / "bad.safetensors").symlink_to("/dev/zero")
    return [["info", "bad.safetensors"]]


@refused("container: a link to nothing", FORMAT, ("bad.safetensors", "gone.safetensors"))
def _(here: Path) -> Commands:
    (here / "bad.safetensors").symlink_to("gone.safetensors")
    return [["info", "bad.safetensors"]]


@refused("container: a sparse file larger than the disk", OUTPUT, "out", "free")
def _(here: Path) -> Commands:
    size = 2 * shutil.disk_usage(here).free + (1 << 30)
    header = pack({NAME: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    with open(here / "big.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    return [["convert", "big.safetensors", "-o", "out"]]


# --- indexes, shards and links

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def sharded(folder: Path, change: Callable[[dict[str, str]], Any] | None = None, index: str | None = None) -> Path:
    """Write a model in two shards, with a changed ``weight_map`` or another index altogether."""
    weights = base_weights()
    homes = {name: SHARDS[".layers.1." in name] for name in weights}
    folder.mkdir()
    for shard in SHARDS:
        inside = {name: value for name, value in weights.items() if homes[name] == shard}
        (folder / shard).write_bytes(save_bytes(inside, {"format": "pt"}))
    if change:
        change(homes)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}) if index is None else index)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def _indexed(
    change: Callable[[dict[str, str]], Any] | None = None, index: str | None = None
) -> Callable[[Path], Commands]:
    def make(here: Path) -> Commands:
        sharded(here / "base-model", change, index)
        adapter(here / "style-lora")
        return _reading("base-model")

    return make


def _reading(name: str) -> Commands:
    return [
        ["info", name], ["verify", name], ["convert", name, "-o", "out"], ["merge", name, "style-lora", "-o", "out"],
    ]  # fmt: skip


QW = f"{Q}.weight"
OUTSIDE = ("out.safetensors", "secret")

INDEXES: dict[str, tuple[Callable[[Path], Commands], int, tuple[Word, ...]]] = {
    "a tensor that no shard holds": (_indexed(lambda m: m.update({"ghost.weight": SHARDS[0]})), FORMAT,
                                     (INDEX, "ghost.weight")),
    "a tensor given to the wrong shard": (_indexed(lambda m: m.update({QW: SHARDS[1]})), FORMAT, (INDEX, QW, SHARDS[1])),
    "a tensor left out of the index": (_indexed(lambda m: m.pop(QW)), FORMAT, (INDEX, QW, SHARDS[0])),
    "a shard that is not there": (_indexed(lambda m: m.update({QW: "model-00003-of-00003.safetensors"})), FORMAT,
                                  (INDEX, "model-00003-of-00003.safetensors")),
    "a path upwards": (_indexed(lambda m: m.update({QW: "../secret/out.safetensors"})), UNSAFE, (INDEX, QW, "../secret")),
    "an absolute path": (_indexed(lambda m: m.update({QW: "/etc/passwd"})), UNSAFE, (INDEX, QW, "/etc/passwd")),
    "a path into a subfolder": (_indexed(lambda m: m.update({QW: "sub/out.safetensors"})), UNSAFE, (INDEX, QW)),
    "a Windows path": (_indexed(lambda m: m.update({QW: "..\\secret\\out.safetensors"})), UNSAFE, (INDEX, QW)),
    "a Windows drive": (_indexed(lambda m: m.update({QW: "C:out.safetensors"})), UNSAFE, (INDEX, QW)),
    "the folder itself": (_indexed(lambda m: m.update({QW: ".."})), UNSAFE, (INDEX, QW)),
    "a shard's name with NUL": (_indexed(lambda m: m.update({QW: "a\0.safetensors"})), UNSAFE, (INDEX, QW)),
    "a shard's name with a lone surrogate": (_indexed(lambda m: m.update({QW: "\ud800.safetensors"})), FORMAT,
                                             (INDEX, "ud800.safetensors")),
    "a shard's name of 5000 characters": (_indexed(lambda m: m.update({QW: "a" * 5000 + ".safetensors"})), FORMAT,
                                          (INDEX,)),
    "a number for a shard": (_indexed(lambda m: m.update({QW: 7})), FORMAT, (INDEX, QW)),
    "the configuration for a shard": (_indexed(lambda m: m.update({QW: "config.json"})), FORMAT, ("config.json",)),
    "the index that is no JSON": (_indexed(index="{"), FORMAT, (INDEX, "JSON")),
    "the index that is empty": (_indexed(index=""), FORMAT, (INDEX, "JSON")),
    "the index that is a list": (_indexed(index="[]"), FORMAT, (INDEX,)),
    "the index without a weight_map": (_indexed(index='{"metadata": {}}'), FORMAT, (INDEX, "weight_map")),
    "a weight_map that is a list": (_indexed(index='{"weight_map": []}'), FORMAT, (INDEX, "weight_map")),
    "a weight_map that is empty": (_indexed(index='{"weight_map": {}}'), FORMAT, (INDEX, "weight_map")),
    "a weight_map with a name twice": (
        _indexed(index=f'{{"weight_map": {{"{QW}": "{SHARDS[0]}", "{QW}": "{SHARDS[1]}"}}}}'), FORMAT, (INDEX, QW)),
    "the index that nests too deeply": (_indexed(index='{"weight_map":' + "[" * 200_000), FORMAT, (INDEX,)),
    "a number of 5000 digits in the index": (_indexed(index=f'{{"metadata": {{"total_size": {"9" * 5000}}}}}'), FORMAT,
                                             (INDEX,)),
}  # fmt: skip
for _id, (_make, _code, _says) in INDEXES.items():
    CASES.append(Case(f"index: {_id}", _code, _says, _make))


@refused("index: both shards missing are listed", FORMAT, INDEX, SHARDS[0], SHARDS[1])
def _(here: Path) -> Commands:
    folder = sharded(here / "base-model")
    for shard in SHARDS:
        (folder / shard).unlink()
    adapter(here / "style-lora")
    return _reading("base-model")


@refused("index: a second shard that is malformed", FORMAT, SHARDS[1])
def _(here: Path) -> Commands:
    folder = sharded(here / "base-model")
    os.truncate(folder / SHARDS[1], 100)
    adapter(here / "style-lora")
    return _reading("base-model")


@refused("index: one tensor in two shards", FORMAT, "base-model", QW, SHARDS[0], SHARDS[1])
def _(here: Path) -> Commands:
    folder = sharded(here / "base-model")
    extra = {**load_bytes((folder / SHARDS[1]).read_bytes()), QW: torch.ones(32, 32)}
    (folder / SHARDS[1]).write_bytes(save_bytes(extra, {"format": "pt"}))
    adapter(here / "style-lora")
    return _reading("base-model")


@refused("index: a single file beside the index", MISMATCH, "base-model", "model.safetensors", INDEX)
def _(here: Path) -> Commands:
    folder = sharded(here / "base-model")
    (folder / "model.safetensors").write_bytes(save_bytes(base_weights()))
    adapter(here / "style-lora")
    return _reading("base-model")


@refused("index: two indexes", MISMATCH, "base-model", INDEX, "model.fp16.safetensors.index.json")
def _(here: Path) -> Commands:
    folder = sharded(here / "base-model")
    shutil.copy(folder / INDEX, folder / "model.fp16.safetensors.index.json")
    adapter(here / "style-lora")
    return _reading("base-model")


@refused("index: a shard of three without an index", FORMAT, "base-model", "index")
def _(here: Path) -> Commands:
    folder = sharded(here / "base-model")
    (folder / INDEX).unlink()
    (folder / SHARDS[1]).rename(folder / "model-00003-of-00003.safetensors")
    adapter(here / "style-lora")
    return _reading("base-model")


@refused("index: several files and no index", MISMATCH, "base-model", "a.safetensors", "b.safetensors")
def _(here: Path) -> Commands:
    folder = model(here / "base-model")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    adapter(here / "style-lora")
    return _reading("base-model")


@refused("index: a folder without weights", FORMAT, "base-model", "config.json")
def _(here: Path) -> Commands:
    (model(here / "base-model") / "model.safetensors").unlink()
    adapter(here / "style-lora")
    return _reading("base-model")


def _outward(member: str) -> Callable[[Path], Commands]:
    def make(here: Path) -> Commands:
        folder = sharded(here / "base-model") if member in (*SHARDS, INDEX) else model(here / "base-model")
        (here / "elsewhere").mkdir()
        (folder / member).rename(here / "elsewhere" / "secret")
        (folder / member).symlink_to("../elsewhere/secret")
        adapter(here / "style-lora")
        return _reading("base-model")

    return make


CASES.extend(
    Case(f"link: {member} leads out of the folder", UNSAFE, (member, "link"), _outward(member))
    for member in ("model.safetensors", SHARDS[1], INDEX, "config.json")
)


@refused("link: a tokenizer leads out of the folder", UNSAFE, "tokenizer.json", "link")
def _(here: Path) -> Commands:
    (model(here / "base-model") / "tokenizer.json").symlink_to("/etc/passwd")
    return [["convert", "base-model", "-o", "out"]]


@refused("link: an adapter's weights lead out of its folder", UNSAFE, "adapter_model.safetensors", "link")
def _(here: Path) -> Commands:
    model(here / "base-model")
    weights = adapter(here / "style-lora") / "adapter_model.safetensors"
    weights.rename(here / "secret")
    weights.symlink_to("../secret")
    return [["merge", "base-model", "style-lora", "-o", "out"], ["verify", "style-lora"]]


@refused("link: a model that links to itself", IO, "base-model")
def _(here: Path) -> Commands:
    (here / "base-model.safetensors").symlink_to("base-model.safetensors")
    return [["info", "base-model.safetensors"]]


@refused("link: a snapshot that leads out of its cache", UNSAFE, "model.safetensors", "link")
def _(here: Path) -> Commands:
    folder = here / "hub" / "models--org--name" / "snapshots" / "0123"
    model(folder)
    (folder / "model.safetensors").rename(here / "secret")
    (folder / "model.safetensors").symlink_to("../../../../secret")
    return [["info", str(folder.relative_to(here))]]


# --- pickles


class _Shell:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def _evil(*, legacy: bool = False) -> bytes:
    code = pickle.dumps({QW: _Shell()}, 2)
    if legacy:
        return code
    return rezipped(_zip_of_torch(), {"data.pkl": lambda _: code})


def rezipped(data: bytes, changes: dict[str, Callable[[bytes], bytes]], *, method: int = zipfile.ZIP_STORED) -> bytes:
    """Write a torch checkpoint again, with some of its entries changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            change = changes.get(name.partition("/")[2], lambda content: content)
            new.writestr(name, change(old.read(name)))
    return buffer.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    """Return what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _square(**more: Any) -> bytes:
    return saved({NAME: torch.arange(16.0).reshape(4, 4), **more})


PICKLES: dict[str, tuple[Callable[[], bytes], int, tuple[Word, ...]]] = {
    "os.system in a zip": (_evil, UNSAFE, ("system",)),
    "os.system in a bare pickle": (lambda: _evil(legacy=True), UNSAFE, ()),
    "a legacy checkpoint": (lambda: saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False), UNSAFE, ()),
    "a whole module": (lambda: saved(torch.nn.Linear(2, 2)), UNSAFE, ("Linear",)),
    "compressed entries": (lambda: rezipped(_square(), {}, method=zipfile.ZIP_DEFLATED), FORMAT, ("compressed",)),
    "a storage shorter than its tensor": (lambda: rezipped(_square(), {"data/0": lambda data: data[:32]}), FORMAT, (NAME,)),
    "a shape beyond its storage": (
        lambda: rezipped(_square(), {"data.pkl": lambda code: code.replace(b"K\x04K\x04\x86", b"K\x04K\x05\x86")}),
        FORMAT, (NAME,)),
    "an offset beyond its storage": (
        lambda: rezipped(_square(), {"data.pkl": lambda code: code.replace(b"QK\0K\x04", b"QK\x09K\x04")}), FORMAT, (NAME,)),
    "a list at the top": (lambda: saved([torch.ones(2)]), FORMAT, ()),
    "no tensor at all": (lambda: saved({"epoch": 3}), FORMAT, ()),
    "tensors at the top and below": (lambda: _square(state_dict={"w": torch.ones(2)}), MISMATCH, ("state_dict",)),
    "a tensor called __metadata__": (lambda: saved({"__metadata__": torch.ones(2)}), MISMATCH, ("__metadata__",)),
    "a tensor without a name": (lambda: saved({"": torch.ones(2)}), FORMAT, ("name",)),
    "a complex dtype that has no place": (lambda: saved({NAME: torch.ones(2, dtype=torch.complex128)}), MISMATCH, (NAME,)),
    "a truncated zip": (lambda: _square()[:-30], FORMAT, ()),
    "a zip cut in half": (lambda: _square()[:300], FORMAT, ()),
    "an empty file": (lambda: b"", FORMAT, ()),
    "safetensors under a pickle's name": (lambda: GOOD, FORMAT, ()),
    "opcodes after the end": (lambda: rezipped(_square(), {"data.pkl": lambda code: code + b"N."}), FORMAT, ()),
}  # fmt: skip


def _pickled(data: Callable[[], bytes]) -> Callable[[Path], Commands]:
    def make(here: Path) -> Commands:
        content = data()
        (here / "bad.bin").write_bytes(content)
        (here / "folder").mkdir()
        (here / "folder" / "pytorch_model_bad.bin").write_bytes(content)
        return [
            ["info", "bad.bin"],
            ["convert", "bad.bin", "-o", "out.safetensors"],
            ["extract-lora", "bad.bin", "folder", "-o", "out"],
            ["convert", "folder", "-o", "out"],
        ]

    return make


for _id, (_data, _code, _says) in PICKLES.items():
    CASES.append(Case(f"pickle: {_id}", _code, ("bad.bin", *_says), _pickled(_data)))


@refused("pickle: os.system in an adapter", UNSAFE, "adapter_model.bin", "system")
def _(here: Path) -> Commands:
    model(here / "base-model")
    folder = adapter(here / "style-lora")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(_evil())
    return [["merge", "base-model", "style-lora", "-o", "out"], ["verify", "style-lora"]]


# --- names and shapes


def _extracting(here: Path, *more: str) -> Commands:
    return [["extract-lora", "base-model", "tuned-model", "-o", "out", *more]]


def _paired(id: str, code: int, *says: Word, changes: Callable[[], dict[str, torch.Tensor | None]]) -> None:
    def make(here: Path) -> Commands:
        pair(here, **changes())
        return _extracting(here)

    CASES.append(Case(f"pair: {id}", code, says, make))


_paired("a shape that differs", MISMATCH, QW, "tuned-model", "[32, 16]", changes=lambda: {QW: torch.ones(32, 16)})
_paired("a shape that broadcasts", MISMATCH, QW, "tuned-model", "[32, 1]", changes=lambda: {QW: torch.ones(32, 1)})
_paired("a scalar for a matrix", MISMATCH, QW, "tuned-model", changes=lambda: {QW: torch.ones(())})
_paired(
    "a shape with the same number of elements", MISMATCH, QW, "tuned-model", changes=lambda: {QW: torch.ones(64, 16)}
)
_paired("an embedding that is wider", MISMATCH, EMBED, "tuned-model", "64", "72",
        changes=lambda: {EMBED: torch.ones(72, 40)})  # fmt: skip


@refused(
    "pair: a vocabulary that was resized, for a server that keeps the base's", MISMATCH, EMBED, "tuned-model", "vLLM"
)
def _(here: Path) -> Commands:
    pair(here, **{EMBED: torch.ones(72, 32)})
    return [[*command, "--for", "vllm"] for command in _extracting(here)]


@refused("pair: no name in common", MISMATCH, "tuned-model", "base-model")
def _(here: Path) -> Commands:
    model(here / "base-model")
    names = {name: f"encoder.block.{n}.kernel" for n, name in enumerate(base_weights())}
    model(here / "tuned-model", {names[name]: value for name, value in tuned_weights().items()})
    return _extracting(here)


@refused("pair: an adapter with no module in common", MISMATCH, "style-lora", "base-model", "q_proj")
def _(here: Path) -> Commands:
    model(here / "base-model", {f"encoder.block.{n}.weight": value for n, value in enumerate(base_weights().values())})
    adapter(here / "style-lora")
    return [["merge", "base-model", "style-lora", "-o", "out"]]


@refused("pair: two names that collapse into one", MISMATCH, NORM)
def _(here: Path) -> Commands:
    pair(here)
    folder = here / "tuned-model"
    doubled = {**tuned_weights(), f"_orig_mod.{NORM}": torch.ones(32)}
    (folder / "model.safetensors").write_bytes(save_bytes(doubled))
    return _extracting(here)


@refused("pair: identical models", MISMATCH, "tuned-model", "no difference")
def _(here: Path) -> Commands:
    model(here / "base-model")
    model(here / "tuned-model")
    return _extracting(here)


@refused("pair: the same folder twice", USAGE, "base-model")
def _(here: Path) -> Commands:
    model(here / "base-model")
    return [["extract-lora", "base-model", "base-model", "-o", "out"], ["extract-lora", "base-model", "./base-model/"]]


@refused("pair: the same folder through a link", USAGE, ("base-model", "tuned-model"))
def _(here: Path) -> Commands:
    model(here / "base-model")
    (here / "tuned-model").symlink_to("base-model")
    return _extracting(here)


@refused("pair: a folder and its only file", USAGE, ("base-model", "model.safetensors"))
def _(here: Path) -> Commands:
    model(here / "base-model")
    return [["extract-lora", "base-model", "base-model/model.safetensors", "-o", "out"]]


@refused("pair: only integers differ", MISMATCH, ("base-model", "tuned-model"), QW)
def _(here: Path) -> Commands:
    model(here / "base-model", {QW: torch.ones(4, 4, dtype=torch.int64)})
    model(here / "tuned-model", {QW: torch.zeros(4, 4, dtype=torch.int64)})
    return _extracting(here)


@refused("pair: everything excluded", MISMATCH, "tuned-model")
def _(here: Path) -> Commands:
    pair(here)
    return _extracting(here, "--exclude", "*")


@refused("pair: a target that matches nothing", MISMATCH, "q_porj", "q_proj")
def _(here: Path) -> Commands:
    pair(here)
    return _extracting(here, "--target", "q_porj")


@refused("names: a rename that makes two tensors one", MISMATCH, "b.weight", "--rename")
def _(here: Path) -> Commands:
    (here / "base.safetensors").write_bytes(save_bytes({"a.weight": torch.ones(2), "b.weight": torch.ones(2)}))
    return [["convert", "base.safetensors", "--rename", "a=b", "-o", "out"]]


@refused("names: a rename to __metadata__", MISMATCH, "__metadata__")
def _(here: Path) -> Commands:
    (here / "base.safetensors").write_bytes(save_bytes({"a.weight": torch.ones(2)}))
    return [["convert", "base.safetensors", "--rename", "a.weight=__metadata__", "-o", "out"]]


@refused("names: a rename to nothing", USAGE, "--rename")
def _(here: Path) -> Commands:
    (here / "base.safetensors").write_bytes(save_bytes({"a.weight": torch.ones(2)}))
    return [["convert", "base.safetensors", "--rename", "a.weight=", "-o", "out"]]


@refused("names: a rename that matches nothing", MISMATCH, "base.safetensors", "no.such")
def _(here: Path) -> Commands:
    (here / "base.safetensors").write_bytes(save_bytes({"a.weight": torch.ones(2)}))
    return [["convert", "base.safetensors", "--rename", "no.such=b", "-o", "out"]]


# --- numbers


def _with(value: torch.Tensor, number: float) -> torch.Tensor:
    changed = value.clone()
    changed.view(-1)[7] = number
    return changed


for _number, _word in ((float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "minus Inf")):
    for _name, _kind in ((QW, "linear weight"), (NORM, "norm"), (EMBED, "embedding")):
        _paired(f"{_word} in the fine-tune's {_kind}", NUMERIC, "tuned-model", _name, ("NaN", "Inf"),
                changes=lambda name=_name, number=_number: {name: _with(tuned_weights()[name], number)})  # fmt: skip


@refused("numbers: NaN in the base at extraction", NUMERIC, "base-model", QW)
def _(here: Path) -> Commands:
    pair(here)
    changed = {**base_weights(), QW: _with(base_weights()[QW], float("nan"))}
    (here / "base-model" / "model.safetensors").write_bytes(save_bytes(changed))
    return _extracting(here)


@refused("numbers: a difference that overflows float32", NUMERIC, "tuned-model", QW)
def _(here: Path) -> Commands:
    model(here / "base-model", {QW: torch.full((8, 8), -3e38)})
    model(here / "tuned-model", {QW: torch.full((8, 8), 3e38)})
    return _extracting(here)


@refused("numbers: a float64 difference that overflows float32", NUMERIC, "tuned-model", QW)
def _(here: Path) -> Commands:
    model(here / "base-model", {QW: torch.zeros(8, 8, dtype=torch.float64)})
    model(here / "tuned-model", {QW: torch.full((8, 8), 1e300, dtype=torch.float64)})
    return _extracting(here)


@refused("numbers: factors that overflow float16", NUMERIC, "tuned-model", Q, "F16")
def _(here: Path) -> Commands:
    model(here / "base-model", {QW: torch.zeros(8, 8)})
    model(here / "tuned-model", {QW: torch.full((8, 8), 1e12)})
    return _extracting(here, "--dtype", "F16")


def _merging(base: dict[str, torch.Tensor] | None = None, **changes: Any) -> Callable[[Path], Commands]:
    def make(here: Path) -> Commands:
        model(here / "base-model", {**base_weights(), **(base or {})})
        adapter(here / "style-lora", **{key: value() for key, value in changes.items()})
        return [
            ["merge", "base-model", "style-lora", "-o", "out"],
            ["merge", "base-model", "style-lora", "-o", "out.safetensors"],
            ["merge", "base-model", "style-lora", "-o", "new/folders/out"],
        ]

    return make


CASES.extend(
    Case(
        f"numbers: {word} in an adapter's {key[-8:-7]} at merge", NUMERIC, ("style-lora", Q),
        _merging(tensors=lambda key=key, number=number: {key: _with(lora_tensors()[key], number)}),
    )
    for number, word in ((float("nan"), "NaN"), (float("inf"), "Inf"))
    for key in (A, B)
)  # fmt: skip

for _key, _kind in ((f"base_model.model.{NORM}", "saved module"), ("base_model.model." + EMBED, "saved embedding")):
    CASES.append(
        Case(
            f"numbers: NaN in an adapter's {_kind} at merge", NUMERIC, ("style-lora", _key[17:]),
            _merging(tensors=lambda key=_key: {key: _with(base_weights()[key[17:]], float("nan"))}),
        )
    )  # fmt: skip
CASES.append(
    Case(
        "numbers: Inf in an adapter's token rows at merge", NUMERIC, ("style-lora", "embed_tokens"),
        _merging(
            config=lambda: {"trainable_token_indices": [1, 2]},
            tensors=lambda: {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta":
                             torch.full((2, 32), float("inf"))},
        ),
    )
)  # fmt: skip

for _word, _base, _changes in (
    ("NaN in a merged weight of the base", {QW: _with(torch.zeros(32, 32), float("nan"))}, {}),
    ("a sum that overflows float16", {QW: torch.full((32, 32), 65000.0, dtype=torch.float16)},
     {A: torch.full((4, 32), 100.0), B: torch.full((32, 4), 100.0)}),
    ("a sum that overflows bfloat16", {QW: torch.full((32, 32), 3.38e38, dtype=torch.bfloat16)},
     {A: torch.full((4, 32), 1e18), B: torch.full((32, 4), 1e18)}),
    ("a sum that overflows float32", {QW: torch.full((32, 32), 3e38)},
     {A: torch.full((4, 32), 1e19), B: torch.full((32, 4), 1e19)}),
):  # fmt: skip
    CASES.append(
        Case(f"numbers: {_word} at merge", NUMERIC, (("base-model", "style-lora", "out"), QW),
             _merging(_base, tensors=lambda changes=_changes: changes))
    )  # fmt: skip


def _casting(value: float, kind: torch.dtype, dtype: str, *more: str) -> Callable[[Path], Commands]:
    def make(here: Path) -> Commands:
        model(here / "base-model", {QW: _with(torch.zeros(8, 8, dtype=kind), value)})
        return [
            ["convert", "base-model", "--dtype", dtype, "-o", "out", *more],
            ["convert", "base-model", "--dtype", dtype, "-o", "out.safetensors", *more],
        ]

    return make


for _value, _kind, _dtype in (
    (70000.0, torch.float32, "F16"), (65520.0, torch.float32, "F16"), (-70000.0, torch.bfloat16, "F16"),
    (1e300, torch.float64, "F16"), (3.4e38, torch.float32, "BF16"), (-3.4e38, torch.float32, "BF16"),
    (1e300, torch.float64, "BF16"), (1e300, torch.float64, "F32"), (3.5e38, torch.float64, "F32"),
    (float("nan"), torch.float32, "BF16"), (float("inf"), torch.float32, "F16"), (float("-inf"), torch.bfloat16, "F32"),
):  # fmt: skip
    CASES.append(
        Case(f"numbers: {_value:g} from {str(_kind)[6:]} to {_dtype}", NUMERIC, (("base-model", "out"), QW),
             _casting(_value, _kind, _dtype))
    )  # fmt: skip

for _rank in ("0", "-3", "abc", "8.5", "", "nan", "1e3", "²", "9" * 5000):

    def _ranked(here: Path, rank: str = _rank) -> Commands:
        pair(here)
        return _extracting(here, "--rank", rank)

    CASES.append(Case(f"numbers: rank {_rank[:10]!r}", USAGE, ("rank",), _ranked))


# --- quantised weights

_CODES = torch.arange(1024).remainder(100).reshape(32, 32)


def _quantised(kind: str, shift: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    codes = (_CODES + shift).remainder(100)
    fp8 = codes.to(torch.float32).to(torch.float8_e4m3fn)
    if kind == "fp8 with block scales":
        return {QW: fp8, f"{QW}_scale_inv": torch.ones(1, 1)}, {"quant_method": "fp8"}
    if kind == "fp8 with a scale":
        return {QW: fp8, f"{QW}_scale": torch.ones(())}, {"quant_method": "compressed-tensors"}
    if kind == "bitsandbytes int8":
        return {QW: codes.to(torch.int8), f"{Q}.SCB": torch.ones(32)}, {"quant_method": "bitsandbytes"}
    if kind == "bitsandbytes 4-bit":
        packed = {QW: codes.reshape(-1, 1)[:512].to(torch.uint8), f"{QW}.absmax": torch.ones(16)}
        return packed | {f"{QW}.quant_state.bitsandbytes__nf4": torch.ones(8, dtype=torch.uint8)}, {
            "quant_method": "bitsandbytes"
        }
    if kind == "GPTQ":
        packed = {f"{Q}.qweight": codes[:4].to(torch.int32), f"{Q}.qzeros": torch.ones(1, 4, dtype=torch.int32)}
        return {QW: None} | packed | {f"{Q}.scales": torch.ones(1, 32).half() + shift}, {"quant_method": "gptq"}  # type: ignore[return-value]
    assert kind == "fp8 without scales"
    return {QW: fp8}, {}


for _kind, _scheme in {
    "fp8 with block scales": "fp8", "fp8 with a scale": "compressed-tensors", "bitsandbytes int8": "bitsandbytes",
    "bitsandbytes 4-bit": "bitsandbytes", "GPTQ": ("gptq", "GPTQ"), "fp8 without scales": "F8_E4M3",
}.items():  # fmt: skip

    def _quantise(here: Path, kind: str) -> None:
        for name, weights, shift in (("base-model", base_weights(), 0), ("tuned-model", tuned_weights(), 1)):
            changes, declared = _quantised(kind, shift)
            model(here / name, weights, {"quantization_config": declared} if declared else {}, changes=changes)
        adapter(here / "style-lora")

    def _quantised_extract(here: Path, kind: str = _kind) -> Commands:
        _quantise(here, kind)
        return _extracting(here)

    def _quantised_merge(here: Path, kind: str = _kind) -> Commands:
        _quantise(here, kind)
        return [["merge", "base-model", "style-lora", "-o", "out"]]

    def _quantised_convert(here: Path, kind: str = _kind) -> Commands:
        _quantise(here, kind)
        return [["convert", "base-model", "--dtype", "BF16", "-o", "out"]]

    CASES.append(Case(f"quantised: {_kind}, extracted", MISMATCH, (("base-model", "tuned-model"), Q, _scheme),
                      _quantised_extract))  # fmt: skip
    CASES.append(Case(f"quantised: {_kind}, merged into", MISMATCH, ("base-model", Q, _scheme), _quantised_merge))
    CASES.append(Case(f"quantised: {_kind}, cast", MISMATCH, ("base-model", Q, _scheme), _quantised_convert))


for _kind in ("fp8 with block scales", "bitsandbytes int8", "GPTQ"):

    def _quantised_tuned(here: Path, kind: str = _kind) -> Commands:
        model(here / "base-model")
        changes, declared = _quantised(kind, 1)
        model(here / "tuned-model", tuned_weights(), {"quantization_config": declared}, changes=changes)
        return _extracting(here)

    CASES.append(Case(f"quantised: a plain base and a fine-tune in {_kind}", MISMATCH, ("tuned-model", Q, "quantised"),
                      _quantised_tuned))  # fmt: skip


# --- adapters


def _adapted(id: str, code: int, *says: Word, config: Any = None, tensors: Any = None) -> None:
    def make(here: Path) -> Commands:
        model(here / "base-model")
        adapter(here / "style-lora", config=config, tensors=tensors() if tensors else None)
        return [
            ["merge", "base-model", "style-lora", "-o", "out"],
            ["merge", "base-model", "style-lora/adapter_model.safetensors", "-o", "out"],
            ["merge", "base-model", "style-lora", "--coeff", "0.5", "-o", "out.safetensors"],
        ]

    CASES.append(Case(f"adapter: {id}", code, ("style-lora", *says), make))


HUGE = 10**400
_adapted("lora_alpha missing", MISMATCH, "lora_alpha", config={"lora_alpha": ...})
_adapted("lora_alpha null", MISMATCH, "lora_alpha", config={"lora_alpha": None})
_adapted("lora_alpha NaN", MISMATCH, "lora_alpha", config={"lora_alpha": float("nan")})
_adapted("lora_alpha of 400 digits", FORMAT, "adapter_config.json", config={"lora_alpha": HUGE})
_adapted("lora_alpha a string", MISMATCH, "lora_alpha", config={"lora_alpha": "8"})
_adapted("r missing", MISMATCH, "r =", config={"r": ...})
_adapted("r zero", MISMATCH, "r =", config={"r": 0})
_adapted("r a float", MISMATCH, "r =", config={"r": 4.0})
_adapted("r that is not the tensors'", MISMATCH, "rank 4", "8", "q_proj", config={"r": 8})
_adapted("r of 400 digits", FORMAT, "adapter_config.json", config={"r": HUGE})
_adapted("rank_pattern infinite", FORMAT, "rank_pattern", config={"rank_pattern": {"q_proj": float("inf")}})
_adapted("rank_pattern a fraction", FORMAT, "rank_pattern", config={"rank_pattern": {"q_proj": 4.5}})
_adapted("rank_pattern no expression", FORMAT, "rank_pattern", config={"rank_pattern": {"(": 4}})
_adapted("rank_pattern a list", FORMAT, "rank_pattern", config={"rank_pattern": [4]})
_adapted("rank_pattern that takes exponential time", FORMAT, "rank_pattern",
         config={"rank_pattern": {r"((\w|\.)+)+!": 4}})  # fmt: skip
_adapted("alpha_pattern negative", FORMAT, "alpha_pattern", config={"alpha_pattern": {"q_proj": -1}})
_adapted("alpha_pattern of 400 digits", FORMAT, "adapter_config.json", config={"alpha_pattern": {"q_proj": HUGE}})
_adapted("use_rslora a string", FORMAT, "use_rslora", config={"use_rslora": "yes"})
_adapted("modules_to_save a number", FORMAT, "modules_to_save", config={"modules_to_save": 5})
_adapted("modules_to_save of numbers", FORMAT, "modules_to_save", config={"modules_to_save": [5], "target_modules": ["q_proj", "v_proj", "up_proj"]})  # fmt: skip
_adapted("a field that may change the result", MISMATCH, "lora_twist", config={"lora_twist": 3})
_adapted("layer replication", MISMATCH, "layer_replication", config={"layer_replication": [[0, 1]]})
_adapted("an initialisation that changes the base", MISMATCH, "pissa", config={"init_lora_weights": "pissa"})
_adapted("LoHa", MISMATCH, "LOHA", "adapter_config.json", config={"peft_type": "LOHA"})
_adapted("IA3 with LoRA's tensors", MISMATCH, "IA3", config={"peft_type": "IA3"})
_adapted("a method from the future", MISMATCH, "FUTURELORA", config={"peft_type": "FUTURELORA"})
_adapted("no method at all", MISMATCH, "peft_type", config={"peft_type": ...})
_adapted("A without B", MISMATCH, A, tensors=lambda: {B: None})
_adapted("B without A", MISMATCH, B, tensors=lambda: {A: None})
_adapted("A and B of different ranks", MISMATCH, Q, "[4, 32]", "[32, 2]", tensors=lambda: {B: torch.ones(32, 2)})
_adapted("A for a narrower weight", MISMATCH, Q, "[32, 16]", tensors=lambda: {A: torch.ones(4, 16)})
_adapted("B for a taller weight", MISMATCH, Q, "[64, 32]", tensors=lambda: {B: torch.ones(64, 4)})
_adapted("B that would broadcast", MISMATCH, Q, "[1, 32]", tensors=lambda: {B: torch.ones(1, 4)})
_adapted("A of one dimension", MISMATCH, Q, tensors=lambda: {A: torch.ones(4)})
_adapted("rank zero tensors", MISMATCH, Q, tensors=lambda: {A: torch.ones(0, 32), B: torch.ones(32, 0)})
_adapted("half of its modules missing", MISMATCH, "model.layers.1.self_attn.q_proj",
         tensors=lambda: {name: None for name in lora_tensors() if ".layers.1." in name})  # fmt: skip
_adapted("half of its modules missing, targets by expression", MISMATCH, "model.layers.1.self_attn.q_proj",
         config={"target_modules": r".*\.[qv]_proj"},
         tensors=lambda: {name: None for name in lora_tensors() if ".layers.1." in name})  # fmt: skip
_adapted("no tensors but one norm", MISMATCH, "q_proj",
         tensors=lambda: {**dict.fromkeys(lora_tensors()), f"base_model.model.{NORM}": torch.ones(32)})  # fmt: skip
_adapted("a module that the base lacks", MISMATCH, "layers.9", "base-model",
         tensors=lambda: {key.replace("layers.0", "layers.9"): value for key, value in lora_tensors().items()})  # fmt: skip
_adapted("a tensor that LoRA does not have", MISMATCH, "lora_C",
         tensors=lambda: {A.replace("lora_A", "lora_C"): torch.ones(4, 4)})  # fmt: skip
_adapted(
    "two tensors with one role", MISMATCH, Q, tensors=lambda: {A.removeprefix("base_model.model."): torch.ones(4, 32)}
)
_adapted("a saved module of another shape", MISMATCH, EMBED,
         tensors=lambda: {f"base_model.model.{EMBED}": torch.ones(72, 40)})  # fmt: skip
_adapted("a saved module that would broadcast", MISMATCH, NORM,
         tensors=lambda: {f"base_model.model.{NORM}": torch.ones(1)})  # fmt: skip
_adapted("a saved module of integers", MISMATCH, NORM,
         tensors=lambda: {f"base_model.model.{NORM}": torch.ones(32, dtype=torch.int32)})  # fmt: skip
_adapted("factors of integers", MISMATCH, Q, tensors=lambda: {A: torch.ones(4, 32, dtype=torch.int8)})
_adapted("factors in fp8 without scales", MISMATCH, Q, tensors=lambda: {A: torch.ones(4, 32).to(torch.float8_e4m3fn)})
_adapted("factors that are complex", MISMATCH, Q, tensors=lambda: {A: torch.ones(4, 32, dtype=torch.complex64)})
_adapted("token rows beyond the vocabulary", MISMATCH, "64", EMBED, config={"trainable_token_indices": [1, 99]},
         tensors=lambda: {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)})  # fmt: skip
_adapted("token rows named twice", FORMAT, "trainable_token_indices", config={"trainable_token_indices": [1, 1]})
_adapted("token rows that are negative", FORMAT, "trainable_token_indices", config={"trainable_token_indices": [-1]})
_adapted("DoRA without its magnitudes", MISMATCH, Q, config={"use_dora": True})


def _broken_adapter(id: str, code: int, *says: Word, files: dict[str, bytes | None]) -> None:
    def make(here: Path) -> Commands:
        model(here / "base-model")
        folder = adapter(here / "style-lora")
        for name, content in files.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        return [["merge", "base-model", "style-lora", "-o", "out"]]

    CASES.append(Case(f"adapter: {id}", code, ("style-lora", *says), make))


_broken_adapter("configuration missing", FORMAT, "adapter_config.json", files={"adapter_config.json": None})
_broken_adapter("configuration truncated", FORMAT, "adapter_config.json", "JSON",
                files={"adapter_config.json": json.dumps(LORA_CONFIG).encode()[:-9]})  # fmt: skip
_broken_adapter("configuration empty", FORMAT, "adapter_config.json", files={"adapter_config.json": b""})
_broken_adapter("configuration a list", FORMAT, "adapter_config.json", files={"adapter_config.json": b"[]"})
_broken_adapter(
    "configuration not UTF-8", FORMAT, "adapter_config.json", files={"adapter_config.json": b'{"a": "\xff"}'}
)
_broken_adapter("configuration with a key twice", FORMAT, "adapter_config.json", "lora_alpha",
                files={"adapter_config.json": b'{"peft_type": "LORA", "lora_alpha": 8, "lora_alpha": 80, "r": 4}'})  # fmt: skip
_broken_adapter("configuration with a number of 5000 digits", FORMAT, "adapter_config.json",
                files={"adapter_config.json": b'{"peft_type": "LORA", "r": 4, "lora_alpha": ' + b"9" * 5000 + b"}"})  # fmt: skip
_broken_adapter("configuration that nests too deeply", FORMAT, "adapter_config.json",
                files={"adapter_config.json": b'{"a":' + b"[" * 200_000})  # fmt: skip
_broken_adapter("weights missing", FORMAT, files={"adapter_model.safetensors": None})
_broken_adapter("weights empty", FORMAT, "adapter_model.safetensors", files={"adapter_model.safetensors": b""})
_broken_adapter("weights without a tensor", FORMAT, "no tensors", files={"adapter_model.safetensors": pack("{}")})
_broken_adapter("weights without a tensor, and no targets", FORMAT, "no tensors", files={
    "adapter_model.safetensors": pack("{}"), "adapter_config.json": b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}'})  # fmt: skip
_broken_adapter("factors in F4", MISMATCH, "_proj", "F4", files={"adapter_model.safetensors": pack(
    {name: {"dtype": "F4", "shape": list(value.shape), "data_offsets": [64 * n, 64 * n + 64]}
     for n, (name, value) in enumerate(lora_tensors().items())}, bytes(64 * len(lora_tensors())))})  # fmt: skip
_broken_adapter("a record that is no JSON", FORMAT, "surgery.json", files={"surgery.json": b"{"})
_broken_adapter("a record of a later version", FORMAT, "surgery.json",
                files={"surgery.json": b'{"schema": "surgery.provenance/9", "tensors": {}}'})  # fmt: skip


def _extracted(here: Path) -> None:
    """Write a base, a fine-tune, and an adapter that knows the base it was taken from."""
    pair(here)
    done("extract-lora", "base-model", "tuned-model", "--rank", "4", "-o", "own-lora")


@refused("identity: an adapter of another base", MISMATCH, "other-model", "own-lora", QW)
def _(here: Path) -> Commands:
    _extracted(here)
    model(here / "other-model", changes={QW: base_weights()[QW] * 1.01})
    return [
        ["merge", "other-model", "own-lora", "-o", "out"],
        ["merge", "other-model", "own-lora", "-o", "out.safetensors"],
    ]


@refused("identity: an adapter on its own fine-tune", MISMATCH, "tuned-model", "own-lora", "proj.weight")
def _(here: Path) -> Commands:
    _extracted(here)
    return [["merge", "tuned-model", "own-lora", "-o", "out"]]


@refused(
    "identity: an adapter on its own fine-tune under other names", MISMATCH, "bare-model", "own-lora", "proj.weight"
)
def _(here: Path) -> Commands:
    _extracted(here)
    done("convert", "tuned-model", "--rename", "model.=", "-o", "bare-model")
    return [["merge", "bare-model", "own-lora", "-o", "out"]]


@refused("identity: an unmerge from a bare base under other names", MISMATCH, "bare-model", "own-lora")
def _(here: Path) -> Commands:
    _extracted(here)
    done("convert", "base-model", "--rename", "model.=", "-o", "bare-model")
    (here / "bare-model" / "surgery.json").unlink()
    return [["unmerge", "bare-model", "own-lora", "-o", "out"]]


@refused("identity: an adapter merged twice", MISMATCH, "merged-model", "own-lora")
def _(here: Path) -> Commands:
    _extracted(here)
    done("merge", "base-model", "own-lora", "-o", "merged-model")
    return [["merge", "merged-model", "own-lora", "-o", "out"]]


@refused("identity: an adapter named twice in one merge", MISMATCH, "own-lora")
def _(here: Path) -> Commands:
    _extracted(here)
    return [["merge", "base-model", "own-lora", "own-lora", "-o", "out"]]


@refused("identity: an unmerge of what was never merged", MISMATCH, "base-model", "own-lora")
def _(here: Path) -> Commands:
    _extracted(here)
    return [["unmerge", "base-model", "own-lora", "-o", "out"]]


@refused("identity: an unmerge of another adapter than was merged", MISMATCH, "merged-model", "style-lora", "own-lora")
def _(here: Path) -> Commands:
    _extracted(here)
    done("merge", "base-model", "own-lora", "-o", "merged-model")
    adapter(here / "style-lora")
    return [["unmerge", "merged-model", "style-lora", "-o", "out"]]


@refused("identity: an unmerge with another coefficient", MISMATCH, "own-lora", "0.5")
def _(here: Path) -> Commands:
    _extracted(here)
    done("merge", "base-model", "own-lora", "-o", "merged-model")
    return [["unmerge", "merged-model", "own-lora", "--coeff", "0.5", "-o", "out"]]


@refused("identity: an unmerge with another base", MISMATCH, "other-model", QW)
def _(here: Path) -> Commands:
    _extracted(here)
    done("merge", "base-model", "own-lora", "-o", "merged-model")
    model(here / "other-model", changes={QW: base_weights()[QW] * 1.01})
    return [["unmerge", "merged-model", "own-lora", "--base", "other-model", "-o", "out"]]


@refused("identity: an unmerge with a base of another shape", MISMATCH, "other-model", QW)
def _(here: Path) -> Commands:
    _extracted(here)
    done("merge", "base-model", "own-lora", "-o", "merged-model")
    model(here / "other-model", changes={QW: torch.ones(32, 16)})
    return [["unmerge", "merged-model", "own-lora", "--base", "other-model", "-o", "out"]]


@refused("identity: a model where an adapter belongs", USAGE, "tuned-model", "adapter")
def _(here: Path) -> Commands:
    pair(here)
    return [["merge", "base-model", "tuned-model", "-o", "out"]]


@refused("identity: an adapter where a model belongs", FORMAT, "style-lora", "adapter")
def _(here: Path) -> Commands:
    adapter(here / "style-lora")
    return [
        ["merge", "style-lora", "style-lora", "-o", "out"],
        ["info", "style-lora"],
        ["convert", "style-lora", "-o", "out"],
    ]


# --- records


def _recorded(id: str, code: int, *says: Word, change: Callable[[dict[str, Any]], Any]) -> None:
    def make(here: Path) -> Commands:
        model(here / "base-model")
        adapter(here / "style-lora")
        adapter(here / "other-lora", config={"lora_alpha": 4})
        done("merge", "base-model", "style-lora", "-o", "merged-model")
        path = here / "merged-model" / "surgery.json"
        document = json.loads(path.read_text())
        changed = change(document)
        path.write_text(json.dumps(document) if changed is None else changed)
        return [
            ["merge", "merged-model", "other-lora", "-o", "out"],
            ["unmerge", "merged-model", "style-lora", "-o", "out"],
        ]

    CASES.append(Case(f"record: {id}", code, ("merged-model", *says), make))


_recorded("no JSON", FORMAT, "surgery.json", change=lambda d: "{")
_recorded("no object", FORMAT, "surgery.json", change=lambda d: "[]")
_recorded("no schema", FORMAT, "surgery.json", change=lambda d: '{"tensors": {}}')
_recorded("tensors that are a list", FORMAT, "surgery.json", change=lambda d: d.update(tensors=[]))
_recorded("an entry that is a number", FORMAT, "surgery.json", QW, change=lambda d: d["tensors"].update({QW: 5}))
_recorded("an entry without a fingerprint", FORMAT, "surgery.json", QW, change=lambda d: d["tensors"].update({QW: {}}))
_recorded("a fingerprint that is a number", FORMAT, "surgery.json", QW,
          change=lambda d: d["tensors"].update({QW: {"fingerprint": 5, "base": 5}}))  # fmt: skip
_recorded("adapters that are a number", FORMAT, "surgery.json", change=lambda d: d.update(adapters=5))
_recorded("an adapter that touched a list of lists", FORMAT, "surgery.json",
          change=lambda d: d["adapters"][0].update(touched=[[]]))  # fmt: skip
_recorded("an adapter with an infinite coefficient", FORMAT, "surgery.json",
          change=lambda d: d["adapters"][0].update(coeff=float("inf")))  # fmt: skip
_recorded("a number of 5000 digits", FORMAT, "surgery.json", change=lambda d: f'{{"a": {"9" * 5000}}}')


def _verifying(id: str, code: int, *says: Word, change: Callable[[Path], Any]) -> None:
    def make(here: Path) -> Commands:
        model(here / "base-model")
        done("convert", "base-model", "-o", "copied-model")
        change(here / "copied-model")
        return [["verify", "copied-model"]]

    CASES.append(Case(f"verify: {id}", code, ("copied-model", *says), make))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(base_weights()[QW].numpy().tobytes()) + 77] ^= 1
    path.write_bytes(data)


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / "surgery.json").read_text())
    change(document)
    (folder / "surgery.json").write_text(json.dumps(document))


_verifying("one bit flipped", CHANGED, QW, change=lambda folder: _flip(folder / "model.safetensors"))
_verifying("a tensor missing", CHANGED, QW, change=lambda folder: (folder / "model.safetensors").write_bytes(
    save_bytes({name: value for name, value in base_weights().items() if name != QW})))  # fmt: skip
_verifying("a tensor added", CHANGED, "more.weight", change=lambda folder: (folder / "model.safetensors").write_bytes(
    save_bytes({**base_weights(), "more.weight": torch.ones(2)})))  # fmt: skip
_verifying("a record with an entry that is a number", FORMAT, "surgery.json", QW,
           change=lambda folder: _rewrite(folder, lambda d: d["tensors"].update({QW: 5})))  # fmt: skip
_verifying("a configuration of another width", CHANGED, EMBED,
           change=lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 64})))  # fmt: skip
_verifying("a configuration that is no JSON", FORMAT, "config.json",
           change=lambda folder: (folder / "config.json").write_text("{"))  # fmt: skip


# --- outputs


def _publishing(id: str, code: int, *says: Word, out: str, more: tuple[str, ...] = (), change: Any = None) -> None:
    def make(here: Path) -> Commands:
        model(here / "models" / "base-model")
        adapter(here / "style-lora")
        if change:
            change(here)
        return [
            ["merge", "models/base-model", "style-lora", "-o", out, *more],
            ["convert", "models/base-model", "-o", out, *more],
        ]

    CASES.append(Case(f"output: {id}", code, says, make))


def _file(name: str, content: bytes = b"mine") -> Callable[[Path], None]:
    def write(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)

    return write


OVER = ("--overwrite",)
_publishing("the input itself", OUTPUT, "base-model", "input", out="models/base-model")
_publishing("the input itself, overwritten", OUTPUT, "base-model", "input", out="models/base-model", more=OVER)
_publishing("the input by a longer way", OUTPUT, "base-model", "input", out="models/../models/./base-model/", more=OVER)
_publishing("the input through a link", OUTPUT, "alias", "input", out="alias", more=OVER,
            change=lambda here: (here / "alias").symlink_to("models/base-model"))  # fmt: skip
_publishing("inside the input", OUTPUT, "base-model", "input", out="models/base-model/out")
_publishing("deep inside the input", OUTPUT, "base-model", "input", out="models/base-model/new/deep/out")
_publishing("inside the input through a link", OUTPUT, "alias/out", "input", out="alias/out",
            change=lambda here: (here / "alias").symlink_to("models/base-model"))  # fmt: skip
_publishing(
    "the input's own file", OUTPUT, "model.safetensors", "input", out="models/base-model/model.safetensors", more=OVER
)
_publishing("a link to the input's own file", OUTPUT, "alias.safetensors", "input", out="alias.safetensors", more=OVER,
            change=lambda here: (here / "alias.safetensors").symlink_to("models/base-model/model.safetensors"))  # fmt: skip
_publishing("the folder that holds the input", OUTPUT, "models", "input", out="models", more=OVER)
_publishing("the working folder", OUTPUT, ".", out=".", more=OVER)
_publishing("the root of the file system", OUTPUT, "/", out="/", more=OVER)
_publishing("a folder that exists", OUTPUT, "out", "--overwrite", out="out", change=lambda here: model(here / "out"))
_publishing(
    "an empty folder that exists", OUTPUT, "out", "--overwrite", out="out", change=lambda here: (here / "out").mkdir()
)
_publishing("a file that exists", OUTPUT, "out.safetensors", "--overwrite", out="out.safetensors",
            change=_file("out.safetensors"))  # fmt: skip
_publishing("a link to nothing", OUTPUT, "out", out="out", change=lambda here: (here / "out").symlink_to("gone"))
_publishing("a file where a folder should be", OUTPUT, "out", "file", out="out", more=OVER, change=_file("out"))
_publishing("a folder where a file should be", OUTPUT, "out.safetensors", "folder", out="out.safetensors", more=OVER,
            change=lambda here: model(here / "out.safetensors"))  # fmt: skip
_publishing("a folder of somebody's own", OUTPUT, "out", out="out", more=OVER, change=_file("out/thesis.tex"))
_publishing("a repository", OUTPUT, "out", out="out", more=OVER,
            change=lambda here: (model(here / "out") / ".git").mkdir())  # fmt: skip
_publishing("below a file", IO, "notes/out", out="notes/out", change=_file("notes"))
_publishing("far below a file", IO, "notes/new/out", out="notes/new/out", change=_file("notes"))
_publishing("a name too long for the file system", IO, "x" * 200, out="x" * 300)
_publishing("an empty path", USAGE, "output", out="")
_publishing("one file in shards", USAGE, "out.safetensors", "--max-shard-size", out="out.safetensors",
            more=("--max-shard-size", "1MB"))  # fmt: skip
_publishing(
    "shards smaller than a tensor", USAGE, "weight", "--max-shard-size", out="out", more=("--max-shard-size", "1KB")
)
_publishing("more memory than allowed", IO, "--max-memory", out="out", more=("--max-memory", "1KB"))


@refused("output: the adapter that is merged", OUTPUT, "style-lora", "input")
def _(here: Path) -> Commands:
    model(here / "base-model")
    adapter(here / "style-lora")
    return [
        ["merge", "base-model", "style-lora", "-o", "style-lora", "--overwrite"],
        ["merge", "base-model", "style-lora", "-o", "style-lora/out"],
        ["merge", "base-model", "style-lora/adapter_model.safetensors", "-o", "style-lora/out.safetensors"],
    ]


@refused("output: an extraction into one of its models", OUTPUT, ("base-model", "tuned-model"), "input")
def _(here: Path) -> Commands:
    pair(here)
    return [
        ["extract-lora", "base-model", "tuned-model", "-o", "base-model", "--overwrite"],
        ["extract-lora", "base-model", "tuned-model", "-o", "tuned-model", "--overwrite"],
        ["extract-lora", "base-model", "tuned-model", "-o", "tuned-model/lora"],
    ]


@refused("output: the file that a single input is", OUTPUT, "base.safetensors", "input")
def _(here: Path) -> Commands:
    (here / "base.safetensors").write_bytes(save_bytes(base_weights()))
    (here / "alias.safetensors").symlink_to("base.safetensors")
    return [
        ["convert", "base.safetensors", "-o", "base.safetensors", "--overwrite"],
        ["convert", "alias.safetensors", "-o", "base.safetensors", "--overwrite"],
        ["convert", "base.safetensors", "-o", "./x/../base.safetensors", "--overwrite"],
    ]


@refused("output: an adapter as one file", USAGE, "out.safetensors", "folder")
def _(here: Path) -> Commands:
    pair(here)
    return [["extract-lora", "base-model", "tuned-model", "-o", "out.safetensors"]]


LOCKS: list[int] = []
"""Descriptors that hold a lock until the test ends."""


@refused("output: another run is writing it", OUTPUT, "out", "another run", "4242")
def _(here: Path) -> Commands:
    model(here / "base-model")
    (here / ".out.surgery-lock").write_text("4242")
    descriptor = os.open(here / ".out.surgery-lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    LOCKS.append(descriptor)
    return [["convert", "base-model", "-o", "out"]]


# --- command lines and configurations


def _calling(id: str, code: int, *says: Word, line: str | list[str], change: Any = None) -> None:
    def make(here: Path) -> Commands:
        pair(here)
        adapter(here / "style-lora")
        if change:
            change(here)
        return [line.split() if isinstance(line, str) else line]

    CASES.append(Case(f"call: {id}", code, says, make))


_calling("two coefficients for one adapter", USAGE, "2 coefficients", "--coeff",
         line="merge base-model style-lora --coeff 1 --coeff 2 -o out")  # fmt: skip
_calling("a coefficient that is NaN", USAGE, "coeff", line="merge base-model style-lora --coeff nan -o out")
_calling("a coefficient that is infinite", USAGE, "coeff", line="merge base-model style-lora --coeff=-inf -o out")
_calling("a coefficient that overflows", USAGE, "coeff", line="merge base-model style-lora --coeff 1e999 -o out")
_calling("a coefficient that is a word", USAGE, "coeff", line="merge base-model style-lora --coeff half -o out")
_calling(
    "an unmerge with a coefficient that is NaN", USAGE, "coeff", line="unmerge base-model style-lora --coeff nan -o out"
)
_calling("no adapter", USAGE, "merge --help", line="merge base-model -o out")
_calling("no output", USAGE, "--output", line="merge base-model style-lora")
_calling("no such command", USAGE, "mrege", "merge", line="mrege base-model style-lora -o out")
_calling("no such option", USAGE, "--coef", line="merge base-model style-lora --coef 1 -o out")
_calling("no such model", USAGE, "no-model", line="merge no-model style-lora -o out")
_calling("no such adapter", USAGE, "no-lora", line="merge base-model no-lora -o out")
_calling("a Hub name that is not here", USAGE, "meta-llama/Llama-3-8B", line="convert meta-llama/Llama-3-8B -o out")
_calling("a scheme that is not read", USAGE, "s3://", line="convert s3://bucket/model -o out")
_calling("an empty path", USAGE, "path", line=["convert", "", "-o", "out"])
_calling("a path of 5,000 characters", USAGE, "xxxx", line=["convert", "x" * 5_000, "-o", "out"])
_calling("the home of nobody", USAGE, "~nobody-at-all", line="convert ~nobody-at-all/model -o out")
_calling("an output in the home of nobody", USAGE, "~nobody-at-all", line="convert base-model -o ~nobody-at-all/out")
_calling("a dtype that surgery does not compute with", USAGE, "I8", line="convert base-model --dtype I8 -o out")
_calling("a device that is not there", USAGE, "warp", line="extract-lora base-model tuned-model --device warp -o out")
_calling("a device without memory", USAGE, "meta", line="extract-lora base-model tuned-model --device meta -o out")
_calling("a seed that is a word", USAGE, "seed", line="extract-lora base-model tuned-model --seed x -o out")
_calling("no jobs", USAGE, "jobs", line="convert base-model --jobs 0 -o out")
_calling("a size that is none", USAGE, "5XB", line="convert base-model --max-shard-size 5XB -o out")
_calling(
    "a size that is infinite", USAGE, "max-shard-size", line=f"convert base-model --max-shard-size {'9' * 400}GB -o out"
)
_calling("a pattern that is no expression", USAGE, "re:(", line="convert base-model --drop re:( -o out")
_calling("everything dropped", USAGE, "--drop", line="convert base-model --drop * -o out")
_calling("a rename without an equals sign", USAGE, "--rename", line="convert base-model --rename lm_head -o out")
_calling(
    "a name map that is not there", USAGE, "map.json", line="merge base-model style-lora --name-map map.json -o out"
)
_calling("a name map that is no JSON", USAGE, "map.json", line="merge base-model style-lora --name-map map.json -o out",
         change=_file("map.json", b"{"))  # fmt: skip
_calling("a name map of numbers", USAGE, "map.json", line="merge base-model style-lora --name-map map.json -o out",
         change=_file("map.json", b'{"a": 1}'))  # fmt: skip
_calling("a name map that nests too deeply", USAGE, "map.json", line="merge base-model style-lora --name-map map.json -o out",
         change=_file("map.json", b"[" * 200_000))  # fmt: skip
_calling("a configuration that is no JSON", FORMAT, "config.json", line="info base-model",
         change=_file("base-model/config.json", b"{"))  # fmt: skip
_calling("a configuration that is a list", FORMAT, "config.json", line="info base-model",
         change=_file("base-model/config.json", b"[1]"))  # fmt: skip
_calling("a configuration with a number of 5000 digits", FORMAT, "config.json", line="info base-model",
         change=_file("base-model/config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"))  # fmt: skip
_calling("a configuration that nests too deeply", FORMAT, "config.json", line="info base-model",
         change=_file("base-model/config.json", b'{"a":' + b"[" * 200_000))  # fmt: skip
_calling("originals that are malformed", FORMAT, "originals", line="merge base-model style-lora -o out",
         change=lambda here: (
             _file("base-model/.surgery/originals", b"PK\x03\x04nonsense")(here),
             _file("base-model/surgery.json", b'{"schema": "surgery.provenance/1", "tensors": {}}')(here)))  # fmt: skip


# --- what must be accepted


def accepted(
    id: str, check: Callable[[Path, Result], None]
) -> Callable[[Callable[[Path], Commands]], Callable[[Path], Commands]]:  # fmt: skip
    """Register the decorated builder as a twin."""

    def register(make: Callable[[Path], Commands]) -> Callable[[Path], Commands]:
        TWINS.append(Twin(id, make, check))
        return make

    return register


def _copied(source: str, target: str = "out.safetensors") -> Callable[[Path, Result], None]:
    def check(here: Path, result: Result) -> None:
        assert unpack((here / target).read_bytes()) == unpack((here / source).read_bytes())

    return check


def _twin(id: str, data: bytes) -> None:
    def make(here: Path) -> Commands:
        (here / "odd.safetensors").write_bytes(data)
        return [["info", "odd.safetensors", "--tensors"], ["convert", "odd.safetensors", "-o", "out.safetensors"]]

    TWINS.append(Twin(id, make, _copied("odd.safetensors")))


def _all_dtypes() -> bytes:
    sizes = {
        "BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    }  # fmt: skip
    header, end = {}, 0
    for dtype, bits in sizes.items():
        header[f"t.{dtype}.weight"] = {"dtype": dtype, "shape": [4, 8], "data_offsets": [end, end + 4 * bits]}
        end += 4 * bits
    return pack(header, bytes(number * 37 % 256 for number in range(end)))


# As a number, each of these lengths starts with the bytes of a pickle.
for _length in (640, 896, 1152, 1408, 66_176):
    _twin(f"a header of {_length:,} bytes", pack(json.dumps(one()).ljust(_length), FOUR))
_twin("header in another order than the data", pack(two((16, 32), (0, 16)), FOUR + bytes(16)))
_twin("tensors of no size", pack({**one(), "a": {**ENTRY, "shape": [0, 4], "data_offsets": [16, 16]},
                                  "b": {**ENTRY, "shape": [4, 0], "data_offsets": [0, 0]}}, FOUR))  # fmt: skip
_twin("only a tensor of no size", pack({"a": {**ENTRY, "shape": [0], "data_offsets": [0, 0]}}))
_twin("scalars", pack({"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, FOUR[:4]))
_twin("every dtype there is, with bytes that none would write", _all_dtypes())
_twin("a header padded with a megabyte of spaces", pack(json.dumps(one()) + " " * 1_000_000, FOUR))
_twin("32 dimensions", pack(one(shape=[1] * 31 + [4]), FOUR))
_twin("names that look like paths", pack({"../../etc/passwd": ENTRY, "/dev/null": {**ENTRY, "data_offsets": [16, 32]}},
                                         FOUR + FOUR))  # fmt: skip
_twin("names of escapes and line breaks", pack({"\x1b[31mred\nsurgery: error: x": ENTRY}, FOUR))
_twin("names that differ by case or by composition", pack(
    {name: {**ENTRY, "data_offsets": [16 * n, 16 * n + 16]} for n, name in enumerate(
        ("a", "A", unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")))}, FOUR * 4))  # fmt: skip
_twin("names with digits that are no numbers", pack(
    {"h.².weight": ENTRY, "h.٣.weight": {**ENTRY, "data_offsets": [16, 32]}}, FOUR + FOUR))  # fmt: skip
_twin("a name of 1024 bytes", pack({"a" * 1024: ENTRY}, FOUR))
_twin("null for metadata", pack({"__metadata__": None, **one()}, FOUR))


def _merged_exactly(folder: str) -> Callable[[Path, Result], None]:
    def check(here: Path, result: Result) -> None:
        merged, base, parts = (
            load_bytes((here / folder / "model.safetensors").read_bytes()),
            base_weights(),
            lora_tensors(),
        )
        expected = (base[QW].double() + 2 * parts[B].double() @ parts[A].double()).float()
        assert torch.equal(merged[QW], expected)
        assert torch.equal(merged[NORM], base[NORM])

    return check


_FOLDERS = {"spaces": "my base model", "CJK": "模型 ベース", "line breaks": "a\nb\tc", "quotes": "it's \"a\" $(model);",
            "a leading dash": "-base"}  # fmt: skip
if sys.platform == "linux":  # other systems have no such names
    _FOLDERS["bytes that are no UTF-8"] = os.fsdecode(b"caf\xe9")

for _what, _folder in _FOLDERS.items():

    def _strange_folder(here: Path, folder: str = _folder) -> Commands:
        model(here / folder)
        adapter(here / "lora" / folder)
        return [
            ["info", "--", folder],
            ["merge", "-o", f"./{folder}-out", "--", folder, f"lora/{folder}"],
            ["verify", "--", f"./{folder}-out"],
        ]

    TWINS.append(Twin(f"folders named with {_what}", _strange_folder, _merged_exactly(f"{_folder}-out")))


def snapshot(here: Path, files: dict[str, bytes]) -> Path:
    """Write a Hugging Face cache whose snapshot links into its blobs."""
    repo = here / "hub" / "models--org--name"
    folder = repo / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, (name, content) in enumerate(files.items()):
        blob = f"{number:064x}"
        (repo / "blobs" / blob).write_bytes(content)
        (folder / name).symlink_to(f"../../blobs/{blob}")
    return folder.relative_to(here)


def _model_files() -> dict[str, bytes]:
    return {"model.safetensors": save_bytes(base_weights()), "config.json": json.dumps(CONFIG).encode()}


def _adapter_files() -> dict[str, bytes]:
    return {
        "adapter_model.safetensors": save_bytes(lora_tensors()),
        "adapter_config.json": json.dumps(LORA_CONFIG).encode(),
    }


@accepted("snapshot of a Hugging Face cache", _merged_exactly("out"))
def _(here: Path) -> Commands:
    folder = str(snapshot(here, _model_files()))
    adapter(here / "style-lora")
    return [["info", folder], ["merge", folder, "style-lora", "-o", "out"]]


@refused("link: a cache's folder in place of a snapshot's", FORMAT, "models--org--name", "snapshots/0123abcd")
def _(here: Path) -> Commands:
    return _reading(str(snapshot(here, _model_files()).parent.parent))[:3]


def _renamed(names: dict[str, str]) -> Callable[[Path], Commands]:
    """Shard a model into files of other names, and read what is written of it."""

    def make(here: Path) -> Commands:
        folder = sharded(here / "base-model", lambda homes: homes.update({n: names[f] for n, f in homes.items()}))
        for old, new in names.items():
            if len(set(names.values())) == 1:
                (folder / old).unlink()
            else:
                (folder / old).rename(folder / new)
        if len(set(names.values())) == 1:
            (folder / names[SHARDS[0]]).write_bytes(save_bytes(base_weights()))
        adapter(here / "style-lora")
        return [["convert", "base-model", "-o", "copy"], ["verify", "copy"], ["merge", "copy", "style-lora", "-o", "out"],
                ["verify", "out"], ["diff", "base-model", "copy", "--exit-code"]]  # fmt: skip

    return make


def _indexed_as_loaders_know(here: Path, result: Result) -> None:
    assert {path.name for path in (here / "out").glob("*.safetensors*")} == {
        "weights_b.safetensors", "a-05-part.safetensors", INDEX,
    }  # fmt: skip


accepted("index: all tensors in one file, as MLX writes it", _merged_exactly("out"))(
    _renamed(dict.fromkeys(SHARDS, "model.safetensors"))
)
accepted("index: shards whose names bear no numbers", _indexed_as_loaders_know)(
    _renamed({SHARDS[0]: "weights_b.safetensors", SHARDS[1]: "a-05-part.safetensors"})
)


@accepted("adapter in a Hugging Face cache", _merged_exactly("out"))
def _(here: Path) -> Commands:
    model(here / "base-model")
    return [["merge", "base-model", str(snapshot(here, _adapter_files())), "-o", "out"]]


@accepted("adapter's file in a Hugging Face cache", _merged_exactly("out"))
def _(here: Path) -> Commands:
    model(here / "base-model")
    path = snapshot(here, _adapter_files()) / "adapter_model.safetensors"
    return [["merge", "base-model", str(path), "-o", "out"]]


@accepted("pickled file in a Hugging Face cache", _copied("expected.safetensors"))
def _(here: Path) -> Commands:
    (here / "expected.safetensors").write_bytes(save_bytes(base_weights()))
    path = snapshot(here, {"pytorch_model.bin": saved(base_weights())}) / "pytorch_model.bin"
    return [["convert", str(path), "-o", "out.safetensors"]]


@accepted("pickle with wrappers, ties and transposed views", _copied("expected.safetensors"))
def _(here: Path) -> Commands:
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"embed.weight": weight, "head.weight": weight, "turned.weight": weight.t(), "row.weight": weight[1]}
    (here / "expected.safetensors").write_bytes(
        save_bytes({name: value.contiguous().clone() for name, value in state.items()})
    )
    (here / "model.ckpt").write_bytes(saved({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}))
    return [["convert", "model.ckpt", "-o", "out.safetensors"]]


def _says(*words: str) -> Callable[[Path, Result], None]:
    def check(here: Path, result: Result) -> None:
        assert all(word in result.out + result.err for word in words)

    return check


@accepted("tensors that only the base has are reported", _says("note: ", "lm_head.weight"))
def _(here: Path) -> Commands:
    pair(here, **{"lm_head.weight": None})
    return _extracting(here)


@accepted("tensors that only the fine-tune has are reported", _says("note: ", "score.weight"))
def _(here: Path) -> Commands:
    pair(here, **{"score.weight": torch.ones(2, 32)})
    return _extracting(here)


@accepted("a fine-tune in another dtype", _says("wrote out"))
def _(here: Path) -> Commands:
    model(here / "base-model", {name: value.bfloat16() for name, value in base_weights().items()})
    model(here / "tuned-model", tuned_weights())
    return _extracting(here)


@accepted("a rank above what a matrix has", _says("wrote out"))
def _(here: Path) -> Commands:
    pair(here)
    return _extracting(here, "--rank", "1000000000")


@accepted("NaN in a tensor that a merge does not touch", lambda here, result: None)
def _(here: Path) -> Commands:
    model(here / "base-model", changes={NORM: _with(base_weights()[NORM], float("nan"))})
    adapter(here / "style-lora")
    return [["merge", "base-model", "style-lora", "-o", "out"], ["verify", "out"]]


def _valid_json(here: Path, result: Result) -> None:
    json.loads(result.out, parse_constant=lambda word: (_ for _ in ()).throw(AssertionError(word)))


@accepted("NaN and Inf in a comparison", _valid_json)
def _(here: Path) -> Commands:
    pair(here, **{NORM: _with(base_weights()[NORM], float("nan")), QW: _with(base_weights()[QW], float("inf"))})
    return [["diff", "base-model", "tuned-model"], ["diff", "base-model", "tuned-model", "--json"]]


@accepted("a lone surrogate and Infinity in a configuration", _valid_json)
def _(here: Path) -> Commands:
    strange = {
        "model_type": "\ud800", "time_step_limit": [0.0, float("inf")], "num_key_value_heads": float("nan"),
        "torch_dtype": "float32",
    }  # fmt: skip
    model(here / "base-model", config=strange)
    return [
        ["info", "base-model"],
        ["convert", "base-model", "--dtype", "BF16", "-o", "out"],
        ["info", "out", "--json"],
    ]


@accepted("a lone surrogate in a record", lambda here, result: None)
def _(here: Path) -> Commands:
    _extracted(here)
    done("merge", "base-model", "own-lora", "-o", "merged-model")
    record = here / "merged-model" / "surgery.json"
    document = json.loads(record.read_bytes())
    document["adapters"][0].update(name="\ud800")
    record.write_bytes(provenance.encode(provenance.sealed(document)))
    adapter(here / "style-lora")
    return [["merge", "merged-model", "style-lora", "-o", "out"], ["verify", "out"]]


def _restored(here: Path, result: Result) -> None:
    once, none = (load_bytes((here / name / "model.safetensors").read_bytes()) for name in ("once", "none"))
    merged = load_bytes((here / "merged-model" / "model.safetensors").read_bytes())
    for name, value in base_weights().items():
        assert torch.allclose(none[name], value, atol=1e-6)
        assert torch.allclose(once[name], merged[name], atol=1e-6)


@accepted("an adapter merged twice comes out once at a time", _restored)
def _(here: Path) -> Commands:
    _extracted(here)
    done("merge", "base-model", "own-lora", "-o", "merged-model")
    return [
        ["merge", "merged-model", "own-lora", "--allow-base-mismatch", "-o", "twice"],
        ["unmerge", "twice", "own-lora", "-o", "once"],
        ["unmerge", "once", "own-lora", "-o", "none"],
    ]


@accepted("an unmerge without a record, of an adapter that left most weights alone", _says("wrote out"))
def _(here: Path) -> Commands:
    model(here / "base-model")
    model(here / "tuned-model", changes={f"{UP}.weight": tuned_weights()[f"{UP}.weight"]})
    done("extract-lora", "base-model", "tuned-model", "--rank", "4", "-o", "own-lora")
    done("merge", "base-model", "own-lora", "-o", "merged-model")
    (here / "merged-model" / "surgery.json").unlink()
    return [["unmerge", "merged-model", "own-lora", "-o", "out"]]


@accepted("remains of a run that was killed", _copied("base-model/model.safetensors", "out/model.safetensors"))
def _(here: Path) -> Commands:
    model(here / "base-model")
    (here / ".out.surgery-tmp").mkdir()
    (here / ".out.surgery-tmp" / "model.safetensors").write_bytes(b"half")
    (here / ".out.surgery-lock").write_text("4242")
    return [["convert", "base-model", "-o", "out"]]


@accepted("an index without sizes", _copied("base-model/" + SHARDS[1], "out/" + SHARDS[1]))
def _(here: Path) -> Commands:
    sharded(here / "base-model")
    return [["convert", "base-model", "-o", "out"]]
