"""Publishing: whatever stops a run, its output is the old one or the new one, whole, and nothing else stays behind.

Run as a script, this file is the driver of the fault sweeps: it imports surgery once and forks a child for every fault
at every system call that the writer makes. What it finds is judged by :func:`complaints`, and the judge is itself tried
on a writer that publishes in place. The oracle of what an output holds is the official safetensors reader.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import functools
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import safetensors

from surgery import writer
from surgery.cli import main
from surgery.sources.files import OpenFile

# --- models


def save(path, tensors):
    """Write a safetensors file by hand: name → (dtype, shape, bytes)."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(data for _, _, data in tensors.values()))


def floats(draw, *shape):
    return "F32", shape, draw.normal(0, 0.02, shape).astype("<f4").tobytes()


def model(folder, seed, shards):
    """Write a model of a few kilobytes with everything that travels with one."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for layer in range(2):
        tensors[f"layers.{layer}.q_proj.weight"] = floats(draw, 8, 8)
        tensors[f"layers.{layer}.norm.weight"] = floats(draw, 8)
    tensors["embed_tokens.weight"] = floats(draw, 16, 8)
    tensors["position_ids"] = ("I64", (1, 4), draw.integers(0, 99, 4).tobytes())
    folder.mkdir()
    names = [f"model-{k:05d}-of-{shards:05d}.safetensors" for k in range(1, shards + 1)]
    names = names if shards > 1 else ["model.safetensors"]
    weight_map = {name: names[k * shards // len(tensors)] for k, name in enumerate(tensors)}
    for file in names:
        save(folder / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    if shards > 1:
        index = {"metadata": {"total_size": sum(len(t[2]) for t in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"seed": seed}))
    return folder


def adapter(folder):
    """Write a LoRA adapter that also replaces a norm, so that a merge keeps an original."""
    draw = np.random.default_rng(7)
    stem = "base_model.model.layers"
    folder.mkdir()
    save(
        folder / "adapter_model.safetensors",
        {
            f"{stem}.0.norm.weight": floats(draw, 8),
            f"{stem}.0.q_proj.lora_A.weight": floats(draw, 2, 8),
            f"{stem}.0.q_proj.lora_B.weight": floats(draw, 8, 2),
            f"{stem}.1.q_proj.lora_A.weight": floats(draw, 2, 8),
            f"{stem}.1.q_proj.lora_B.weight": floats(draw, 8, 2),
        },
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["0.norm"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def large_model(folder, seed, megabytes):
    folder.mkdir()
    data = random.Random(seed).randbytes(1 << 20)
    tensors = {f"layers.{k}.weight": ("U8", (1 << 20,), data[k:] + data[:k]) for k in range(megabytes)}
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    return folder


# --- looking at outputs


def loaded(out):
    """Load a checkpoint with the official reader. Raises where a loader would fail or take stale weights."""
    if out.is_file():
        return dict(sorted((name, _plain(item)) for name, item in safetensors.deserialize(out.read_bytes())))
    files = {path.name for path in out.iterdir() if path.name.endswith(".safetensors")}
    weight_map = dict.fromkeys([], "")
    for index in out.glob("*.index.json"):
        weight_map |= json.loads(index.read_text())["weight_map"]
    if files != (set(weight_map.values()) or files) or len(files) < 1 or (not weight_map and len(files) > 1):
        raise ValueError(f"weight files {sorted(files)} beside an index of {sorted(set(weight_map.values()))}")
    tensors = {}
    for file in files:
        for name, item in safetensors.deserialize((out / file).read_bytes()):
            if name in tensors or weight_map.get(name, file) != file:
                raise ValueError(f"{name} is in {file} too")
            tensors[name] = _plain(item)
    if weight_map and tensors.keys() != weight_map.keys():
        raise ValueError("the index and its files name different tensors")
    json.loads((out / "config.json").read_text())
    return dict(sorted(tensors.items()))


def _plain(item):
    return item["dtype"], tuple(item["shape"]), bytes(item["data"])


def contents(out):
    """Read every file of an output, byte for byte."""
    if not out.is_dir():
        return {"": out.read_bytes()}
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def remains(folder, out, inputs):
    """List what lies in ``folder`` that is neither an input nor the output nor a folder around it."""
    keep = [folder / name for name in inputs] + [out]
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not any(path.is_relative_to(kept) for kept in keep) and not (out.exists() and out.is_relative_to(path))
    )


# --- the driver: one fault, one forked child


class Tap:
    """Stands between the writer and the system: counts calls, and does something at the ``at``-th."""

    CALLS = ("open", "mkdir", "write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "rename", "replace",
             "unlink", "rmdir")  # fmt: skip
    FULL_DISK = ("open to create", "mkdir", "write", "pwrite", "rewrite", "ftruncate", "posix_fallocate", "fsync",
                 "rename", "replace", "renameat2")  # fmt: skip
    """Calls that a full disk, or a quota, can fail."""
    STRUCK: ClassVar = {
        "torn": {"write", "pwrite", "rewrite"},
        "ENOSPC": FULL_DISK,
        "EIO": {*CALLS, *FULL_DISK, "reopen"},
        "short": set(),
    }
    RENAMES = ("rename", "replace", "renameat2")

    def __init__(self, mode, at):
        self.mode = mode
        self.at = at
        self.calls = []
        self.unsynced = []
        self._armed = False
        self._paths = {}
        self._dirty = set()
        self._staging = self._parent = None

    def install(self, *, exchange):
        for name in self.CALLS:
            setattr(os, name, self._tapped(name, getattr(os, name)))
        writer.open = self._tapped("reopen", lambda *args: Rewriter(self, *args))
        rename2 = writer._rename2
        writer._rename2 = self._tapped("renameat2", rename2) if exchange else lambda *args: False
        enter = writer.Publication.__enter__

        def armed(publication):
            self._armed = True
            self._staging, self._parent = publication.staging, publication.out.parent
            return enter(publication)

        writer.Publication.__enter__ = armed

    def _tapped(self, name, real):
        def call(*args, **options):
            if not self._armed:
                return real(*args, **options)
            kind = self._kind(name, args)
            self.calls.append(kind)
            if len(self.calls) == self.at:
                self._strike(kind, real, args)
            if name == "pwrite" and self.mode == "short":
                args = (args[0], args[1][:7], args[2])
            self._follow(kind, args)
            if name == "fsync":
                return None  # a killed process loses nothing that the kernel has: only the order matters here
            result = real(*args, **options)
            if name == "open":
                self._paths[result] = str(args[0])
            return result

        return call

    @staticmethod
    def _kind(name, args):
        if name == "open" and args[1] & os.O_CREAT:
            return "open to create"
        return "mkdir again" if name == "mkdir" and os.path.isdir(args[0]) else name

    def _strike(self, kind, real, args):
        if self.mode == "torn" and kind in ("write", "pwrite", "rewrite"):
            real(args[0], args[1][: len(args[1]) // 2], *args[2:])
        if self.mode in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.mode in ("SIGTERM", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, self.mode))
        elif self.mode in ("ENOSPC", "EIO"):
            code = getattr(errno, self.mode)
            raise OSError(code, os.strerror(code))

    def _follow(self, kind, args):
        """Keep track of what a power loss would take: bytes that were not synced, names whose folder was not."""
        if kind in ("pwrite", "write"):
            self._dirty.add(self._paths.get(args[0]))
        elif kind in ("reopen", "rewrite"):
            self._dirty.add(str(args[0]))
        elif kind in ("open to create", "mkdir"):
            self._dirty |= {str(args[0]), os.path.dirname(args[0])}
        elif kind == "fsync":
            self._dirty.discard(self._paths.get(args[0]))
        elif kind in self.RENAMES and self._leaves_staging(*map(str, args[:2])):
            self.unsynced += sorted(path for path in self._dirty if path and path.startswith(str(self._staging)))
            self._dirty.add(os.path.dirname(args[1]))

    def _leaves_staging(self, source, target):
        """Tell the rename that publishes from those inside the staging folder, by which the journal enters files."""
        inside = f"{self._staging}/"
        return source.startswith(str(self._staging)) and not target.startswith(inside)

    def finish(self):
        """Add the folders whose new names were not synced by the end."""
        over = {path for path in self._dirty if path and Path(path).is_dir() and self._parent.is_relative_to(path)}
        self.unsynced += sorted(over)


class Rewriter:
    """A file that was opened again, tapped."""

    def __init__(self, tap, path, mode):
        self._file = open(path, mode)  # noqa: SIM115  closed with the context
        self._path = path
        self._write = tap._tapped("rewrite", lambda path, data: self._file.write(data) and self._file.flush())

    def write(self, data):
        self._write(self._path, data)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self._file.close()


class InPlace(writer.Publication):
    """A deliberately naive writer: it puts each file into the output as it goes."""

    def __enter__(self):
        super().__enter__()
        os.rmdir(self.staging)
        self.staging = self.out
        self.out.mkdir(exist_ok=True)
        return self

    def create(self, name, size):
        (self.staging / name).unlink(missing_ok=True)
        return super().create(name, size)

    def commit(self):
        for stale in self.out.glob("model.safetensors"):
            stale.unlink()

    def __exit__(self, *details):
        self._lock.release()


@dataclasses.dataclass
class Job:
    """One command whose faults are explored, in a folder that holds its inputs."""

    folder: str
    argv: list[str]
    out: str
    inputs: list[str]
    modes: list[str]
    old: str | None = None
    """Where a copy of the old output lies; ``None`` for a fresh one."""
    exchange: bool = True
    naive: bool = False
    stride: int = 1
    """Strike at every ``stride``-th call, and at those around the last rename."""


class Driver:
    def __init__(self, job):
        self.job = job
        self.folder = Path(job.folder)
        self.out = self.folder / job.out
        self.old = contents(Path(job.old)) if job.old else None
        self.old_tensors = loaded(Path(job.old)) if job.old else None
        self.inputs = {name: contents(self.folder / name) for name in job.inputs}
        self.new = self.new_tensors = None

    def explore(self):
        whole = self._whole_run()
        calls = whole["calls"]
        found = {"calls": calls, "unsynced": whole["unsynced"], "points": []}
        for mode in self.job.modes:
            relevant = Tap.STRUCK.get(mode, set(calls))
            for at, call in enumerate(calls, 1):
                chosen = at % self.job.stride == 0 or abs(at - self._published_by(calls)) <= 2
                if call in relevant and chosen:
                    found["points"].append(self._point(mode, at, calls))
            # The loop's end: one call further, nothing is left to strike at.
            beyond = self._point(mode, len(calls) + 1, calls)
            assert (beyond["code"], beyond["state"], beyond["remains"]) == (0, "new", []), beyond
        return found

    def _whole_run(self):
        self._reset()
        whole = self._attempt(self.job.argv, "none", 0)
        assert whole["code"] == 0, whole
        self.new, self.new_tensors = contents(self.out), loaded(self.out)
        return whole

    @staticmethod
    def _published_by(calls):
        return max((at for at, call in enumerate(calls, 1) if call in Tap.RENAMES), default=len(calls))

    def _point(self, mode, at, calls):
        self._reset()
        argv = self.job.argv
        point = {"mode": mode, "at": at, "call": calls[at - 1] if at <= len(calls) else "none"}
        point |= {"published": at > self._published_by(calls), **self._attempt(argv, mode, at), **self._look()}
        if mode in ("kill", "torn") or point["state"] != "old" or point["remains"]:
            again = argv if self.job.old or point["state"] == "old" else [*argv, "--overwrite"]
            point["rerun"] = {**self._attempt(again, "none", 0), **self._look()}
        return point

    def _reset(self):
        for path in self.folder.iterdir():
            if path.name not in self.job.inputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.job.old:
            copy = shutil.copytree if Path(self.job.old).is_dir() else shutil.copy
            copy(self.job.old, self.out)

    def _look(self):
        intact = all(contents(self.folder / name) == before for name, before in self.inputs.items())
        return {
            "state": self._state(),
            "remains": remains(self.folder, self.out, self.job.inputs),
            "inputs_intact": intact,
        }

    def _state(self):
        aside = self.out.with_name(f".{self.out.name}.surgery-old")
        if not os.path.lexists(self.out):
            if self.old is None:
                return "old"
            return "aside" if aside.exists() and contents(aside) == self.old else "gone"
        try:
            tensors = loaded(self.out)
        except (safetensors.SafetensorError, ValueError, OSError, KeyError) as error:
            return f"unloadable: {error}"
        if (tensors, contents(self.out)) == (self.old_tensors, self.old):
            return "old"
        return "new" if (tensors, contents(self.out)) == (self.new_tensors, self.new) else "mixed"

    def _attempt(self, argv, mode, at):
        """Run the command line in a forked child."""
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as told:
            child = os.fork()
            if child == 0:
                self._child(argv, Tap(mode, at), said.fileno(), told.fileno())
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            said.seek(0)
            told.seek(0)
            return {"code": code, "said": said.read().decode(), **json.loads(told.read() or b"{}")}

    def _child(self, argv, tap, said, told):
        signal.alarm(60)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(self.folder)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if self.job.naive:
            importlib.import_module("surgery.execute").Publication = InPlace
        report = os.write  # untapped
        tap.install(exchange=self.job.exchange)
        code = 99
        try:
            main(argv)
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stderr.flush()
            tap.finish()
            report(told, json.dumps({"calls": tap.calls, "unsynced": tap.unsynced}).encode())
            os._exit(code)


EXIT = {"kill": -9, "torn": -9, "ENOSPC": 7, "EIO": 8, "SIGTERM": 143, "SIGINT": 130, "short": 0}


def complaints(points):
    """Judge what a driver found. An empty list is a clean bill."""
    found = []
    for point in points:
        mode, where = point["mode"], f"{point['mode']} at call {point['at']} ({point['call']})"
        killed, failed = mode in ("kill", "torn"), mode in ("ENOSPC", "EIO")

        def say(what, where=where, point=point):
            found.append(f"{where}: {what}; exit {point['code']}, it said {point['said']!r}")

        wanted = ["old", "new"] if killed else ["new"] if point["published"] else ["old"]
        if point["state"] not in wanted and not (killed and point["state"] == "aside"):
            say(f"the output is {point['state']}, not {' or '.join(wanted)}")
        if not point["inputs_intact"]:
            say("an input changed")
        if point["code"] not in ({EXIT[mode], 0, 8} if point["published"] and not killed else {EXIT[mode]}):
            say(f"exit {EXIT[mode]} was due")
        # What cannot be cleared away once the output is there, the next run on it clears.
        clearing = point["call"] in ("unlink", "rmdir", "open") and point["published"]
        if point["remains"] and not killed and not clearing:
            say(f"left {point['remains']}")
        if "Traceback" in point["said"] or point["said"].strip().count("\n"):
            say("more than one line")
        if failed and point["code"] and not point["said"].startswith("surgery: error: "):
            say("no error line")
        if "nothing was published" in point["said"] and point["state"] == "new":
            say("what it says is not so")
        rerun = point.get("rerun")  # there is none where all is as it was before the first run
        if rerun and (
            (rerun["code"], rerun["state"], rerun["remains"]) != (0, "new", []) or not rerun["inputs_intact"]
        ):
            say(f"the next run gave {rerun['code']}, {rerun['state']}, left {rerun['remains']}, said {rerun['said']!r}")
    return found


# --- sweeps


def arrange(folder, kind):
    """Lay out the inputs and the old output of one kind of run."""
    work = folder / "work"
    work.mkdir(parents=True)
    model(work / "input", 1, shards=2)
    job = Job(str(work), [], "out", ["input"], [])
    if kind == "merge into a folder":
        adapter(work / "adapter")
        job.inputs.append("adapter")
        job.stride = 3
        job.argv = ["merge", "input", "adapter", "--overwrite"]
    else:
        job.argv = ["convert", "input"]
    if kind == "fresh folder":
        job.out = "made/here/out"
    elif kind == "file over a file":
        job.out = "out.safetensors"
        job.argv.append("--overwrite")
        old = {"other.weight": floats(np.random.default_rng(3), 40, 8)}
        save(folder / "old.safetensors", old)
        job.old = str(folder / "old.safetensors")
    else:
        job.old = str(model(folder / "old", 2, shards=1))
    if kind.startswith(("folder over", "without")):
        job.argv.append("--overwrite")
    job.exchange = kind != "without an exchange"
    job.argv += ["-o", job.out, "--jobs", "1", "-q"]
    return job


KINDS = {
    "folder over a folder": ["kill", "torn", "ENOSPC", "EIO", "SIGTERM", "SIGINT", "short"],
    "file over a file": ["kill", "torn", "ENOSPC", "EIO", "short"],
    "fresh folder": ["kill", "ENOSPC", "EIO", "SIGTERM"],
    "without an exchange": ["kill", "EIO", "SIGTERM"],
    "merge into a folder": ["kill", "ENOSPC"],
}
SWEEPS = [(kind, mode) for kind, modes in KINDS.items() for mode in modes if mode != "short"]


def drive(job):
    command = [sys.executable, __file__, json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def sweep():
    """Explore a kind of run once, with all its modes: in memory, where there is such a folder, for speed."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:

        @functools.cache
        def explored(kind):
            job = arrange(Path(folder) / kind.replace(" ", "-"), kind)
            job.modes = KINDS[kind]
            return drive(job)

        yield explored


@pytest.mark.parametrize(("kind", "mode"), SWEEPS, ids=lambda value: value.replace(" ", "-"))
def test_a_fault_at_any_call_leaves_the_old_or_the_new_output_whole(sweep, kind, mode):
    points = [point for point in sweep(kind)["points"] if point["mode"] == mode]
    assert len(points) >= (8 if mode == "torn" else 15)
    assert {point["published"] for point in points} == ({False} if mode == "torn" else {False, True})
    found = complaints(points)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_synced_before_it_takes_the_outputs_name_and_the_name_after(sweep, kind):
    assert sweep(kind)["unsynced"] == []


def test_the_judge_sees_a_writer_that_publishes_in_place(tmp_path):
    job = arrange(tmp_path, "folder over a folder")
    shutil.rmtree(job.old)
    model(Path(job.old), 2, shards=2)  # in files of the same names
    job.naive, job.modes = True, ["torn"]
    points = drive(job)["points"]
    bad = [point for point in points if point["state"] not in ("old", "new")]
    assert len(bad) >= 5
    assert any(point["state"] == "mixed" for point in bad)
    assert any(point["state"].startswith("unloadable") for point in bad)
    assert len(complaints(points)) >= len(bad)


def test_the_new_output_of_the_sweeps_is_the_right_one(tmp_path):
    job = arrange(tmp_path, "folder over a folder")
    drive(job)
    assert loaded(Path(job.folder) / job.out) == loaded(Path(job.folder) / "input")


def test_an_output_that_stepped_aside_comes_back_even_for_a_run_that_may_not_replace_it(tmp_path):
    job = arrange(tmp_path, "without an exchange")
    work = Path(job.folder)
    os.rename(job.old, work / ".out.surgery-old")  # as a kill between the two renames leaves it
    (work / ".out.surgery-tmp").mkdir()
    (work / ".out.surgery-tmp" / "model.safetensors").write_bytes(b"half")
    before = contents(work / ".out.surgery-old")
    done = surgery("convert", "input", "-o", "out", cwd=work)
    assert (done.returncode, done.stderr.count("\n")) == (7, 1)
    assert "exists already" in done.stderr
    assert contents(work / "out") == before
    assert remains(work, work / "out", ["input"]) == []


# --- real processes


def surgery(*arguments, cwd, **options):
    command = [sys.executable, "-m", "surgery", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60, **options)


def start(*arguments, cwd, seconds_a_write=0.0):
    """Start a command, by wish with slow writes, and its signals as a terminal gives them."""
    slow = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "write = os.pwrite\n"
        f"os.pwrite = lambda *a: (time.sleep({seconds_a_write}), write(*a))[1]\n"
        "from surgery.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", slow, *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)


def test_kills_spread_over_a_run_of_a_large_model_leave_the_old_or_the_new_output(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    large_model(work / "input", 1, 64)
    command = ("convert", "input", "-o", "out", "--overwrite", "--max-shard-size", "9MB", "-q")
    assert surgery(*command, cwd=work).returncode == 0
    new = contents(work / "out")
    assert loaded(work / "out") == loaded(work / "input")
    shutil.rmtree(work / "out")
    old_folder = large_model(tmp_path / "old", 2, 64)
    old = contents(old_folder)
    source = contents(work / "input")
    staging, moments = work / ".out.surgery-tmp", 22
    began = time.monotonic()
    process = start(*command, cwd=work)
    wait_for(staging, process)
    entered = time.monotonic() - began
    assert process.wait() == 0
    process.communicate()
    duration = time.monotonic() - began - entered
    seen = {"old": 0, "new": 0, "midway": 0}
    fresh = True
    for moment in range(moments):
        if fresh:
            shutil.rmtree(work / "out", ignore_errors=True)
            shutil.copytree(old_folder, work / "out")
        process = start(*command, cwd=work)
        if moment < 2:
            time.sleep(entered * (moment + 1) / 3)  # while it is still reading headers
        else:
            wait_for(staging, process)
            time.sleep(duration * (moment - 2) / (moments - 3) * 1.05)
        process.kill()
        process.communicate()
        found = contents(work / "out")
        assert found in (old, new), f"mixed after a kill at moment {moment}"
        seen["old" if found == old else "new"] += 1
        seen["midway"] += staging.exists()
        fresh = found == new
        if moment % 5 == 4:
            assert surgery(*command, cwd=work).returncode == 0
            assert contents(work / "out") == new
            assert remains(work, work / "out", ["input"]) == []
            fresh = True
    assert contents(work / "input") == source
    assert seen["old"] >= 5, seen
    assert seen["midway"] >= 5, seen


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_that_is_told_to_stop_says_so_and_clears_up(tmp_path, name, code):
    large_model(tmp_path / "input", 1, 20)
    large_model(tmp_path / "out", 2, 1)
    before = contents(tmp_path / "out")
    process = start("convert", "input", "-o", "out", "--overwrite", "-q", cwd=tmp_path, seconds_a_write=0.05)
    wait_for(tmp_path / ".out.surgery-tmp" / "model.safetensors", process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
    assert "\n" not in err.strip()
    assert contents(tmp_path / "out") == before
    assert remains(tmp_path, tmp_path / "out", ["input"]) == []


def test_a_second_run_on_the_same_output_gives_way_at_once_and_says_to_whom(tmp_path):
    large_model(tmp_path / "input", 1, 20)
    first = start("convert", "input", "-o", "out", "-q", cwd=tmp_path, seconds_a_write=0.2)
    wait_for(tmp_path / ".out.surgery-tmp", first)
    began = time.monotonic()
    second = surgery("convert", "input", "-o", "out", "--overwrite", cwd=tmp_path)
    waited = time.monotonic() - began
    assert first.poll() is None, "the first run was over before the second one began"
    assert second.returncode == 7
    assert second.stderr.count("\n") == 1
    assert "another run is writing it" in second.stderr
    assert str(first.pid) in second.stderr
    assert waited < 2
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert loaded(tmp_path / "out") == loaded(tmp_path / "input")
    assert remains(tmp_path, tmp_path / "out", ["input"]) == []


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["fresh", "overwriting"])
def test_runs_that_start_together_publish_one_whole_output(tmp_path, overwrite):
    model(tmp_path / "input", 1, shards=2)
    wanted = None
    for _ in range(4):
        runs = [start("convert", "input", "-o", "out", "-q", *overwrite, cwd=tmp_path) for _ in range(3)]
        said = [run.communicate(timeout=60)[1] for run in runs]
        codes = sorted(run.returncode for run in runs)
        assert set(codes) <= {0, 7}, said
        assert codes.count(0) >= 1
        assert overwrite or codes.count(0) == 1
        assert all(line.count("\n") <= 1 for line in said)
        wanted = wanted or contents(tmp_path / "out")
        assert contents(tmp_path / "out") == wanted
        assert loaded(tmp_path / "out") == loaded(tmp_path / "input")
        assert remains(tmp_path, tmp_path / "out", ["input"]) == []
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_the_umask_decides_who_may_read_an_output(tmp_path, mask):
    model(tmp_path / "input", 1, shards=2)
    adapter(tmp_path / "adapter")
    os.chmod(tmp_path / "input" / "config.json", 0o600)
    for out in ("out", "out.safetensors"):
        for options in ((), ("--overwrite",)):
            done = surgery("convert", "input", "-o", out, *options, cwd=tmp_path, umask=mask)
            assert done.returncode == 0, done.stderr
            members = [tmp_path / out, *(tmp_path / out).rglob("*")]
            assert len(members) == (1 if out.endswith(".safetensors") else 8)
            for path in members:
                assert path.stat().st_mode & 0o7777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_limit_on_file_sizes_is_an_error_like_any_other(tmp_path):
    large_model(tmp_path / "input", 1, 1)
    large_model(tmp_path / "out", 2, 2)
    before = contents(tmp_path / "out")
    done = surgery(
        "convert", "input", "-o", "out", "--overwrite", "-q", cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19)),
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (8, 1), done.stderr
    assert contents(tmp_path / "out") == before
    assert remains(tmp_path, tmp_path / "out", ["input"]) == []


# --- refusals, in this process


@dataclasses.dataclass
class Outcome:
    code: int
    said: str


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Call the command line here, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return Outcome(stop.value.code, capsys.readouterr().err)

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def listing(tmp_path):
    """Say what is in the folder: every path, with its bytes."""

    def look():
        return {str(path.relative_to(tmp_path)): path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    return look


def assert_refused(outcome, code, *words):
    assert outcome.code == code, outcome.said
    assert outcome.said.startswith("surgery: error: ")
    assert outcome.said.count("\n") == 1
    for word in words:
        assert word in outcome.said


def test_an_output_that_exists_is_refused_whatever_it_is(tmp_path, cli, listing):
    model(tmp_path / "input", 1, shards=1)
    model(tmp_path / "folder", 2, shards=1)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "file.safetensors", {"w": ("U8", (1,), b"x")})
    os.symlink("nowhere", tmp_path / "dangling")
    before = listing()
    for out in ("folder", "empty", "file.safetensors", "dangling"):
        assert_refused(cli("convert", "input", "-o", out), 7, out, "exists already", "--overwrite")
    assert listing() == before


def test_overwriting_replaces_only_what_is_a_model_and_of_the_same_kind(tmp_path, cli, listing):
    model(tmp_path / "input", 1, shards=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    model(tmp_path / "repository", 2, shards=1)
    (tmp_path / "repository" / ".git").mkdir()
    model(tmp_path / "folder.safetensors", 2, shards=1)
    (tmp_path / "notes").write_text("a file")
    before = listing()
    for out in ("thesis", "repository", "folder.safetensors", "notes"):
        assert_refused(cli("convert", "input", "-o", out, "--overwrite"), 7, out)
    assert_refused(cli("convert", "input", "-o", ".", "--overwrite"), 7)
    assert listing() == before


def test_a_link_in_the_outputs_place_is_replaced_and_what_it_points_to_is_not_touched(tmp_path, cli):
    model(tmp_path / "input", 1, shards=1)
    model(tmp_path / "elsewhere", 2, shards=1)
    save(tmp_path / "elsewhere.safetensors", {"w": ("U8", (1,), b"x")})
    before = contents(tmp_path / "elsewhere"), contents(tmp_path / "elsewhere.safetensors")
    for out, target in (("out", "elsewhere"), ("out.safetensors", "elsewhere.safetensors")):
        os.symlink(target, tmp_path / out)
        assert cli("convert", "input", "-o", out, "--overwrite").code == 0
        assert not (tmp_path / out).is_symlink()
        assert loaded(tmp_path / out) == loaded(tmp_path / "input")
    assert (contents(tmp_path / "elsewhere"), contents(tmp_path / "elsewhere.safetensors")) == before
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_is_or_holds_or_lies_in_an_input_is_refused(tmp_path, cli, listing):
    (tmp_path / "models").mkdir()
    model(tmp_path / "models" / "base", 1, shards=1)
    adapter(tmp_path / "models" / "adapter")
    os.symlink("models/base", tmp_path / "alias")
    os.symlink("models", tmp_path / "around")
    os.link(tmp_path / "models" / "base" / "model.safetensors", tmp_path / "twin.safetensors")
    (tmp_path / "models" / "config.json").write_text("{}")
    before = listing()
    cases = [
        ("models/base", "is an input"),
        ("models/../models/base/", "is an input"),
        ("alias", "is an input"),
        ("around/base", "is an input"),
        ("models/base/merged", "inside the input"),
        ("models/base/model.safetensors", "inside the input"),
        ("alias/deep/merged", "inside the input"),
        ("models", "holds the input"),
        ("around", "holds the input"),
        (tmp_path, "holds the input"),
        ("/", "file system"),
    ]
    for out, words in cases:
        for command in (("convert", "models/base"), ("merge", "models/base", "models/adapter")):
            outcome = cli(*command, "-o", out, "--overwrite", "-q")
            assert_refused(outcome, 7)
            assert words in outcome.said or out == "models/base/model.safetensors", (out, outcome.said)
    # One file as the input: itself under other names, and the folder that it lies in.
    for out in ("models/base/model.safetensors", "twin.safetensors", "alias/model.safetensors"):
        assert_refused(cli("convert", "models/base/model.safetensors", "-o", out, "--overwrite"), 7, "is an input")
    for out in ("models/base", "models"):
        outcome = cli("convert", "models/base/model.safetensors", "-o", out, "--overwrite")
        assert_refused(outcome, 7, "holds the input")
    # The adapter is an input as well.
    for out in ("models/adapter", "models/adapter/merged"):
        assert_refused(cli("merge", "models/base", "models/adapter", "-o", out, "--overwrite"), 7)
    assert listing() == before


def test_extraction_refuses_its_output_before_the_work(tmp_path, cli, listing, monkeypatch):
    model(tmp_path / "base", 1, shards=1)
    model(tmp_path / "tuned", 2, shards=1)
    model(tmp_path / "taken", 3, shards=1)
    before = listing()
    extract = importlib.import_module("surgery.operations.extract_lora")
    monkeypatch.setattr(extract.Extraction, "run", lambda *_: pytest.fail("the models were read"))
    for out in ("taken", "tuned", "base/adapter"):
        assert_refused(cli("extract-lora", "base", "tuned", "-o", out), 7)
    assert listing() == before


def test_a_place_that_cannot_be_written_is_one_line_and_nothing_stays(tmp_path, cli, listing):
    model(tmp_path / "input", 1, shards=1)
    (tmp_path / "file").write_text("not a folder")
    before = listing()
    for out in ("file/out", "file/deep/out", "file/out.safetensors", "/proc/out", "/proc/deep/out", "x" * 300):
        outcome = cli("convert", "input", "-o", out)
        assert outcome.code in (7, 8)
        assert_refused(outcome, outcome.code, "cannot be written")
    assert listing() == before


@pytest.mark.parametrize(("code", "wanted"), [("EROFS", 8), ("EACCES", 8), ("EIO", 8), ("ENOSPC", 7), ("EDQUOT", 7)])
@pytest.mark.parametrize("out", ["out", "deep/er/out"])
def test_a_folder_that_cannot_be_made_is_one_line_and_nothing_stays(
    tmp_path, cli, listing, monkeypatch, out, code, wanted
):
    model(tmp_path / "input", 1, shards=1)
    before = listing()
    number = getattr(errno, code)
    made = os.mkdir

    def mkdir(path, *rest, **options):
        if Path(path).name in (".out.surgery-tmp", "er"):
            raise OSError(number, os.strerror(number), path)
        made(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert_refused(cli("convert", "input", "-o", out), wanted, out)
    monkeypatch.undo()
    assert listing() == before


def test_a_parent_that_somebody_else_makes_meanwhile_is_no_hindrance(tmp_path, cli, monkeypatch):
    model(tmp_path / "input", 1, shards=1)
    made = os.mkdir

    def mkdir(path, *rest, **options):
        if Path(path).name == "shared" and not os.path.exists(path):
            made(path)
        made(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert cli("convert", "input", "-o", "shared/out", "-q").code == 0
    assert loaded(tmp_path / "shared" / "out") == loaded(tmp_path / "input")


def test_a_full_disk_is_noticed_before_the_first_byte(tmp_path, cli, listing, monkeypatch):
    model(tmp_path / "input", 1, shards=2)
    adapter(tmp_path / "adapter")
    before = listing()
    free = types.SimpleNamespace(total=10**12, used=10**12 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(writer, "OutputFile", lambda *_: pytest.fail("a file was made"))
    for command in (("convert", "input"), ("merge", "input", "adapter")):
        assert_refused(cli(*command, "-o", "new/out", "-q"), 7, "1 kB free", "needs ")
    assert listing() == before


def test_all_that_will_be_written_counts_against_the_free_space(tmp_path, cli, monkeypatch):
    model(tmp_path / "input", 1, shards=2)
    adapter(tmp_path / "adapter")
    asked = []
    monkeypatch.setattr(writer.Publication, "check_space", lambda _, needed: asked.append(needed))
    assert cli("merge", "input", "adapter", "-o", "out", "-q").code == 0
    written = {name: len(data) for name, data in contents(tmp_path / "out").items()}
    tables = sum(size for name, size in written.items() if name in ("surgery.json", "model.safetensors.index.json"))
    assert ".surgery/originals" in written
    assert asked[0] >= sum(written.values()) - tables


# --- inputs that change under the reader's hands


def change_during(monkeypatch, change):
    """Call ``change`` once, after the first tensor was read."""
    read, reads = OpenFile.read_into, []

    def tapped(self, offset, out):
        read(self, offset, out)
        reads.append(offset)
        if len(reads) == 1:
            change()

    start = writer.Publication.__enter__

    def enter(publication):
        monkeypatch.setattr(OpenFile, "read_into", tapped)
        return start(publication)

    monkeypatch.setattr(writer.Publication, "__enter__", enter)
    return reads


def rewrite(path):
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(len(data) - 8)
        file.write(bytes(8))


def truncate(path):
    os.truncate(path, path.stat().st_size - 64)


def empty(path):
    os.truncate(path, 0)


def append(path):
    with open(path, "ab") as file:
        file.write(b"more")


def replace(path):
    """Put another file of the same shape in its place, as careful tools do."""
    data = bytearray(path.read_bytes())
    data[-8:] = bytes(8)
    path.with_suffix(".new").write_bytes(data)
    os.replace(path.with_suffix(".new"), path)


CHANGES = [rewrite, truncate, empty, append, replace]


@pytest.mark.parametrize("shard", [1, 2])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_input_that_changes_while_it_is_read_stops_the_run(tmp_path, cli, monkeypatch, change, shard):
    model(tmp_path / "input", 1, shards=2)
    model(tmp_path / "out", 2, shards=1)
    before = contents(tmp_path / "out")
    victim = tmp_path / "input" / f"model-0000{shard}-of-00002.safetensors"
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    reads = change_during(monkeypatch, lambda: change(victim))
    outcome = cli("convert", "input", "-o", "out", "--overwrite", "--jobs", "1", "-q")
    assert reads
    assert_refused(outcome, 8, victim.name)
    assert contents(tmp_path / "out") == before
    assert remains(tmp_path, tmp_path / "out", ["input"]) == []


def test_an_adapter_that_changes_while_it_is_read_stops_the_run(tmp_path, cli, monkeypatch):
    model(tmp_path / "input", 1, shards=1)
    adapter(tmp_path / "adapter")
    time.sleep(0.02)
    change_during(monkeypatch, lambda: rewrite(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert_refused(cli("merge", "input", "adapter", "-o", "out", "-q"), 8, "adapter_model.safetensors")
    assert remains(tmp_path, tmp_path / "out", ["input", "adapter"]) == []
    assert not (tmp_path / "out").exists()


def test_an_input_folder_that_is_exchanged_for_another_is_never_mixed_with_it(tmp_path, cli, monkeypatch):
    model(tmp_path / "input", 1, shards=2)
    model(tmp_path / "other", 2, shards=2)

    def exchange():
        os.rename(tmp_path / "input", tmp_path / "before")
        os.rename(tmp_path / "other", tmp_path / "input")

    change_during(monkeypatch, exchange)
    assert_refused(cli("convert", "input", "-o", "out", "--jobs", "1", "-q"), 8, "changed while it was read")
    assert remains(tmp_path, tmp_path / "out", ["input", "before"]) == []
    assert not (tmp_path / "out").exists()


def test_a_read_that_fails_stops_the_run_and_names_the_file(tmp_path, cli, monkeypatch):
    model(tmp_path / "input", 1, shards=2)
    read = os.preadv

    def failing(descriptor, buffers, offset):
        if offset > 100:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    outcome = cli("convert", "input", "-o", "out", "-q")
    assert_refused(outcome, 8, "of-00002.safetensors: ", "cannot be read at byte ")
    assert remains(tmp_path, tmp_path / "out", ["input"]) == []


def test_a_failing_close_of_the_context_publishes_nothing(tmp_path):
    with contextlib.suppress(ZeroDivisionError), writer.Publication(tmp_path / "out") as publication:
        publication.write("model.safetensors", b"half")
        1 / 0
    with writer.Publication(tmp_path / "out") as publication:
        publication.write("model.safetensors", b"whole, but never committed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_somebody_elses_output_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(writer, "_rename2", lambda *_: False)
    with writer.Publication(tmp_path / "out") as publication:
        publication.write("model.safetensors", b"ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
        with pytest.raises(writer.OutputError, match="meanwhile"):
            publication.commit()
    assert contents(tmp_path / "out") == {"theirs": b"theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_this_files_promises_cover_every_call_that_the_writer_makes():
    """A call that the writer makes and no tap counts would never be struck."""
    used = {
        node.func.attr
        for node in ast.walk(ast.parse(Path(writer.__file__).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and getattr(node.func.value, "id", "") == "os"
    }
    harmless = {"fspath", "fsencode", "fstat", "stat", "close", "read", "walk", "listdir", "getpid", "strerror"}
    assert used - harmless <= set(Tap.CALLS)


if __name__ == "__main__":
    request = Job(**json.loads(sys.argv[1]))
    importlib.import_module(f"surgery.cli.{request.argv[0]}")
    if request.argv[0] == "merge":
        importlib.import_module("torch").set_num_threads(1)
    gc.freeze()  # a forked child that collects would copy every page
    gc.disable()
    print(json.dumps(Driver(request).explore()))
