"""The only home of SVD → (B, A): truncated factorisation of a delta, and its spectrum.

For ``Δ`` of shape ``(m, n)`` the best rank-``r`` approximation in Frobenius norm is the truncated SVD (Eckart and Young
1936), with squared error ``‖Δ‖² − Σ_{i≤r} σᵢ²``. Three routes find it, and each can say how near it came:

* **subspace** (:mod:`surgery.algorithms.subspace`): block Lanczos from a sketch, with a certificate from probes beside it,
  for ranks well below the short side. It goes on until the certificate holds.
* **gram**: eigenvectors of the Gram matrix of the short side: for thin matrices, for high ranks, and where the search has
  spent more than the Gram matrix costs (flat spectra). Large Gram matrices are searched in the same way, which is an
  order of magnitude cheaper a step; only where that does not settle are they diagonalised.
* **lapack**: the full SVD in float64, when asked for.

Which is taken when: :mod:`surgery.algorithms.routes`. All end alike: a basis ``V`` orthonormal to rounding and the image ``ΔV``, diagonalised. What was captured, ``‖ΔV‖²``, is then
exact (Pythagoras: ``‖Δ − ΔVVᵀ‖² = ‖Δ‖² − ‖ΔV‖²``), so the error reported is the error achieved, not an estimate.
Products are float32; where less than :data:`WIDE_BELOW` of the energy is left over, where float32 could not tell how
little, they are made again in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from surgery import numerics
from surgery.algorithms.routes import WIDE_BELOW, Costs, Factoriser, full_width, lapack, start_width
from surgery.algorithms.triplets import TruncatedSVD, none_of

__all__ = ["Costs", "TruncatedSVD", "component_products", "truncated_svd", "working_bytes"]

USUAL = Costs()
SAFE = 2.0**40
"""Root mean squares outside ``1/SAFE … SAFE`` are scaled: their fourth powers would leave float32."""


def truncated_svd(
    delta: torch.Tensor,
    rank: int,
    generator: torch.Generator,
    *,
    tolerance: float = 1e-3,
    exact: bool = False,
    energy: float | None = None,
    costs: Costs = USUAL,
) -> TruncatedSVD:
    """Compute the leading ``rank`` singular triplets of ``delta``, and prove how near the optimum they are.

    The result holds at least ``rank`` triplets; more where they came for free, which are orthonormal and whose energies
    are exact for themselves, but of which nothing is proved. For ranks up to 64 they are at least ``2·rank``.

    Args:
        delta: ``(m, n)``, float32 or float64, finite, on any device.
        rank: how many, from 0 to ``min(m, n)``; more is clamped.
        generator: where random starts come from: on the CPU, so that every device draws the same.
        tolerance: largest ``excess`` to accept.
        exact: take the full SVD in float64.
        energy: ``‖Δ‖²`` in float64 where known; saves a pass.
        costs: when each route is taken.

    Returns:
        Triplets, the total energy, the certified excess, and the route taken. The certificate fails with a probability
        of at most 1e-9 over the random start (the other routes draw nothing), beyond rounding errors, which are allowed
        for as independent. Signs are canonical: in each row of ``right`` the entry of largest magnitude is positive.

    Raises:
        ValueError: ``delta`` is not a matrix, or holds NaN or Inf.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> svd = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2, g)
    >>> [round(float(s), 6) for s in svd.sigma[:2]], round(svd.error(2), 6), svd.excess < 1e-3
    ([3.0, 2.0], 0.267261, True)

    References: see :mod:`surgery.algorithms.subspace`.
    """
    if delta.ndim != 2:
        raise ValueError(f"a matrix is needed, not a tensor of shape {tuple(delta.shape)}")
    if energy is None:
        energy = numerics.squared_norm(delta)
    if not math.isfinite(energy):
        raise ValueError("the matrix holds NaN or Inf")
    rank = min(rank, *delta.shape)
    if rank == 0 or energy == 0.0:
        return none_of(delta, rank, energy)
    root_mean_square = math.sqrt(energy / delta.numel())
    if not 1.0 / SAFE < root_mean_square < SAFE:
        unit = 2.0 ** round(math.log2(root_mean_square))
        scaled = truncated_svd(delta / unit, rank, generator, tolerance=tolerance, exact=exact, costs=costs)
        return replace(scaled, sigma=scaled.sigma * unit, energy=energy)
    if exact:
        return lapack(delta, rank, energy).canonical()
    short = Factoriser(delta, rank, generator, tolerance, energy, costs).run()
    return (short if delta.shape[0] <= delta.shape[1] else short.transposed()).canonical()


def working_bytes(shape: tuple[int, int], rank: int) -> int:
    """Return how many bytes :func:`truncated_svd` needs at most beside a float32 ``delta``, without ``exact``.

    The basis of a search, its images on both sides, the factors in float64, the Gram matrix in float64 with LAPACK's
    workspace, and widened rows.

    >>> working_bytes((1536, 8960), 32) < 1536 * 8960 * 4 * 4
    True
    """
    short, long = sorted(shape)
    full, kept = full_width(short, rank), min(max(start_width(short, rank), 2 * rank), short)
    blocks = (3 * 4 * full + 3 * 8 * kept) * (short + long)
    rows = 2 * 8 * 256 * long
    return (8 << 20) + blocks + rows + 4 * 8 * short * short


def component_products(
    delta: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, energy: float | None = None
) -> tuple[torch.Tensor, float]:
    """Return ``⟨bₖ aₖ, Δ⟩`` of every component of ``left @ right``, and ``‖Δ − left @ right‖²``, of factors as they will be stored.

    The second is ``‖Δ‖² − 2 Σₖ ⟨bₖ aₖ, Δ⟩ + tr((BᵀB)(AAᵀ))``, with one skinny product; where that leaves less than a thousandth
    of ``‖Δ‖²``, which cancellation spoils, the difference itself, block by block.

    Args:
        delta: ``(m, n)``, float32 or float64.
        left: ``B (m, r)``, of any floating dtype.
        right: ``A (r, n)``.
        energy: ``‖Δ‖²`` where known; saves a pass.

    Returns:
        ``(r,)`` in float64, on the CPU; and the residual energy.

    >>> products, rest = component_products(torch.eye(2), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    >>> products.tolist(), rest
    ([1.0], 1.0)
    """
    if energy is None:
        energy = numerics.squared_norm(delta)
    left, right = left.to(delta.device), right.to(delta.device)
    wide_left, wide_right = left.double(), right.double()
    image = (delta @ right.to(delta.dtype).T).double()
    products = (image * wide_left).sum(0).cpu()
    own = float(((wide_left.T @ wide_left) * (wide_right @ wide_right.T)).sum())
    rest = energy - 2.0 * float(products.sum()) + own
    if rest > WIDE_BELOW * energy:
        return products, rest
    step = max(numerics.BLOCK * 8 // max(delta.shape[1], 1), 1)
    return products, math.fsum(
        numerics.squared_norm(delta[row : row + step].double() - wide_left[row : row + step] @ wide_right)
        for row in range(0, delta.shape[0], step)
    )
