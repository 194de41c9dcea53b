"""The Python API: paths, dicts and lazy objects are interchangeable, and nothing is computed too early."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MismatchError, UnsupportedError, UsageError


def pair(seed=0, layers=2, width=16):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=0.02):
        return scale * torch.randn(*shape, generator=generator)

    base = {}
    for layer in range(layers):
        base[f"layers.{layer}.q_proj.weight"] = normal(width, width)
        base[f"layers.{layer}.up_proj.weight"] = normal(2 * width, width)
        base[f"layers.{layer}.up_proj.bias"] = normal(2 * width)
        base[f"layers.{layer}.input_layernorm.weight"] = torch.ones(width)
    tuned = {
        name: value + (normal(*value.shape, scale=1e-3) if "layers.0" in name else 0) for name, value in base.items()
    }
    return base, tuned


def test_every_name_of_the_package_is_exported_and_importable():
    for name in surgery.__all__:
        assert getattr(surgery, name) is not None
    assert set(surgery.__all__) <= set(dir(surgery))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        surgery.nothing


def test_reports_show_themselves_in_a_line():
    base, tuned = pair()
    assert repr(surgery.diff(base, tuned)).startswith("<DiffReport '(in memory)' → '(in memory)': dense")
    assert repr(surgery.info(base)) == "<Info '(in memory)': 8 tensors, 1.63 K parameters, 6.53 kB>"


def test_tied_weights_of_a_module_are_loaded_by_either_name():
    module = torch.nn.ModuleDict({"emb": torch.nn.Embedding(5, 4), "head": torch.nn.Linear(4, 5, bias=False)})
    module["head"].weight = module["emb"].weight
    wanted = torch.arange(20.0).reshape(5, 4)
    surgery.open({"emb.weight": wanted}).load_into(module)
    assert torch.equal(module["head"].weight, wanted)
    with pytest.raises(MismatchError, match="in the module only"):
        surgery.open({"other.weight": wanted}).load_into(module)


def test_a_module_in_place_of_its_state_dict_is_told_what_to_pass():
    with pytest.raises(UsageError, match=r"not of class Linear; pass its state_dict\(\)"):
        surgery.diff({"weight": torch.zeros(2, 2)}, torch.nn.Linear(2, 2))


def test_the_main_job_runs_on_dicts_without_touching_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, tuned = pair()
    adapter = surgery.extract_lora(base, tuned, rank="full")
    merged = surgery.merge(base, adapter)
    for name, value in tuned.items():
        assert torch.allclose(merged[name], value, atol=1e-7), name
    assert surgery.diff(merged, tuned).relative_norm < 1e-6
    restored = surgery.unmerge(merged, adapter)
    for name, value in base.items():
        assert torch.allclose(restored[name], value, atol=1e-8), name
    assert not list(tmp_path.iterdir())


def test_paths_and_dicts_give_the_same(tmp_path):
    base, tuned = pair()
    for name, tensors in (("base", base), ("ft", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    from_paths = surgery.extract_lora(tmp_path / "base", tmp_path / "ft", rank=2).state_dict()
    from_dicts = surgery.extract_lora(base, tuned, rank=2).state_dict()
    assert from_paths.keys() == from_dicts.keys()
    assert all(torch.equal(from_paths[key], from_dicts[key]) for key in from_paths)


def test_a_live_modules_state_dict_diffs_against_a_path(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    save_file({f"model.{name}": value for name, value in module.state_dict().items()}, tmp_path / "model.safetensors")
    wrapped = {f"_orig_mod.{name}": value for name, value in module.state_dict().items()}
    report = surgery.diff(tmp_path / "model.safetensors", wrapped)
    assert report.verdict() == "identical"
    assert report.notes


def test_numpy_arrays_are_tensors_too():
    checkpoint = surgery.open({"w": np.arange(6, dtype=np.float16).reshape(2, 3), "big": np.arange(2, dtype=">i4")})
    assert checkpoint.specs["w"].describe() == "F16[2, 3]"
    assert checkpoint["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint["big"].tolist() == [0, 1]


def test_nothing_is_computed_before_it_is_asked_for():
    class Trap:
        def __init__(self, spec):
            self.spec = spec
            self.unit, self.scratch, self.resident = 1, 0, 0
            self.reads = 0

        def read_into(self, start, stop, out):
            self.reads += 1
            out[:] = bytes(len(out))

    base, tuned = pair(layers=1)
    adapter = surgery.extract_lora(base, tuned, rank=1)
    traps = {name: Trap(tensor.spec) for name, tensor in surgery.open(base).tensors.items()}
    merged = surgery.merge(traps, adapter)
    merged.plan()
    assert not any(trap.reads for trap in traps.values())
    merged["layers.0.q_proj.weight"]
    assert [name for name, trap in traps.items() if trap.reads] == ["layers.0.q_proj.weight"]


def test_merging_twice_equals_saving_in_between(tmp_path):
    base, tuned = pair()
    _, other = pair(seed=1)
    first = surgery.extract_lora(base, tuned, rank=2)
    second = surgery.extract_lora(base, {n: base[n] + (other[n] - pair(seed=1)[0][n]) for n in base}, rank=2)
    lazy = surgery.merge(surgery.merge(base, first), second, allow_base_mismatch=True)
    surgery.merge(base, first).save(tmp_path / "between")
    stored = surgery.merge(tmp_path / "between", second, allow_base_mismatch=True)
    assert all(torch.equal(lazy[name], stored[name]) for name in base)


def test_a_nested_lazy_merge_is_right_for_tensors_of_many_blocks(tmp_path):
    # Larger than one block: a producer that reads from another one must not share its buffers.
    base = {"q_proj.weight": torch.randn(700, 600)}
    adapters = []
    for seed in (1, 2):
        delta = torch.randn(700, 2, generator=torch.Generator().manual_seed(seed)) @ torch.randn(2, 600)
        adapters.append(surgery.extract_lora(base, {"q_proj.weight": base["q_proj.weight"] + delta}, rank=2))
    nested = surgery.merge(surgery.merge(base, adapters[0]), adapters[1], allow_base_mismatch=True)["q_proj.weight"]
    surgery.merge(base, adapters[0]).save(tmp_path / "one")
    stored = surgery.merge(load_file(tmp_path / "one" / "model.safetensors"), adapters[1], allow_base_mismatch=True)
    assert torch.equal(nested, stored["q_proj.weight"])


def test_load_into_copies_into_a_module_and_refuses_what_does_not_fit():
    module = torch.nn.Linear(3, 2)
    surgery.open({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}).load_into(module)
    assert module(torch.ones(3)).tolist() == [3.0, 3.0]
    with pytest.raises(MismatchError, match="bias: is in the module only"):
        surgery.open({"weight": torch.ones(2, 3)}).load_into(module)
    surgery.open({"weight": torch.full((2, 3), 2.0)}).load_into(module, strict=False)
    assert module(torch.ones(3)).tolist() == [6.0, 6.0]
    with pytest.raises(MismatchError, match="shape"):
        surgery.open({"weight": torch.ones(3, 2), "bias": torch.zeros(2)}).load_into(module)


def test_reports_have_rows_and_render_in_a_notebook():
    base, tuned = pair()
    for report in (surgery.diff(base, tuned), surgery.extract_lora(base, tuned, rank=1).report, surgery.info(base)):
        assert len(report.rows) == len(base)
        assert "<table>" in report._repr_html_()
    assert "<table>" in surgery.extract_lora(base, tuned, rank=1)._repr_html_()
    assert "layers.0" in repr(surgery.open({"layers.0": torch.zeros(1)}).specs)


def test_a_saved_single_file_carries_its_record_and_can_be_unmerged_with_its_base(tmp_path):
    base, tuned = pair()
    adapter = surgery.extract_lora(base, tuned, rank=2)
    surgery.merge(base, adapter).save(tmp_path / "merged.safetensors")
    surgery.verify(tmp_path / "merged.safetensors")
    with pytest.raises(MismatchError, match="pass --base"):
        surgery.unmerge(tmp_path / "merged.safetensors", adapter)
    restored = surgery.unmerge(tmp_path / "merged.safetensors", adapter, base=base)
    assert all(torch.equal(restored[name], base[name]) for name in base)


def test_convert_casts_renames_drops_and_reshards(tmp_path):
    base, _ = pair()
    converted = surgery.convert(base, dtype="BF16", rename=["layers.=model.layers"], drop=["*.bias"])
    assert all(name.startswith("model.layers.") and not name.endswith(".bias") for name in converted)
    name = "layers.0.up_proj.weight"
    assert torch.equal(converted[f"model.{name}"], base[name].to(torch.bfloat16))
    converted.save(tmp_path / "out", max_shard_size=2048)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again = surgery.open(tmp_path / "out")
    assert all(torch.equal(again[key], converted[key]) for key in converted)


def test_converting_states_the_new_dtype_in_config_json(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"torch_dtype": "float32", "model_type": "x"}')
    surgery.convert(tmp_path / "in", dtype="F16").save(tmp_path / "out")
    assert surgery.open(tmp_path / "out").config == {"torch_dtype": "float16", "model_type": "x"}


def test_integers_and_booleans_pass_through_a_cast_untouched():
    tensors = {"ids": torch.arange(4), "mask": torch.tensor([True, False]), "w": torch.ones(2)}
    converted = surgery.convert(tensors, dtype="F16")
    assert {name: value.dtype for name, value in converted.state_dict().items()} == {
        "ids": torch.int64, "mask": torch.bool, "w": torch.float16,
    }  # fmt: skip


def test_wrong_arguments_are_usage_errors():
    base, tuned = pair()
    adapter = surgery.extract_lora(base, tuned, rank=1)
    with pytest.raises(UsageError, match="at least one adapter"):
        surgery.merge(base)
    with pytest.raises(UsageError, match="2 coefficients for 1"):
        surgery.merge(base, adapter, coeff=[1, 2])
    with pytest.raises(UsageError, match="not a finite number"):
        surgery.merge(base, adapter, coeff=float("nan"))
    with pytest.raises(UsageError, match="not a state dict"):
        surgery.merge(base, tuned)
    with pytest.raises(UsageError, match="rank must be"):
        surgery.extract_lora(base, tuned, rank=0)
    checkpoint = surgery.open(base)
    with pytest.raises(UsageError, match="same files"):
        surgery.extract_lora(checkpoint, checkpoint)
    with pytest.raises(UsageError, match="folder"):
        adapter.save("adapter.safetensors")
    with pytest.raises(UnsupportedError, match="meta"):
        surgery.open({"w": torch.empty(2, device="meta")})


def test_memory_is_refused_before_it_is_used(tmp_path):
    base, tuned = pair()
    merged = surgery.merge(base, surgery.extract_lora(base, tuned, rank=1))
    with pytest.raises(surgery.SurgeryError, match="--max-memory") as error:
        merged.save(tmp_path / "out", max_memory=1_000_000)
    assert error.value.exit_code == 8
    assert not list(tmp_path.iterdir())
