"""Hostile and mismatched inputs through the command line: the right exit code, one line that names the place, no debris."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hostile_cases
import pytest
from hostile_cases import CASES, TWINS, Case, Result, Twin, run

from surgery.cli.main import COMMANDS
from surgery.cli.main import surgery as group

SECONDS = 30
"""What no refusal may take: it finds what hangs or grows, on a busy machine too, where importing transformers takes five."""
LONGEST_LINE = 8_000
TALK = re.compile(r"note: |(?:convert|diff|extract|merge|unmerge|verify): ")
"""How the lines begin that a command may print beside its error."""

AS_PROCESSES = (
    "container: data truncated by a byte",
    "container: name with terminal escapes",
    "index: a path upwards",
    "pickle: os.system in a zip",
    "numbers: NaN in an adapter's A at merge",
    "output: the input itself, overwritten",
    "call: no such command",
)


# Every command is imported here: no case shall pay for it within its time.
OPTIONS = {"--help", "--version"}
for _name in COMMANDS:
    for _parameter in group.get_command(None, _name).params:
        OPTIONS.update(_parameter.opts)


class TooSlowError(BaseException):
    """A command took longer than any refusal may; no ``except Exception`` catches it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop what runs inside after so many seconds."""

    def stop(number, frame):
        raise TooSlowError(f"still running after {seconds} s")

    terminate = signal.getsignal(signal.SIGTERM)  # the command line sets a handler of its own
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGTERM, terminate)


def contents(root: Path) -> dict[str, object]:
    """Say what lies below a folder: every entry, its kind and mode, and its bytes."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            inside: object = None
            if stat.S_ISLNK(status.st_mode):
                inside = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                inside = status.st_mtime_ns if status.st_size > 1 << 30 else Path(path).read_bytes()
            found[os.path.relpath(path, root)] = (status.st_mode, inside)
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder inside the test's own, so that whatever is written beside it is seen too."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    while hostile_cases.LOCKS:
        os.close(hostile_cases.LOCKS.pop())


def assert_one_line(result: Result, case: Case, command: list[str]) -> None:
    """Assert that stderr holds one error that names its place, in plain characters."""
    assert "Traceback" not in result.out + result.err
    lines = [line for line in result.err.splitlines() if not TALK.match(line)]
    assert len(lines) == 1, result.err
    (line,) = lines
    assert line.startswith("surgery: error: ")
    assert line.isprintable()
    assert len(line) <= LONGEST_LINE
    offered = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)) - set(command)
    assert offered <= OPTIONS, "the message offers an option that no command has"
    assert "\x1b" not in result.out + result.err
    for words in case.says:
        assert any(word in line for word in ([words] if isinstance(words, str) else words)), f"{words!r} not in {line}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_hostile_input_is_refused_in_one_line_and_leaves_nothing_behind(case: Case, here: Path) -> None:
    commands = case.make(here)
    before = contents(here.parent)
    for command in commands:
        began = time.monotonic()
        with time_limit(SECONDS):
            result = run(*command)
        assert time.monotonic() - began < SECONDS
        assert (result.code, command) == (case.code, command), result.err
        assert_one_line(result, case, command)
        assert contents(here.parent) == before, command


@pytest.mark.parametrize("case", [case for case in CASES if case.id in AS_PROCESSES], ids=lambda case: case.id)
def test_a_hostile_input_is_refused_in_a_process_of_its_own(case: Case, here: Path) -> None:
    command = case.make(here)[-1]
    before = contents(here.parent)
    ended = subprocess.run(
        [sys.executable, "-m", "surgery", *command],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == case.code, ended.stderr
    assert_one_line(Result(ended.returncode, ended.stdout, ended.stderr), case, command)
    assert contents(here.parent) == before


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.id)
def test_an_input_that_only_looks_hostile_is_accepted(twin: Twin, here: Path) -> None:
    commands = twin.make(here)
    before = contents(here)
    result = Result(0, "", "")
    for command in commands:
        with time_limit(SECONDS):
            result = run(*command)
        assert (result.code, command) == (0, command), result.err
        assert "\x1b" not in result.out + result.err
    twin.check(here, result)
    after = contents(here)
    kept = {name: entry for name, entry in before.items() if ".surgery-" not in name}
    assert {name: after.get(name) for name in kept} == kept
    assert not [name for name in after if ".surgery-" in name]


def test_the_number_of_a_block_costs_no_memory(here: Path) -> None:
    """A name may number a block by a thousand million; a set of all numbers below it would fill the machine."""
    names = ("h.0.q.weight", "h.1000000000.q.weight")
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    (here / "odd.safetensors").write_bytes(hostile_cases.pack(dict.fromkeys(names, entry)))
    program = (
        "import resource\n"
        "from surgery.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "main(['info', 'odd.safetensors'])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr[-500:]) == (0, ended.stderr[-500:])
    assert "2 in 1 file" in ended.stdout


def test_the_table_is_long_enough_and_its_ids_are_unique() -> None:
    ids = [entry.id for entry in (*CASES, *TWINS)]
    assert len(CASES) >= 75
    assert len(TWINS) >= 8
    assert len(set(ids)) == len(ids)
    assert set(AS_PROCESSES) <= {case.id for case in CASES}
