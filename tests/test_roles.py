"""Roles: what the one table of rules takes tensors for, on the layouts that real checkpoints have."""

from __future__ import annotations

import re

import numpy as np
import pytest

import surgery
from surgery.cli.main import main
from surgery.errors import MismatchError
from surgery.names import parse_patterns, select
from surgery.roles import roles_of
from surgery.tensor import TensorSpec
from tests.families import MODELS, build, saved, shapes

BERT_BLOCK = {
    "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
    "attention.output.dense": "o", "attention.output.LayerNorm": "norm",
    "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "norm",
}  # fmt: skip
BERT_EMBEDDINGS = {
    "embeddings.word_embeddings": "embedding", "embeddings.position_embeddings": "embedding",
    "embeddings.token_type_embeddings": "embedding", "embeddings.LayerNorm": "norm",
}  # fmt: skip
LLAMA = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down", "input_layernorm": "norm",
    "post_attention_layernorm": "norm", "model.norm": "norm", "embed_tokens": "embedding", "lm_head": "head",
}  # fmt: skip
QK_NORMS = {"self_attn.q_norm": "norm", "self_attn.k_norm": "norm"}
SPEECH = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.out_proj": "o",
    "encoder_attn.q_proj": "q", "encoder_attn.k_proj": "k", "encoder_attn.v_proj": "v", "encoder_attn.out_proj": "o",
    "fc1": "up", "fc2": "down", "layer_norm": "norm", "self_attn_layer_norm": "norm", "final_layer_norm": "norm",
    "encoder_attn_layer_norm": "norm", "embed_tokens": "embedding", "embed_positions": "embedding",
    "conv1": "other", "conv2": "other",
}  # fmt: skip
T5_MODULES = {
    **{f"{attention}.{role}": role for attention in ("SelfAttention", "EncDecAttention") for role in "qkvo"},
    "relative_attention_bias": "embedding", "DenseReluDense.wi": "up", "DenseReluDense.wo": "down",
    "layer_norm": "norm", "final_layer_norm": "norm", "shared": "embedding",
}  # fmt: skip
# What each module's weight is, written from the models' papers and code, by the end of its name.
TRUTH: dict[str, dict[str, str]] = {
    "bert": {**BERT_BLOCK, **BERT_EMBEDDINGS, "pooler.dense": "head", "classifier": "head"},
    "bert-mlm": {
        **BERT_BLOCK, **BERT_EMBEDDINGS, "transform.dense": "head", "transform.LayerNorm": "norm",
    },
    "roberta": {**BERT_BLOCK, **BERT_EMBEDDINGS, "classifier.dense": "head", "classifier.out_proj": "head"},
    "distilbert": {
        "q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "o", "ffn.lin1": "up", "ffn.lin2": "down",
        "sa_layer_norm": "norm", "output_layer_norm": "norm", "pre_classifier": "head", "classifier": "head",
        "word_embeddings": "embedding", "position_embeddings": "embedding", "embeddings.LayerNorm": "norm",
    },
    "gpt2": {
        "attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down", "ln_1": "norm", "ln_2": "norm",
        "ln_f": "norm", "wte": "embedding", "wpe": "embedding",
    },
    "gpt-neox": {
        "query_key_value": "qkv", "attention.dense": "o", "dense_h_to_4h": "up", "dense_4h_to_h": "down",
        "input_layernorm": "norm", "post_attention_layernorm": "norm", "final_layer_norm": "norm",
        "embed_in": "embedding", "embed_out": "head",
    },
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, **QK_NORMS},
    "mistral": LLAMA,
    "mixtral": {**LLAMA, "w1": "gate", "w2": "down", "w3": "up", "block_sparse_moe.gate": "router"},
    "qwen3-moe": {**LLAMA, **QK_NORMS, "mlp.gate": "router", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    "gemma": LLAMA,
    "phi": {**LLAMA, "self_attn.dense": "o", "fc1": "up", "fc2": "down", "final_layernorm": "norm"},
    "phi3": {**LLAMA, "qkv_proj": "qkv", "gate_up_proj": "gate_up"},
    "t5": T5_MODULES,
    "t5-gated": {**T5_MODULES, "wi_0": "gate", "wi_1": "up"},
    "vit": {
        "attention.attention.query": "q", "attention.attention.key": "k", "attention.attention.value": "v",
        "attention.output.dense": "o", "intermediate.dense": "up", "output.dense": "down", "layernorm_before": "norm",
        "layernorm_after": "norm", "vit.layernorm": "norm", "classifier": "head", "projection": "other",
        "cls_token": "embedding", "position_embeddings": "embedding",
    },
    "whisper": SPEECH,
    "unet": {
        **{f"{attention}.to_{role}": role for attention in ("attn1", "attn2") for role in "qkv"}, "to_out.0": "o",
        "ff.net.0.proj": "up", "ff.net.2": "down", "norm": "norm", "norm1": "norm", "norm2": "norm", "norm3": "norm",
        "conv_norm_out": "norm", "linear_1": "other", "linear_2": "other", "time_emb_proj": "other",
        **dict.fromkeys(("conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out"), "other"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("families"))


def test_every_family_has_its_truth():
    assert TRUTH.keys() == MODELS.keys()


@pytest.mark.parametrize("family", MODELS)
def test_roles_are_right_on_the_layout_of(family, folder):
    found = shapes(saved(family, folder))
    roles = roles_of({name: TensorSpec(name, "F32", shape) for name, shape in found.items()})
    for name, role in roles.items():
        module = re.sub(r"\.(weight|bias)$", "", name)
        endings = [end for end in TRUTH[family] if module == end or module.endswith(f".{end}")]
        if name.endswith("bias") and not (endings and TRUTH[family][max(endings, key=len)] == "norm"):
            assert role == "bias", name
        else:
            assert endings, f"{name} has no truth"
            assert role == TRUTH[family][max(endings, key=len)], name


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_that_are_fused_have_the_roles_of_what_they_are_fused_from(family):
    roles = roles_of({name: TensorSpec(name, "F32", tuple(v.shape)) for name, v in build(family).state_dict().items()})
    found = {name.rpartition(".")[2]: role for name, role in roles.items() if ".experts." in name}
    assert found == {"gate_up_proj": "gate_up", "down_proj": "down"}


@pytest.mark.parametrize("family", ["llama", "t5", "vit", "unet"])
def test_a_pattern_takes_a_role(family, folder):
    roles = roles_of(surgery.open(saved(family, folder)).specs)
    chosen = select(roles, parse_patterns(["role:q,role:v"]), "--target")
    assert chosen == {name for name, role in roles.items() if role in ("q", "v")}
    assert len(chosen) >= 4


def test_a_role_that_no_tensor_has_is_refused_with_those_that_there_are(folder):
    roles = roles_of(surgery.open(saved("phi3", folder)).specs)
    with pytest.raises(MismatchError, match=r"role:q' matches no tensor; .*down.*gate_up.*qkv.*by a pattern"):
        select(roles, parse_patterns(["role:q"]), "--target")


def test_names_that_no_rule_knows_are_other_and_said_so(capsys, tmp_path):
    from safetensors.numpy import save_file

    save_file({"h.0.wobble.weight": np.ones((4, 4), np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["info", str(tmp_path / "m.safetensors"), "--roles"])
    assert not stop.value.code
    said = capsys.readouterr()
    assert re.search(r"h\.\*\.wobble\.weight\s+other", said.out)
    assert "no rule knows what 1 tensors are" in said.err


def test_merges_diffs_and_conversions_take_roles(tmp_path):
    import torch

    a = {"h.0.q_proj.weight": torch.zeros(2, 2), "h.0.v_proj.weight": torch.zeros(2, 2)}
    b = {name: value + 1 for name, value in a.items()}
    merged = surgery.merge(a, b, algorithm="linear", coeff={"role:q": [0, 1], "role:v": [1, 0]})
    assert merged["h.0.q_proj.weight"].sum() == 4
    assert merged["h.0.v_proj.weight"].sum() == 0
    assert list(surgery.convert(a, drop=["role:v"])) == ["h.0.q_proj.weight"]
    assert [row.name for row in surgery.diff(a, b, target=["role:v"]).rows] == ["h.0.v_proj.weight"]
