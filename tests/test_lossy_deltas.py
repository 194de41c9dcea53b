"""Lossy deltas: quantised factors whose error is measured, and that nobody takes for an exact delta."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

import surgery
from surgery.cli.main import main
from surgery.errors import FormatError, MismatchError, UsageError
from surgery.lossy import open_lossy
from surgery.operations.extract_lossy import extract_lossy


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base, and a fine-tune of it whose matrices moved along few directions, most along the first."""
    folder = tmp_path_factory.mktemp("lossy")
    torch.manual_seed(0)
    base = {f"model.layers.{n}.self_attn.q_proj.weight": torch.randn(96, 80) * 0.02 for n in range(3)}
    base["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(96)
    tuned = {name: value.clone() for name, value in base.items()}
    for name, value in base.items():
        if value.dim() == 2:
            u, v = torch.linalg.qr(torch.randn(96, 24))[0], torch.linalg.qr(torch.randn(80, 24))[0]
            tuned[name] = value + 1e-3 * (u * torch.arange(1, 25) ** -0.7) @ v.T
    tuned["model.layers.0.self_attn.q_proj.bias"][3] = 0.5
    for name, tensors in (("base", base), ("ft", tuned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return folder


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_the_stated_error_is_that_of_what_was_written(pair, tmp_path, bits):
    path = tmp_path / "task.lossy.safetensors"
    delta = extract_lossy(pair / "base", pair / "ft", bits=bits, rank=24)
    record = delta.save(path)
    stored = load_file(path)
    base, tuned = (load_torch(pair / name / "model.safetensors") for name in ("base", "ft"))
    energy = left = 0.0
    for name, old in base.items():
        wanted = tuned[name].double().numpy() - old.double().numpy()
        made = np.zeros_like(wanted)
        if old.dim() == 2:
            a, b = (
                _dequantised(stored, f"base_model.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB"
            )
            made = b.T @ a  # an oracle of its own: the format as the document tells it
        else:
            made = wanted  # biases are stored as they are
        energy += (wanted**2).sum()
        left += ((wanted - made) ** 2).sum()
    assert record["error"]["relative"] == pytest.approx(np.sqrt(left / energy), rel=1e-6, abs=1e-9)
    assert record["error"]["relative"] < (0.005 if bits == "int8" else 0.1)


def _dequantised(stored, key):
    """Rows are components."""
    (key,) = {
        k.rpartition(".")[0] for k in stored if k.startswith((key, key.replace("base_model.", "base_model.model.")))
    }
    codes = stored[f"{key}.int8"].astype(np.float64)
    packed = stored.get(f"{key}.int4")
    if packed is not None:
        four = np.stack([packed & 15, packed >> 4], axis=2).reshape(packed.shape[0], -1)[:, : codes.shape[1]]
        codes = np.concatenate([codes, np.where(four > 7, four.astype(int) - 16, four)])
    return codes * stored[f"{key}.scales"].astype(np.float64)[:, None]


def test_it_merges_like_an_adapter_at_any_coefficient_and_on_its_base_only(pair, tmp_path):
    path = tmp_path / "task.lossy.safetensors"
    extract_lossy(pair / "base", pair / "ft", bits="int8", rank=24).save(path)
    base, tuned = (load_torch(pair / name / "model.safetensors") for name in ("base", "ft"))
    name = "model.layers.1.self_attn.q_proj.weight"
    for coeff in (1, -0.5):
        surgery.merge(pair / "base", path, coeff=coeff).save(tmp_path / f"out{coeff}")
        moved = load_torch(tmp_path / f"out{coeff}" / "model.safetensors")[name] - base[name]
        assert (moved - coeff * (tuned[name] - base[name])).norm() < 0.01 * moved.norm()
    with pytest.raises(MismatchError):
        surgery.merge(pair / "ft", path).save(tmp_path / "twice")
    surgery.merge(pair / "base", path).save(tmp_path / "in")
    surgery.unmerge(tmp_path / "in", path).save(tmp_path / "out")
    assert torch.equal(load_torch(tmp_path / "out" / "model.safetensors")[name], base[name])
    assert surgery.verify(path).label == "task.lossy.safetensors"


def test_fewer_bits_are_fewer_bytes(pair):
    eight, four = (extract_lossy(pair / "base", pair / "ft", bits=bits, rank=24) for bits in ("int8", "int4"))
    assert four.nbytes < 0.65 * eight.nbytes < 0.65 * eight.adapter.nbytes
    assert four.error > eight.error


def test_nobody_takes_it_for_something_else(pair, tmp_path):
    delta = extract_lossy(pair / "base", pair / "ft", rank=4)
    for name in ("task.delta", "task.safetensors"):
        with pytest.raises(UsageError, match=r"ends in \.lossy\.safetensors"):
            delta.save(tmp_path / name)
    save_file({"w": torch.zeros(2)}, tmp_path / "other.lossy.safetensors")
    with pytest.raises(FormatError, match="is no lossy delta"):
        open_lossy(tmp_path / "other.lossy.safetensors")
    with pytest.raises(UsageError, match="int8 or int4"):
        extract_lossy(pair / "base", pair / "ft", bits="int2")


def test_the_command_states_the_error(pair, tmp_path, capsys):
    out = tmp_path / "task.lossy.safetensors"
    words = ["extract-delta", pair / "base", pair / "ft", "--lossy", "int4", "-o", out]
    for extra, code, said in (
        ([], 0, "not exact"),
        (["--reversible"], 2, "never reversible"),
        (["--overwrite"], 0, "int4"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in [*words, *extra]])
        told = capsys.readouterr()
        assert (stop.value.code, said in told.out + told.err) == (code, True)
    with pytest.raises(SystemExit):
        main([str(word) for word in [*words, "--overwrite", "--json"]])
    assert 0 < json.loads(capsys.readouterr().out)["relative_error"] < 0.2
