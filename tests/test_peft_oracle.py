"""Merging and unmerging adapters that PEFT wrote.

Two judges: PEFT's own ``merge_and_unload``, and float64 NumPy written from the formulas of the papers.
"""

from __future__ import annotations

import copy
import json
import math
import random
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

import surgery
from surgery import numerics
from surgery.errors import MismatchError, NumericError, UnsupportedError, UsageError
from surgery.tensor import TensorSpec

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Vision(torch.nn.Module):
    """A model that is no transformers model: a convolution, an embedding and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, (3, 2), bias=True)
        self.embed = torch.nn.Embedding(20, 8)
        self.head = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))

    def forward(self, x, ids):
        return self.head(self.conv(x).mean((2, 3)) + self.embed(ids))


def bert(**more):
    return transformers.BertConfig(**SIZES, max_position_embeddings=32, **more)


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **more))


BUILD = {
    "bert": lambda: transformers.BertModel(bert()),
    "bert-classifier": lambda: transformers.BertForSequenceClassification(bert(num_labels=3)),
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    ),
    "vision": Vision,
}


@contextmanager
def peft_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def shake(parameters, seed, size=0.2):
    """Move every parameter away from its initial value, by draws that do not depend on the others."""
    with torch.no_grad():
        for place, parameter in enumerate(parameters):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + place))
            parameter.add_((size * noise).to(parameter.dtype))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Give folders of base models by (kind, dtype), each written once."""
    made = {}

    def folder(kind, dtype=torch.float32):
        if (kind, dtype) not in made:
            torch.manual_seed(0)
            model = BUILD[kind]()
            shake(model.parameters(), seed=1)
            model.to(dtype)
            made[kind, dtype] = path = tmp_path_factory.mktemp(f"{kind}-{str(dtype)[6:]}") / "base"
            if kind == "vision":
                path.mkdir()
                safetensors.torch.save_file(model.state_dict(), path / "model.safetensors")
            else:
                model.save_pretrained(path)
        return path_of(made[kind, dtype])

    return folder


def path_of(path):
    return str(path)


def load(kind, folder):
    if kind == "vision":
        model = Vision()
        model.load_state_dict(safetensors.torch.load_file(f"{folder}/model.safetensors"))
        return model.eval()
    model_class = type(BUILD[kind]())
    return model_class.from_pretrained(folder, dtype="auto").eval()


def train_adapter(kind, base, out, config, *, seed=2, dtype=None, safe=True, tie=()):
    """Write an adapter as PEFT does after training: all that it trains has moved."""
    with peft_may_warn():
        model = get_peft_model(load(kind, base), LoraConfig(**config))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert named
        shake([p for _, p in named], seed)
        for name, parameter in named:
            if dtype is not None and "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        for source, target in tie:
            parameters = dict(model.named_parameters())
            parameters[target].data.copy_(parameters[source].data)
        model.save_pretrained(out, safe_serialization=safe)
    return str(out)


def merged_by_peft(kind, base, *adapters):
    model = load(kind, base)
    with peft_may_warn():
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def adapter_tensors(adapter):
    return safetensors.torch.load_file(f"{adapter}/adapter_model.safetensors")


def base_tensors(base):
    return safetensors.torch.load_file(f"{base}/model.safetensors")


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def steps_apart(a, b):
    """Count the representable 16-bit values between two tensors, element by element."""

    def line(tensor):
        bits = tensor.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -32768 - bits, bits)

    return (line(a) - line(b)).abs()


def meet(actual, expected):
    """Check that names agree, but for output heads that are tied in memory and absent on disk."""
    assert actual.keys() <= expected.keys()
    for name in expected.keys() - actual.keys():
        assert name == "lm_head.weight"
        twin = next(n for n in actual if n.endswith(("embed_tokens.weight", "wte.weight")))
        assert torch.equal(expected[name], expected[twin])


def assert_like_peft(actual, expected):
    meet(actual, expected)
    same = count = 0
    for name, value in actual.items():
        wanted = expected[name]
        assert value.dtype == wanted.dtype
        assert value.shape == wanted.shape
        if value.dtype == torch.float32:
            bound = 2**-22 * wanted.abs().max().item() + 2**-30
            assert (value - wanted).abs().max().item() <= bound, name
        else:
            apart = steps_apart(value, wanted)
            assert apart.max().item() <= 1, name
            same, count = same + int((apart == 0).sum()), count + apart.numel()
    assert same >= 0.999 * count


# --- PEFT as the judge


@dataclass(frozen=True)
class Case:
    kind: str
    config: dict[str, Any]
    base_dtype: torch.dtype = torch.float32
    train: dict[str, Any] = field(default_factory=dict)
    touched: int | None = None
    """How many of the base's tensors must change; a merge that forgets some is not like PEFT by luck."""


QKV = ["q_proj", "k_proj", "v_proj"]
CONV1D = ["c_attn", "c_fc", "c_proj"]
BERT_LINEAR = ["query", "key", "value", "dense"]
DENSE = r".*\.(query|value|intermediate\.dense)"

CASES = {
    "plain LoRA on BERT": Case("bert", {"r": 4, "lora_alpha": 4, "target_modules": ["query", "value"]}, touched=4),
    "plain LoRA on Llama": Case("llama", {"r": 4, "lora_alpha": 4, "target_modules": QKV}, touched=6),
    "LoRA on all linear layers of Llama": Case(
        "llama", {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}, touched=14
    ),
    "alpha that is not r": Case("llama", {"r": 4, "lora_alpha": 13, "target_modules": QKV}, touched=6),
    "rank above the matrix": Case("llama", {"r": 24, "lora_alpha": 5, "target_modules": ["k_proj"]}, touched=2),
    "rank and alpha patterns": Case(
        "llama",
        {
            "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6, "^model.layers.0.self_attn.v_proj": 3},
            "alpha_pattern": {"v_proj": 5, "model.layers.1.self_attn.q_proj": 7},
        },
        touched=6,
    ),
    "rank patterns that overlap": Case(
        "bert",
        {
            "r": 2, "lora_alpha": 2, "target_modules": ["query", "key"],
            "rank_pattern": {"query": 3, "layer.1.attention.self.query": 5}, "alpha_pattern": {".*key": 9},
        },
        touched=4,
    ),
    "rsLoRA": Case("llama", {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": QKV}, touched=6),
    "rsLoRA with patterns": Case(
        "llama",
        {
            "r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": QKV,
            "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k_proj": 2, "v_proj": 11},
        },
        touched=6,
    ),
    "Conv1D layers of GPT-2": Case(
        "gpt2", {"r": 4, "lora_alpha": 8, "target_modules": CONV1D, "fan_in_fan_out": True}, touched=8
    ),
    "Conv1D layers, square ones alone": Case(
        "gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}, touched=2
    ),
    "Conv1D layers without fan_in_fan_out": Case(
        "gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "attn.c_proj"]}, touched=4
    ),
    "an embedding of Llama": Case(
        "llama", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}, touched=3
    ),
    "embeddings of BERT": Case(
        "bert", {"r": 2, "lora_alpha": 6, "target_modules": ["word_embeddings", "position_embeddings"]}, touched=2
    ),
    "the tied embedding of GPT-2": Case("gpt2", {"r": 4, "lora_alpha": 6, "target_modules": ["wte"]}, touched=1),
    "an output head that is not tied": Case(
        "llama", {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "v_proj"]}, touched=3
    ),
    "a convolution, an embedding and linear layers": Case(
        "vision", {"r": 2, "lora_alpha": 3, "target_modules": ["conv", "embed", "head.0", "head.2"]}, touched=4
    ),
    "all biases": Case(
        "bert", {"r": 2, "lora_alpha": 2, "target_modules": ["query", "dense"], "bias": "all"}, touched=26
    ),
    "all biases of GPT-2": Case(
        "gpt2", {"r": 2, "lora_alpha": 2, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
        touched=15,
    ),
    "biases of adapted layers": Case(
        "bert", {"r": 2, "lora_alpha": 2, "target_modules": ["query", "dense"], "bias": "lora_only"}, touched=18
    ),
    "biases of adapted Qwen2 layers": Case(
        "qwen2", {"r": 2, "lora_alpha": 2, "target_modules": QKV, "bias": "lora_only"}, touched=12
    ),
    "norms and output head saved whole": Case(
        "llama",
        {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head"]},
        touched=4,
    ),
    "norms named by a suffix that others share": Case(
        "llama", {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}, touched=7
    ),
    "LayerNorms with biases saved whole": Case(
        "bert", {"r": 2, "lora_alpha": 2, "target_modules": ["query"], "modules_to_save": ["LayerNorm"]}, touched=12
    ),
    "a classifier": Case(
        "bert-classifier",
        {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, touched=6,
    ),
    "a classifier and all biases": Case(
        "bert-classifier",
        {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"},
        touched=24,
    ),
    "trained tokens": Case(
        "llama", {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 95, 0]},
        touched=3,
    ),
    "trained tokens by module": Case(
        "bert",
        {
            "r": 2, "lora_alpha": 2, "target_modules": ["query"],
            "trainable_token_indices": {"word_embeddings": [7, 2], "position_embeddings": [31]},
        },
        touched=4,
    ),
    "trained tokens of tied embeddings": Case(
        "llama-tied",
        {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 1]}},
        touched=3,
    ),
    "trained tokens of GPT-2": Case(
        "gpt2",
        {
            "r": 2, "lora_alpha": 2, "target_modules": ["c_attn"], "trainable_token_indices": {"wte": [5, 1]},
            "fan_in_fan_out": True,
        },
        touched=3,
    ),
    "LoRA with biases of its own": Case(
        "bert", {"r": 2, "lora_alpha": 6, "target_modules": ["query", "dense"], "lora_bias": True}, touched=18
    ),
    "LoRA with biases of its own on Conv1D": Case(
        "gpt2", {"r": 2, "lora_alpha": 6, "target_modules": CONV1D, "lora_bias": True, "fan_in_fan_out": True},
        touched=16,
    ),
    "DoRA": Case("llama", {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": QKV}, touched=6),
    "DoRA with rsLoRA": Case(
        "bert", {"r": 4, "lora_alpha": 3, "use_dora": True, "use_rslora": True, "target_modules": ["query", "dense"]},
        touched=9,
    ),
    "DoRA on Conv1D": Case(
        "gpt2", {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": CONV1D, "fan_in_fan_out": True},
        touched=8,
    ),
    "tied embeddings saved under both names": Case(
        "llama-tied",
        {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        train={"tie": [(
            "base_model.model.model.embed_tokens.modules_to_save.default.weight",
            "base_model.model.lm_head.modules_to_save.default.weight",
        )]},
        touched=3,
    ),
    "a bfloat16 adapter on a float32 base": Case(
        "llama", {"r": 4, "lora_alpha": 8, "target_modules": QKV}, train={"dtype": torch.bfloat16}, touched=6
    ),
    "a float16 adapter on a float32 base": Case(
        "bert", {"r": 4, "lora_alpha": 8, "target_modules": BERT_LINEAR}, train={"dtype": torch.float16}, touched=13
    ),
    "a float32 adapter on a bfloat16 base": Case(
        "llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}, torch.bfloat16,
        touched=14,
    ),
    "a float32 adapter on a bfloat16 base of Conv1D": Case(
        "gpt2", {"r": 4, "lora_alpha": 7, "target_modules": CONV1D, "fan_in_fan_out": True}, torch.bfloat16, touched=8
    ),
    "a float32 adapter on a float16 base": Case(
        "bert", {"r": 4, "lora_alpha": 8, "target_modules": BERT_LINEAR}, torch.float16, touched=13
    ),
    "norms and biases on a bfloat16 base": Case(
        "bert",
        {"r": 2, "lora_alpha": 2, "target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler.dense"]},
        torch.bfloat16, touched=21,
    ),
    "some layers only": Case(
        "llama",
        {
            "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
        touched=1,
    ),
    "a regular expression": Case("bert", {"r": 4, "lora_alpha": 8, "target_modules": DENSE}, touched=6),
    "modules excluded": Case(
        "llama", {"r": 4, "lora_alpha": 8, "target_modules": QKV, "exclude_modules": ["v_proj"]}, touched=4
    ),
    "whole names": Case(
        "llama", {"r": 4, "lora_alpha": 8, "target_modules": ["model.layers.1.self_attn.q_proj"]}, touched=1
    ),
    "a pickled adapter": Case(
        "llama", {"r": 4, "lora_alpha": 8, "target_modules": QKV}, train={"safe": False}, touched=6
    ),
    "a pickled adapter with saved modules": Case(
        "bert", {"r": 4, "lora_alpha": 8, "target_modules": ["query"], "modules_to_save": ["pooler"]},
        train={"safe": False}, touched=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_merge_gives_what_peft_gives(case, bases, tmp_path):
    base = bases(case.kind, case.base_dtype)
    adapter = train_adapter(case.kind, base, tmp_path / "adapter", case.config, **case.train)
    actual, before = surgery.merge(base, adapter).state_dict(), base_tensors(base)
    assert_like_peft(actual, merged_by_peft(case.kind, base, adapter))
    changed = [name for name in before if raw(actual[name]) != raw(before[name])]
    assert len(changed) == case.touched, changed
