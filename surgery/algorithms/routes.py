"""The ways to a truncated SVD, and when each is taken: by shape and rank alone, so that every machine goes the same.

A matrix has its short side first here. All ways end alike: a basis ``V`` and the image ``Xᵀ V``, diagonalised, so that what
was captured is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from surgery.algorithms import subspace
from surgery.algorithms.products import Products, gram_share, orthonormalise
from surgery.algorithms.subspace import PROBES, ROUNDING, Search
from surgery.algorithms.triplets import TruncatedSVD

OVERSAMPLE = (16, 64)
"""Columns of the start beyond the rank: half as many again as the rank, but at least and at most so many."""
LEAST_STEP = 8
"""Columns that a search is widened by: as many as the rank, but at least so many."""
WIDE_BELOW = 1e-3
"""Share of the energy left over below which products are made in float64."""
SKETCH = (512, 16)
"""Columns of the sketch that a search starts from: at least so many, and so many times those of the start, but .."""
SKETCH_SHARE = 3
"""no more than this part of the long side. Where that would leave less than four times .., one step with the matrix."""
SKETCH_STEPS = 3
"""Steps with the sketch."""
GRAM_STEPS = 5
"""Steps with the Gram matrix before the first look, where that is at hand: each costs less than a look."""
FULLEST = 4
"""Times the start's width that a basis may grow to; it is cut back to its leading directions then."""
SMALL = 128
"""Up to this width the sharper of two bounds costs less than one more product with the probes."""
FREE = 128
"""Up to this many triplets, twice the rank asked for is returned."""


@dataclass(frozen=True, slots=True)
class Costs:
    """When each route is taken; the same on every machine, so that results are."""

    direct: int = 384
    """Short sides up to this have their Gram matrix diagonalised, whatever the rank."""
    share: float = 0.25
    """So do starts wider than this share of the short side: they would be no cheaper."""
    cheap: float = 3.0
    """A Gram matrix that costs less than this many steps of the start's width is formed at once."""
    patience: float = 1.0
    """A search turns to the Gram matrix once it has spent this many times what that costs."""
    steps: int = 40
    """Most steps in all; what has not settled by then is diagonalised."""


def lapack(delta: torch.Tensor, rank: int, energy: float) -> TruncatedSVD:
    """Take the full SVD in float64."""
    left, sigma, right = torch.linalg.svd(delta.double(), full_matrices=False)
    share = sigma**2 / energy
    captured = float(share[:rank].sum())
    bound = subspace.excess(captured, min(captured, 1.0) + ROUNDING[torch.float64])
    return TruncatedSVD(left, sigma, right, energy, bound, "lapack")


def start_width(short: int, rank: int) -> int:
    """Return how many columns a search starts with."""
    low, high = OVERSAMPLE
    return min(rank + min(max(3 * rank // 2, low), high), short)


def full_width(short: int, rank: int) -> int:
    """Return how many columns a search may grow to."""
    return min(FULLEST * start_width(short, rank), short // 2)


class Factoriser:
    """One factorisation with the short side first, from the choice of route to the triplets.

    Args:
        delta: ``(m, n)``, of energy within float32's range even squared.
        rank: at least 1.
        generator: where random starts come from: on the CPU.
        tolerance: largest certified excess to accept.
        energy: ``‖Δ‖²``.
        costs: when each route is taken.
    """

    def __init__(
        self, delta: torch.Tensor, rank: int, generator: torch.Generator, tolerance: float, energy: float, costs: Costs
    ) -> None:
        self.delta, self.rank, self.generator, self.costs = delta, rank, generator, costs
        self.tolerance, self.energy = tolerance, energy
        self.width = start_width(min(delta.shape), rank)
        self.keep = max(rank, min(2 * rank, FREE))
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
        walk = _Walk(self, products, warm)
        for step in range(1, costs.steps):
            search = walk.advance()
            if dtype != torch.float64 and 1.0 - search.captured < WIDE_BELOW:
                return None, search.leading(self.width)
            if search.excess <= self.tolerance:
                return self._finish(products, search, walk)
            if step + 1 < costs.steps and not walk.prepare():
                break
        return self._diagonalise(products, products.gram() if walk.gram is None else walk.gram)

    def _diagonalise(self, products: Products, gram: torch.Tensor) -> tuple[TruncatedSVD | None, torch.Tensor]:
        """Take the eigenvectors of the Gram matrix; its trace, known exactly, tells how well it was computed."""
        values, vectors = torch.linalg.eigh(gram.double())
        keep = min(max(self.keep, self.width), products.short)
        basis = vectors.flip(1)[:, :keep].to(products.dtype)
        leading = float(values[-self.rank :].sum())
        if products.dtype != torch.float64 and 1.0 - leading < WIDE_BELOW:
            return None, basis[:, : self.width]
        off = abs(float(gram.diagonal().double().sum()) - 1.0)
        basis = basis[:, : self.keep]
        svd = self._triplets(basis, products.transposed_times(basis), math.inf, "gram")
        upper = min(leading, 1.0) + 2.0 * off + ROUNDING[products.dtype]
        return replace(svd, excess=subspace.excess(svd.captured(self.rank) / self.energy, upper)), basis

    def _finish(self, products: Products, search: Search, walk: _Walk) -> tuple[TruncatedSVD, torch.Tensor]:
        if walk.images is not None:
            image = torch.cat(walk.images, 1)
            return self._triplets(search.basis, image, search.excess, "subspace"), search.basis
        basis = search.leading(min(self.keep, search.width))
        return self._triplets(basis, products.transposed_times(basis), search.excess, "gram"), basis

    def _triplets(self, basis: torch.Tensor, image: torch.Tensor, bound: float, route: str) -> TruncatedSVD:
        """Rayleigh–Ritz: turn a basis of the short side and its image ``Xᵀ V`` into singular triplets of ``V Vᵀ X``."""
        # A basis orthonormal to 1e-7 only would put as much into the energies: take what it lacks out of the small problem.
        wide = basis.double()
        factor = torch.linalg.cholesky(wide.T @ wide)
        inner = torch.linalg.solve_triangular(factor, (image.T @ image).double(), upper=False)
        inner = torch.linalg.solve_triangular(factor, inner.T.contiguous(), upper=False)
        vectors = torch.linalg.eigh((inner + inner.T) / 2)[1].flip(1)[:, : self.keep]
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
        return TruncatedSVD(left, share * self.norm, right, self.energy, bound, route)


class _Walk:
    """A search on its way: with the matrix itself, two products a step, until its Gram matrix is the cheaper one.

    Args:
        task: what is looked for.
        products: of the matrix.
        warm: leading directions that are known already, in place of a start from a sketch.
    """

    def __init__(self, task: Factoriser, products: Products, warm: torch.Tensor | None) -> None:
        self.task, self.products = task, products
        self.gram: torch.Tensor | None = None
        self.images: list[torch.Tensor] | None = []
        """``Xᵀ V``, block by block, where all of it is at hand."""
        self.price = gram_share(products.short) * products.short
        """Columns in products that cost what the Gram matrix does."""
        self.spent = 0.0
        self.step = max(task.rank, LEAST_STEP)
        if self.price < task.costs.cheap * 2.0 * task.width:
            self._form_gram()
        self.search = self._begin(self._start() if warm is None else orthonormalise(warm.to(products.dtype))[0])

    def advance(self) -> Search:
        """Multiply what is pending, and look."""
        search, pending = self.search, self.search.pending()
        if self.gram is not None:
            search.take(self.gram @ pending)
        else:
            image = self.products.transposed_times(pending)
            if self.images is not None and search.fresh:
                self.images.append(image[:, : search.fresh].clone())
            search.take(self.products.times(image))
            self.spent += 2.0 * pending.shape[1]
        search.look()
        if search.excess > search.tolerance and (search.width <= SMALL or not search.lacks_probes()):
            search.look_closely()
        return search

    def prepare(self) -> bool:
        """Decide on the next step; ``False`` where none leads further."""
        search = self.search
        if self.gram is None and self.spent > self.task.costs.patience * self.price:
            self._form_gram()
        if search.lacks_probes():
            return True
        if search.width + self.step > full_width(self.products.short, self.task.rank):
            self._restart()
            return True
        return search.widen(self.step)

    def _form_gram(self) -> None:
        self.gram = self.products.gram()
        self.images = None

    def _restart(self) -> None:
        """Keep the leading directions, as a start that new probes do not depend on."""
        if self.images is not None:
            self.images = []
        self.search = self._begin(self.search.leading(self.task.width))

    def _begin(self, start: torch.Tensor) -> Search:
        start, _ = orthonormalise(start)
        task, products = self.task, self.products
        if self.gram is not None:
            probes = self._normal(products.short)
            probes = self.gram @ (probes - start @ (start.T @ probes))
            return Search(start, probes, task.rank, task.tolerance, plain=1.0)
        self.spent += PROBES
        return Search(start, products.times(self._normal(products.long)), task.rank, task.tolerance)

    def _normal(self, rows: int, columns: int = PROBES) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=self.task.generator)
        return drawn.to(self.task.delta.device, self.products.dtype)

    def _start(self) -> torch.Tensor:
        """Find about where the leading directions are."""
        width = self.task.width
        basis = self._normal(self.products.short, width)
        if self.gram is not None:
            for _ in range(GRAM_STEPS):
                basis, _ = orthonormalise(self.gram @ basis)
            return basis
        columns = min(max(SKETCH[0], SKETCH[1] * width), self.products.long // SKETCH_SHARE)
        if columns < 4 * width:
            self.spent += 2.0 * width
            return self.products.squared_times(basis)
        self.spent += 2.0 * SKETCH_STEPS * width * columns / self.products.long
        sketch = self.products.folded(columns, self.task.generator)
        for _ in range(SKETCH_STEPS):
            basis, _ = orthonormalise(sketch @ (sketch.T @ basis))
        return basis
