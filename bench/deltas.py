"""Sizes of exact deltas, in bits a weight, beside what else keeps a fine-tune to the last bit.

python -m bench.deltas
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zstandard

import surgery
from fixtures import real_pair
from surgery.tensor import read_bytes

COLUMNS = ("pair", "raw", "zstd of the fine-tune", "its byte planes", "zstd of the XOR", "XOR's byte planes", "surgery",
           "reversible", "at most")  # fmt: skip
TARGETS = {3e-5: (1.9, 2.1), 1e-4: (3.5, 3.75), 3e-4: (5.0, 5.5)}
"""Standard deviation of ΔW → the most that a delta, and a reversible one, may cost in bits a weight."""
ELEMENTS = 1 << 24

Pair = tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]
"""Bit patterns of a base and a fine-tune."""


def main() -> None:
    """Print the table."""
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) - 1))
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("F32", "BF16", "F16"):
            folders = [real_pair.base(), real_pair.tuned()]
            if dtype != "F32":
                for number, folder in enumerate(folders):
                    folders[number] = Path(scratch) / f"{dtype}-{number}"
                    surgery.convert(folder, dtype=dtype).save(folders[number])
            base, tuned = map(surgery.open, folders)
            print(row(f"MiniLM, {dtype}", patterns(base, tuned), base, tuned, "–"), flush=True)
    for deviation, (limit, both_ways) in TARGETS.items():
        base, tuned = generated(deviation)
        limits = f"{limit:.1f} / {both_ways:.2f}"
        print(row(f"Gaussian, ΔW {deviation:.0e}, BF16", patterns(base, tuned), base, tuned, limits), flush=True)


def generated(deviation: float) -> tuple[surgery.Checkpoint, surgery.Checkpoint]:
    """Make bfloat16 weights of 0.02 and a Gaussian difference."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(ELEMENTS, generator=generator).mul_(0.02).bfloat16()
    tuned = (weights.float() + torch.randn(ELEMENTS, generator=generator).mul_(deviation)).bfloat16()
    return surgery.open({"w": weights}), surgery.open({"w": tuned})


def patterns(base: surgery.Checkpoint, tuned: surgery.Checkpoint) -> Pair:
    """Read the bits of all tensors that both have."""
    found = []
    for checkpoint in (base, tuned):
        tensors = {name: checkpoint.lazy(name) for name in tuned if name in base}
        found.append(
            {name: np.frombuffer(read_bytes(tensor), f"<u{tensor.spec.itemsize}") for name, tensor in tensors.items()}
        )
    return found[0], found[1]


def row(title: str, pair: Pair, base: surgery.Checkpoint, tuned: surgery.Checkpoint, limits: str) -> str:
    """Compose one line: every size in bits a weight."""
    old, new = pair
    count = sum(values.size for values in new.values())
    xor = {name: old[name] ^ values for name, values in new.items()}
    sizes = [
        sum(values.nbytes for values in new.values()),
        sum(len(compressed(values)) for values in new.values()),
        sum(in_planes(values) for values in new.values()),
        sum(len(compressed(values)) for values in xor.values()),
        sum(in_planes(values) for values in xor.values()),
        surgery.extract_delta(base, tuned).nbytes,
        surgery.extract_delta(base, tuned, reversible=True).nbytes,
    ]
    return "| " + " | ".join([title, *(f"{8 * size / count:.2f}" for size in sizes), limits]) + " |"


def compressed(values: np.ndarray) -> bytes:
    """Compress as they lie."""
    return zstandard.ZstdCompressor(level=3).compress(values.tobytes())


def in_planes(values: np.ndarray) -> int:
    """Count the compressed bytes of the lowest bytes of all numbers, the next lowest, and so on."""
    planes = values.view(np.uint8).reshape(-1, values.itemsize).T
    return sum(len(compressed(np.ascontiguousarray(plane))) for plane in planes)


if __name__ == "__main__":
    main()
