"""Extraction at its edges: quantised tensors, integers, float64, budgets of a kilobyte, errors out of reach, names given twice."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.errors import IOFailure, MismatchError, UnsupportedError, UsageError
from surgery.operations.extract_lora import default_output, plan_extraction
from surgery.operations.extract_many import extract_many
from surgery.operations.extraction_report import summary
from surgery.operations.rank_rule import parse_rule


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair():
    base = {f"layers.0.{name}_proj.weight": values(24, 16, seed=n) for n, name in enumerate("qkv")}
    tuned = {name: value + 0.01 * values(24, 16, seed=9 + n) for n, (name, value) in enumerate(base.items())}
    return base, tuned


@pytest.mark.parametrize("mixed", [False, True])
def test_the_noise_floor_of_float64_is_uncertain(pair, mixed):
    base, tuned = pair
    chosen = list(tuned)[:1] if mixed else list(tuned)
    tuned = {name: value.double() if name in chosen else value for name, value in tuned.items()}
    floors = {row.name: row.floor for row in surgery.spectrum(base, tuned).rows}
    assert all("float64" in floors[name].why for name in chosen)
    adapter = surgery.extract_lora(base, tuned, noise_floor=True)
    assert any("uncertain" in note and chosen[0] in note for note in adapter.report.notes)
    assert adapter.report.kept > 0.999


def quantised(codes):
    return {
        "layers.1.q_proj.weight": torch.full((8, 8), codes).to(torch.float8_e4m3fn),
        "layers.1.q_proj.weight_scale": torch.ones(1),
    }


def test_quantised_tensors_that_are_the_same_on_both_sides_do_not_stop_an_extraction(pair):
    base, tuned = (side | quantised(1.0) for side in pair)
    adapter = surgery.extract_lora(base, tuned, rank=16)
    assert not any("layers.1" in key for key in adapter.tensors)
    merged = surgery.merge(base, adapter)
    assert torch.allclose(merged["layers.0.q_proj.weight"], tuned["layers.0.q_proj.weight"], atol=1e-5)


def test_quantised_tensors_that_differ_do_unless_they_are_excluded(pair):
    base, tuned = pair[0] | quantised(1.0), pair[1] | quantised(2.0)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.q_proj\.weight: differs, and is quantised"):
        surgery.extract_lora(base, tuned)
    assert surgery.extract_lora(base, tuned, exclude=["layers.1.*"]).report.rows


def test_a_weight_quantised_on_one_side_only_may_be_excluded_and_is_reported(pair):
    base = pair[0] | {"layers.1.q_proj.weight": values(8, 8)}
    tuned = pair[1] | quantised(2.0)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.q_proj\.weight"):
        surgery.extract_lora(base, tuned)
    adapter = surgery.extract_lora(base, tuned, exclude=["layers.1.*"])
    assert not any("layers.1" in key for key in adapter.tensors)
    notes = "\n".join(adapter.report.notes)
    assert "differs but is F8_E4M3, so not in the adapter: layers.1.q_proj.weight" in notes
    assert "only in the fine-tune, so not in the adapter: layers.1.q_proj.weight_scale" in notes


def test_packed_codes_of_the_fine_tune_alone_may_be_excluded(pair):
    base = pair[0] | {"layers.1.q_proj.weight": values(8, 8)}
    tuned = pair[1] | {"layers.1.q_proj.qweight": torch.ones(1, 8, dtype=torch.int32),
                       "layers.1.q_proj.qzeros": torch.ones(1, 1, dtype=torch.int32),
                       "layers.1.q_proj.scales": torch.ones(1, 8)}  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"layers\.1\.q_proj"):
        surgery.extract_lora(base, tuned)
    adapter = surgery.extract_lora(base, tuned, exclude=["layers.1.*"])
    assert any("only in the fine-tune" in note and "qweight" in note for note in adapter.report.notes)


def test_a_memory_limit_takes_threads_first_and_then_refuses_by_name(pair):
    head = {"lm_head.weight": values(60_000, 512)}
    base, tuned = pair[0] | head, pair[1] | {"lm_head.weight": head["lm_head.weight"] * 1.01}
    plan = plan_extraction(base, tuned, rank=2, jobs=4)
    one = plan_extraction(base, tuned, rank=2, jobs=1).peak_memory
    assert one < plan.peak_memory
    fitted = plan_extraction(base, tuned, rank=2, jobs=4, max_memory=one)
    assert (fitted.settings.jobs, fitted.peak_memory) == (1, one)
    with pytest.raises(IOFailure, match=r"lm_head\.weight: the plan needs up to .* of memory, --max-memory allows"):
        surgery.extract_lora(base, tuned, rank=2, max_memory=one - 1)
    assert surgery.extract_lora(base, tuned, rank=2, max_memory=one - 1, exclude=["lm_head"]).report.rows


def test_an_untied_embedding_that_may_be_factored_counts_in_the_memory(pair):
    table = {"embed_tokens.weight": values(60_000, 512), "lm_head.weight": values(60_000, 512, seed=1)}
    plan = plan_extraction(pair[0] | table, pair[1] | table, rank=2, jobs=2)
    small = plan_extraction(pair[0] | table, pair[1] | table, rank=2, jobs=2, embeddings="none")
    assert plan.peak_memory > small.peak_memory + 60_000 * 512 * 4


def test_integers_alone_that_differ_are_named(pair):
    base = pair[0] | {"position_ids": torch.arange(4)}
    with pytest.raises(MismatchError, match=r"only tensors that an adapter cannot hold differ: position_ids"):
        surgery.extract_lora(base, base | {"position_ids": torch.arange(4) + 1})


def test_a_budget_of_which_the_header_is_a_large_part_is_used(pair, tmp_path):
    base, tuned = pair
    sizes = []
    for budget in (700, 1000, 1300, 2000):
        surgery.extract_lora(base, tuned, budget=budget).save(tmp_path / str(budget))
        size = (tmp_path / str(budget) / "adapter_model.safetensors").stat().st_size
        assert size <= budget
        sizes.append(size)
    assert sizes == sorted(sizes)
    # A component takes 160 bytes, and the two entries of a matrix that has none yet about 220.
    assert all(size > budget - 400 for size, budget in zip(sizes, (700, 1000, 1300, 2000), strict=True)), sizes


def test_an_error_that_rounding_does_not_let_reach_is_said(pair):
    base, tuned = pair
    (note,) = surgery.extract_lora(base, tuned, error=1e-6, dtype="BF16").report.notes
    assert "out of reach" in note
    assert "--dtype F32" in note
    assert not surgery.extract_lora(base, tuned, error=0.5).report.notes


def test_a_rank_beyond_what_a_matrix_has_promises_nothing_of_twice_as_much(pair):
    report = surgery.extract_lora(*pair, rank=64).report
    assert "would keep" not in summary(report)
    assert "would keep" in summary(surgery.extract_lora(*pair, rank=4).report)


def test_a_rank_that_is_no_multiple_of_the_multiple_is_refused():
    with pytest.raises(UsageError, match="--rank 12 is no multiple"):
        parse_rule(rank=12, rank_multiple=8)


def test_a_server_that_takes_no_weight_says_why(pair):
    base, tuned = ({name.removeprefix("layers.0."): value for name, value in side.items()} for side in pair)
    with pytest.raises(MismatchError, match=r"q_proj\.weight: no tensor could be extracted.*layers\.N"):
        surgery.extract_lora(base, tuned, server="sglang")


def test_a_snapshot_in_a_cache_lends_the_output_its_repositorys_name(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert default_output(snapshot, parse_rule(rank=8)) == "./name-lora-r8"


def test_a_fine_tune_or_an_adapter_named_twice_is_said_to_be(pair, tmp_path):
    base, tuned = pair
    for name, tensors in (("base", base), ("ft", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    with pytest.raises(UsageError, match="ft: is named twice"):
        extract_many(tmp_path / "base", [tmp_path / "ft", tmp_path / "ft"], tmp_path / "out")
    adapter = surgery.extract_lora(tmp_path / "base", tmp_path / "ft")
    adapter.save(tmp_path / "adapter")
    with pytest.raises(MismatchError, match="adapter: is named twice"):
        surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
