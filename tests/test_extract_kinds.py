"""Everything that is not a plain linear layer: extracted, loaded in PEFT key by key, and merged alike by PEFT and surgery."""

from __future__ import annotations

import json
import warnings
import zlib

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgery
from surgery.errors import MismatchError

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WHISPER = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 16,
    "max_target_positions": 16, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
BUILD = {
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **{**SIZES, "intermediate_size": 32}, num_key_value_heads=2, num_local_experts=4, head_dim=8
        )
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SIZES,
            num_key_value_heads=2,
            num_local_experts=4,
            head_dim=8,
            intermediate_size_mlp=64,
            interleave_moe_layer_step=1,
        )
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, num_key_value_heads=2, num_experts=4, moe_intermediate_size=16, head_dim=8)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    ),
    "whisper": lambda: transformers.WhisperModel(transformers.WhisperConfig(**WHISPER)),
    "convnext": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1])
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    ),
    "llama-tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    ),
}
BARE = {
    "gpt-oss": ("sinks", "_bias"), "mamba": ("A_log", "mixer.D", "out_proj"), "convnext": ("layer_scale",),
    "mixtral": ("block_sparse_moe.gate",),
}  # fmt: skip
"""What PEFT has no place for, by the parts of its names: bare parameters, and what it refuses to adapt."""


def noise(shape, *key):
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(repr(key).encode())))


def pair(kind, folder, moved=lambda _name: True):
    """Write a base and a fine-tune that moved in every parameter that is wanted."""
    torch.manual_seed(0)
    model = BUILD[kind]()
    for side, size in (("base", 0.2), ("ft", 0.05)):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if side == "base" or moved(name):
                    parameter.add_(size * noise(parameter.shape, name, side))
        model.save_pretrained(folder / side)
    return folder / "base", folder / "ft"


def tensors_of(folder, stem="model"):
    return load_file(f"{folder}/{stem}.safetensors")


def peft_model(kind, base, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(type(BUILD[kind]()).from_pretrained(base), str(adapter))


def assert_merges_as_peft(kind, base, adapter, folder):
    model = peft_model(kind, base, adapter)
    result = peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(adapter)))
    marks = ("lora_", ".modules_to_save.", "trainable_tokens_delta")
    shared = "lm_head.token_adapter."  # of a tied head: the embedding's own
    assert result.unexpected_keys == []
    assert [k for k in result.missing_keys if any(m in k for m in marks) and shared not in k] == []
    theirs = model.merge_and_unload().state_dict()
    surgery.merge(base, adapter).save(folder / "merged")
    ours = type(BUILD[kind]()).from_pretrained(folder / "merged").state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() <= 2**-21 * value.abs().max() + 2**-30, name


@pytest.mark.parametrize("kind", ["gpt-oss", "llama4", "qwen3-moe", "mixtral", "whisper", "convnext", "mamba"])
def test_at_full_rank_all_that_peft_can_hold_comes_back(kind, tmp_path):
    base, tuned = pair(kind, tmp_path)
    adapter = surgery.extract_lora(base, tuned, rank="full")
    adapter.save(tmp_path / "adapter")
    left = [row.name for row in adapter.report.rows if row.how == "left out"]
    assert all(any(part in name for part in BARE.get(kind, ())) for name in left), left
    assert_merges_as_peft(kind, base, tmp_path / "adapter", tmp_path)
    wanted, merged = tensors_of(tuned), tensors_of(tmp_path / "merged")
    for name in wanted.keys() - set(left):
        assert (merged[name] - wanted[name]).abs().max() <= 2**-21 * wanted[name].abs().max() + 2**-30, name


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.5}, {"budget": "20KB"}], ids=str)
@pytest.mark.parametrize("kind", ["gpt-oss", "qwen3-moe", "whisper", "llama"])
def test_any_rule_gives_an_adapter_that_peft_loads(kind, rule, tmp_path):
    base, tuned = pair(kind, tmp_path)
    adapter = surgery.extract_lora(base, tuned, **rule)
    adapter.save(tmp_path / "adapter")
    assert_merges_as_peft(kind, base, tmp_path / "adapter", tmp_path)
    if "budget" in rule:
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size <= 20_000


def test_only_one_of_two_fused_parameters_is_enough_for_both_to_be_there(tmp_path):
    base, tuned = pair("gpt-oss", tmp_path, lambda name: name.endswith("layers.1.mlp.experts.down_proj"))
    surgery.extract_lora(base, tuned, rank=2).save(tmp_path / "adapter")
    keys = tensors_of(tmp_path / "adapter", "adapter_model").keys()
    assert len([key for key in keys if "layers.1.mlp.experts." in key]) == 4
    assert not any("layers.0" in key for key in keys)
    assert_merges_as_peft("gpt-oss", base, tmp_path / "adapter", tmp_path)


def test_one_trained_expert_takes_all_of_them_along_at_one_rank(tmp_path):
    base, tuned = pair("qwen3-moe", tmp_path)
    before, after = tensors_of(base), tensors_of(tuned)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    adapter = surgery.extract_lora(before, {**before, name: after[name]}, energy=0.9)
    a = {key: value for key, value in adapter.tensors.items() if "lora_A" in key}
    assert len(a) == 2 * 4 * 3
    assert len({tensor.spec.shape[0] for tensor in a.values()}) == 1
    merged = surgery.merge(before, adapter)
    assert all(torch.equal(merged[other], before[other]) for other in before if other != name)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("rows", [100, 90], ids=["grown", "shrunk"])
def test_a_resized_vocabulary_is_stored_whole_and_merges(kind, rows, tmp_path):
    base, _ = pair(kind, tmp_path)
    model = type(BUILD[kind]()).from_pretrained(base)
    model.resize_token_embeddings(rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * noise(parameter.shape, name, "resized"))
    model.save_pretrained(tmp_path / "resized")
    adapter = surgery.extract_lora(base, tmp_path / "resized", rank="full")
    adapter.save(tmp_path / "adapter")
    assert any(f"resize_token_embeddings({rows})" in note for note in adapter.report.notes)
    surgery.merge(base, tmp_path / "adapter").save(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == rows
    wanted, ours = tensors_of(tmp_path / "resized"), tensors_of(tmp_path / "merged")
    assert wanted.keys() == ours.keys()
    for name, value in wanted.items():
        assert (ours[name] - value).abs().max() <= 2**-21 * value.abs().max(), name
    ready = type(BUILD[kind]()).from_pretrained(base)
    ready.resize_token_embeddings(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(ready, str(tmp_path / "adapter"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        apart, merged, truth = (m(input_ids=ids).logits for m in (loaded, loaded.merge_and_unload(), model))
    assert torch.allclose(apart, truth, atol=1e-4)
    assert torch.allclose(merged, truth, atol=1e-4)


def test_a_resized_vocabulary_is_taken_out_again_with_the_base(tmp_path):
    base, _ = pair("llama", tmp_path)
    before = tensors_of(base)
    table = "model.embed_tokens.weight"
    after = {**before, table: torch.cat([before[table], noise((4, 32), "new")])}
    adapter = surgery.extract_lora(base, after)
    adapter.save(tmp_path / "adapter")
    surgery.merge(base, tmp_path / "adapter").save(tmp_path / "merged")
    restored = surgery.unmerge(tmp_path / "merged", tmp_path / "adapter", base=base)
    assert torch.equal(restored[table], before[table])
    with pytest.raises(MismatchError, match="coefficient 1"):
        surgery.merge(base, tmp_path / "adapter", coeff=0.5)


def test_a_depthwise_convolution_is_stored_in_full(tmp_path):
    base, tuned = pair("mamba", tmp_path, lambda name: "conv1d" in name)
    adapter = surgery.extract_lora(base, tuned, rank=2)
    assert {row.how for row in adapter.report.rows if "conv1d" in row.name} == {"full"}


def test_dora_reproduces_row_scales_that_lora_spends_rank_on(tmp_path):
    base, _ = pair("llama", tmp_path)
    before = tensors_of(base)
    after = dict(before)
    for name, value in before.items():
        if name.endswith("_proj.weight"):
            rows = 1 + 0.3 * noise((len(value), 1), name, "rows")
            left, right = noise((len(value), 2), name, "left"), noise((2, value.shape[1]), name, "right")
            after[name] = value * rows + 0.02 * left @ right
    plain = surgery.extract_lora(base, after, rank=4)
    dora = surgery.extract_lora(base, after, rank=4, dora=True)
    assert dora.report.error < 0.2 * plain.report.error
    dora.save(tmp_path / "adapter")
    assert_merges_as_peft("llama", base, tmp_path / "adapter", tmp_path)
    merged = tensors_of(tmp_path / "merged")
    left = sum((merged[n].double() - after[n].double()).square().sum() for n in after)
    moved = sum((before[n].double() - after[n].double()).square().sum() for n in after)
    assert float((left / moved).sqrt()) == pytest.approx(dora.report.error, rel=1e-3)
