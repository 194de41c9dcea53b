"""What a core takes to merge one tensor by each algorithm: ``python -m bench.kernels [NAME ...]``.

CPU nanoseconds an element of each input, reading from a warm file included, writing not: the figures of
``surgery.operations.cost``. A bfloat16 matrix of a 0.5 B model, two fine-tunes and their base.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from surgery.algorithms.registry import ALGORITHMS, MERGEKIT, find
from surgery.checkpoint import open_checkpoint
from surgery.merged import Merged
from surgery.plan import block_of
from surgery.tensor import LazyTensor

SHAPE = (4864, 896)
GIVEN = {"density": 0.5, "t": 0.4}


def main() -> None:
    """Measure, and print one line an algorithm."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(SHAPE, generator=generator)
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as folder:
        for name in ("base", "a", "b"):
            moved = base if name == "base" else base + 4e-4 * torch.randn(SHAPE, generator=generator)
            save_file({"w": moved.bfloat16()}, Path(folder, f"{name}.safetensors"))
        tensors = [open_checkpoint(Path(folder, f"{name}.safetensors")).lazy("w") for name in ("base", "a", "b")]
        for name in sys.argv[1:] or ALGORITHMS:
            print(f"{name:18s} {min(_once(name, tensors) for _ in range(6)):6.2f} ns", flush=True)


def _once(name: str, tensors: list[LazyTensor]) -> float:
    row = find(name)
    base = tensors[0] if row.base == "required" else None
    models = tensors[1 : 1 + min(row.models[1] or 2, 2)]
    known = {parameter.name for parameter in row.parameters}
    given = {key: value for key, value in GIVEN.items() if key in known}
    merged = Merged("w", models, base, row, given, compat=MERGEKIT)
    count, size, step = merged.spec.numel, merged.spec.itemsize, block_of(merged)
    out = memoryview(bytearray(step * size))
    began = time.process_time()
    for start in range(0, count, step):
        stop = min(start + step, count)
        merged.read_into(start, stop, out[: (stop - start) * size])
    return (time.process_time() - began) / count / (len(models) + (base is not None)) * 1e9


if __name__ == "__main__":
    main()
