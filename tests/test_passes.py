"""Passes over a whole tensor: shared by threads, summed in order, once; what is drawn and counted in them is exact."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fixtures import generate
from surgery import checkpoint as checkpoint_room
from surgery import merged as engine_room
from surgery.algorithms.kernel import Kernel, Setting, merge_tensors
from surgery.algorithms.order import Order, Rank
from surgery.algorithms.registry import ALGORITHMS
from surgery.algorithms.sparsify import Bits
from surgery.checkpoint import open_checkpoint
from surgery.errors import NumericError
from surgery.merged import Merged
from surgery.numerics import random_words
from surgery.operations import cost
from surgery.passes import Passes
from surgery.tensor import read_bytes

RUNS = [(k, k + 1) for k in range(40)]


class Harmonic(Kernel):
    """Sums 1 / (k + 1) over runs in a first stage, spares a second one, and counts runs in a third."""

    stages = 3

    def needs(self, found):
        return len(found) != 1

    def conclude(self, totals, found):
        return totals[0]


def passes(observe, begin=lambda: None):
    return Passes(Harmonic(Setting("w", (40,), torch.float64)), RUNS, begin, observe)


def term(run, found):
    return (np.array(1 / (run[0] + 1)) if not found else np.array(1),)


def in_order():
    total = 1.0
    for k in range(1, 40):
        total = total + 1 / (k + 1)
    return total


def test_threads_share_runs_and_sums_keep_the_order_of_the_runs():
    chance = random.Random(0)
    done, begun = [], []

    def observe(run, found):
        time.sleep(chance.random() / 500)
        done.append((len(found), run, threading.get_ident()))
        return term(run, found)

    shared = passes(observe, lambda: begun.append(1))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: shared.get(), range(4)))
    assert all(found == [in_order(), None, 40] for found in results)
    assert sorted((stage, run) for stage, run, _ in done) == [(stage, run) for stage in (0, 2) for run in RUNS]
    assert len({thread for _, _, thread in done}) > 1
    assert begun == [1]


def test_an_error_in_one_run_reaches_every_thread_that_waits():
    def observe(run, found):
        if run[0] == 5:
            raise NumericError("is NaN")
        time.sleep(0.001)
        return term(run, found)

    shared = passes(observe)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(shared.get) for _ in range(3)]
        for future in futures:
            with pytest.raises(NumericError, match="is NaN"):
                future.result(timeout=20)


def test_bits_are_given_back_from_anywhere_once_all_are_there():
    mask = np.random.default_rng(0).random(1000) < 0.3
    bits = Bits(1000)
    for start in (504, 0):  # runs come in any order
        assert bits.get(0, 8) is None
        bits.put(start, mask[start : min(start + 504, 1000)])
    for start, stop in ((0, 1000), (3, 4), (501, 777), (999, 1000)):
        assert np.array_equal(bits.get(start, stop - start), mask[start:stop])
    bits.clear()
    assert bits.get(0, 8) is None
    bits.put(0, mask)
    assert bits.get(0, 8) is None
    ragged = Bits(20)
    ragged.put(0, mask[:10])
    ragged.put(10, mask[10:20])  # within a byte: given up
    assert ragged.get(0, 10) is None


def lazily(tensors):
    return [open_checkpoint({"w": tensor}).lazy("w") for tensor in tensors]


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_was_drawn_is_remembered_for_the_last_block_and_then_forgotten(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 200, generator=generator)
    models = [base + 0.1 * torch.randn(64, 200, generator=generator) for _ in "ab"]
    monkeypatch.setattr(engine_room, "BLOCK", 1600)
    drawn = []
    monkeypatch.setattr("surgery.numerics.random_words", lambda *a: drawn.append(a) or random_words(*a))
    lazy = Merged("w", lazily(models), lazily([base])[0], name, {"density": 0.5}, compat="mergekit")
    once = bytes(read_bytes(lazy))
    assert sum(count for *_, count in drawn) == 2 * base.numel()
    assert bytes(read_bytes(lazy)) == once  # drawn anew
    assert sum(count for *_, count in drawn) == 4 * base.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_della_keeps_by_rank_where_it_is_rescaled_by_its_norm(dtype):
    generator = torch.Generator().manual_seed(3)
    base = torch.zeros(50, 300, dtype=dtype)
    delta = torch.randn(50, 300, generator=generator, dtype=dtype)
    found = merge_tensors("della_linear", [delta], base, {"density": 0.4, "epsilon": 0.3}, name="w", compat="mergekit")
    magnitudes = delta.abs().numpy()
    ranks = np.argsort(np.argsort(magnitudes, axis=1), axis=1)
    chance = 0.1 + 0.6 * ranks / 299
    words = random_words(0, "w", "model 0", 0, 50 * 300).reshape(50, 300)
    kept = words * 2.0**-32 < chance
    scale = magnitudes.sum(dtype=np.float64) / magnitudes[kept].sum(dtype=np.float64)
    wrong = kept != (found.numpy() != 0)
    assert wrong.mean() < 1e-3  # draws that lie on a step, to float32's precision
    np.testing.assert_allclose(found.numpy()[kept & ~wrong], (delta.numpy() * scale)[kept & ~wrong], rtol=1e-3)


def test_equal_magnitudes_are_counted_one_by_one_where_a_sample_shows_few(monkeypatch):
    monkeypatch.setattr("surgery.algorithms.order.BLOCK", 300)
    values = torch.tensor([0.0] * 500 + [1.0] * 900 + [2.0] * 600)
    for rank in (1, 599, 600, 601, 1499, 1500, 1501, 2000):
        seeker = Order([Rank(0, rank)], 2000, torch.float32)
        seeker.sample([values])
        totals = [seeker.observe([part], []) for part in values.split(500)]
        (value,) = seeker.conclude(tuple(map(sum, zip(*totals, strict=True))), [])
        assert value == float(values.sort(descending=True).values[rank - 1])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("ties", {"density": 0.4}), ("breadcrumbs", {"density": 0.4}), ("dare_ties", {"density": 0.4}),
     ("della", {"density": 0.4}), ("model_stock", {}), ("linear", {}), ("slerp", {"t": 0.4})],
)  # fmt: skip
def test_what_is_held_of_a_large_matrix_is_a_few_blocks(name, parameters):
    """An embedding of 150,000 × 4,096: what two threads hold for it, by the plan that tests hold to the peak."""
    spec = type("Huge", (), {"unit": 1, "scratch": 0, "resident": 0})
    from surgery.tensor import TensorSpec

    def tensor():
        found = spec()
        found.spec = TensorSpec("embed", "F32", (150_000, 4096))
        return found

    base = tensor() if ALGORITHMS[name].base == "required" else None
    lazy = Merged("embed", [tensor(), tensor()], base, name, parameters, compat="mergekit")
    assert 2 * lazy.resident < 360_000_000


def test_a_checkpoint_is_looked_through_for_quantised_modules_once(tmp_path):
    generate.write(tmp_path / "m", generate.SIZES["tiny"])
    opened = open_checkpoint(tmp_path / "m")
    first = checkpoint_room.quantised_modules(opened)
    assert checkpoint_room.quantised_modules(opened) is first


def test_the_time_of_every_algorithm_was_measured():
    assert set(cost.NANOSECONDS) == set(ALGORITHMS)
