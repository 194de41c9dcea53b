"""``make bench-merge``: whole models merged by surgery and by mergekit 0.1.5, from the same recipes, beside ``cp``.

python -m bench.models [--size 0.5B|1.5B] [--turns 3] [--only ties linear] [--mergekit .venv-mergekit/bin/python]
                       [--models FOLDER]

Generated Qwen2.5 shapes in bfloat16: a base and two fine-tunes. An algorithm at a time, surgery and the floors run in
turns, and mergekit once between them. "work" is the wall time without that of importing torch. surgery syncs what it
wrote before it publishes it; cp and mergekit leave that to the system, so there is a floor of cp with a sync too.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.timing import Run, fresh, in_turns, timed
from fixtures import generate

TWO = """models:
  - {{model: {a}, parameters: {{weight: 0.6{density}}}}}
  - {{model: {b}, parameters: {{weight: 0.4{density}}}}}
merge_method: {method}
{base}dtype: bfloat16
"""
DENSE, SPARSE = "", ", density: 0.5"


def recipe(method: str) -> str:
    """Write a recipe for ``a``, ``b`` and ``base``."""
    if method == "slerp":
        return "models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: a\nparameters: {t: 0.4}\ndtype: bfloat16\n"
    if method == "model_stock":
        return "models: [{model: a}, {model: b}]\nmerge_method: model_stock\nbase_model: base\ndtype: bfloat16\n"
    sparse = method not in ("linear", "task_arithmetic")
    base = "" if method == "linear" else "base_model: base\n"
    return TWO.format(a="a", b="b", density=SPARSE if sparse else DENSE, method=method, base=base)


METHODS = ("linear", "task_arithmetic", "slerp", "model_stock", "ties", "breadcrumbs", "dare_ties", "della")


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("0.05B", "0.5B", "1.5B"), default="0.5B")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--mergekit", type=Path, help="the python of an environment with mergekit 0.1.5")
    parser.add_argument("--models", type=Path, help="generate the models here, and keep them for the next time")
    options = parser.parse_args()
    shape = generate.SIZES[options.size]
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as name:
        folder = options.models or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        needed = 7 * 2 * shape.parameters
        if shutil.disk_usage(folder).free < needed:
            sys.exit(f"{needed / 1e9:.0f} GB of free disk are needed in {folder.parent}; set TMPDIR")
        for out, more in (("base", []), ("a", ["--tune"]), ("b", ["--tune", "--tune-seed", "3"])):
            if not (folder / out).exists():
                made = [sys.executable, "-m", "fixtures.generate", str(folder / out), "--size", options.size, *more]
                subprocess.run(made, check=True, cwd=Path(__file__).parent.parent)
        print(f"{options.size}: {2 * shape.parameters / 1e9:.2f} GB a model in bfloat16\n")
        print(
            "| | wall (min…max) | CPU | peak RSS | cp | cp, sync | import torch | work ÷ cp | work ÷ cp, sync |", end=""
        )
        print(" mergekit 0.1.5 | CPU | peak RSS | mergekit ÷ surgery | in CPU |")
        print("|---|" + "---:|" * 13, flush=True)
        for method in options.only:
            (folder / f"{method}.yml").write_text(recipe(method))
            _compare(folder, method, options.turns, options.mergekit)
        fresh(folder / "out")


def _compare(folder: Path, method: str, turns: int, mergekit: Path | None) -> None:
    def after(*command: str) -> Run:
        fresh(folder / "out")
        return timed(command, folder)

    found = in_turns(
        {
            "cp": lambda: after("cp", "-r", "base", "out"),
            "cp, sync": lambda: after("sh", "-c", "cp -r base out && sync -f out"),
            "import torch": lambda: timed([sys.executable, "-c", "import torch"], folder),
            method: lambda: after(sys.executable, "-m", "surgery", "merge", f"{method}.yml", "-o", "out", "-q"),
        },
        turns,
    )
    walls = {name: sorted(run.wall for run in runs) for name, runs in found.items()}
    copy, durable, torch, ours = (statistics.median(each) for each in walls.values())
    cpu = statistics.median(run.cpu for run in found[method])
    cells = [method, f"{ours:.2f} s ({walls[method][0]:.2f}…{walls[method][-1]:.2f})", f"{cpu:.1f} s"]
    cells += [_peak(found[method]), f"{copy:.2f} s", f"{durable:.2f} s", f"{torch:.2f} s"]
    cells += [f"{(ours - torch) / copy:.1f}", f"{(ours - torch) / durable:.1f}"]
    if mergekit:
        theirs = _mergekit(folder, method, mergekit)
        cells += [f"{theirs.wall:.1f} s", f"{theirs.cpu:.1f} s", _peak([theirs])]
        cells += [f"{theirs.wall / ours:.1f}", f"{theirs.cpu / cpu:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def _mergekit(folder: Path, method: str, python: Path) -> Run:
    fresh(folder / "out")
    script = python.with_name("mergekit-yaml").resolve()
    return timed([str(script), f"{method}.yml", "out", "--no-write-model-card"], folder)


def _peak(runs: Sequence[Run]) -> str:
    return f"{max(run.peak for run in runs) / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
