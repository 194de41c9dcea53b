"""The rank sweep of docs/extraction.md: bytes, energy, error and behaviour of adapters of the real pair.

python -m bench.behaviour
"""

from __future__ import annotations

from typing import Any

import surgery
from fixtures import real_pair
from fixtures.behaviour import Embedder, mean_cosine

SWEEP: tuple[dict[str, Any], ...] = (
    *({"rank": rank} for rank in (4, 8, 16, 32, 64, 128)),
    {"rank": 16, "dtype": "BF16"},
    {"rank": 16, "dora": True},
    {"budget": "6MB"},
    {"budget": "7MB"},
    {"budget": "4MB", "dtype": "BF16"},
)


def main() -> None:
    """Print the table."""
    embed = Embedder(real_pair.tuned())
    lines = (real_pair.SITE_RELIABILITY, real_pair.MIXED)
    wanted = [embed(some) for some in lines]
    print("| | bytes | ‖Δ‖² kept | relative error | cosine, in domain | cosine, mixed |")
    print("|---|---:|---:|---:|---:|---:|")
    for options in SWEEP:
        adapter = surgery.extract_lora(real_pair.base(), real_pair.tuned(), **options)
        weights = surgery.merge(real_pair.base(), adapter).state_dict()
        found = [mean_cosine(embed(some, weights), truth) for some, truth in zip(lines, wanted, strict=True)]
        name = " ".join(f"{key} {value}" for key, value in options.items())
        report = adapter.report
        print(
            f"| {name} | {adapter.nbytes / 1e6:.2f} MB | {100 * report.kept:.1f} % | {report.error:.3f} | {found[0]:.4f} | {found[1]:.4f} |"
        )


if __name__ == "__main__":
    main()
