"""Truncated SVD against float64 LAPACK, over spectra that are hard in different ways."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery import numerics
from surgery.algorithms.lowrank import Costs, component_products, truncated_svd, working_bytes
from surgery.algorithms.subspace import Search, rescaled_chebyshev


@pytest.fixture(autouse=True)
def _one_thread():
    with numerics.single_threaded():
        yield


SPECTRA = {
    "power law": lambda k: np.arange(1, k + 1) ** -0.7,
    "steep": lambda k: np.exp(-np.arange(k) / 3.0),
    "flat": np.ones,
    "steps": lambda k: np.where(np.arange(k) < k // 4, 10.0, 1.0),
    "one direction": lambda k: np.where(np.arange(k) < 1, 1.0, 1e-3),
    "rank deficient": lambda k: np.where(np.arange(k) < max(k // 8, 1), 1.0, 0.0),
    "tiny": lambda k: 1e-12 * np.arange(1, k + 1) ** -1.0,
}
SHAPES = [(96, 64), (64, 96), (700, 600), (600, 700), (40, 1), (1, 40), (1, 1), (64, 64)]


def made(shape, sigma, seed=0):
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.standard_normal((shape[0], len(sigma))))
    right, _ = np.linalg.qr(generator.standard_normal((shape[1], len(sigma))))
    return torch.from_numpy((left * sigma) @ right.T).float()


def generator():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_within_a_tenth_of_a_percent_of_the_optimum(shape, spectrum):
    delta = made(shape, SPECTRA[spectrum](min(shape)))
    sigma = torch.linalg.svdvals(delta.double())
    energy = float((sigma**2).sum())
    for rank in {1, 4, min(16, *shape), min(shape)}:
        found = truncated_svd(delta, rank, generator())
        left, right = found.factors(rank)
        achieved = math.sqrt(component_products(delta.double(), left, right)[1] / energy)
        best = math.sqrt(float((sigma[rank:] ** 2).sum()) / energy)
        assert achieved <= 1.001 * best + 1e-6, (rank, achieved, best)
        assert found.error(rank) == pytest.approx(achieved, rel=1e-4, abs=1e-6)
        assert found.excess <= 1e-3


@pytest.mark.parametrize("shape", [(96, 64), (700, 600), (90, 700)], ids=str)
def test_factors_are_orthonormal_balanced_and_of_canonical_sign(shape):
    delta = made(shape, SPECTRA["power law"](min(shape)))
    found = truncated_svd(delta, 8, generator())
    assert torch.allclose(found.left[:, :8].double().T @ found.left[:, :8].double(), torch.eye(8).double(), atol=1e-5)
    assert torch.allclose(found.right[:8].double() @ found.right[:8].double().T, torch.eye(8).double(), atol=1e-5)
    left, right = found.factors(8)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-5)
    largest = found.right[:8].abs().argmax(dim=1)
    assert (found.right[:8].gather(1, largest[:, None]) > 0).all()


def test_full_rank_reproduces_the_matrix_to_rounding():
    delta = made((300, 200), SPECTRA["steep"](200))
    left, right = truncated_svd(delta, 200, generator()).factors(200)
    assert (left.float() @ right.float() - delta).abs().max() <= 1e-6 * delta.abs().max()


def test_a_zero_matrix_has_no_energy_and_no_error():
    found = truncated_svd(torch.zeros(6, 4), 3, generator())
    assert found.energy == 0.0
    assert found.error(3) == 0.0
    left, right = found.factors(3)
    assert not (left @ right).any()


def test_nan_and_infinity_are_refused():
    for value in (math.nan, math.inf):
        delta = torch.zeros(4, 4)
        delta[1, 2] = value
        with pytest.raises(ValueError, match="NaN or Inf"):
            truncated_svd(delta, 2, generator())


def test_the_energy_is_right_where_float32_sums_are_not():
    delta = torch.full((2048, 4096), 1e-3)
    assert truncated_svd(delta, 1, generator()).energy == pytest.approx(
        2048 * 4096 * float(delta[0, 0]) ** 2, rel=1e-12
    )


def test_the_same_seed_gives_the_same_bits():
    delta = made((700, 600), SPECTRA["power law"](600))
    first, second = (truncated_svd(delta, 8, generator()) for _ in range(2))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_matrix_of_rank_r_is_recovered_by_rank_r(rows, columns, rank, seed):
    generator_ = np.random.default_rng(seed)
    rank = min(rank, rows, columns)
    delta = torch.from_numpy(
        generator_.standard_normal((rows, rank)) @ generator_.standard_normal((rank, columns))
    ).float()
    left, right = truncated_svd(delta, rank, generator()).factors(rank)
    assert (left @ right - delta.double()).norm() <= 1e-5 * max(float(delta.norm()), 1e-30)


NASTY = {
    **SPECTRA,
    "ill-conditioned": lambda k: 10.0 ** -np.linspace(0, 9, k),
    "clustered": lambda k: np.repeat([1.0, 0.99, 0.5, 0.4999, 0.1], -(-k // 5))[:k],
    "equal directions and noise": lambda k: np.where(np.arange(k) < 12, 1.0, 0.0) + 0.05,
    "a gap at the rank": lambda k: np.where(np.arange(k) < 6, 1.0, 1e-4),
    "zero": np.zeros,
    "huge": lambda k: 1e25 * np.arange(1, k + 1) ** -0.5,
    "minute": lambda k: 1e-22 * np.arange(1, k + 1) ** -0.5,
}
ROUTES = {
    "subspace": Costs(direct=0, share=0.7, cheap=0.0, patience=math.inf),
    "gram": Costs(direct=0, share=0.7, cheap=math.inf),
    "a change of mind": Costs(direct=0, share=0.7, cheap=0.0, patience=0.0, steps=3),
    "diagonal": Costs(),
    "lapack": Costs(),
}


def nasty(number):
    """One of the thousand: spectrum, shape, rank and route all vary; every fifth has one very short side."""
    random = np.random.default_rng(number)
    name = list(NASTY)[number % len(NASTY)]
    route = list(ROUTES)[number // len(NASTY) % len(ROUTES)]
    short = int(random.integers(1, 6)) if number % 5 == 0 else int(random.integers(60, 110))
    shape = (short, int(random.integers(short, 140)))
    delta = made(shape, NASTY[name](short), number)
    if random.random() < 0.5:
        delta = delta.T
    return delta, int(random.integers(1, 11)), route


@pytest.mark.parametrize("part", range(10))
def test_the_certificate_holds_on_a_thousand_nasty_matrices(part):
    for number in range(part * 100, part * 100 + 100):
        delta, rank, route = nasty(number)
        found = truncated_svd(delta, rank, generator(), costs=ROUTES[route], exact=route == "lapack")
        left, right = found.factors(min(rank, *delta.shape))
        sigma = torch.linalg.svdvals(delta.double())
        norm, best = float(sigma.norm()), float(sigma[rank:].norm())
        achieved = float(torch.linalg.matrix_norm(delta.double() - left @ right))
        assert found.excess <= 1e-3, number
        assert achieved <= best + found.excess * max(best, norm / 1000) + 1e-7 * norm, number
        assert found.error(rank) * norm == pytest.approx(achieved, rel=1e-4, abs=1e-6 * norm), number


@pytest.mark.parametrize(("costs", "route"), [(ROUTES["subspace"], "subspace"), (ROUTES["gram"], "gram")])
def test_the_route_taken_is_told(costs, route):
    delta = made((90, 100), SPECTRA["power law"](90))
    assert truncated_svd(delta, 4, generator(), costs=costs).route == route
    assert truncated_svd(delta, 4, generator(), exact=True).route == "lapack"


def test_a_search_that_starts_blind_to_the_leading_direction_is_not_certified_by_it():
    """The probes must see what the rest of the start does not: here it has nothing of the largest direction."""
    sigma = np.concatenate([[2.0], np.ones(20), np.full(79, 0.1)])
    delta = torch.diag(torch.from_numpy(sigma)) / np.linalg.norm(sigma)
    gram = delta @ delta.T
    start = torch.randn(100, 24, generator=generator(), dtype=torch.float64)
    start[0] = 0.0
    probes = gram.sqrt() @ torch.randn(100, 16, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    search = Search(torch.linalg.qr(start)[0], probes, 8, 1e-3)
    best = float((gram.diagonal().sort(descending=True)[0][:8]).sum())
    for step in range(6):
        search.take(gram @ search.pending())
        search.look()
        search.look_closely()
        assert step or search.excess > 0.1, "without the probes nothing would speak against the start"
        optimum, achieved = math.sqrt(1 - best), math.sqrt(1 - search.captured)
        assert achieved <= optimum * (1 + search.excess) + 1e-12
        assert search.widen(8)


def test_probes_are_applied_as_polynomials_of_what_the_start_has_not_seen():
    """The polynomials of all edges come from one set of probes: their coefficients against NumPy's Chebyshev series."""
    t = np.linspace(0.0, 3.0, 7)
    for degree in (1, 2, 5):
        for ratio in (0.4, 1.0, 3.0):
            expected = np.polynomial.chebyshev.chebval(ratio * (t + 1.0) - 1.0, [0.0] * degree + [1.0])
            found = np.polynomial.chebyshev.chebval(t, rescaled_chebyshev(degree, ratio))
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_a_rank_whose_later_directions_converge_last_is_certified_without_a_gram_matrix():
    """What widens a search must serve the last of the leading directions too, not only the first."""
    delta = made((500, 700), SPECTRA["power law"](500))
    found = truncated_svd(delta, 32, generator(), costs=Costs(direct=0, cheap=0.0, patience=math.inf))
    assert (found.route, found.excess <= 1e-3) == ("subspace", True)


def test_a_start_from_a_sketch_does_not_spoil_a_matrix_that_cancels_in_it():
    """Columns that are equal cancel in pairs, by chance, where a sketch adds them up: the search must recover."""
    column = torch.randn(600, 1, generator=generator())
    noise = torch.randn(600, 2000, generator=generator())
    delta = column.expand(600, 2000) * 0.1 + noise
    sigma = torch.linalg.svdvals(delta.double())
    found = truncated_svd(delta, 4, generator())
    best = float(sigma[4:].norm() / sigma.norm())
    assert found.error(4) <= best * (1 + found.excess) + 1e-7
    assert found.excess <= 1e-3


def test_more_triplets_than_asked_for_are_orthonormal_and_never_claim_too_much():
    delta = made((500, 700), SPECTRA["power law"](500))
    found = truncated_svd(delta, 32, generator())
    sigma = torch.linalg.svdvals(delta.double())
    assert len(found.sigma) >= 64
    assert torch.allclose(found.left.double().T @ found.left.double(), torch.eye(len(found.sigma)).double(), atol=1e-5)
    for rank in (40, 64):
        assert (
            0.95 * float((sigma[:rank] ** 2).sum())
            <= found.captured(rank)
            <= float((sigma[:rank] ** 2).sum()) * 1.000001
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 7, 60])
def test_the_residual_of_stored_factors_is_that_of_the_dense_difference(dtype, rank):
    delta = made((60, 80), SPECTRA["steep"](60))
    left, right = (factor.to(dtype) for factor in truncated_svd(delta, rank, generator()).factors(rank))
    expected = float(((delta.double() - left.double() @ right.double()) ** 2).sum())
    found = component_products(delta, left, right)[1]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-18)
    assert component_products(delta, left, right, energy=float((delta.double() ** 2).sum()))[1] == pytest.approx(found)


def test_the_energy_given_is_not_computed_again():
    delta = made((60, 80), SPECTRA["steep"](60))
    energy = float((delta.double() ** 2).sum())
    assert truncated_svd(delta, 4, generator(), energy=energy).energy == energy


def test_working_memory_grows_with_the_sides_and_the_rank():
    assert working_bytes((1536, 8960), 8) < working_bytes((1536, 8960), 128) < working_bytes((3072, 8960), 128)
    assert working_bytes((8960, 1536), 8) == working_bytes((1536, 8960), 8)
