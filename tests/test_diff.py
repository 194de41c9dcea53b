"""diff: the verdict on each kind of change, and the table of forms to ship it in, whose commands can be pasted."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery.cli.main import main


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {
        "embed_tokens.weight": (256, 64), "layers.0.self_attn.q_proj.weight": (64, 64),
        "layers.0.mlp.up_proj.weight": (96, 64), "layers.0.mlp.up_proj.bias": (96,), "norm.weight": (64,),
        "lm_head.weight": (256, 64),
    }  # fmt: skip
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def noise(shape, size=0.01):
    return (size * np.random.default_rng(7).standard_normal(shape)).astype(np.float32)


def moved(*ends: str, rank: int | None = None) -> dict[str, np.ndarray]:
    changed = tensors()
    for name, value in changed.items():
        if name.endswith(ends):
            step = noise(value.shape) if rank is None else noise((len(value), rank)) @ noise((rank, value.shape[1]), 1)
            changed[name] = value + step
    return changed


def rows_moved() -> dict[str, np.ndarray]:
    changed = tensors()
    changed["embed_tokens.weight"][3:6] += 1
    return changed


def with_values(name: str, value: float) -> dict[str, np.ndarray]:
    changed = tensors()
    changed[name][1:3] = value
    return changed


@pytest.mark.parametrize(
    ("tuned", "verdict"),
    [
        (tensors(), "identical"),
        (moved("bias"), "only biases"),
        (moved("norm.weight"), "only norms"),
        (moved("bias", "norm.weight"), "only biases and norms"),
        (rows_moved(), "only embeddings"),
        (moved("lm_head.weight"), "only the head"),
        (moved("embed_tokens.weight", "lm_head.weight"), "only embeddings and the head"),
        (moved("proj.weight", rank=2), "low-rank (rank 4 holds 100 % of the matrices' ‖Δ‖²)"),
        (moved("proj.weight"), "dense"),
        (tensors(1), "unrelated (cosine -0.01)"),
        ({name: value * np.float32(1 + 2**-23) for name, value in tensors().items()}, "equal to float32 rounding"),
        (with_values("norm.weight", np.nan), "only NaN or Inf"),
        ({**moved("bias"), "norm.weight": np.full(64, np.nan, np.float32)}, "only biases (and NaN or Inf)"),
        ({**tensors(), "new": np.ones(2, np.float32)}, "identical values (and tensors added)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_verdict_names_the_kind_of_change(tuned, verdict):
    assert surgery.diff(tensors(), tuned).verdict() == verdict


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([0, 1], [0, 2], "only integers, booleans or codes"),
        ([False], [True], "only integers, booleans or codes"),
        ([0.0, 1.0], [-0.0, 1.0], "only signs of zeros"),
        ([np.nan, np.inf, 1.0], [np.nan, np.inf, 1.0], "identical"),
        ([], [], "identical"),
        (2.0, 2.0, "identical"),
    ],
)
def test_identical_means_every_bit(before, after, verdict):
    report = surgery.diff({"x": np.array(before)}, {"x": np.array(after)})
    assert report.verdict() == verdict
    assert report.identical == (verdict == "identical")


def forms(report) -> dict[str, dict]:
    return {form["form"]: form for form in report.document()["ship_it_as"]}


@pytest.mark.parametrize("tuned", [moved("bias"), moved("norm.weight"), rows_moved()], ids=["bias", "norm", "rows"])
def test_what_needs_no_matrix_ships_as_an_adapter_of_any_rank(tuned):
    adapter = forms(surgery.diff(tensors(), tuned))["adapter"]
    report = surgery.extract_lora(tensors(), tuned).report
    assert adapter["bytes"] == sum(row.nbytes for row in report.rows)
    assert adapter["error"] == pytest.approx(report.error, abs=1e-6) == 0


def test_without_a_sketch_no_adapter_is_offered():
    report = surgery.diff(tensors(), moved("proj.weight", "bias"), spectrum=False)
    assert list(forms(report)) == ["full copy"]


def test_errors_and_bytes_of_the_ranks_are_those_of_the_adapters():
    tuned = moved("weight", "bias")
    table = forms(surgery.diff(tensors(), tuned))
    for rank in (4, 16, 64):
        form = table[f"LoRA rank {rank}"]
        assert "exclude=['embed_tokens.weight']" in form["command"]  # it moved all over
        report = eval(form["command"], {"surgery": surgery, "a": tensors(), "b": tuned}).report
        assert form["bytes"] == sum(row.nbytes for row in report.rows)
        assert form["error"] == pytest.approx(report.error, abs=2e-3)
    assert table["full copy"]["error"] == 0
    assert math.isclose(table["full copy"]["bytes"], sum(value.nbytes for value in tuned.values()))


def test_commands_can_be_pasted_from_where_diff_was_run(tmp_path, monkeypatch):
    for name, content in (("my base", tensors()), ("it's tuned", moved("proj.weight"))):
        (tmp_path / "models" / name).mkdir(parents=True)
        save_file(content, tmp_path / "models" / name / "model.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    report = surgery.diff("../models/my base", "../models/it's tuned", target=["up_proj"])
    command = shlex.split(forms(report)["LoRA rank 4"]["command"])
    assert command[:4] == ["surgery", "extract-lora", "../models/my base", "../models/it's tuned"]
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()):
        main([*command[1:], "-q"])
    assert ended.value.code == 0
    (made,) = (tmp_path / "elsewhere").iterdir()
    assert json.loads((made / "adapter_config.json").read_text())["target_modules"] == ["up_proj"]
    assert shlex.split(forms(report)["full copy"]["command"]) == ["cp", "-r", "../models/it's tuned", "OUT"]


def test_commands_for_state_dicts_are_python():
    tuned = moved("proj.weight")
    command = forms(surgery.diff(tensors(), tuned))["LoRA rank 4"]["command"]
    adapter = eval(command, {"surgery": surgery, "a": tensors(), "b": tuned})
    assert adapter.report.rank == "4"
