"""The only home of SVD → (B, A): truncated factorisation of a delta, and its spectrum.

For ``Δ`` of shape ``(m, n)`` the best rank-``r`` approximation in Frobenius norm is the truncated SVD (Eckart and Young
1936), with squared error ``‖Δ‖² − Σ_{i≤r} σᵢ²``. Three routes find it, and each can say how near it came:

* **subspace** (:mod:`surgery.algorithms.subspace`): Chebyshev-filtered block iteration with a certificate, for ranks well
  below the short side. It goes on until the certificate holds.
* **gram**: eigenvectors of the Gram matrix of the short side: for thin matrices, for high ranks, and where the search has
  spent more than the Gram matrix costs (flat spectra). Large Gram matrices are searched in the same way, which is an
  order of magnitude cheaper a step; only where that does not settle are they diagonalised.
* **lapack**: the full SVD in float64, when asked for.

All end alike: a basis ``V`` orthonormal to rounding and the image ``ΔV``, diagonalised. What was captured, ``‖ΔV‖²``, is then
exact (Pythagoras: ``‖Δ − ΔVVᵀ‖² = ‖Δ‖² − ‖ΔV‖²``), so the error reported is the error achieved, not an estimate.
Products are float32; where less than :data:`WIDE_BELOW` of the energy is left over, where float32 could not tell how
little, they are made again in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from surgery import numerics
from surgery.algorithms import subspace
from surgery.algorithms.products import Products, gram_share
from surgery.algorithms.subspace import PROBES, ROUNDING, Search

OVERSAMPLE = (16, 48)
"""Columns beyond the rank (and the probes): as many as the rank, but at least and at most so many."""
WIDE_BELOW = 1e-3
"""Share of the energy left over below which products are made in float64."""
LINEAR_STEPS = 16
"""Most steps with ``Δ`` itself, each two products, before the Gram matrix is formed."""
SAFE = 2.0**40
"""Root mean squares outside ``1/SAFE … SAFE`` are scaled: their fourth powers would leave float32."""


@dataclass(frozen=True, slots=True)
class Costs:
    """When each route is taken; the same on every machine, so that results are."""

    direct: int = 384
    """Short sides up to this have their Gram matrix diagonalised, whatever the rank."""
    share: float = 0.25
    """So do searches wider than this share of the short side: they would be no cheaper."""
    cheap: float = 5.0
    """A Gram matrix that costs less than this many steps is formed at once."""
    patience: float = 1.0
    """A search turns to the Gram matrix once it has spent this many times what that costs."""
    steps: int = 40
    """Most steps in all; what has not settled by then is diagonalised."""


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """``Δ ≈ left @ diag(sigma) @ right``, largest first.

    Args:
        left: ``(m, k)``, orthonormal columns.
        sigma: ``(k,)``, float64, descending.
        right: ``(k, n)``, orthonormal rows.
        energy: ``‖Δ‖²``, accumulated in float64.
        excess: certified for the rank asked for: ``‖Δ − Δ̂_r‖ ≤ optimum + excess · max(optimum, ‖Δ‖/1000)``. Nothing is
            certified for other ranks: there, captured energy is a lower bound of what could be captured.
        route: ``"subspace"``, ``"gram"`` or ``"lapack"``.
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor
    energy: float
    excess: float = 0.0
    route: str = "lapack"

    def captured(self, rank: int) -> float:
        """Return ``Σ_{i≤rank} σᵢ²``: the energy that the first ``rank`` components hold."""
        return min(float((self.sigma[:rank] ** 2).sum()), self.energy)

    def error(self, rank: int) -> float:
        """Return the relative error ``‖Δ − Δ_r‖ / ‖Δ‖`` of the first ``rank`` components; 0 for a zero delta."""
        if not self.energy:
            return 0.0
        return math.sqrt(max(self.energy - self.captured(rank), 0.0) / self.energy)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Split into ``B (m, r)`` and ``A (r, n)`` with √σ on both sides, in float64."""
        root = self.sigma[:rank].sqrt()
        return self.left[:, :rank].double() * root, root[:, None] * self.right[:rank].double()


def truncated_svd(
    delta: torch.Tensor,
    rank: int,
    generator: torch.Generator,
    *,
    tolerance: float = 1e-3,
    exact: bool = False,
    energy: float | None = None,
    costs: Costs = Costs(),
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
        return _nothing(delta, rank, energy)
    root_mean_square = math.sqrt(energy / delta.numel())
    if not 1.0 / SAFE < root_mean_square < SAFE:
        unit = 2.0 ** round(math.log2(root_mean_square))
        scaled = truncated_svd(delta / unit, rank, generator, tolerance=tolerance, exact=exact, costs=costs)
        return replace(scaled, sigma=scaled.sigma * unit, energy=energy)
    if exact:
        return _lapack(delta, rank, energy)
    short = _Factoriser(delta, rank, generator, tolerance, energy, costs).run()
    return _canonical(short if delta.shape[0] <= delta.shape[1] else _transposed(short))


def working_bytes(shape: tuple[int, int], rank: int) -> int:
    """Return how many bytes :func:`truncated_svd` needs at most beside a float32 ``delta``, without ``exact``.

    Skinny blocks and their float64 copies, the Gram matrix in float64 with LAPACK's workspace, and widened rows.

    >>> working_bytes((1536, 8960), 32) < 1536 * 8960 * 4 * 3
    True
    """
    short, long = sorted(shape)
    width = min(max(_width(short, rank), 2 * rank), short)
    blocks = 5 * 8 * (short + long) * width
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


def _nothing(delta: torch.Tensor, rank: int, energy: float) -> TruncatedSVD:
    m, n = delta.shape
    left = torch.eye(m, rank, dtype=delta.dtype, device=delta.device)
    sigma = torch.zeros(rank, dtype=torch.float64, device=delta.device)
    return TruncatedSVD(left, sigma, torch.eye(rank, n, dtype=delta.dtype, device=delta.device), energy, 0.0, "gram")


def _lapack(delta: torch.Tensor, rank: int, energy: float) -> TruncatedSVD:
    left, sigma, right = torch.linalg.svd(delta.double(), full_matrices=False)
    share = sigma**2 / energy
    captured = float(share[:rank].sum())
    bound = subspace.excess(captured, min(captured, 1.0) + ROUNDING[torch.float64])
    return _canonical(TruncatedSVD(left, sigma, right, energy, bound, "lapack"))


def _width(short: int, rank: int) -> int:
    low, high = OVERSAMPLE
    return min(rank + min(max(rank, low), high) + PROBES, short)


class _Factoriser:
    """One factorisation with the short side first, from the choice of route to the triplets."""

    def __init__(
        self, delta: torch.Tensor, rank: int, generator: torch.Generator, tolerance: float, energy: float, costs: Costs
    ) -> None:
        self.delta, self.rank, self.generator, self.costs = delta, rank, generator, costs
        self.tolerance, self.energy = tolerance, energy
        self.width = _width(min(delta.shape), rank)
        self.norm = math.sqrt(energy)

    def run(self) -> TruncatedSVD:
        """Work in float32 first where the matrix is, and in float64 where that cannot tell how little is left."""
        warm = None
        if self.delta.dtype != torch.float64:
            svd, basis = self._attempt(torch.float32, None)
            if svd is not None:
                return svd
            warm = basis
        svd, _ = self._attempt(torch.float64, warm)
        assert svd is not None
        return svd

    def _attempt(self, dtype: torch.dtype, warm: torch.Tensor | None) -> tuple[TruncatedSVD | None, torch.Tensor]:
        """Return triplets, or ``None`` where ``dtype`` is too coarse for what is left; and a basis."""
        products = Products(self.delta, dtype, self.norm)
        costs = self.costs
        if products.short <= costs.direct or self.width > costs.share * products.short:
            return self._diagonalise(products, products.gram())
        search = Search(self._start(products, warm), self.rank)
        search.begin(products.squared_times)
        gram: torch.Tensor | None = None
        price = gram_share(products.short) * products.short / (2.0 * self.width)
        patience = min(costs.patience * price, LINEAR_STEPS)
        for step in range(1, costs.steps):
            if gram is None and (step > patience or price < costs.cheap):
                gram = products.gram()
            image = products.squared_times(search.basis) if gram is None else gram @ search.basis
            ritz = search.look(image)
            if dtype != torch.float64 and 1.0 - search.captured < WIDE_BELOW:
                return None, search.basis
            if search.excess <= self.tolerance:
                return self._finish(products, search.basis, search.excess, "subspace" if gram is None else "gram")
            search.step(image, ritz)
        return self._diagonalise(products, products.gram() if gram is None else gram)

    def _start(self, products: Products, warm: torch.Tensor | None) -> torch.Tensor:
        start = torch.randn(products.short, self.width, generator=self.generator, dtype=torch.float64)
        start = start.to(self.delta.device, products.dtype)
        if warm is not None and warm.shape == start.shape:
            start[:, :-PROBES] = warm[:, :-PROBES]
        return start

    def _diagonalise(self, products: Products, gram: torch.Tensor) -> tuple[TruncatedSVD | None, torch.Tensor]:
        """Take the eigenvectors of the Gram matrix; its trace, known exactly, tells how well it was computed."""
        values, vectors = torch.linalg.eigh(gram.double())
        keep = min(max(2 * self.rank, self.width), products.short)
        basis = vectors.flip(1)[:, :keep].to(products.dtype)
        leading = float(values[-self.rank :].sum())
        if products.dtype != torch.float64 and 1.0 - leading < WIDE_BELOW:
            return None, basis
        off = abs(float(gram.diagonal().double().sum()) - 1.0)
        svd, basis = self._finish(products, basis, math.inf, "gram")
        assert svd is not None
        upper = min(leading, 1.0) + 2.0 * off + ROUNDING[products.dtype]
        return replace(svd, excess=subspace.excess(svd.captured(self.rank) / self.energy, upper)), basis

    def _finish(
        self, products: Products, basis: torch.Tensor, bound: float, route: str
    ) -> tuple[TruncatedSVD | None, torch.Tensor]:
        """Rayleigh–Ritz: turn a basis of the short side into singular triplets of ``V Vᵀ X``."""
        image = products.transposed_times(basis)
        # A basis orthonormal to 1e-7 only would put as much into the energies: take what it lacks out of the small problem.
        wide = basis.double()
        factor = torch.linalg.cholesky(wide.T @ wide)
        inner = torch.linalg.solve_triangular(factor, (image.T @ image).double(), upper=False)
        inner = torch.linalg.solve_triangular(factor, inner.T.contiguous(), upper=False)
        vectors = torch.linalg.eigh((inner + inner.T) / 2)[1].flip(1)
        rotation = torch.linalg.solve_triangular(factor.T.contiguous(), vectors, upper=True)
        rotation = rotation.to(basis.dtype)
        left = basis @ rotation
        right = (image @ rotation).T.contiguous()
        share = torch.stack([row.double().square().sum() for row in right]).sqrt()
        length = torch.linalg.vector_norm(left.double(), dim=0)  # 1 but for the rounding of the rotation
        share /= length
        left /= length.to(left.dtype)
        order = share.argsort(descending=True, stable=True)
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            share, left, right = share[order], left[:, order], right[order]
        right /= torch.linalg.vector_norm(right, dim=1, keepdim=True).clamp_min(torch.finfo(right.dtype).tiny)
        return TruncatedSVD(left, share * self.norm, right, self.energy, bound, route), basis


def _transposed(svd: TruncatedSVD) -> TruncatedSVD:
    return replace(svd, left=svd.right.T, right=svd.left.T)


def _canonical(svd: TruncatedSVD) -> TruncatedSVD:
    right = svd.right
    largest = right.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(right.gather(1, largest) < 0, -1.0, 1.0).to(right.dtype)
    return replace(svd, left=(svd.left * sign.T.to(svd.left.dtype)).contiguous(), right=(right * sign).contiguous())
