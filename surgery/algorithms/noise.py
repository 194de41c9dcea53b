r"""The noise that rounding a fine-tune to its dtype adds to a delta, and the rank that stands above it.

The base is exact in its dtype; the fine-tune was rounded once. Where the change is a few steps of the dtype or more, the
rounding error of an element with spacing ``u`` is spread evenly over ``±u/2``: independent noise of variance ``u²/12``.
The singular values of ``m × n`` such noise end at the Marchenko–Pastur edge

    ``σ_n (√m + √n)``,  ``σ_n² = mean(u²) / 12``,

with fluctuations of the Tracy–Widom scale; components of the delta below it cannot be told from zero. Rows and columns of
real weights differ in size, and the edge is then higher. For variances ``v_ij ≈ a_i b_j`` it is the least ``√z(g)`` over
``0 < g < 1/max b``, where ``z`` solves ``g = Σ_i a_i / (z − a_i h)`` with ``h = Σ_j b_j / (1 − b_j g)``: beyond it the equations
for the resolvent of ``N Nᵀ`` have a real solution. With all sizes alike this is Marchenko and Pastur's.

References: Marchenko, Pastur 1967; Johnstone 2001, "On the distribution of the largest eigenvalue in principal
components analysis"; Couillet, Hachem 2014, "Analysis of the limiting spectral measure of large random matrices of the
separable covariance type", arXiv:1310.8094; Benaych-Georges, Nadakuditi 2012, arXiv:1103.2221 (what of a signal near the
edge remains visible).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SPACING = {
    "BF16": (2.0**-7, 2.0**-126), "F16": (2.0**-10, 2.0**-14), "F32": (2.0**-23, 2.0**-126),
    "F64": (2.0**-52, 2.0**-400),
}  # fmt: skip
"""A dtype's spacing at 1, and its smallest normal number; float64's is far smaller, and its square would vanish."""
_EXPONENT = 0x7FF0_0000_0000_0000
FLUCTUATION = 6.0
"""Tracy–Widom units above the edge that noise is allowed: passed once in about 10⁵ matrices."""
DITHER = 3.0
"""The change's root mean square, in root mean square spacings, from which rounding errors are independent of it."""
CLEAR = 1.1
"""The smallest component kept stands this far above the edge, or it is uncertain."""
UNEXPLAINED = 0.1
"""Share by which the energy below the floor may differ from that of rounding noise and still be called noise."""


class RoundingNoise:
    """Variances of the rounding errors of a matrix, summed by rows and columns while it is read.

    Args:
        shape: ``(m, n)``.
        dtype: the fine-tune's: one of :data:`SPACING`.

    >>> noise = RoundingNoise((2, 2), "BF16")
    >>> noise.update(torch.ones(2, 2, dtype=torch.float64))
    >>> noise.energy == 4 * 2.0**-14 / 12
    True
    """

    def __init__(self, shape: tuple[int, int], dtype: str) -> None:
        self.shape = shape
        self.dtype = dtype
        self._spacing, self._smallest = SPACING[dtype]
        self._rows = torch.zeros(shape[0], dtype=torch.float64)
        self._columns = torch.zeros(shape[1], dtype=torch.float64)
        self._seen = 0

    def update(self, tuned: torch.Tensor) -> None:
        """Add the fine-tune's next rows: ``(count, n)``, float64; overwritten."""
        # A float with its significand cleared is the power of two below it.
        power = tuned.view(torch.int64).bitwise_and_(_EXPONENT).view(torch.float64).clamp_min_(self._smallest)
        power.mul_(self._spacing).square_().div_(12.0)
        torch.sum(power, 1, out=self._rows[self._seen : self._seen + len(power)])
        self._columns += power.sum(0)
        self._seen += len(power)

    @property
    def energy(self) -> float:
        """Expected ``‖N‖²``: the sum of all variances."""
        return float(self._rows.sum())

    @property
    def edge(self) -> float:
        """Largest singular value of the noise, fluctuations allowed for."""
        m, n = self.shape
        total = self.energy
        root = math.sqrt(m) + math.sqrt(n)
        fluctuation = (1.0 / math.sqrt(m) + 1.0 / math.sqrt(n)) ** (1.0 / 3.0) / root
        scale = math.sqrt(total)
        return math.sqrt(_edge(self._rows / scale, self._columns / scale) * (1.0 + FLUCTUATION * fluctuation))


def _edge(rows: torch.Tensor, columns: torch.Tensor) -> float:
    """Return the least ``z(g)``: see the module. ``z`` has one minimum, found by golden section."""
    rows, columns = rows[rows > 0], columns[columns > 0]

    def z(g: float) -> float:
        h = float((columns / (1.0 - columns * g)).sum())
        # Σ a_i/(z − a_i h) is convex and falls to 0: from below its solution Newton's steps rise to it.
        least = max(float(rows.max()) * (h + 1.0 / g), float(rows.sum()) / g)
        for _ in range(50):
            share = rows / (least - rows * h)
            step = (float(share.sum()) - g) / float((share * share / rows).sum())
            least += step
            if step <= 1e-9 * least:
                break
        return least

    golden = (math.sqrt(5.0) - 1.0) / 2.0
    low, high = 0.0, 1.0 / float(columns.max())
    for _ in range(30):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if z(left) < z(right) else (left, high)
    return z((low + high) / 2.0)


@dataclass(frozen=True, slots=True)
class FloorRank:
    """How many components stand above the noise floor."""

    rank: int
    certain: bool
    why: str = ""
    """What makes it uncertain."""


def floor_rank(sigma: torch.Tensor, energy: float, noise: RoundingNoise) -> FloorRank:
    """Return the rank of a delta above its rounding noise, and whether that is certain.

    Certain is that nothing lies where noise and signal overlap, that the change is large enough for rounding errors to
    be independent of it, and that what lies below the floor has the energy of rounding noise.

    Args:
        sigma: the delta's singular values, descending: all, or the leading ones.
        energy: ``‖Δ‖²``.
        noise: of the fine-tune that the delta was taken from.

    >>> noise = RoundingNoise((64, 64), "BF16"); noise.update(torch.ones(64, 64, dtype=torch.float64))
    >>> floor_rank(torch.tensor([9.0, 0.01]), 81.0 + noise.energy, noise)
    FloorRank(rank=1, certain=True, why='')
    """
    m, n = noise.shape
    if noise.dtype == "F64":
        return FloorRank(len(sigma), certain=False, why="deltas are taken in float32, float64 rounds finer than that")
    edge = noise.edge
    rank = int((sigma > edge).sum())
    if rank == len(sigma) and rank < min(m, n):
        return FloorRank(rank, certain=False, why=f"all {rank} singular values looked at are above the floor")
    # Spacings are √12 times as wide as the error's deviation.
    if energy < DITHER * DITHER * 12.0 * noise.energy:
        return FloorRank(rank, certain=False, why="the change is of the size of the dtype's steps")
    if rank and float(sigma[rank - 1]) < CLEAR * edge:
        return FloorRank(rank, certain=False, why="singular values lie at the edge of the noise")
    if rank == min(m, n):
        return FloorRank(rank, certain=True)
    rest = energy - float((sigma[:rank].double() ** 2).sum())
    expected = noise.energy * (1.0 - rank / m) * (1.0 - rank / n)
    if abs(rest - expected) > UNEXPLAINED * expected:
        return FloorRank(rank, certain=False, why=f"{rest / expected:.2f} times the energy of rounding noise is left")
    return FloorRank(rank, certain=True)
