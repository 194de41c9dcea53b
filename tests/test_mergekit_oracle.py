"""With ``compat="mergekit"`` every algorithm answers what mergekit 0.1.5 answers, in float64.

The answers were recorded by ``fixtures/mergekit_goldens.py`` from mergekit's public ``merge_tensors``; ``make oracle`` asks
it again and runs these tests on what it says then.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from surgery.algorithms.kernel import merge_tensors
from surgery.algorithms.registry import ALGORITHMS, find, resolve

GOLDENS = Path(
    os.environ.get("MERGEKIT_GOLDENS", Path(__file__).parent.parent / "fixtures" / "mergekit-0.1.5.safetensors")
)
with safe_open(GOLDENS, "pt") as opened:
    METADATA = opened.metadata()
    TENSORS = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
CASES = json.loads(METADATA["cases"])
ANSWERED = [case for case in CASES if "refused" not in case]

# mergekit computes with random masks in float32 whatever the dtype.
IN_FLOAT32 = {"dare_linear", "dare_ties", "della", "della_linear"}
BASE_IS_A_MODEL = {"slerp"}
"""mergekit calls the first of two models the base."""


def replayed(masks):
    """Give words that keep exactly what a recorded mask keeps."""

    def draws(model, start, count):
        mask = masks[model].reshape(-1)[start : start + count].numpy()
        return np.where(mask, np.uint32(0), np.uint32(2**32 - 1))

    return draws


def translated(algorithm, parameters):
    """Spell mergekit's parameters as ours, by the registry."""
    names = {parameter.recipe_name: parameter.name for parameter in algorithm.parameters}
    whole, count = {}, max((len(v) for v in parameters.values() if isinstance(v, list)), default=0)
    each = [{} for _ in range(count)]
    for key, value in parameters.items():
        if isinstance(value, list):
            for own, item in zip(each, value, strict=True):
                own[names[key]] = item
        else:
            whole[names[key]] = value
    return whole, each


def ours(case, dtype=torch.float64, compat="mergekit"):
    algorithm = find(case["method"])
    models = [TENSORS[f"{case['inputs']}/{k}"].to(dtype) for k in range(case["models"])]
    base = TENSORS[f"{case['inputs']}/base"].to(dtype) if case["base"] else None
    if case["method"] in BASE_IS_A_MODEL:
        models, base = [base, *models], None
    whole, each = translated(algorithm, case["parameters"])
    masks = [TENSORS[f"{case['name']}/mask {k}"] for k in range(case["masks"])]
    # A model of density 1 draws nothing, so that recorded masks are those of the others, in order.
    densities = resolve(algorithm, len(models), whole, each)[1].get("density", ())
    drawing = [k for k, density in enumerate(densities) if 0 < density < 1]
    by_model = dict(zip(drawing, masks, strict=True)) if masks else {}
    return merge_tensors(
        algorithm, models, base, whole, each, compat=compat, draws=replayed(by_model) if masks else None
    )


@pytest.mark.parametrize("case", ANSWERED, ids=lambda case: f"{case['name']} {case['method']}")
def test_the_answer_is_mergekits(case):
    wanted, found = TENSORS[f"{case['name']}/result"], ours(case)
    assert found.shape == wanted.shape
    tolerance = 1e-6 if case["method"] in IN_FLOAT32 else 1e-12
    assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance), (found - wanted).abs().max()


def test_every_algorithm_of_ours_is_held_against_mergekit():
    assert {find(case["method"]).name for case in ANSWERED} == set(ALGORITHMS)
    assert METADATA["made_by"].startswith("mergekit 0.1.5, ")


def test_what_mergekit_refuses_is_little_and_ours_answers_it():
    refused = [case for case in CASES if "refused" in case]
    assert len(refused) < len(CASES) / 8
    for case in refused:
        assert ours({**case, "masks": 0}).isfinite().all(), case
