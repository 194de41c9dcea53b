"""``make bench-extract``: LoRA extraction from a generated 1.5 B-parameter bfloat16 pair, beside mergekit-extract-lora.

python -m bench.extract [--size 0.5B|1.5B] [--ranks 8 32 128] [--turns 3] [--mergekit .venv-mergekit/bin/python]

mergekit runs once, at ``--mergekit-rank``: it takes minutes, whatever the rank. surgery, and reading both models to compute ‖ΔW‖, in turns.
The relative error of both is measured from the adapters' files, by the same code, over the linear weights.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.timing import Run, fresh, in_turns, timed
from fixtures import generate

FLOOR = """
import sys
from surgery.execute import Silent
from surgery.operations.extract_lora import plan_extraction
from surgery.operations.extraction_measure import in_parallel, largest_first
from surgery.operations.pairs import Pair
plan = plan_extraction("base", "ft", rank=1)
def work(name):
    Pair(plan.base.tensors[name], plan.tuned[name], ("base", "ft")).energy()
in_parallel(largest_first(plan.base, plan.names), work, plan.settings.jobs)
"""
"""Reading both models and computing ‖ΔW‖: what no extraction can be faster than."""


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("0.05B", "0.5B", "1.5B"), default="1.5B")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--mergekit", type=Path, help="the python of an environment with mergekit 0.1.5")
    parser.add_argument("--mergekit-rank", type=int, default=32)
    parser.add_argument("--pair", type=Path, help="a folder with base and ft, in place of making them")
    options = parser.parse_args()
    shape = generate.SIZES[options.size]
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as name:
        folder = Path(name)
        if options.pair:
            for side in ("base", "ft"):
                (folder / side).symlink_to((options.pair / side).resolve())
        else:
            _make(folder, options.size, shape)
        print(
            f"{options.size}: {shape.parameters / 1e9:.2f} B parameters in bfloat16, {2 * shape.parameters / 1e9:.2f} GB each\n"
        )
        _compare(folder, options.ranks, options.turns, options.mergekit, options.mergekit_rank)


def _make(folder: Path, size: str, shape: generate.Shape) -> None:
    needed = 6 * 2 * shape.parameters
    if shutil.disk_usage(folder).free < needed:
        sys.exit(f"{needed / 1e9:.0f} GB of free disk are needed in {folder.parent}; set TMPDIR")
    for extra in (["base"], ["ft", "--tune"]):
        made = [sys.executable, "-m", "fixtures.generate", str(folder / extra[0]), "--size", size, *extra[1:]]
        subprocess.run(made, check=True, cwd=Path(__file__).parent.parent)


def _compare(folder: Path, ranks: Sequence[int], turns: int, mergekit: Path | None, peer_rank: int) -> None:
    def surgery(rank: int) -> Run:
        fresh(folder / f"lora-{rank}")
        command = [
            "extract-lora",
            "base",
            "ft",
            "--rank",
            str(rank),
            "--embeddings",
            "none",
            "-o",
            f"lora-{rank}",
            "-q",
        ]
        return timed([sys.executable, "-m", "surgery", *command], folder)

    contenders = {
        "import torch": lambda: timed([sys.executable, "-c", "import torch"], folder),
        "read both, ‖ΔW‖": lambda: timed([sys.executable, "-c", FLOOR], folder),
        **{f"surgery --rank {rank}": lambda rank=rank: surgery(rank) for rank in ranks},
    }
    found = in_turns(contenders, turns)
    errors = {rank: _judge(folder, folder / f"lora-{rank}") for rank in ranks}
    print("| | wall (min…max) | CPU | peak RSS | weights file | rel. error | mergekit ÷ surgery |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    theirs = None
    if mergekit:
        fresh(folder / "mergekit")
        script = mergekit.with_name("mergekit-extract-lora").absolute()
        # Absolute paths: it would look names up on the Hub, at the end, for its card.
        command = [
            str(script),
            "--model",
            str(folder / "ft"),
            "--base-model",
            str(folder / "base"),
            "--out-path",
            "mergekit",
        ]
        theirs = timed([*command, "--max-rank", str(peer_rank)], folder)
        size, error = _size(folder / "mergekit"), _judge(folder, folder / "mergekit")
        line = f"mergekit-extract-lora --max-rank {peer_rank}"
        print(_line(line, [theirs], f"{size / 1e6:.1f} MB", f"{error:.5f}", ""), flush=True)
    for name, runs in found.items():
        rank = int(name.rsplit(" ", 1)[1]) if name.startswith("surgery") else None
        size = f"{_size(folder / f'lora-{rank}') / 1e6:.1f} MB" if rank else ""
        error = f"{errors[rank]:.5f}" if rank else ""
        ratio = f"{theirs.wall / statistics.median(r.wall for r in runs):.1f}" if rank and theirs else ""
        print(_line(name, runs, size, error, ratio))


def _line(name: str, runs: Sequence[Run], size: str, error: str, ratio: str) -> str:
    walls = sorted(run.wall for run in runs)
    cpu, peak = statistics.median(run.cpu for run in runs), max(run.peak for run in runs)
    spread = f"{statistics.median(walls):.2f} s ({walls[0]:.2f}…{walls[-1]:.2f})"
    return f"| {name} | {spread} | {cpu:.1f} s | {peak / 1e6:.0f} MB | {size} | {error} | {ratio} |"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _judge(folder: Path, adapter: Path) -> float:
    """Measure ‖ΔW − scaling·BA‖ / ‖ΔW‖ over all linear weights of the layers, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.extract_error", str(folder), str(adapter)],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    return math.sqrt(json.loads(done.stdout)["share"])


if __name__ == "__main__":
    main()
