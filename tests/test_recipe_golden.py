"""Recipes against mergekit's own answers for them, made by ``python -m fixtures.recipe_oracle --golden``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from surgery.operations.recipe import merge_recipe

GOLDEN = Path(__file__).parent.parent / "fixtures" / "golden"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_recipe_gives_what_mergekit_gives(path, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    with safe_open(path, "pt") as golden:
        assert golden.metadata()["made_by"] == "mergekit 0.1.5"
        result = merge_recipe(golden.metadata()["recipe"].encode())
        assert set(result) == set(golden.keys())
        for name in result:
            wanted, found = golden.get_tensor(name), result[name]
            assert found.dtype == wanted.dtype
            step = 2e-6 if found.dtype == torch.float32 else 2**-7  # a few roundings of mergekit's arithmetic
            assert torch.allclose(found.double(), wanted.double(), rtol=0, atol=step * float(wanted.abs().max())), name


def test_there_are_answers_for_every_form():
    assert len(list(GOLDEN.glob("*.safetensors"))) >= 9
