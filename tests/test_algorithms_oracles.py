"""Every algorithm against a plain float64 NumPy reading of its paper: whole arrays, full sorts, no streaming.

These are our own semantics; ``tests/test_mergekit_oracle.py`` holds ``compat="mergekit"`` against mergekit itself. At the
end: that the two semantics differ where the documentation says so.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.algorithms.kernel import merge_tensors
from surgery.errors import UsageError
from surgery.numerics import random_words

SHAPES = [(), (9,), (5, 1), (1, 7), (12, 16), (3, 4, 5), (0, 3)]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def draw(shape, count=3, seed=3, size=0.2):
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(shape)
    return base, [base + size * generator.standard_normal(shape) for _ in range(count)]


def run(name, models, base=None, parameters=None, per_model=(), **options):
    tensors = [torch.from_numpy(np.array(model)) for model in models]
    own = None if base is None else torch.from_numpy(np.array(base))
    return merge_tensors(name, tensors, own, parameters, per_model, name="w", **options).numpy()


def each(**lists):
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def trimmed(delta, density):
    """Keep the k largest magnitudes, by a full sort."""
    if density >= 1 or not delta.size:
        return delta
    k = max(1, int(density * delta.size)) if density else 0
    order = np.argsort(-np.abs(delta), axis=None)[:k]
    kept = np.zeros(delta.size)
    kept[order] = delta.reshape(-1)[order]
    return kept.reshape(delta.shape)


def elect(deltas):
    return np.where(np.sum(deltas, axis=0) >= 0, 1.0, -1.0)


def agreeing_mean(deltas, coeffs, *, normalize):
    sign = elect(deltas)
    top, bottom = np.zeros(sign.shape), np.zeros(sign.shape)
    for delta, coeff in zip(deltas, coeffs, strict=True):
        agrees = np.sign(delta) == sign
        top += coeff * delta * agrees
        bottom += coeff * agrees
    return top / np.where(bottom == 0, 1, bottom) if normalize else top


def keep_mask(model, chance, shape, seed=0):
    words = random_words(seed, "w", f"model {model}", 0, int(np.prod(shape)))
    return (words < np.broadcast_to(chance, shape).reshape(-1) * 2**32).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_and_passthrough(shape):
    _, models = draw(shape)
    coeffs = [0.5, -0.25, 1.5]
    wanted = sum(c * m for c, m in zip(coeffs, models, strict=True))
    np.testing.assert_allclose(run("linear", models, per_model=each(coeff=coeffs)), wanted / 1.75, **EXACT)
    found = run("linear", models, None, {"normalize": False}, each(coeff=coeffs))
    np.testing.assert_allclose(found, wanted, **EXACT)
    np.testing.assert_allclose(run("passthrough", models[:1], None, {"scale": -2}), -2 * models[0], **EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_task_arithmetic_adds_forgets_and_makes_analogies(shape):
    base, models = draw(shape)
    wanted = base + 0.7 * (models[0] - base) - 0.7 * (models[1] - base) + 0.7 * (models[2] - base)
    found = run("task_arithmetic", models, base, {"scale": 0.7}, each(coeff=[1, -1, 1]))
    np.testing.assert_allclose(found, wanted, **EXACT)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties(shape, density):
    base, models = draw(shape)
    deltas = [trimmed(model - base, density) for model in models]
    coeffs = [0.5, 2.0, 1.0]
    wanted = base + 0.9 * agreeing_mean(deltas, coeffs, normalize=True)
    found = run("ties", models, base, {"density": density, "scale": 0.9}, each(coeff=coeffs))
    np.testing.assert_allclose(found, wanted, **EXACT)


def test_ties_keeps_equal_magnitudes_together():
    base = np.zeros(6)
    delta = np.array([3.0, -1.0, 1.0, 1.0, 0.5, 0.0])
    np.testing.assert_array_equal(run("ties", [delta], base, {"density": 0.34}), [3, -1, 1, 1, 0, 0])
    np.testing.assert_array_equal(run("ties", [delta], base, {"density": 0.2}), [3, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_dare(shape, ties):
    base, models = draw(shape)
    densities, coeffs = [0.3, 0.6, 1.0], [1.0, 0.5, -0.5]
    deltas = [
        (model - base) * keep_mask(k, p, shape) / p if p < 1 else model - base
        for k, (model, p) in enumerate(zip(models, densities, strict=True))
    ]
    change = agreeing_mean(deltas, coeffs, normalize=False) if ties else np.tensordot(coeffs, deltas, 1)
    name = "dare_ties" if ties else "dare_linear"
    found = run(name, models, base, {}, each(coeff=coeffs, density=densities))
    np.testing.assert_allclose(found, base + change, **EXACT)


def test_dare_keeps_the_expectation():
    base, models = draw((400, 500), 1)
    delta = (run("dare_linear", models, base, {"density": 0.25}) - base).reshape(-1)
    kept = np.count_nonzero(delta) / delta.size
    assert abs(kept - 0.25) < 5 * np.sqrt(0.25 * 0.75 / delta.size)
    whole = (models[0] - base).reshape(-1)
    assert abs(delta @ whole / (whole @ whole) - 1) < 0.02


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della(shape, name):
    base, models = draw(shape)
    density, epsilon, coeffs = 0.5, 0.2, [1.0, 0.5, 2.0]
    deltas = []
    for k, model in enumerate(models):
        delta = model - base
        rows = delta.reshape(-1, shape[-1] if shape else 1) if delta.size else delta
        length = rows.shape[-1]
        ranks = np.argsort(np.argsort(np.abs(rows), axis=1), axis=1)
        chance = density - epsilon + 2 * epsilon * ranks / (length - 1) if length > 1 else np.full(rows.shape, density)
        chance = chance.reshape(shape)
        deltas.append(delta * keep_mask(k, chance, shape) / chance)
    mean = agreeing_mean(deltas, coeffs, normalize=True)
    change = mean if name == "della" else np.tensordot(coeffs, deltas, 1)
    found = run(name, models, base, {"density": density, "epsilon": epsilon}, each(coeff=coeffs))
    np.testing.assert_allclose(found, base + change, **EXACT)


def test_della_refuses_probabilities_out_of_range():
    base, models = draw((4, 4))
    with pytest.raises(UsageError, match="density ± epsilon"):
        run("della", models, base, {"density": 0.9, "epsilon": 0.2})


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.3), (0.5, 0.0), (0.3, 0.5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_breadcrumbs(shape, density, gamma):
    base, models = draw(shape)
    deltas = []
    for model in models:
        delta = model - base
        kept = int(density * delta.size)
        top = min(int(gamma * delta.size), delta.size - kept)
        order = np.argsort(-np.abs(delta), axis=None)[top : top + kept]
        sparse = np.zeros(delta.size)
        sparse[order] = delta.reshape(-1)[order]
        deltas.append(sparse.reshape(shape))
    coeffs, parameters = [1.0, -0.5, 2.0], {"density": density, "gamma": gamma}
    found = run("breadcrumbs", models, base, parameters, each(coeff=coeffs))
    np.testing.assert_allclose(found, base + np.tensordot(coeffs, deltas, 1), **EXACT)
    found = run("breadcrumbs_ties", models, base, parameters, each(coeff=coeffs))
    np.testing.assert_allclose(found, base + agreeing_mean(deltas, coeffs, normalize=False), **EXACT)


@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
def test_rescaling_restores_the_l1_norm(name):
    base, models = draw((12, 16), 1)
    delta = run(name, models, base, {"density": 0.4, "rescale": True}) - base
    np.testing.assert_allclose(np.abs(delta).sum(), np.abs(models[0] - base).sum(), rtol=1e-12)
    assert 0 < np.count_nonzero(delta) < delta.size


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [0.2, 1e-4])
def test_sce(shape, density, size):
    base, models = draw(shape, size=size)
    deltas = np.array([model - base for model in models])
    if density < 1:
        variance = np.mean((deltas - deltas.mean(axis=0)) ** 2, axis=0)
        k = int(density * np.count_nonzero(variance))
        mask = np.zeros(variance.size)
        mask[np.argsort(-variance, axis=None)[:k]] = 1
        deltas *= mask.reshape(shape)
    energies = np.array([np.sum(delta**2) for delta in deltas])
    weights = energies / (energies.sum() or 1)
    wanted = base + agreeing_mean(list(deltas), weights, normalize=True)
    np.testing.assert_allclose(run("sce", models, base, {"density": density}), wanted, **EXACT)


def slerp(a, b, t):
    """Interpolate two vectors as Shoemake does."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = np.clip(a @ b / norms, -1, 1) if norms else 1.0
    theta = np.arccos(cosine)
    if np.sin(theta) < 1e-7:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


@pytest.mark.parametrize("size", [0.2, 1e-3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slerp(shape, size):
    _, (a, b) = draw(shape, 2, size=size)
    for t in (0.0, 0.3, 1.0):
        wanted = slerp(a.reshape(-1), b.reshape(-1), t).reshape(shape)
        np.testing.assert_allclose(run("slerp", [a, b], None, {"t": t}), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("shape", [(9,), (12, 16), (3, 4, 5)], ids=str)
def test_nuslerp_whole_by_row_and_by_column(shape, with_base):
    base, (a, b) = draw(shape, 2)
    origin = base if with_base else 0.0
    own = base if with_base else None
    pair = [np.array(x - origin) for x in (a, b)]
    per_model = each(coeff=[0.5, 1.5])
    found = run("nuslerp", [a, b], own, {}, per_model)
    wanted = slerp(pair[0].reshape(-1), pair[1].reshape(-1), 0.75).reshape(shape)
    np.testing.assert_allclose(found, origin + wanted, **EXACT)
    for row_wise, axis in ((True, -1), (False, 0)):
        moved = [np.moveaxis(x, axis, -1) for x in pair]
        flat = [x.reshape(-1, x.shape[-1]) for x in moved]
        rows = np.array([slerp(x, y, 0.75) for x, y in zip(*flat, strict=True)]).reshape(moved[0].shape)
        found = run("nuslerp", [a, b], own, {"flatten": False, "row_wise": row_wise}, per_model)
        np.testing.assert_allclose(found, origin + np.moveaxis(rows, -1, axis), **EXACT)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_multislerp_by_the_tangent_space_it_was_described_in(shape, with_base):
    base, models = draw(shape)
    origin = base if with_base else 0.0
    flat = np.array([(model - origin).reshape(-1) for model in models])
    coeffs = np.array([0.2, 0.3, 0.5])
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    units = flat / np.where(norms > 0, norms, 1)
    mean = coeffs @ units
    mean = mean / (np.linalg.norm(mean) or 1)
    tangents = units - (units @ mean)[:, None] * mean
    step = coeffs @ tangents
    size = np.linalg.norm(step)
    point = np.cos(size) * mean + np.sinc(size / np.pi) * step
    wanted = origin + (point * float(coeffs @ norms[:, 0])).reshape(shape)
    found = run("multislerp", models, base if with_base else None, {}, each(coeff=list(coeffs)))
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_multislerp_refuses_directions_that_cancel_out():
    a, b, c = np.array([1.0, 0]), np.array([-0.5, 3**0.5 / 2]), np.array([-0.5, -(3**0.5) / 2])
    with pytest.raises(UsageError, match="cancel out"):
        run("multislerp", [a, b, c])


def test_karcher_finds_the_point_where_tangents_vanish():
    _, models = draw((12, 16), 4, size=1.0)
    found = run("karcher", models, None, {"max_iter": 100, "tol": 1e-12}).reshape(-1)
    units = np.array([model.reshape(-1) / np.linalg.norm(model) for model in models])
    mean = found / np.linalg.norm(found)
    cosines = units @ mean
    angles = np.arccos(cosines)
    tangent = np.sum((angles / np.sin(angles))[:, None] * (units - cosines[:, None] * mean), axis=0)
    assert np.linalg.norm(tangent) < 1e-9
    np.testing.assert_allclose(np.linalg.norm(found), np.mean([np.linalg.norm(m) for m in models]), rtol=1e-12)


def test_karcher_of_two_is_the_middle_of_their_arc():
    _, (a, b) = draw((12, 16), 2, size=1.0)
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    middle = slerp(a.reshape(-1) / lengths[0], b.reshape(-1) / lengths[1], 0.5).reshape(a.shape)
    np.testing.assert_allclose(run("karcher", [a, b]), middle * np.mean(lengths), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("size", [0.2, 1e-5])
def test_model_stock(shape, filter_wise, size):
    base, models = draw(shape, size=size)
    apart = filter_wise and len(shape) > 1
    groups = (shape[0], -1) if apart and base.size else (1, -1)
    flat = np.array([(model - base).reshape(groups) if base.size else (model - base)[None] for model in models])
    wanted = np.zeros(base.reshape(groups).shape) if base.size else base
    for row in range(len(wanted) if base.size else 0):
        deltas = flat[:, row]
        pairs = [(0, 1), (0, 2), (1, 2)]
        lengths = [np.linalg.norm(delta) for delta in deltas]
        cosine = np.mean([deltas[i] @ deltas[j] / lengths[i] / lengths[j] for i, j in pairs])
        divisor = 1 + 2 * cosine
        ratio = 3 * cosine / divisor if abs(divisor) > 1e-6 else 0
        wanted[row] = base.reshape(groups)[row] + ratio * deltas.mean(axis=0)
    found = run("model_stock", models, base, {"filter_wise": filter_wise})
    np.testing.assert_allclose(found, wanted.reshape(shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearswap(shape):
    base, (model,) = draw(shape, 1)
    delta = model - base
    weight = np.minimum(0.05 / np.abs(delta), 1)
    np.testing.assert_allclose(run("nearswap", [model], base, {"t": 0.05}), base + weight * delta, **EXACT)


@pytest.mark.parametrize("shape", [(9,), (12, 16), (3, 4, 5)], ids=str)
def test_arcee_fusion(shape):
    base, (model,) = draw(shape, 1)

    def softmax(x):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True) + 1e-8

    p, q = softmax(model), softmax(base)
    importance = np.abs(model - base) * np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    ordered = np.sort(importance, axis=None)
    first, median, third = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    wanted = np.where(importance >= median + 1.5 * (third - first), model, base)
    np.testing.assert_allclose(run("arcee_fusion", [model], base), wanted, **EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ram_and_ramplus(shape):
    base, models = draw(shape)
    deltas = np.array([np.where(np.abs(m - base) > 0.1, m - base, 0) for m in models])
    changers = np.count_nonzero(deltas, axis=0)
    wanted = base + deltas.sum(axis=0) / np.maximum(changers, 1)
    np.testing.assert_allclose(run("ram", models, base, {"epsilon": 0.1}), wanted, **EXACT)
    change = np.zeros(shape)
    for delta in deltas:
        unique = np.count_nonzero((delta != 0) & (changers == 1))
        shared = np.count_nonzero((delta != 0) & (changers > 1))
        factor = 1 + 0.5 * min(shared / max(unique, 0.1), 0.4)
        change += np.where(changers == 1, factor * delta, delta / np.maximum(changers, 1))
    found = run("ramplus", models, base, {"epsilon": 0.1, "r": 0.5, "alpha": 0.4})
    np.testing.assert_allclose(found, base + change, **EXACT)


# Where the two semantics differ, as each algorithm's documentation says under "Departs in mergekit".

SMALL = {"size": 1e-4}
DIFFERENCES = {
    "ties": ({}, {"density": 0.5}, [4.0, 1.0, 1.0]),
    "dare_linear": ({}, {"density": 0.5}, None),
    "dare_ties": ({}, {"density": 0.5}, None),
    "della": ({}, {"density": 0.5}, None),
    "della_linear": ({}, {"density": 0.5}, None),
    "sce": (SMALL, {}, None),
    "slerp": ({"size": 0.02}, {"t": 0.5}, None),
    "nuslerp": ({}, {"flatten": False}, None),
    "model_stock": ({"size": 1e-5}, {}, None),
    "breadcrumbs_ties": ({}, {"density": 0.5}, [4.0, 1.0, 1.0]),
}
NONE = {"linear", "passthrough", "task_arithmetic", "breadcrumbs", "karcher", "ram", "arcee_fusion"}
ROUNDING = {"multislerp": "eps in the norms", "ramplus": "float32 counts", "nearswap": "differences below 1e-6"}


@pytest.mark.parametrize("name", sorted(DIFFERENCES))
def test_the_semantics_differ_where_documented(name):
    drawing, parameters, coeffs = DIFFERENCES[name]
    two = name in ("slerp", "nuslerp")
    base, models = draw((12, 16), 2 if two else 3, **drawing)
    own = None if two else base
    per_model = each(coeff=coeffs) if coeffs else ()
    paper = run(name, models, own, parameters, per_model)
    theirs = run(name, models, own, parameters, per_model, compat="mergekit")
    scale = np.abs(np.array(models) - base).max()
    assert np.abs(paper - theirs).max() > 1e-6 * scale


@pytest.mark.parametrize("name", sorted(NONE | set(ROUNDING)))
def test_the_semantics_agree_where_no_difference_is_documented(name):
    base, models = draw((12, 16), 1 if name in ("passthrough", "nearswap", "arcee_fusion") else 3)
    own = None if name in ("linear", "passthrough", "karcher", "multislerp") else base
    parameters = {"t": 0.05} if name == "nearswap" else {}
    paper, theirs = (run(name, models, own, parameters, compat=compat) for compat in ("paper", "mergekit"))
    np.testing.assert_allclose(paper, theirs, atol=1e-7 if name in ROUNDING else 1e-14, rtol=0)


def test_every_algorithm_is_in_one_of_the_three_lists():
    from surgery.algorithms.registry import ALGORITHMS

    assert set(DIFFERENCES) | NONE | set(ROUNDING) == set(ALGORITHMS)
