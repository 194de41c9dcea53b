"""Laws that every merge algorithm keeps, over the registry. Exemptions are written down with their reasons."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from surgery.algorithms.kernel import merge_tensors
from surgery.algorithms.registry import ALGORITHMS, COMPAT, find, resolve
from surgery.errors import UsageError

NAMES = sorted(ALGORITHMS)
SHAPES = [(), (7,), (5, 1), (6, 8), (3, 4, 5), (0, 4)]

COEFFICIENT_ONE = {
    "slerp": "has no coefficients; t = 1 returns the second model",
    "nearswap": "steps are bounded by t",
    "arcee_fusion": "takes over what stands out only",
    "nuslerp": "takes exactly two models",
    "model_stock": "needs two models at least",
    "ram": "changes up to ε count as none",
    "ramplus": "enlarges what one model alone changed, and ε as for ram",
}
"""Algorithms that do not return one model as it is, and why."""

COEFFICIENT_ZERO = dict.fromkeys(
    ("sce", "model_stock", "nearswap", "arcee_fusion", "ram", "ramplus"), "no coefficients"
)
"""Algorithms with a base that cannot be given the coefficient 0."""

SYMMETRIC_EXEMPT = {
    "slerp": "t tells the two apart",
    "dare_linear": "every model has a draw of its own",
    "dare_ties": "every model has a draw of its own",
    "della": "every model has a draw of its own",
    "della_linear": "every model has a draw of its own",
}
"""Algorithms whose result depends on the order of the models."""


def draw(shape, count=3, seed=0, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return base, [base + size * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def arguments(algorithm, count, **given):
    """Give required parameters a value, and make sparsifiers do something."""
    known = {"density": 0.5, "t": 0.3, **given}
    own = {parameter.name for parameter in algorithm.parameters}
    return {name: value for name, value in known.items() if name in own}


def count_for(algorithm):
    low, high = algorithm.models
    return min(max(low, 3), high or 3)


def merged(name, base, models, compat="paper", seed=0, tensor="w", **given):
    algorithm = find(name)
    own = base if algorithm.base == "required" else None
    return merge_tensors(
        algorithm, models, own, arguments(algorithm, len(models), **given), name=tensor, compat=compat, seed=seed
    )


@pytest.mark.parametrize("compat", COMPAT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shape_and_dtype_are_kept_inputs_are_untouched_and_results_repeat(name, shape, compat):
    base, models = draw(shape, count_for(find(name)))
    for dtype in (torch.float64, torch.float32):
        given = [base.to(dtype), *(model.to(dtype) for model in models)]
        before = [tensor.clone() for tensor in given]
        first = merged(name, given[0], given[1:], compat)
        assert first.shape == shape
        assert first.dtype == dtype
        assert first.isfinite().all()
        assert torch.equal(first, merged(name, given[0], given[1:], compat))
        assert all(torch.equal(old, new) for old, new in zip(before, given, strict=True))


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(COEFFICIENT_ONE)))
def test_one_model_returns_itself(name):
    base, models = draw((6, 8), 1)
    found = merged(name, base, models, density=1.0)
    assert torch.allclose(found, models[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", [n for n in NAMES if ALGORITHMS[n].base == "required" and n not in COEFFICIENT_ZERO])
def test_coefficient_zero_returns_the_base(name):
    base, models = draw((6, 8), 3)
    given = {} if find(name).parameter("normalize").default else {"normalize": False}
    found = merged(name, base, models, coeff=0.0, **given)
    assert torch.equal(found, base)


@pytest.mark.parametrize("name", [n for n in NAMES if ALGORITHMS[n].base == "required"])
def test_models_equal_to_the_base_give_the_base(name):
    base, _ = draw((6, 8))
    models = [base.clone() for _ in range(count_for(find(name)))]
    for compat in COMPAT:
        assert torch.equal(merged(name, base, models, compat), base)


@pytest.mark.parametrize("name", [n for n in NAMES if ALGORITHMS[n].base != "required"])
def test_equal_models_give_themselves(name):
    base, _ = draw((6, 8))
    algorithm = find(name)
    for compat in COMPAT:
        given = {"normalize": True} if any(p.name == "normalize" for p in algorithm.parameters) else {}
        found = merged(name, base, [base] * count_for(algorithm), compat, **given)
        assert torch.allclose(found, base, rtol=0, atol=1e-7), compat  # mergekit's multislerp adds 1e-8 to norms


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_models_does_not_matter_where_the_registry_says_so(name):
    algorithm = find(name)
    assert algorithm.symmetric is (name not in SYMMETRIC_EXEMPT)
    count = count_for(algorithm)
    base, models = draw((6, 8), count)
    found = [merged(name, base, list(order)) for order in itertools.permutations(models)]
    same = all(torch.allclose(found[0], other, rtol=0, atol=1e-12) for other in found[1:])
    assert same is algorithm.symmetric


@pytest.mark.parametrize("name", [n for n in NAMES if ALGORITHMS[n].random])
def test_draws_depend_on_seed_and_name(name):
    base, models = draw((16, 16))
    first = merged(name, base, models)
    assert not torch.equal(first, merged(name, base, models, seed=1))
    assert not torch.equal(first, merged(name, base, models, tensor="other"))
    assert all(
        torch.equal(merged(n, base, models), merged(n, base, models, seed=1)) for n in NAMES if n in ("ties", "ram")
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_is_complete(name):
    algorithm = find(name)
    assert algorithm.title
    assert algorithm.citation
    assert algorithm.models[0] >= 1
    names = [parameter.name for parameter in algorithm.parameters]
    assert len(set(names)) == len(names)
    for parameter in algorithm.parameters:
        assert parameter.meaning
        assert parameter.default is None or parameter.check(parameter.default) == parameter.default
    module, _, kernel = algorithm.kernel.partition(":")
    documented = getattr(importlib.import_module(f"surgery.algorithms.{module}"), kernel)
    assert (documented.__doc__ or "").strip()


def test_names_are_found_under_their_other_spellings_and_wrong_ones_get_a_hint():
    assert find("dare-ties") is ALGORITHMS["dare_ties"]
    assert find("ramplus_tl") is ALGORITHMS["ramplus"]
    with pytest.raises(UsageError, match="did you mean ties"):
        find("tiess")
    with pytest.raises(UsageError, match="did you mean density"):
        resolve(find("ties"), 2, {"densty": 0.5})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"density": 1.5}, "density lies in"),
        ({"density": float("nan")}, "finite number"),
        ({"normalize": 0.5}, "true or false"),
        ({"coeff": "1"}, "finite number"),
        ({"scale": [1, 2]}, "finite number"),
    ],
)
def test_values_out_of_range_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        resolve(find("ties"), 2, given)


def test_parameters_of_the_merge_are_not_a_models_and_required_ones_are_asked_for():
    with pytest.raises(UsageError, match="belongs to the merge"):
        resolve(find("ties"), 1, {}, [{"scale": 2.0}])
    with pytest.raises(UsageError, match="slerp needs t"):
        resolve(find("slerp"), 2, {})
    with pytest.raises(UsageError, match="whole number"):
        resolve(find("karcher"), 2, {"max_iter": 2.5})


@pytest.mark.parametrize(
    ("name", "models", "base", "message"),
    [
        ("ties", 2, False, "needs a base"),
        ("linear", 2, True, "takes no base"),
        ("slerp", 3, False, "merges 2"),
        ("nearswap", 2, True, "merges 1 and a base"),
        ("model_stock", 1, True, "2 or more"),
    ],
)
def test_the_number_of_models_must_fit(name, models, base, message):
    with pytest.raises(UsageError, match=message):
        find(name).check_arity(models, base)
