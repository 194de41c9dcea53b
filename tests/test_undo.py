"""Undo records: what was merged comes out to the bit, in reverse order, or the run stops and says why.

The oracle is plain: the bytes that went in, compared with those that come out through the official safetensors.
"""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery
from fixtures import real_pair
from surgery import rounding
from surgery.cli.main import main
from surgery.errors import MismatchError, NumericError, SurgeryError, VerificationError
from surgery.formats import undo_record
from surgery.sources import local
from surgery.tensor import read_bytes

OUT, WIDE = 96, 64
LAYERS = [f"model.layers.{k}.self_attn.q_proj" for k in range(3)]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def base_model(folder, dtype=torch.bfloat16, seed=0, size=0.02):
    draw = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(40, WIDE, generator=draw)}
    tensors["model.spare.weight"] = torch.randn(OUT, WIDE, generator=draw)
    for layer in LAYERS:
        tensors[f"{layer}.weight"] = torch.randn(OUT, WIDE, generator=draw) * size
        tensors[f"{layer}.bias"] = torch.randn(OUT, generator=draw) * size
    folder.mkdir()
    save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def lora(folder, seed=1, rank=4, size=2e-4, layers=LAYERS, config=None, more=None):
    """Write an adapter whose ΔW has a standard deviation of ``size``."""
    draw = torch.Generator().manual_seed(seed)
    tensors = dict(more or {})
    for layer in layers:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, WIDE, generator=draw)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(OUT, rank, generator=draw) * size / rank**0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear", **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def bitfit(folder, seed=3):
    draw = torch.Generator().manual_seed(seed)
    more = {f"base_model.model.{layer}.bias": torch.randn(OUT, generator=draw) for layer in LAYERS}
    return lora(folder, layers=[], config={"bias": "all", "target_modules": None}, more=more)


def raw(source):
    return {
        name: (tensor.spec.dtype, tensor.spec.shape, bytes(read_bytes(tensor)))
        for name, tensor in surgery.open(source).tensors.items()
    }


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.fixture
def pair(tmp_path):
    """A base, an adapter, and the base with the adapter in it."""
    base, adapter = base_model(tmp_path / "base"), lora(tmp_path / "adapter")
    surgery.merge(base, adapter).save(tmp_path / "merged")
    return base, adapter, tmp_path / "merged"


# --- the way back


@pytest.mark.parametrize("coeff", [1.0, 0.3, -1.0])
@pytest.mark.parametrize("rank", [4, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_is_undone_to_the_bit(dtype, rank, coeff, tmp_path):
    base = base_model(tmp_path / "base", DTYPES[dtype])
    adapter = lora(tmp_path / "adapter", rank=rank)
    surgery.merge(base, adapter, coeff=coeff).save(tmp_path / "merged")
    assert raw(tmp_path / "merged") != raw(base)
    record = surgery.unmerge(tmp_path / "merged", adapter).save(tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert raw(tmp_path / "back") == raw(base)
    assert record["restored"] == {"tensors": 3, "proven_exact": 3}
    assert record["adapters"] == []


@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.02, 3.0, 1e4], ids=str)
def test_deltas_of_any_size_are_undone(size, tmp_path):
    base = base_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[f"{LAYERS[0]}.weight"][:5] = 0.0
    weights[f"{LAYERS[0]}.weight"][5:9] = -0.0
    weights[f"{LAYERS[1]}.weight"][::2] = 1e-38
    save_file(weights, base / "model.safetensors")
    adapter = lora(tmp_path / "adapter", size=size)
    surgery.merge(base, adapter).save(tmp_path / "merged")
    surgery.unmerge(tmp_path / "merged", adapter).save(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(base)


def test_biases_come_back_and_cost_themselves(tmp_path):
    base, adapter = base_model(tmp_path / "base"), bitfit(tmp_path / "adapter")
    record = surgery.merge(base, adapter).save(tmp_path / "merged")
    assert record["undo"] == {"bytes": 0, "weights": 0, "originals": 3, "original_bytes": 3 * OUT * 2}
    surgery.unmerge(tmp_path / "merged", adapter).save(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(base)


def test_values_that_are_no_numbers_come_back_with_their_payload(tmp_path):
    base, adapter = base_model(tmp_path / "base"), lora(tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    odd = torch.tensor([0x7F81, 0x7FC1, 0xFF80, 0x7F80], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weights[f"{LAYERS[1]}.weight"][3, :4] = odd
    save_file(weights, base / "model.safetensors")
    with pytest.raises(NumericError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        surgery.merge(base, adapter).save(tmp_path / "refused")
    surgery.merge(base, adapter, allow_nonfinite=True).save(tmp_path / "merged")
    surgery.unmerge(tmp_path / "merged", adapter).save(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(base)


def test_rows_whole_modules_and_factors_of_one_adapter_come_back_together(tmp_path):
    base = base_model(tmp_path / "base")
    draw = torch.Generator().manual_seed(5)
    embedding = "base_model.model.model.embed_tokens"
    more = {
        f"{embedding}.token_adapter.trainable_tokens_delta": torch.randn(2, WIDE, generator=draw),
        f"base_model.model.{LAYERS[2]}.weight": torch.randn(OUT, WIDE, generator=draw),
        f"base_model.model.{LAYERS[2]}.bias": torch.randn(OUT, generator=draw),
    }
    config = {"trainable_token_indices": {"embed_tokens": [7, 3]}, "modules_to_save": [LAYERS[2]]}
    adapter = lora(tmp_path / "adapter", layers=LAYERS[:2], config=config, more=more)
    for coeff in (1.0, 0.5):
        out = tmp_path / str(coeff)
        record = surgery.merge(base, adapter, coeff=coeff).save(out)
        assert record["undo"]["originals"] == 4  # two tensors; two rows, their numbers and their values
        surgery.unmerge(out, adapter).save(tmp_path / f"back-{coeff}")
        assert raw(tmp_path / f"back-{coeff}") == raw(base)


def test_dora_comes_out_to_the_bit(tmp_path):
    base = base_model(tmp_path / "base")
    draw = torch.Generator().manual_seed(5)
    more = {
        f"base_model.model.{layer}.lora_magnitude_vector": torch.rand(OUT, generator=draw) + 0.1 for layer in LAYERS
    }
    adapter = lora(tmp_path / "adapter", config={"use_dora": True}, more=more)
    surgery.merge(base, adapter).save(tmp_path / "merged")
    surgery.unmerge(tmp_path / "merged", adapter).save(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(base)


def test_the_real_pair_comes_back_to_the_bit(tmp_path):
    adapter = surgery.extract_lora(real_pair.base(), real_pair.tuned(), rank=8)
    for dtype in ("F32", "BF16"):
        base = real_pair.base()
        if dtype != "F32":
            surgery.convert(base, dtype=dtype).save(tmp_path / "cast")
            base = tmp_path / "cast"
        surgery.merge(base, adapter, coeff=0.3, allow_base_mismatch=True).save(tmp_path / f"merged-{dtype}")
        surgery.unmerge(tmp_path / f"merged-{dtype}", adapter).save(tmp_path / f"back-{dtype}")
        assert raw(tmp_path / f"back-{dtype}") == raw(base)


def test_records_do_not_depend_on_threads(tmp_path):
    shape = (3000, 512)  # several jobs and ranges
    weight = (np.random.default_rng(0).normal(0, 0.02, shape)).astype("f4")
    (tmp_path / "base").mkdir()
    save_file({"q_proj.weight": torch.from_numpy(weight).bfloat16()}, tmp_path / "base" / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    (tmp_path / "adapter").mkdir()
    factors = {"base_model.model.q_proj.lora_A.weight": torch.randn(16, shape[1], generator=draw),
               "base_model.model.q_proj.lora_B.weight": torch.randn(shape[0], 16, generator=draw) * 5e-5}  # fmt: skip
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 16})
    )
    for jobs in (1, 2, 5):
        surgery.merge(tmp_path / "base", tmp_path / "adapter").save(tmp_path / f"out{jobs}", jobs=jobs)
    assert files(tmp_path / "out1") == files(tmp_path / "out2") == files(tmp_path / "out5")
    weights = tmp_path / "out1" / "model.safetensors"
    assert os.path.getsize(tmp_path / "out1" / ".surgery" / "undo") <= 0.02 * os.path.getsize(weights)
    # The way back is cut otherwise: one element more shifts every range.
    odd = surgery.open(tmp_path / "out1").lazy("q_proj.weight")
    back = surgery.unmerge(tmp_path / "out1", tmp_path / "adapter").lazy("q_proj.weight")
    wanted = read_bytes(surgery.open(tmp_path / "base").lazy("q_proj.weight"))
    for low, high in ((0, 7), (1021, 1030), (2999, 3000), (5, 2047)):
        assert read_bytes(back, low * 512, high * 512) == wanted[low * 1024 : high * 1024]
    assert odd.spec == back.spec
    for jobs in (1, 4):
        surgery.unmerge(tmp_path / "out1", tmp_path / "adapter").save(tmp_path / f"back{jobs}", jobs=jobs)
        assert raw(tmp_path / f"back{jobs}") == raw(tmp_path / "base")


def test_sums_in_any_order_restore_the_same_bits(pair, monkeypatch):
    """Another BLAS: products summed backwards, in pieces, and off by the rounding of each."""
    base, adapter, merged = pair
    calls = []

    def summed(self, values, base, start):
        width = self.right.shape[1]
        rows = values.view(-1, width)
        first = start // width
        for k in reversed(range(self.right.shape[0])):
            rows.add_(self.left[first : first + len(rows), k : k + 1] * self.right[k] * self.scale)
        calls.append(start)

    monkeypatch.setattr("surgery.delta.LoadedLowRank.add_to", summed)
    restored = surgery.unmerge(merged, adapter)
    assert raw(restored) == raw(base)
    assert calls


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part_comes_back_from_what_it_lists(data):
    dtype = data.draw(st.sampled_from(["F32", "BF16", "F16"]))
    size = data.draw(st.integers(1, 200))
    pattern = np.uint32 if dtype == "F32" else np.uint16
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    known, merged = (draw.integers(0, 1 << 16, size).astype(pattern) for _ in range(2))
    low = np.where(draw.random(size) < data.draw(st.sampled_from([0.0, 0.1, 1.0])), known + pattern(1), known)
    high = np.where(draw.random(size) < data.draw(st.sampled_from([0.0, 0.1, 1.0])), low + pattern(2), low)
    places = np.flatnonzero((low != known) | (high != known))
    missed = undo_record.Missed(places, known[places], low[places], high[places], merged[places])
    coding, coded = undo_record.encode(missed, known, merged, dtype)
    predicted = np.where(draw.random(size) < 0.5, low, high)  # whichever the way back arrives at
    if coding == undo_record.CODED:
        assert (undo_record.decode_against(coded, merged, dtype) == known).all()
        return
    if coding == undo_record.LISTED:
        undo_record.correct(coded, predicted, merged)
    assert (predicted == known).all()


# --- stacking


def test_adapters_come_out_in_reverse_order_and_in_no_other(tmp_path):
    base = base_model(tmp_path / "base")
    names = ["first", "second", "third"]
    adapters = {name: lora(tmp_path / name, seed=k, layers=LAYERS[: k + 1]) for k, name in enumerate(names)}
    here, stages = base, [raw(base)]
    for name in names:
        surgery.merge(here, adapters[name]).save(tmp_path / f"with-{name}")
        here = tmp_path / f"with-{name}"
        stages.append(raw(here))
    order = (
        r"layers\.0\.self_attn\.q_proj\.weight: second was merged into it after first; unmerge third, then second first"
    )
    with pytest.raises(MismatchError, match=order):
        surgery.unmerge(here, adapters["first"])
    for step, name in reversed(list(enumerate(names))):
        surgery.unmerge(here, adapters[name]).save(tmp_path / f"without-{name}")
        here = tmp_path / f"without-{name}"
        assert raw(here) == stages[step]
    assert [entry["name"] for entry in json.loads((here / "surgery.json").read_text())["adapters"]] == []
    assert not (here / ".surgery").exists()
    surgery.unmerge(tmp_path / "with-third", *adapters.values()).save(tmp_path / "at-once")
    assert raw(tmp_path / "at-once") == stages[0]


def test_adapters_that_share_no_weight_come_out_in_any_order(tmp_path):
    base = base_model(tmp_path / "base")
    one, other = lora(tmp_path / "one", layers=LAYERS[:1]), lora(tmp_path / "other", seed=2, layers=LAYERS[1:])
    surgery.merge(base, one).save(tmp_path / "once")
    surgery.merge(tmp_path / "once", other).save(tmp_path / "twice")
    surgery.unmerge(tmp_path / "twice", one).save(tmp_path / "other alone")
    assert raw(tmp_path / "other alone") == raw(surgery.merge(base, other))
    surgery.unmerge(tmp_path / "other alone", other).save(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(base)
    surgery.merge(base, one, other).save(tmp_path / "at once")
    surgery.unmerge(tmp_path / "at once", other).save(tmp_path / "one alone")
    assert raw(tmp_path / "one alone") == raw(tmp_path / "once")
    surgery.unmerge(tmp_path / "one alone", one).save(tmp_path / "back again")
    assert raw(tmp_path / "back again") == raw(base)


def test_adapters_merged_at_once_come_out_at_once(tmp_path):
    base = base_model(tmp_path / "base")
    one, other = lora(tmp_path / "one"), lora(tmp_path / "other", seed=2)
    surgery.merge(base, one, other, coeff=[0.3, -1.0]).save(tmp_path / "both")
    with pytest.raises(MismatchError, match="merged into it together with one; name all of them: one, other"):
        surgery.unmerge(tmp_path / "both", one)
    surgery.unmerge(tmp_path / "both", other, one).save(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(base)


def test_subtraction_is_there_for_those_who_ask_and_ends_what_is_exact(tmp_path):
    base = base_model(tmp_path / "base", torch.float32)
    one, other = lora(tmp_path / "one"), lora(tmp_path / "other", seed=2)
    surgery.merge(base, one).save(tmp_path / "once")
    surgery.merge(tmp_path / "once", other).save(tmp_path / "twice")
    surgery.unmerge(tmp_path / "twice", one, approximate=True).save(tmp_path / "other alone")
    wanted = surgery.merge(base, other)
    alone = surgery.open(tmp_path / "other alone")
    assert all((alone[name] - wanted[name]).abs().max() < 1e-8 for name in wanted)
    last = surgery.unmerge(tmp_path / "other alone", other)
    assert any("subtraction" in note for note in last.notes)
    assert all((last[name] - surgery.open(base)[name]).abs().max() < 1e-8 for name in wanted)


def test_without_records_it_is_subtraction_as_ever(tmp_path):
    base, adapter = base_model(tmp_path / "base"), lora(tmp_path / "adapter")
    surgery.merge(base, adapter, undo=False).save(tmp_path / "merged")
    assert not (tmp_path / "merged" / ".surgery").exists()
    surgery.merge(base, adapter).save(tmp_path / "one.safetensors")
    for merged in ("merged", "one.safetensors"):
        assert any("subtraction" in note for note in surgery.unmerge(tmp_path / merged, adapter).notes)


def test_loaders_do_not_see_what_is_kept(pair):
    _, _, merged = pair
    assert sorted(path.name for path in merged.iterdir() if not path.name.startswith(".")) == [
        "config.json", "model.safetensors", "surgery.json",
    ]  # fmt: skip
    assert local.open_weights(merged).tensors.keys() == load_file(merged / "model.safetensors").keys()
    assert sorted(path.name for path in (merged / ".surgery").iterdir()) == ["undo"]


# --- provenance


def test_another_base_is_refused_by_tensor_and_copies_of_the_right_one_are_not(tmp_path):
    base, tuned = base_model(tmp_path / "base"), base_model(tmp_path / "tuned", seed=0)
    weights = load_file(tuned / "model.safetensors")
    for layer in LAYERS:
        weights[f"{layer}.weight"] = (weights[f"{layer}.weight"].float() + 0.01 * torch.eye(OUT, WIDE)).bfloat16()
    save_file(weights, tuned / "model.safetensors")
    surgery.extract_lora(base, tuned, rank=8).save(tmp_path / "adapter")
    wanted = raw(surgery.merge(base, tmp_path / "adapter"))
    for copy in copies_of(base, tmp_path):
        merged = surgery.merge(copy, tmp_path / "adapter")
        merged.save(tmp_path / f"on-{copy.name}")
        assert raw(tmp_path / f"on-{copy.name}") == wanted, copy
    moved = shutil.copytree(base, tmp_path / "moved")
    weights = load_file(base / "model.safetensors")
    weights[f"{LAYERS[1]}.weight"][0, 0] += 1
    save_file(weights, moved / "model.safetensors")
    with pytest.raises(MismatchError, match=r"layers\.1\.self_attn\.q_proj\.weight.*not the tensor that adapter"):
        surgery.merge(moved, tmp_path / "adapter").save(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    surgery.merge(moved, tmp_path / "adapter", allow_base_mismatch=True).save(tmp_path / "allowed")


def copies_of(folder, home):
    """Re-sharded, renamed, and repacked copies of a model, made by other hands."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = home / f"{folder.name}-sharded"
    shards.mkdir()
    index = {}
    for k, part in enumerate((names[:2], names[2:])):
        file = f"model-{k + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, shards / file)
        index |= dict.fromkeys(part, file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    renamed = home / f"{folder.name}-renamed"
    renamed.mkdir()
    save_file(weights, renamed / "weights.safetensors", {"by": "somebody else"})
    pickled = home / f"{folder.name}-pickled"
    pickled.mkdir()
    torch.save({name: weights[name] for name in reversed(names)}, pickled / "pytorch_model.bin")
    found = [shards, renamed, pickled]
    for copy in found:
        for extra in ("surgery.json", ".surgery"):
            if (folder / extra).is_dir():
                shutil.copytree(folder / extra, copy / extra)
            elif (folder / extra).exists():
                shutil.copy(folder / extra, copy / extra)
    return found


def test_copies_of_a_merged_model_are_verified_merged_and_unmerged_as_itself(pair, tmp_path):
    base, adapter, merged = pair
    other = lora(tmp_path / "other", seed=8)
    wanted = raw(surgery.merge(merged, other))
    for copy in copies_of(merged, tmp_path):
        surgery.verify(copy)
        surgery.unmerge(copy, adapter).save(tmp_path / f"{copy.name}-back")
        assert raw(tmp_path / f"{copy.name}-back") == raw(base), copy
        surgery.merge(copy, other).save(tmp_path / f"{copy.name}-more")
        assert raw(tmp_path / f"{copy.name}-more") == wanted, copy


def test_merging_twice_and_unmerging_what_is_not_there_are_refused(pair, tmp_path):
    base, adapter, merged = pair
    again = shutil.copytree(adapter, tmp_path / "another name")
    with pytest.raises(
        MismatchError, match=r"merged: model\.layers\.0\.self_attn\.q_proj\.weight: already has the adapter"
    ):
        surgery.merge(merged, again)
    with pytest.raises(MismatchError, match="not merged into it"):
        surgery.unmerge(merged, lora(tmp_path / "stranger", seed=9))
    surgery.unmerge(merged, again).save(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(base)
    with pytest.raises(MismatchError, match="not merged into it"):
        surgery.unmerge(tmp_path / "back", adapter)


def test_weights_that_changed_since_the_record_was_written_are_refused_by_name(pair, tmp_path):
    _, adapter, merged = pair
    weights = load_file(merged / "model.safetensors")
    other = lora(tmp_path / "other", seed=8)
    for name in (f"{LAYERS[2]}.weight", f"{LAYERS[1]}.bias"):
        moved = shutil.copytree(merged, tmp_path / f"moved-{name}")
        save_file({**weights, name: weights[name] * 2}, moved / "model.safetensors", {"format": "pt"})
        with pytest.raises(MismatchError, match=f"{name}: is not what the record beside it says"):
            surgery.merge(moved, other).save(tmp_path / "out")
        with pytest.raises(MismatchError, match=f"{name}: is not what"):
            surgery.unmerge(moved, adapter).save(tmp_path / "out")
        surgery.merge(moved, other, allow_base_mismatch=True).save(tmp_path / f"allowed-{name}")
        surgery.unmerge(moved, adapter, approximate=True).save(tmp_path / f"subtracted-{name}")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_was_changed_does_not_pass_for_what_was_merged(pair, tmp_path):
    _, adapter, merged = pair
    document = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**document, "lora_alpha": 5}))
    with pytest.raises(MismatchError, match="not merged into it"):
        surgery.unmerge(merged, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(MismatchError, match="other weights than when it was merged"):
        surgery.unmerge(merged, adapter, name_map={LAYERS[0]: "model.spare"})
    swapped = {LAYERS[0]: LAYERS[1], LAYERS[1]: LAYERS[0]}
    with pytest.raises(VerificationError, match=r"layers\.0\.self_attn\.q_proj\.weight: did not come back"):
        surgery.unmerge(merged, adapter, name_map=swapped).save(tmp_path / "out")


def test_the_proof_stops_what_the_records_cannot_bring_back(pair, tmp_path, monkeypatch):
    _, adapter, merged = pair
    add = surgery.delta.LoadedLowRank.add_to

    def wrong(self, values, base, start):
        add(self, values, base, start)
        values.mul_(1.5)

    monkeypatch.setattr("surgery.delta.LoadedLowRank.add_to", wrong)
    with pytest.raises(VerificationError, match=r"q_proj\.weight: did not come back as it was"):
        surgery.unmerge(merged, adapter).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("coeff", [1.0, 2.0])
def test_an_adapter_that_seems_to_be_inside_is_told_of_where_no_record_tells(coeff, tmp_path):
    base, adapter, merged = base_model(tmp_path / "base"), lora(tmp_path / "adapter", size=4e-3), tmp_path / "merged"
    surgery.merge(base, adapter).save(merged)
    for record in (merged / "surgery.json", merged / ".surgery" / "undo"):
        record.unlink()
    warned = surgery.merge(merged, adapter, coeff=coeff).save(tmp_path / "twice")["warnings"]
    assert len(warned) == 1
    assert "adapter seems to be in merged already" in warned[0]
    for other in (lora(tmp_path / "stranger", seed=9, size=4e-3), bitfit(tmp_path / "biases")):
        assert "warnings" not in surgery.merge(merged, other).save(tmp_path / f"{other.name}-merged")
    assert "warnings" not in surgery.merge(base, adapter).save(tmp_path / "once")


def test_projections_tell_chance_from_what_is_inside():
    draw = np.random.default_rng(0)
    weight, delta = draw.normal(0, 0.02, 1 << 20), draw.normal(0, 2e-4, 1 << 20)

    def sums(values):
        return {
            "w": rounding.Sums(values.size, 0, float(delta @ delta), 0.0, float(values @ delta), float(values @ values))
        }

    assert rounding.inside(sums(weight)) is None
    assert rounding.inside(sums(weight + delta)) == pytest.approx(1, abs=0.3)
    assert rounding.inside(sums(weight + 2 * delta)) == pytest.approx(2, abs=0.3)
    assert rounding.inside(sums(weight - delta)) is None


# --- honest rounding


@pytest.mark.parametrize("size", [2e-5, 2e-4, 2e-3])
def test_what_the_dtype_left_of_the_delta_is_what_numpy_finds(size, tmp_path):
    base, adapter = base_model(tmp_path / "base"), lora(tmp_path / "adapter", size=size)
    kept = surgery.merge(base, adapter).save(tmp_path / "merged")["delta_kept"]
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    lost = ideal = changed = count = 0.0
    for layer in LAYERS:
        name, stem = f"{layer}.weight", f"base_model.model.{layer}"
        delta = (factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()).numpy()
        applied = (new[name].double() - old[name].double()).numpy()
        error = np.linalg.norm(applied - delta) / np.linalg.norm(delta)
        assert kept["tensors"][name]["error"] == pytest.approx(error, rel=1e-5)
        assert kept["tensors"][name]["changed"] == pytest.approx(float((applied != 0).mean()), rel=1e-5)
        lost, ideal = lost + np.sum((applied - delta) ** 2), ideal + np.sum(delta**2)
        changed, count = changed + (applied != 0).sum(), count + applied.size
    assert kept["error"] == pytest.approx((lost / ideal) ** 0.5, rel=1e-5)
    assert kept["changed"] == pytest.approx(changed / count, rel=1e-5)
    errors = [kept["tensors"][name]["error"] for name in kept["worst"]]
    assert errors == sorted((entry["error"] for entry in kept["tensors"].values()), reverse=True)


def test_the_command_line_says_what_was_kept(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["merge", "base", "adapter", "-o", "again"]) == 0
    out = capsys.readouterr().out
    assert "of the delta " in out
    assert "kept for unmerge: undo records, " in out
    assert run(["merge", "base", "adapter", "-o", "bare", "--no-undo", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["delta_kept"]["tensors"].keys() == {f"{layer}.weight" for layer in LAYERS}
    assert "files" not in document
    assert run(["unmerge", "again", "adapter", "-o", "back"]) == 0
    assert "3 of 3 touched tensors proven bit-identical to the base" in capsys.readouterr().out
    assert run(["unmerge", "again", "adapter", "-o", "close", "--approximate"]) == 0
    assert "subtraction" in capsys.readouterr().err


def test_an_overflow_stops_the_run_by_name_unless_allowed(tmp_path):
    base, adapter = base_model(tmp_path / "base", torch.float16), lora(tmp_path / "adapter", size=3e4)
    with pytest.raises(NumericError, match=r"layers\.0.*overflow F16"):
        surgery.merge(base, adapter).save(tmp_path / "merged")
    record = surgery.merge(base, adapter, allow_nonfinite=True).save(tmp_path / "merged")
    assert record["delta_kept"]["error"] is None
    surgery.unmerge(tmp_path / "merged", adapter).save(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(base)


# --- bit rot


def notes_or_error(step, out):
    """Go on with a damaged output; return the notes if nothing stops it."""
    try:
        made = step()
        made.save(out, jobs=1)
    except SurgeryError:
        assert not out.exists()
        return None
    shutil.rmtree(out)
    return made.notes


def test_every_flipped_bit_is_found_by_verify_and_by_whoever_goes_on(tmp_path):
    """1,000 flips anywhere in an output with two merges in it: ``verify`` finds each, and so do ``unmerge`` and ``merge``."""
    base, third = base_model(tmp_path / "base"), lora(tmp_path / "third", seed=3, layers=LAYERS[:1])
    first = lora(
        tmp_path / "first", config={"bias": "all"}, more=load_file(bitfit(tmp_path / "b") / "adapter_model.safetensors")
    )
    second = lora(tmp_path / "second", seed=2)
    surgery.merge(base, first).save(tmp_path / "once")
    surgery.merge(tmp_path / "once", second).save(tmp_path / "twice")
    folder, out = tmp_path / "twice", tmp_path / "out"
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert {path.name for path in found} >= {"undo", "originals", "surgery.json", "config.json"}
    draw = random.Random(0)
    steps = (lambda: surgery.unmerge(folder, second), lambda: surgery.merge(folder, third))
    for turn in range(1000):
        # Every other flip hits what merges kept; the weights would take nearly all of them.
        path = draw.choices(found, [path.stat().st_size for path in found] if turn % 2 else None)[0]
        data = bytearray(path.read_bytes())
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        with pytest.raises(SurgeryError):
            surgery.verify(folder, jobs=1)
        if turn % 5 == 0:
            said = notes_or_error(steps[turn // 5 % 2], out)
            assert said is None or any(path.name in note for note in said), path
        data[place] ^= bit
        path.write_bytes(data)
    surgery.verify(folder)
