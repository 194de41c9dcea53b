"""Hostile recipes, through the command line: one line, the right exit code, and nothing on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures import generate
from surgery.cli import main

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
PAIR = "{{models: [{{model: base}}, {{model: {0}}}], merge_method: {1}}}"

A = "{name: a, models: [{model: b}, {model: ft}], merge_method: linear}"
B = "{name: b, models: [{model: a}, {model: ft}], merge_method: linear}"
LAST = "{models: [{model: a}, {model: ft}], merge_method: linear}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a fine-tune, and copies of it with one thing wrong."""
    root = tmp_path_factory.mktemp("hostile")
    base = generate.write(root / "base", generate.SIZES["tiny"])
    generate.write(root / "ft", generate.SIZES["tiny"], tune=True)
    config = json.loads((base / "config.json").read_text())
    good = load_file(base / "model.safetensors")
    poisoned = good[UP].clone()
    poisoned[3, 5] = torch.nan
    codes = good[UP].to(torch.float8_e4m3fn)
    variants = {
        "missing": ({name: tensor for name, tensor in good.items() if name != UP}, {}),
        "broadcast": ({**good, NORM: good[NORM][:1].clone()}, {}),
        "nan": ({**good, UP: poisoned}, {}),
        "fp8": (
            {**good, UP: codes, f"{UP}_scale_inv": torch.ones(1, 1)},
            {"quantization_config": {"quant_method": "fp8"}},
        ),
        "bare": ({**good, UP: codes}, {}),
    }
    for name, (tensors, more) in variants.items():
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps(config | more))
    return root


CASES = {
    "a typo in a key": ("{modles: [{model: base}], merge_method: linear}", 3, "line 1: unknown key 'modles'"),
    "a typo in a parameter": (
        "{models: [{model: base, parameters: {wieght: 1}}, {model: ft}], merge_method: linear}", 3, "did you mean 'weight'",
    ),
    "a typo in the algorithm": (PAIR.format("ft", "liner"), 2, "did you mean linear"),
    "a layer range outside of the model": (
        "{slices: [{sources: [{model: base, layer_range: [0, 3]}]}], merge_method: passthrough}", 4, "reaches beyond base",
    ),
    "a missing tensor": (PAIR.format("missing", "linear"), 4, f"missing: {UP}: is not there, but in base"),
    "a tensor that the base lacks": (
        "{models: [{model: ft}], base_model: missing, merge_method: ties}", 4, f"missing: {UP}: is not there, but in ft",
    ),
    "a shape that only broadcasts": (PAIR.format("broadcast", "linear"), 4, f"broadcast: {NORM}: has shape [1], but [64]"),
    "fp8 with scales": (PAIR.format("fp8", "linear"), 4, f"fp8: {UP}: is quantised (fp8)"),
    "fp8 without": (PAIR.format("bare", "linear"), 4, f"bare: {UP}: is quantised (F8_E4M3 without scales)"),
    "a NaN, averaged": (PAIR.format("nan", "linear"), 6, f"nan: {UP}: is NaN or infinite at element 197"),
    "a NaN, at weight 0": (
        "{models: [{model: ft}, {model: nan, parameters: {weight: 0}}], merge_method: linear}", 6, "is NaN or infinite",
    ),
    "a NaN, trimmed": (PAIR.format("nan", "ties, base_model: ft"), 6, "is NaN or infinite at element 197"),
    "a NaN, on an arc": (PAIR.format("nan", "slerp, parameters: {t: 0.5}"), 6, "is NaN or infinite at element 197"),
    "a NaN, by rows": (
        PAIR.format("nan", "della, base_model: ft, parameters: {density: 0.5}"), 6, "is NaN or infinite at element 197",
    ),
    "a NaN in a parameter": (
        "{models: [{model: ft, parameters: {weight: .nan}}, {model: base}], merge_method: linear}", 3, "is not a number",
    ),
    "no base named": ("{models: [{model: ft}], merge_method: ties}", 2, "ties needs a base"),
    "a base that is not there": (
        "{models: [{model: ft}], base_model: ./nothing, merge_method: ties}", 3, "./nothing is no folder here",
    ),
    "stages in a circle": (f"{A}\n---\n{B}\n---\n{LAST}", 3, "the stages need each other: a → b → a"),
    "a stage of itself": (f"{A.replace('b}', 'a}')}\n---\n{LAST}", 3, "the stages need each other: a → a"),
    "stages in a circle, and none after them": (f"{A}\n---\n{B}", 3, "the stages need each other: none is the last"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_recipe_ends_in_one_line_and_leaves_nothing(world, tmp_path, monkeypatch, capsys, case):
    text, code, message = CASES[case]
    (tmp_path / "recipe.yml").write_text(text)
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "out")])
    found = capsys.readouterr()
    assert stop.value.code == code, found.err
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert found.err.startswith("surgery: error: ")
    assert message in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


def test_what_only_takes_another_place_is_copied_whatever_it_holds(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yml").write_text(
        "{slices: [{sources: [{model: nan, layer_range: [0, 2]}]}], merge_method: passthrough}"
    )
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "out"), "-q"])
    assert stop.value.code == 0, capsys.readouterr().err
    assert load_file(tmp_path / "out" / "model.safetensors")[UP][3, 5].isnan()
