"""Peak memory: bounded by the plan's own estimate, and the same for models of any size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures import generate

SIZES = {"0.1 GB": 100_000_000, "0.5 GB": 500_000_000, "1 GB": 1_000_000_000}

# Run in a process of its own. The high-water mark is reset after everything is imported and warm, so that what is
# measured is what the operation adds.
PROBE = """
import json, sys
import surgery, torch
from surgery.operations.diff import plan_diff
from surgery.operations import compare_values, merge

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

verb, base, other, warm, warm_other, out = sys.argv[1:]
if verb == "merge":
    surgery.merge(warm, warm_other).save(out + "-warm")
else:
    surgery.diff(warm, warm_other)
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")
before = status("VmRSS")
if verb == "merge":
    merged = surgery.merge(base, other)
    estimate = merged.plan().peak_memory
    merged.save(out)
else:
    comparison = plan_diff(base, other)
    estimate = comparison.peak_memory
    comparison.run()
print(json.dumps({"peak": status("VmHWM") - before, "estimate": estimate}))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for label, size in {"warm": 0, **SIZES}.items():
        shape = generate.of_bytes(size)
        name = label.replace(" ", "")
        made[label] = (generate.write(folder / name, shape), generate.adapter(folder / f"{name}-adapter", shape))
    return made


def _probe(verb: str, base: Path, other: Path, warm: tuple[Path, Path], out: Path) -> dict[str, int]:
    arguments = [verb, str(base), str(other), str(warm[0]), str(warm[1]), str(out)]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_merge_needs_the_same_memory_for_a_model_of_any_size_and_no_more_than_planned(models, tmp_path):
    peaks = {}
    for label in SIZES:
        base, adapter = models[label]
        found = _probe("merge", base, adapter, models["warm"], tmp_path / label.replace(" ", ""))
        assert found["peak"] <= found["estimate"], (label, found)
        peaks[label] = found["peak"]
    assert max(peaks.values()) - min(peaks.values()) < 32_000_000, peaks


def test_diff_needs_the_same_memory_for_a_model_of_any_size_and_no_more_than_planned(models, tmp_path):
    import surgery

    warm = surgery.merge(*models["warm"])
    warm.save(tmp_path / "warm")
    peaks = {}
    for label in SIZES:
        base, adapter = models[label]
        merged = tmp_path / label.replace(" ", "")
        surgery.merge(base, adapter).save(merged)
        found = _probe("diff", base, merged, (models["warm"][0], tmp_path / "warm"), tmp_path / "unused")
        assert found["peak"] <= found["estimate"], (label, found)
        peaks[label] = found["peak"]
    assert max(peaks.values()) - min(peaks.values()) < 32_000_000, peaks
