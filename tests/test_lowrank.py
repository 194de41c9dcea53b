"""Truncated SVD against float64 LAPACK, over spectra that are hard in different ways."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.algorithms.lowrank import Costs, residual_energy, truncated_svd

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
        achieved = math.sqrt(residual_energy(delta.double(), left, right) / energy)
        best = math.sqrt(float((sigma[rank:] ** 2).sum()) / energy)
        assert achieved <= 1.001 * best + 1e-6, (rank, achieved, best)
        assert found.error(rank) == pytest.approx(achieved, rel=1e-3, abs=2e-4)


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
