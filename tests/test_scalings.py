"""IA³ and LayerNorm tuning, merged as PEFT merges them: trained adapters of several layouts, bit for bit."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MismatchError, UnsupportedError
from tests.families import build, saved

warnings.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models"))


def trained(family, method, folder, path, **settings):
    """Write an addition, and give its tensors other values."""
    surgery.add(saved(family, folder), method, **settings).save(path)
    generator = torch.Generator().manual_seed(3)
    file = path / "adapter_model.safetensors"
    values = {key: value + torch.randn(value.shape, generator=generator) for key, value in load_file(file).items()}
    save_file(values, file)
    return path


CASES = [
    ("llama", "ia3", {}), ("gpt2", "ia3", {"target": "role:qkv,role:down"}), ("bert", "ia3", {}), ("t5", "ia3", {}),
    ("qwen3", "ln-tuning", {}), ("bert", "ln-tuning", {}), ("phi3", "ia3", {"target": "role:qkv,role:down"}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method", "settings"), CASES, ids=str)
def test_merging_gives_the_bits_that_peft_gives(family, method, settings, folder, tmp_path):
    adapter = trained(family, method, folder, tmp_path / "adapter", **settings)
    merged = surgery.merge(saved(family, folder), adapter)
    unloaded = PeftModel.from_pretrained(build(family), adapter).merge_and_unload().state_dict()
    # PEFT leaves heads wrapped where it unloads LayerNorm tuning.
    theirs = {name.replace(".modules_to_save.default", ""): value for name, value in unloaded.items()}
    base = build(family).state_dict()
    for name, value in merged.items():
        assert torch.equal(value, theirs[name]), name
    changed = {name for name in merged if not torch.equal(merged[name], base[name])}
    assert changed >= set(surgery.add(saved(family, folder), method, **settings).chosen)


def test_a_coefficient_goes_part_of_the_way(folder, tmp_path):
    adapter = trained("llama", "ia3", folder, tmp_path / "adapter")
    base = surgery.open(saved("llama", folder))
    half = surgery.merge(base, adapter, coeff=0.5)
    whole = surgery.merge(base, adapter)
    for name, value in half.items():
        torch.testing.assert_close(value, (base[name] + whole[name]) / 2, rtol=1e-6, atol=1e-7)


def test_two_adapters_add_up(folder, tmp_path):
    base = surgery.open(saved("llama", folder))
    ia3, norms = (trained("llama", method, folder, tmp_path / method) for method in ("ia3", "ln-tuning"))
    both = surgery.merge(base, ia3, norms)
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(both[name], surgery.merge(base, norms)[name])
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(both[name], surgery.merge(base, ia3)[name])


@pytest.mark.parametrize("method", ["ia3", "ln-tuning"])
def test_a_merged_one_comes_out_to_the_bit(method, folder, tmp_path):
    base = saved("llama", folder)
    adapter = trained("llama", method, folder, tmp_path / "adapter")
    surgery.merge(base, adapter).save(tmp_path / "merged")
    for given in (None, base):
        restored = surgery.unmerge(tmp_path / "merged", adapter, base=given)
        assert all(torch.equal(value, build("llama").state_dict()[name]) for name, value in restored.items())


def test_without_what_merge_keeps_only_the_base_brings_scaled_weights_back(folder, tmp_path):
    adapter = trained("llama", "ia3", folder, tmp_path / "adapter")
    surgery.merge(saved("llama", folder), adapter, undo=False).save(tmp_path / "merged")
    with pytest.raises(MismatchError, match="cannot be subtracted; pass --base"):
        surgery.unmerge(tmp_path / "merged", adapter)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    adapter = trained("llama", "ia3", folder, tmp_path / "adapter")
    with pytest.raises(MismatchError, match=r"its vector is F32\[1, 32\], the weight F32\[16, 16\]"):
        surgery.merge({name: torch.ones(16, 16) for name in surgery.open(saved("llama", folder))}, adapter)
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.x.hada_w1_a": torch.ones(2)}, file)
    with pytest.raises(UnsupportedError, match="no tensor that an adapter of IA3 has"):
        surgery.merge(saved("llama", folder), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "wobble": 3}))
    with pytest.raises(MismatchError, match="sets 'wobble', which may change the result"):
        surgery.merge(saved("llama", folder), adapter)


@pytest.mark.parametrize(
    "method",
    ["ia3", "ln-tuning", "lora", "bitfit", "prompt-tuning", "prefix-tuning", "p-tuning", "houlsby", "head", "prelayer"],
)
def test_verify_reads_the_folders_of_all_methods(method, folder, tmp_path):
    settings = {"lora": {"r": 2}, "houlsby": {"size": 4}, "head": {"name": "new"}}.get(method, {})
    surgery.add(saved("bert", folder), method, **settings).save(tmp_path / "out")
    assert any("fingerprint" in check for check in dict(surgery.verify(tmp_path / "out").checks))


@pytest.mark.parametrize("method", ["ia3", "ln-tuning", "lora", "bitfit"])
def test_what_add_gives_merges_into_the_base_as_it_is(method, folder):
    base = surgery.open(saved("bert", folder))
    merged = surgery.add(base, method, **({"r": 2} if method == "lora" else {})).merge()
    assert all(torch.equal(value, base[name]) for name, value in merged.items())
