"""Whole processes, timed by the system's own accounting, in turns, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One finished process."""

    wall: float
    cpu: float
    peak: int
    """Peak resident bytes."""


def timed(command: Sequence[str], cwd: Path) -> Run:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output.decode(errors='replace')[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def in_turns(contenders: Mapping[str, Callable[[], Run]], turns: int) -> dict[str, list[Run]]:
    """Run every contender once to warm up, then all in turn, ``turns`` times."""
    for contender in contenders.values():
        contender()
    found: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, contender in contenders.items():
            found[name].append(contender())
    return found


def table(title: str, found: Mapping[str, list[Run]], reference: str) -> str:
    """Write medians, spreads, and ratios to ``reference`` as a Markdown table."""
    unit = statistics.median(run.wall for run in found[reference])
    lines = [f"### {title}", "", f"| | wall (min…max) | CPU | peak RSS | × {reference} |", "|---|---:|---:|---:|---:|"]
    for name, runs in found.items():
        walls = sorted(run.wall for run in runs)
        middle = statistics.median(walls)
        cpu = statistics.median(run.cpu for run in runs)
        peak = max(run.peak for run in runs)
        lines.append(
            f"| {name} | {middle:.2f} s ({walls[0]:.2f}…{walls[-1]:.2f}) | {cpu:.2f} s | {peak / 1e6:.0f} MB | {middle / unit:.2f} |"
        )
    return "\n".join(lines)


def fresh(path: Path) -> Path:
    """Remove what an earlier turn wrote."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    return path
