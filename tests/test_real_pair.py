"""The main job on a real base and a real fine-tune of it, with PEFT and transformers as judges."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

import surgery
from fixtures import real_pair
from fixtures.behaviour import Embedder, mean_cosine

SENTENCES = {"site reliability": real_pair.SITE_RELIABILITY, "mixed": real_pair.MIXED}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair") / "adapter"
    extracted = surgery.extract_lora(real_pair.base(), real_pair.tuned(), rank=16)
    extracted.save(out)
    return out


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair") / "merged"
    surgery.merge(real_pair.base(), adapter).save(out)
    return out


def peft_model(folder, adapter, dtype=torch.float32):
    from peft import PeftModel
    from transformers import AutoModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModel.from_pretrained(folder, dtype=dtype), adapter)


def test_peft_finds_every_tensor_of_the_adapter_and_misses_none(adapter):
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    model = peft_model(real_pair.base(), adapter)
    stored = load_peft_weights(str(adapter))
    result = set_peft_model_state_dict(model, dict(stored))
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "default" in key] == []
    loaded = get_peft_model_state_dict(model)
    assert stored.keys() <= loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in stored.items())


def test_peft_and_surgery_merge_to_the_same_weights(adapter, merged):
    theirs = peft_model(real_pair.base(), adapter).merge_and_unload().state_dict()
    ours = load_file(merged / "model.safetensors")
    assert theirs.keys() <= ours.keys()
    for name, value in theirs.items():
        # PEFT rounds ΔW to float32, and adds in float32: at most two units in the last place of the larger.
        assert (ours[name] - value).abs().max() <= 2**-22 * value.abs().max(), name


def test_in_bfloat16_peft_and_surgery_agree_bit_for_bit_almost_everywhere(adapter, tmp_path):
    half = tmp_path / "base-bf16"
    surgery.convert(real_pair.base(), dtype="BF16").save(half)
    ours = surgery.merge(half, adapter, allow_base_mismatch=True)
    theirs = peft_model(half, adapter, torch.bfloat16).merge_and_unload().state_dict()
    same = total = 0
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype, name
        same += int((ours[name].view(torch.int16) == value.view(torch.int16)).sum())
        total += value.numel()
    assert same / total >= 0.999, same / total


def test_the_merged_model_behaves_as_the_fine_tune(merged):
    embed = Embedder(real_pair.tuned())
    wanted = {name: embed(lines) for name, lines in SENTENCES.items()}
    weights = {"base": surgery.open(real_pair.base()).state_dict(), "merged": load_file(merged / "model.safetensors")}
    found = {
        (model, name): mean_cosine(embed(lines, weights[model]), wanted[name])
        for model in weights
        for name, lines in SENTENCES.items()
    }
    assert found["merged", "site reliability"] >= 0.996, found
    assert found["merged", "mixed"] >= 0.99, found
    assert found["base", "site reliability"] < 0.6, found


def test_full_rank_gives_the_fine_tune_back_on_every_tensor():
    tuned = surgery.open(real_pair.tuned())
    extracted = surgery.extract_lora(real_pair.base(), real_pair.tuned(), rank="full")
    back = surgery.merge(real_pair.base(), extracted)
    left_out = {row.name for row in extracted.report.rows if row.how == "left out"}
    assert not left_out
    for name in tuned:
        error = (back[name].double() - tuned[name].double()).abs().max()
        assert error <= 2**-22 * tuned[name].abs().max(), (name, float(error))


def test_tensors_only_in_the_base_are_reported_and_kept(adapter, merged):
    record = json.loads((adapter / "surgery.json").read_text())
    assert record["operation"] == "extract-lora"
    report = surgery.extract_lora(real_pair.base(), real_pair.tuned(), rank=1).report
    assert any("position_ids" in note for note in report.notes)
    assert "embeddings.position_ids" in load_file(merged / "model.safetensors")


def test_trained_rows_are_told_apart_from_weight_decay():
    report = surgery.extract_lora(real_pair.base(), real_pair.tuned(), rank=1).report
    (words,) = [row for row in report.rows if row.name.endswith("word_embeddings.weight")]
    assert words.how == "rows"
    rows = words.nbytes // (384 * 4)
    assert 1_900 < rows < 2_100, rows  # of 30,522, all of which moved
    assert words.residual < 0.001 * words.energy


def test_the_card_and_the_report_say_how_good_it_is(adapter):
    card = (adapter / "README.md").read_text()
    assert "library_name: peft" in card
    assert "rel. error" in card
    report = json.loads((adapter / "surgery.json").read_text())["report"]
    rows = {row["name"]: row for row in report["tensors"]}
    pair = surgery.open(real_pair.base()), surgery.open(real_pair.tuned())
    name = "encoder.layer.3.output.dense.weight"
    stored = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    product = stored[f"{stem}.lora_B.weight"].double() @ stored[f"{stem}.lora_A.weight"].double()
    delta = pair[1][name].double() - pair[0][name].double()
    best = torch.linalg.svdvals(delta)
    assert rows[name]["relative_error"] == pytest.approx(float((delta - product).norm() / delta.norm()), rel=1e-4)
    assert rows[name]["relative_error"] <= 1.001 * float(best[16:].norm() / best.norm())


def test_unmerge_with_the_base_is_exact_and_without_it_right_to_rounding(adapter, merged):
    base = surgery.open(real_pair.base())
    exact = surgery.unmerge(merged, adapter, base=real_pair.base())
    close = surgery.unmerge(merged, adapter)
    for name in base:
        assert torch.equal(exact[name], base[name]), name
        assert (close[name].double() - base[name].double()).abs().max() <= 2**-23 * base[name].abs().max().double(), (
            name
        )
    embeddings = "embeddings.word_embeddings.weight"
    assert torch.equal(close[embeddings], base[embeddings])


def test_diff_says_what_the_pair_is_and_what_the_merge_left():
    report = surgery.diff(real_pair.base(), real_pair.tuned())
    assert report.verdict().startswith("dense")
    rows = {row.name: row for row in report.rows}
    assert rows["embeddings.position_ids"].status == "removed"
    assert rows["pooler.dense.weight"].status == "identical"
    name = "encoder.layer.0.attention.self.query.weight"
    before, after = surgery.open(real_pair.base())[name].double(), surgery.open(real_pair.tuned())[name].double()
    delta = after - before
    assert rows[name].relative_norm == pytest.approx(float(delta.norm() / before.norm()), rel=1e-12)
    assert rows[name].max_abs == float(delta.abs().max())
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
    assert rows[name].cosine == pytest.approx(float(cosine), rel=1e-12)
    sigma2 = torch.linalg.svdvals(delta) ** 2
    assert rows[name].effective_rank == pytest.approx(float(sigma2.sum() ** 2 / (sigma2**2).sum()), rel=0.02)
    for rank, kept in rows[name].kept.items():
        assert kept == pytest.approx(float(sigma2[:rank].sum() / sigma2.sum()), rel=0.01)


def test_a_merged_adapter_is_recognised_as_low_rank(adapter, merged):
    assert surgery.diff(real_pair.base(), merged).verdict().startswith("low-rank (rank 16")


def test_an_adapter_is_not_said_to_be_inside_the_base_it_was_taken_from_but_where_it_was_merged(
    adapter, merged, tmp_path
):
    """What training adds lies along the weights themselves: here its projection on the very base is 0.7."""
    assert "warnings" not in json.loads((merged / "surgery.json").read_text())
    foreign, bare = tmp_path / "foreign", tmp_path / "bare"
    shutil.copytree(adapter, foreign, ignore=shutil.ignore_patterns("surgery.json"))
    shutil.copytree(merged, bare, ignore=shutil.ignore_patterns("surgery.json", ".surgery"))
    assert "warnings" not in surgery.merge(real_pair.base(), foreign).save(tmp_path / "once")
    (said,) = surgery.merge(bare, foreign).save(tmp_path / "twice")["warnings"]
    assert "foreign seems to be in bare already" in said
