"""The rank of merged LoRAs above the rounding noise of the dtype they were merged in."""

from __future__ import annotations

import math

import pytest
import torch

from surgery import numerics
from surgery.algorithms.noise import RoundingNoise, floor_rank


@pytest.fixture(autouse=True)
def _one_thread():
    with numerics.single_threaded():
        yield


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def merged(shape, rank, dtype, ratio, seed, *, uneven=0.0):
    """A base in ``dtype`` and its LoRA merged by one rounding: returns ΔW and the fine-tune, in float64."""
    g = torch.Generator().manual_seed(seed)
    m, n = shape
    base = 0.02 * torch.randn(m, n, generator=g)
    base *= torch.exp(uneven * torch.randn(m, 1, generator=g)) * torch.exp(uneven * torch.randn(1, n, generator=g))
    base = base.to(DTYPES[dtype]).double()
    change = (torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)).double()
    change *= ratio * base.norm() / change.norm()
    tuned = (base + change).to(DTYPES[dtype]).double()
    return tuned - base, tuned


def found(delta, tuned, dtype):
    noise = RoundingNoise(tuple(delta.shape), dtype)
    for start in range(0, len(tuned), 50):
        noise.update(tuned[start : start + 50].clone())
    short = delta if delta.shape[0] <= delta.shape[1] else delta.T
    sigma = torch.linalg.eigvalsh(short @ short.T).flip(0).clamp_min(0).sqrt()
    return floor_rank(sigma, float((delta**2).sum()), noise), sigma, noise


@pytest.mark.parametrize(("dtype", "ratio"), [("BF16", 0.03), ("F16", 0.01)])
@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize(("shape", "uneven"), [((256, 256), 0.0), ((160, 640), 0.4), ((400, 200), 0.2)], ids=str)
def test_a_merged_lora_shows_its_true_rank_for_twenty_seeds(dtype, ratio, rank, shape, uneven):
    for seed in range(20):
        delta, tuned = merged(shape, rank, dtype, ratio, seed, uneven=uneven)
        answer, _, _ = found(delta, tuned, dtype)
        assert (answer.rank, answer.certain) == (rank, True), (seed, answer)


@pytest.mark.parametrize(("dtype", "ratio"), [("BF16", 0.005), ("F16", 0.0006)])
def test_a_change_of_the_size_of_the_dtypes_steps_is_uncertain(dtype, ratio):
    for seed in range(5):
        delta, tuned = merged((128, 256), 16, dtype, ratio, seed)
        answer, _, _ = found(delta, tuned, dtype)
        assert not answer.certain
        assert "steps" in answer.why


def test_a_dense_change_beside_the_lora_is_not_called_noise():
    delta, tuned = merged((128, 256), 8, "BF16", 0.05, 0)
    dense = 2e-5 * torch.randn(128, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    answer, _, _ = found(delta + dense, tuned, "BF16")
    assert not answer.certain
    large, _, _ = found(delta + 100 * dense, tuned, "BF16")
    assert (large.rank, large.certain) == (128, True)


def test_too_few_singular_values_are_uncertain():
    delta, tuned = merged((128, 256), 16, "BF16", 0.05, 0)
    _, sigma, noise = found(delta, tuned, "BF16")
    answer = floor_rank(sigma[:10], float((delta**2).sum()), noise)
    assert (answer.rank, answer.certain) == (10, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_variances_are_a_twelfth_of_the_squared_spacing(dtype):
    """The oracle is the dtype itself: the distance to the next number further from zero."""
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DTYPES[dtype])
    bits = values.view(torch.int16) + 1
    spacing = (bits.view(DTYPES[dtype]).double() - values.double()).abs()
    noise = RoundingNoise((40, 30), dtype)
    noise.update(values.double())
    assert noise.energy == pytest.approx(float((spacing**2).sum()) / 12, rel=1e-12)


def test_the_edge_of_even_noise_is_marchenko_and_pasturs():
    noise = RoundingNoise((4000, 9000), "BF16")
    noise._rows += 9000 * 2.0**-14 / 12
    noise._columns += 4000 * 2.0**-14 / 12
    expected = 2.0**-7 / math.sqrt(12) * (math.sqrt(4000) + math.sqrt(9000))
    assert expected < noise.edge < 1.01 * expected


def test_the_edge_of_uneven_noise_is_where_simulated_noise_ends():
    g = torch.Generator().manual_seed(3)
    rows = torch.exp(torch.randn(300, 1, generator=g, dtype=torch.float64))
    noise = RoundingNoise((300, 500), "BF16")
    power = torch.exp2(torch.floor(torch.log2(rows))).expand(300, 500)
    noise.update((power * 1.5).clone())
    drawn = (torch.rand(300, 500, generator=g, dtype=torch.float64) - 0.5) * power * 2.0**-7
    largest = float(torch.linalg.matrix_norm(drawn, 2))
    assert 0.9 * noise.edge < largest < noise.edge
