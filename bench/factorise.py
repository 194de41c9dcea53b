"""``python -m bench.factorise``: time and error of truncated SVDs beside LAPACK's and ``torch.svd_lowrank``, on one thread.

A table of shapes × spectra × ranks. ``×pass`` is the time in units of one product of the matrix with as many columns as
the search keeps: the floor that no iteration gets below, since it must make a few. Errors are in excess of the optimum,
which float64 eigenvalues of the Gram matrix give.

python -m bench.factorise [--shape 1536x8960 …] [--rank 8 …] [--lapack] [--threads 1]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator

import torch

from surgery import numerics
from surgery.algorithms.lowrank import truncated_svd

SHAPES = ("256x1536", "1536x1536", "1536x8960")
RANKS = (8, 32, 128)


def spectra(m: int, n: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield deltas: like a fine-tune's, flat, and with many equal directions."""
    draw = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        values = torch.randn(m, n, generator=draw)
        return values / values.norm()

    count = min(384, m, n)
    left, right = torch.randn(m, count, generator=draw), torch.randn(count, n, generator=draw)
    power = left * torch.arange(1, count + 1) ** -0.7 @ right
    yield "power law + 30 % noise", power / power.norm() + 0.3 * noise()
    yield "flat", noise()
    count = min(64, m, n)
    left = torch.linalg.qr(torch.randn(m, count, generator=draw))[0]
    right = torch.linalg.qr(torch.randn(n, count, generator=draw))[0].T
    yield f"{count} equal + 50 % noise", left @ right / math.sqrt(count) + 0.5 * noise()


def best(call: Callable[[], object], turns: int = 3) -> float:
    """Return the shortest of a few runs, in milliseconds."""
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def excess(delta: torch.Tensor, left: torch.Tensor, right: torch.Tensor, optimum: float) -> str:
    """Write the measured excess error of factors over the optimum."""
    achieved = float(torch.linalg.matrix_norm(delta.double() - left.double() @ right.double()))
    return f"{100 * (achieved / optimum - 1):.4f} %"


def row(delta: torch.Tensor, rank: int, sigma: torch.Tensor, *, lapack: bool) -> list[str]:
    """Measure one matrix at one rank."""
    energy = numerics.squared_norm(delta)
    optimum = math.sqrt(max(energy - float((sigma[:rank] ** 2).sum()), 0.0))
    svd = truncated_svd(delta, rank, torch.Generator().manual_seed(0), energy=energy)
    ours = best(lambda: truncated_svd(delta, rank, torch.Generator().manual_seed(0), energy=energy))
    block = torch.randn(delta.shape[1], len(svd.sigma))
    floor = best(lambda: delta @ block)
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(delta, rank, niter=2)
    sketch = best(lambda: torch.svd_lowrank(delta, rank, niter=2))
    full = f"{best(lambda: torch.linalg.svd(delta, full_matrices=False), 1) / ours:.0f} ×" if lapack else "–"
    return [
        svd.route, f"{ours:.0f} ms", f"{ours / floor:.1f}", excess(delta, *svd.factors(rank), optimum),
        f"{100 * svd.excess:.4f} %", full, f"{sketch / ours:.2f} ×", excess(delta, u * s, v.T, optimum),
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--rank", nargs="+", type=int, default=RANKS)
    parser.add_argument("--lapack", action="store_true", help="time the full SVD too: seconds a matrix")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| shape | delta | rank | route | time | ×pass | excess | certified | LAPACK | svd_lowrank | its excess |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for shape in options.shape:
        m, n = map(int, shape.split("x"))
        for name, delta in spectra(m, n):
            wide = (delta if m <= n else delta.T).double()
            sigma = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0).sqrt()
            for rank in options.rank:
                print("|", " | ".join([shape, name, str(rank), *row(delta, rank, sigma, lapack=options.lapack)]), "|")


if __name__ == "__main__":
    main()
