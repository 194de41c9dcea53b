"""Merging and unmerging adapters that PEFT wrote.

Two judges: PEFT's own ``merge_and_unload``, and float64 NumPy written from the formulas of the papers.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
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
        return str(made[kind, dtype])

    return folder


def load(kind, folder):
    if kind == "vision":
        model = Vision()
        model.load_state_dict(safetensors.torch.load_file(f"{folder}/model.safetensors"))
        return model.eval()
    model_class = type(BUILD[kind]())
    return model_class.from_pretrained(folder, dtype="auto").eval()


def train_adapter(kind, base, out, config, *, seed=2, dtype=None, safe=True, tie=()):
    """Write an adapter as PEFT does after training: all that it trains has moved."""
    torch.manual_seed(seed)
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


def assert_like_peft(actual, expected, roundings=1):
    meet(actual, expected)
    same = count = 0
    for name, value in actual.items():
        wanted = expected[name]
        assert value.dtype == wanted.dtype
        assert value.shape == wanted.shape
        if value.dtype == torch.float32:
            bound = roundings * 2**-22 * wanted.abs().max().item() + 2**-30
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

WHOLE = {
    "r": 2, "lora_alpha": 4, "target_modules": ["query"], "modules_to_save": ["LayerNorm", "pooler.dense"],
    "trainable_token_indices": {"word_embeddings": [7, 2, 90]},
}  # fmt: skip

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
            "rank_pattern": {"layer.1.attention.self.query": 5, "query": 3}, "alpha_pattern": {".*key": 9},
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
        "bert", {"r": 2, "lora_alpha": 2, "target_modules": ["query", "dense"], "bias": "all"}, touched=27
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
    # For DoRA, PEFT takes a norm, divides and multiplies in float32, and rounds each time.
    assert_like_peft(actual, merged_by_peft(case.kind, base, adapter), 2 if case.config.get("use_dora") else 1)
    changed = [name for name in before if raw(actual[name]) != raw(before[name])]
    assert len(changed) == case.touched, changed


RUN = {
    "Llama": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": True}),
    "tied Llama": ("llama-tied", {"target_modules": QKV, "trainable_token_indices": {"embed_tokens": [1, 2]}}),
    "GPT-2": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True, "bias": "all"}),
    "BERT": ("bert", {"target_modules": BERT_LINEAR, "lora_bias": True, "modules_to_save": ["LayerNorm"]}),
    "BERT with a classifier": ("bert-classifier", {"target_modules": BERT_LINEAR[:3], "task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize(("kind", "config"), RUN.values(), ids=RUN)
def test_a_saved_merge_answers_as_the_model_with_its_adapter_does(kind, config, bases, tmp_path):
    base = bases(kind)
    adapter = train_adapter(kind, base, tmp_path / "adapter", {"r": 3, "lora_alpha": 4, **config})
    surgery.merge(base, adapter).save(tmp_path / "merged")
    ids = torch.tensor([[1, 2, 3, 95, 4], [5, 2, 2, 40, 1]])
    with peft_may_warn(), torch.no_grad():
        wanted = PeftModel.from_pretrained(load(kind, base), adapter).eval()(input_ids=ids)[0]
        plain = load(kind, base)(input_ids=ids)[0]
        actual = load(kind, tmp_path / "merged")(input_ids=ids)[0]
    assert torch.allclose(actual, wanted, atol=1e-4, rtol=1e-4)
    assert (actual - plain).abs().max() > 0.1


def test_an_adapter_of_the_bare_model_merges_into_the_model_with_a_head(bases, tmp_path):
    base = bases("bert-classifier")
    load("bert-classifier", base).bert.save_pretrained(tmp_path / "bare")
    adapter = train_adapter("bert", tmp_path / "bare", tmp_path / "adapter", WHOLE)
    merged, bare = surgery.merge(base, adapter), surgery.merge(tmp_path / "bare", adapter)
    assert "bert." in " ".join(merged.notes)
    assert all(raw(merged[f"bert.{name}"]) == raw(bare[name]) for name in bare)


TIED = {
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 1]}},
    "LoRA on the embedding": {"target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("config", TIED.values(), ids=TIED)
@pytest.mark.parametrize("where", ["on disk", "in memory"])
def test_a_tied_weight_that_the_base_stores_twice_changes_under_both_names(where, config, bases, tmp_path):
    base = bases("llama-tied")
    adapter = train_adapter("llama-tied", base, tmp_path / "adapter", {"r": 2, "lora_alpha": 2, **config})
    twice = load("llama-tied", base).state_dict()
    assert torch.equal(twice["lm_head.weight"], twice["model.embed_tokens.weight"])
    if where == "on disk":
        shutil.copytree(base, tmp_path / "twice")
        tensors = {name: value.clone() for name, value in twice.items()}
        safetensors.torch.save_file(tensors, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
        twice = tmp_path / "twice"
    merged = surgery.merge(twice, adapter)
    assert_like_peft(merged.state_dict(), merged_by_peft("llama-tied", base, adapter))
    restored = surgery.unmerge(merged, adapter)
    assert (restored["lm_head.weight"] - restored["model.embed_tokens.weight"]).abs().max() == 0
    before = base_tensors(base)["model.embed_tokens.weight"]
    assert (restored["lm_head.weight"] - before).abs().max() <= 2**-22


def test_saved_copies_of_tied_embeddings_that_differ_are_refused(bases, tmp_path):
    base = bases("llama-tied")
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = train_adapter("llama-tied", base, tmp_path / "adapter", config)
    with pytest.raises(MismatchError, match="tie"):
        surgery.merge(base, adapter)


def test_lora_on_both_names_of_tied_embeddings_is_refused(bases, tmp_path):
    # PEFT adds both deltas to the one weight; unmerged, each acts alone. No merge could be right.
    base = bases("llama-tied")
    adapter = train_adapter(
        "llama-tied",
        base,
        tmp_path / "adapter",
        {"r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens", "lm_head"]},
    )
    with pytest.raises(MismatchError, match="lm_head"):
        surgery.merge(base, adapter)


@pytest.mark.parametrize("target", ["embed", "conv"], ids=["an embedding", "a convolution"])
def test_dora_on_what_is_no_linear_layer_is_refused_by_name(target, bases, tmp_path):
    base = bases("vision")
    config = {"r": 2, "lora_alpha": 2, "target_modules": [target], "use_dora": True}
    adapter = train_adapter("vision", base, tmp_path / "adapter", config)
    with pytest.raises(UnsupportedError, match=target):
        surgery.merge(base, adapter)


def test_the_layout_of_a_square_weight_is_not_read_off_an_embedding(bases, tmp_path):
    # An embedding's factors always look transposed; they say nothing about linear layers.
    base = bases("bert")
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["word_embeddings", "query"]}
    adapter = train_adapter("bert", base, tmp_path / "adapter", config)
    assert_like_peft(surgery.merge(base, adapter).state_dict(), merged_by_peft("bert", base, adapter))


def test_an_adapter_whose_header_length_starts_like_a_pickle_is_read(bases, tmp_path):
    base = bases("bert")
    adapter = train_adapter("bert", base, tmp_path / "adapter", {"r": 2, "target_modules": ["query"]})
    path, tensors = f"{adapter}/adapter_model.safetensors", adapter_tensors(adapter)
    wanted = surgery.merge(base, adapter).state_dict()
    for length in (640, 1152):  # little endian 80 02 and 80 04: a pickle's protocol 2 and 4
        for padding in range(length):
            safetensors.torch.save_file(tensors, path, {"format": "pt", "padding": "x" * padding})
            with open(path, "rb") as file:
                if int.from_bytes(file.read(8), "little") == length:
                    break
        else:
            raise AssertionError("no padding gives that length")
        assert_like_peft(surgery.merge(base, adapter).state_dict(), wanted)


# --- float64 and exact arithmetic as the judges

FORMATS = {"BF16": (8, -126, 127), "F16": (11, -14, 15), "F32": (24, -126, 127)}
"""Significand bits, smallest and largest exponent of a normal number."""
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def nearest(value, kind):
    """Round an exact number once, to nearest, ties to even; by integers and fractions alone."""
    value = Fraction(value)
    precision, lowest, highest = FORMATS[kind]
    size = abs(value)
    if not size:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    whole, rest = divmod(size, quantum)
    if 2 * rest > quantum or (2 * rest == quantum and whole % 2):
        whole += 1
    result = math.inf if whole * quantum >= Fraction(2) ** (highest + 1) else float(whole * quantum)
    return -result if value < 0 else result


def narrowed(values, kind):
    """Round by the code under test."""
    flat = torch.tensor(values, dtype=torch.float64)
    spec = TensorSpec("w", kind, (len(values),))
    out = bytearray(spec.nbytes)
    numerics.narrow(flat, spec, memoryview(out), allow_nonfinite=True)
    return numerics.view(spec, out).to(torch.float64).tolist()


def neighbours(kind):
    """Give values at, and a hair beside, the midpoints between neighbours, where rounding twice goes wrong."""
    precision, lowest, highest = FORMATS[kind]
    draw = random.Random(kind)
    exponents = [*range(lowest - precision, lowest + 3), -1, 0, 1, *range(highest - 2, highest + 1)]
    for exponent in exponents:
        unit = math.ldexp(1.0, max(exponent, lowest) - precision + 1)
        low = math.ldexp(1.0, exponent)
        for step in (0, 1, 2, 3, draw.randrange(1 << (precision - 2)), (1 << (precision - 1)) - 1):
            middle = low + (step + 0.5) * unit
            around = [middle, math.nextafter(middle, math.inf), math.nextafter(middle, 0.0)]
            around += [middle * (1 + sign * 2.0**-bits) for bits in (25, 26, 30, 40, 51) for sign in (1, -1)]
            yield from around
            yield from (-value for value in around)


@pytest.mark.parametrize("kind", FORMATS)
def test_narrowing_rounds_once_to_nearest_even_beside_every_midpoint(kind):
    values = [*neighbours(kind), 0.0, 5e-324, -5e-324, 2.0**-1074 * 3, 1e-310, 1e308, -1e308]
    assert narrowed(values, kind) == [nearest(value, kind) for value in values]


@pytest.mark.parametrize("kind", FORMATS)
def test_narrowing_by_way_of_float32_would_fail_this_test(kind):
    # The judge itself is judged: plain casts, float64 to float32 to the dtype, do get some of these wrong.
    values = list(neighbours(kind))
    twice = torch.tensor(values, dtype=torch.float64).to(torch.float32).to(TORCH[kind]).to(torch.float64).tolist()
    assert (twice != [nearest(value, kind) for value in values]) == (kind != "F32")


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_narrowing_rounds_any_numbers_once(kind, values):
    assert narrowed(values, kind) == [nearest(value, kind) for value in values]


def test_narrowing_keeps_signs_of_zero_and_what_is_not_finite():
    for kind in FORMATS:
        zero, tiny, inf, nan = narrowed([-0.0, -5e-324, -math.inf, math.nan], kind)
        assert math.copysign(1, zero) == math.copysign(1, tiny) == -1
        assert inf == -math.inf
        assert math.isnan(nan)


def grid(shape, seed, unit, reach):
    """Draw multiples of ``unit`` up to ``reach``: their products and sums are exact in float64."""
    numbers = np.random.default_rng(seed).integers(-round(reach / unit), round(reach / unit), shape, endpoint=True)
    return torch.tensor(numbers * unit)


def write_adapter(folder, tensors, **config):
    """Write an adapter by hand."""
    folder.mkdir()
    safetensors.torch.save_file(
        {f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q"], **config}))
    return str(folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_merge_rounds_the_exact_sum_once(kind, tmp_path):
    dtype = TORCH[kind]
    weight = (grid((24, 16), 0, 2**-11, 4) if kind == "F16" else grid((24, 16), 0, 2**-20, 1)).to(dtype)
    a, b = grid((3, 16), 1, 2**-9, 1).float(), grid((24, 3), 2, 2**-9, 1).float()
    adapter = write_adapter(tmp_path / "a", {"q.lora_A.weight": a, "q.lora_B.weight": b}, r=3, lora_alpha=2.25)
    merged = surgery.merge({"q.weight": weight}, adapter, coeff=0.625)["q.weight"]
    exact = [[Fraction(v) for v in row] for row in weight.double().tolist()]
    scale, left, right = Fraction(0.625) * Fraction(3, 4), b.double().tolist(), a.double().T.tolist()
    wanted = [
        [nearest(w + scale * sum(Fraction(x) * Fraction(y) for x, y in zip(row, column, strict=True)), kind)
         for w, column in zip(weights, right, strict=True)]
        for weights, row in zip(exact, left, strict=True)
    ]  # fmt: skip
    assert merged.dtype == dtype
    assert merged.double().tolist() == wanted


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_merge_into_bfloat16_is_not_rounded_twice(sign, tmp_path):
    # 1 + 2⁻⁸ + 2⁻³⁰ lies above the midpoint of 1 and 1 + 2⁻⁷; in float32 it is the midpoint, which rounds to even, 1.
    a = torch.tensor([[2**-8 + 2**-30, 2**-8 - 2**-30, 2**-8]])
    adapter = write_adapter(
        tmp_path / "a", {"q.lora_A.weight": a, "q.lora_B.weight": torch.full((1, 1), sign)}, r=1, lora_alpha=1
    )
    base = {"q.weight": torch.full((1, 3), sign, dtype=torch.bfloat16)}
    merged = surgery.merge(base, adapter)["q.weight"]
    assert merged.double().tolist() == [[sign * (1 + 2**-7), sign, sign]]


def low_rank(tensors, document, module):
    """Compute ``s·B@A`` in float64 as the papers write it, and a bound on its rounding."""
    a = tensors[f"base_model.model.{module}.lora_A.weight"].double().numpy()
    b = tensors[f"base_model.model.{module}.lora_B.weight"].double().numpy()
    rank = len(a)
    scale = document["lora_alpha"] / (math.sqrt(rank) if document["use_rslora"] else rank)
    return scale * (b @ a), 2**-50 * scale * (np.abs(b) @ np.abs(a))


def judge(base, adapter, coeff=1.0):
    """Compute every adapted weight in float64 NumPy: LoRA (Hu et al. 2021, eq. 3), rsLoRA and DoRA (Liu et al. 2024, eq. 5).

    Returns:
        Weight name → (value, bound on the value's own error).
    """
    with open(f"{adapter}/adapter_config.json") as file:
        document = json.load(file)
    weights, tensors, found = base_tensors(base), adapter_tensors(adapter), {}
    for key in tensors:
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weight = weights[f"{module}.weight"].double().numpy()
        delta, slack = low_rank(tensors, document, module)
        if document["fan_in_fan_out"]:
            delta, slack = delta.T, slack.T
        value = weight + delta
        magnitude = tensors.get(f"base_model.model.{module}.lora_magnitude_vector")
        if document["use_dora"]:
            axis = 0 if document["fan_in_fan_out"] else 1
            factor = np.expand_dims(magnitude.double().numpy(), axis) / np.linalg.norm(value, axis=axis, keepdims=True)
            value, slack = factor * value, np.abs(factor) * (slack + 2**-50 * np.abs(value).max())
        value = weight + coeff * (value - weight)
        found[f"{module}.weight"] = value, abs(coeff) * slack + 2**-50 * (np.abs(weight) + np.abs(value))
    return found


def assert_rounded_once(actual, value, slack):
    """Check that values are the float64 ones rounded once; where those lie on a midpoint, give or take, both sides do."""
    assert (slack <= 2**-40 * max(np.abs(value).max(), 1)).all()
    kind = next(kind for kind, dtype in TORCH.items() if dtype == actual.dtype)
    if kind == "F32":
        low, high = (value - slack).astype(np.float32), (value + slack).astype(np.float32)
    else:
        low, high = (
            np.array([nearest(v, kind) for v in side.ravel()]).reshape(side.shape)
            for side in (value - slack, value + slack)
        )
    found = actual.float().numpy()
    assert ((low <= found) & (found <= high)).all()


FORMULA_CASES = {
    "LoRA": ("llama", torch.float32, {"target_modules": [*QKV, "down_proj"]}),
    "rsLoRA": ("llama", torch.float32, {"target_modules": [*QKV, "down_proj"], "use_rslora": True}),
    "DoRA": ("llama", torch.float32, {"target_modules": [*QKV, "down_proj"], "use_dora": True}),
    "LoRA on Conv1D": ("gpt2", torch.float32, {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "DoRA on Conv1D": ("gpt2", torch.float32, {"target_modules": CONV1D, "fan_in_fan_out": True, "use_dora": True}),
    "LoRA into bfloat16": ("llama", torch.bfloat16, {"target_modules": QKV}),
    "DoRA into bfloat16": ("llama", torch.bfloat16, {"target_modules": QKV, "use_dora": True}),
    "rsLoRA into float16": ("bert", torch.float16, {"target_modules": ["query", "value"], "use_rslora": True}),
}


@pytest.mark.parametrize("coeff", [1.0, 0.3, -1.0])
@pytest.mark.parametrize(("kind", "dtype", "config"), FORMULA_CASES.values(), ids=FORMULA_CASES)
def test_a_merge_is_the_formula_in_float64_rounded_once(kind, dtype, config, coeff, bases, tmp_path):
    base = bases(kind, dtype)
    adapter = train_adapter(kind, base, tmp_path / "adapter", {"r": 5, "lora_alpha": 7, **config})
    merged, wanted = surgery.merge(base, adapter, coeff=coeff), judge(base, adapter, coeff)
    assert len(wanted) >= 4
    for name, (value, slack) in wanted.items():
        assert_rounded_once(merged[name], value, slack)
    untouched = base_tensors(base).keys() - wanted.keys()
    assert all(raw(merged[name]) == raw(base_tensors(base)[name]) for name in untouched)


# --- coefficients


def replacements(adapter):
    return {
        key.removeprefix("base_model.model."): value for key, value in adapter_tensors(adapter).items()
        if "lora_" not in key and "trainable" not in key
    }  # fmt: skip


def test_two_adapters_with_coefficients_of_their_own_add_up_and_round_once(bases, tmp_path):
    base = bases("llama", torch.bfloat16)
    first = train_adapter("llama", base, tmp_path / "1", {"r": 3, "lora_alpha": 5, "target_modules": QKV}, seed=3)
    second = train_adapter(
        "llama", base, tmp_path / "2", {"r": 2, "lora_alpha": 9, "target_modules": ["q_proj"]}, seed=4
    )
    merged = surgery.merge(base, first, second, coeff=[0.3, -1.0])
    swapped = surgery.merge(base, second, first, coeff=[-1.0, 0.3])
    one, other, weights = judge(base, first, 0.3), judge(base, second, -1.0), base_tensors(base)
    assert len(one) == 6
    assert other.keys() < one.keys()
    for name, (value, slack) in one.items():
        if name in other:
            value = value + (other[name][0] - weights[name].double().numpy())  # noqa: PLW2901
            slack = slack + other[name][1]  # noqa: PLW2901
        assert_rounded_once(merged[name], value, slack)
    assert all(raw(merged[name]) == raw(swapped[name]) for name in merged)


def test_what_an_adapter_stores_in_full_is_copied_as_bytes_at_coefficient_one(bases, tmp_path):
    base = bases("bert")
    adapter = train_adapter("bert", base, tmp_path / "adapter", WHOLE)
    tensors = adapter_tensors(adapter)
    odd = torch.tensor([-0.0, 1e-45, -1e-40, 3e38] * 8)  # signed zero, subnormals, nearly too large
    tensors["base_model.model.encoder.layer.0.output.LayerNorm.weight"] = odd
    rows = "base_model.model.embeddings.word_embeddings.token_adapter.trainable_tokens_delta"
    tensors[rows][1] = odd
    safetensors.torch.save_file(tensors, f"{adapter}/adapter_model.safetensors")
    merged, whole = surgery.merge(base, adapter), replacements(adapter)
    assert len(whole) == 12
    assert all(raw(merged[name]) == raw(value) for name, value in whole.items())
    table, before = merged["embeddings.word_embeddings.weight"], base_tensors(base)["embeddings.word_embeddings.weight"]
    assert torch.equal(table[[7, 2, 90]], tensors[rows])
    others = [row for row in range(96) if row not in (7, 2, 90)]
    assert raw(table[others]) == raw(before[others])


@pytest.mark.parametrize("coeff", [0.3, -1.0, 2.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_an_adapter_stores_in_full_moves_by_the_coefficient(coeff, dtype, bases, tmp_path):
    base = bases("bert", dtype)
    adapter = train_adapter("bert", base, tmp_path / "adapter", WHOLE)
    merged, before = surgery.merge(base, adapter, coeff=coeff), base_tensors(base)
    whole = replacements(adapter)
    wanted = {name: (before[name].double().numpy(), value.double().numpy()) for name, value in whole.items()}
    name, ids = "embeddings.word_embeddings.weight", [7, 2, 90]
    old, new = before[name].double().numpy(), before[name].double().numpy()
    new[ids] = adapter_tensors(adapter)[
        "base_model.model.embeddings.word_embeddings.token_adapter.trainable_tokens_delta"
    ].double()
    wanted[name] = old, new
    for name, (old, new) in wanted.items():
        assert_rounded_once(merged[name], old + coeff * (new - old), 2**-50 * (np.abs(old) + np.abs(new)))


def test_two_adapters_that_replace_one_tensor_add_their_differences(bases, tmp_path):
    base = bases("bert")
    first = train_adapter("bert", base, tmp_path / "1", WHOLE, seed=3)
    second = train_adapter(
        "bert", base, tmp_path / "2",
        {**WHOLE, "target_modules": ["pooler.dense"], "modules_to_save": ["LayerNorm"],
         "trainable_token_indices": {"word_embeddings": [90, 4]}},
        seed=4,
    )  # fmt: skip
    before, rows = (
        base_tensors(base),
        "base_model.model.embeddings.word_embeddings.token_adapter.trainable_tokens_delta",
    )
    for coeffs in ([1.0, 1.0], [0.5, -0.25]):
        merged = surgery.merge(base, first, second, coeff=coeffs)
        one, two = replacements(first), replacements(second)
        assert len(two) == 10
        changes = {name: coeffs[0] * (value.double() - before[name].double()) for name, value in one.items()}
        for name, value in two.items():
            changes[name] = changes[name] + coeffs[1] * (value.double() - before[name].double())
        delta, _ = low_rank(adapter_tensors(second), {"lora_alpha": 4, "use_rslora": False}, "pooler.dense")
        changes["pooler.dense.weight"] = changes["pooler.dense.weight"] + coeffs[1] * torch.tensor(delta)
        table = before["embeddings.word_embeddings.weight"].double()
        moved = torch.zeros_like(table)
        moved[[7, 2, 90]] += coeffs[0] * (adapter_tensors(first)[rows].double() - table[[7, 2, 90]])
        moved[[90, 4]] += coeffs[1] * (adapter_tensors(second)[rows].double() - table[[90, 4]])
        changes["embeddings.word_embeddings.weight"] = moved
        for name, change in changes.items():
            old = before[name].double().numpy()
            value = old + change.numpy()
            assert_rounded_once(merged[name], value, 2**-49 * (np.abs(old) + np.abs(value) + 1))


def test_a_coefficient_list_must_fit_and_be_finite(bases, tmp_path):
    base = bases("bert")
    adapter = train_adapter("bert", base, tmp_path / "adapter", {"r": 2, "target_modules": ["query"]})
    for coeff in ([1.0, 2.0], math.nan, math.inf):
        with pytest.raises(UsageError):
            surgery.merge(base, adapter, coeff=coeff)


def test_overflow_and_nan_stop_a_merge_by_name(bases, tmp_path):
    base = bases("bert", torch.float16)
    adapter = train_adapter("bert", base, tmp_path / "adapter", {"r": 2, "lora_alpha": 2, "target_modules": ["query"]})
    with pytest.raises(NumericError, match=r"query\.weight.*overflow"):
        surgery.merge(base, adapter, coeff=1e9).state_dict()


# --- unmerging


def ulp(tensor):
    """Distance between neighbours at each value (at least that of the smallest normal number)."""
    precision, lowest, _ = FORMATS[next(kind for kind, dtype in TORCH.items() if dtype == tensor.dtype)]
    exponent = torch.frexp(tensor.double())[1].clamp_min(lowest + 1)
    return torch.ldexp(torch.ones(tensor.shape, dtype=torch.float64), exponent - precision)


def assert_restored(restored, merged, before):
    """Check that merging and unmerging cost their two roundings and no more."""
    assert restored.keys() == before.keys()
    for name, wanted in before.items():
        error = (restored[name].double() - wanted.double()).abs()
        assert (error <= 0.5001 * (ulp(merged[name]) + ulp(restored[name]))).all(), name


UNMERGED = {
    "float32": ("llama", torch.float32, {"target_modules": QKV}),
    "bfloat16": ("llama", torch.bfloat16, {"target_modules": QKV}),
    "Conv1D": ("gpt2", torch.float32, {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "convolution and embedding": ("vision", torch.float32, {"target_modules": ["conv", "embed", "head.0"]}),
    "biases of LoRA": ("bert", torch.float32, {"target_modules": ["query"], "lora_bias": True}),
}


@pytest.mark.parametrize("coeff", [1.0, -0.7])
@pytest.mark.parametrize(("kind", "dtype", "config"), UNMERGED.values(), ids=UNMERGED)
def test_unmerging_subtracts_to_rounding_and_is_exact_with_the_base(kind, dtype, config, coeff, bases, tmp_path):
    base = bases(kind, dtype)
    adapter = train_adapter(kind, base, tmp_path / "adapter", {"r": 3, "lora_alpha": 4, **config})
    before = base_tensors(base)
    surgery.merge(base, adapter, coeff=coeff).save(tmp_path / "merged")
    merged = base_tensors(tmp_path / "merged")
    touched = [name for name in before if raw(merged[name]) != raw(before[name])]
    assert len(touched) >= 2
    lazily = surgery.unmerge(surgery.merge(base, adapter, coeff=coeff), adapter)
    restored = surgery.unmerge(tmp_path / "merged", adapter, approximate=True)
    assert_restored(restored.state_dict(), merged, before)
    assert all(raw(lazily[name]) == raw(restored[name]) for name in before)
    undone = surgery.unmerge(tmp_path / "merged", adapter)
    assert all(raw(undone[name]) == raw(value) for name, value in before.items())
    exact = surgery.unmerge(tmp_path / "merged", adapter, base=base)
    exact.save(tmp_path / "restored")
    assert {name: raw(value) for name, value in base_tensors(tmp_path / "restored").items()} == {
        name: raw(value) for name, value in before.items()
    }


@pytest.mark.parametrize("coeff", [1.0, 0.3])
def test_what_an_adapter_replaced_comes_back_exactly_from_the_saved_originals(coeff, bases, tmp_path):
    base = bases("bert")
    adapter = train_adapter("bert", base, tmp_path / "adapter", WHOLE)
    surgery.merge(base, adapter, coeff=coeff).save(tmp_path / "merged")
    surgery.unmerge(tmp_path / "merged", adapter).save(tmp_path / "restored")
    before, restored = base_tensors(base), base_tensors(tmp_path / "restored")
    subtracted = {name for name in before if raw(before[name]) != raw(restored[name])}
    assert subtracted <= {f"encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)}
    assert_restored(restored, base_tensors(tmp_path / "merged"), before)


def test_biases_that_peft_saved_come_back_exactly(bases, tmp_path):
    base = bases("gpt2")
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}
    adapter = train_adapter("gpt2", base, tmp_path / "adapter", config)
    surgery.merge(base, adapter).save(tmp_path / "merged")
    restored, before = surgery.unmerge(tmp_path / "merged", adapter), base_tensors(base)
    biases = [name for name in before if name.endswith(".bias")]
    assert len(biases) == 13
    assert all(raw(restored[name]) == raw(before[name]) for name in biases)
    assert all(raw(base_tensors(tmp_path / "merged")[name]) != raw(before[name]) for name in biases)


def two_in_a_row(bases, tmp_path, second_config):
    """Merge one adapter into a base, save, merge another, save."""
    base = bases("bert")
    first = train_adapter("bert", base, tmp_path / "first", WHOLE, seed=3)
    second = train_adapter("bert", base, tmp_path / "second", second_config, seed=4)
    surgery.merge(base, first).save(tmp_path / "once")
    surgery.merge(tmp_path / "once", second).save(tmp_path / "twice")
    return base, first, second


SECOND = {
    "low rank on other weights": {"r": 3, "lora_alpha": 4, "target_modules": ["key"]},
    "low rank on the same weights": {"r": 3, "lora_alpha": 4, "target_modules": ["query"]},
    "low rank on a replaced weight": {"r": 3, "lora_alpha": 4, "target_modules": ["pooler.dense"]},
    "the same norms replaced": {"r": 3, "lora_alpha": 4, "target_modules": ["key"], "modules_to_save": ["LayerNorm"]},
    "some of the same rows": {
        "r": 3, "lora_alpha": 4, "target_modules": ["key"], "trainable_token_indices": {"word_embeddings": [2, 5]},
    },
    "everything": {**WHOLE, "trainable_token_indices": {"word_embeddings": [2, 5]}},
}  # fmt: skip


@pytest.mark.parametrize("config", SECOND.values(), ids=SECOND)
def test_two_merges_are_undone_in_reverse_order(config, bases, tmp_path):
    base, first, second = two_in_a_row(bases, tmp_path, config)
    surgery.unmerge(tmp_path / "twice", second).save(tmp_path / "once again")
    once, again = base_tensors(tmp_path / "once"), base_tensors(tmp_path / "once again")
    assert_restored(again, base_tensors(tmp_path / "twice"), once)
    surgery.unmerge(tmp_path / "once again", first).save(tmp_path / "restored")
    before, restored = base_tensors(base), base_tensors(tmp_path / "restored")
    exact = [name for name in before if not name.endswith(("query.weight", "key.weight"))]
    assert [name for name in exact if raw(restored[name]) != raw(before[name])] == []
    for name in before.keys() - set(exact):
        assert (restored[name] - before[name]).abs().max().item() <= 2**-21


@pytest.mark.parametrize(
    "config", [SECOND["the same norms replaced"], SECOND["some of the same rows"], SECOND["low rank on a replaced weight"]],
    ids=["norms", "rows", "a weight"],
)  # fmt: skip
def test_an_earlier_adapter_is_not_taken_out_from_under_a_later_one(config, bases, tmp_path):
    base, first, _ = two_in_a_row(bases, tmp_path, config)
    with pytest.raises(MismatchError, match="unmerge second first"):
        surgery.unmerge(tmp_path / "twice", first)
    with pytest.raises(MismatchError, match="second"):
        surgery.unmerge(tmp_path / "twice", first, base=base)


def test_an_earlier_adapter_comes_out_first_where_both_only_added(bases, tmp_path):
    base = bases("bert", torch.float32)
    config = {"r": 3, "lora_alpha": 4, "target_modules": ["query"]}
    first = train_adapter("bert", base, tmp_path / "first", config, seed=3)
    second = train_adapter("bert", base, tmp_path / "second", config, seed=4)
    both = surgery.merge(surgery.merge(base, first), second)
    alone = surgery.merge(base, second)
    restored = surgery.unmerge(both, first)
    assert all((restored[name] - alone[name]).abs().max().item() <= 2**-22 for name in alone)
    again = surgery.unmerge(restored, second).state_dict()
    assert all((again[name] - value).abs().max().item() <= 2**-21 for name, value in base_tensors(base).items())


def test_adapters_merged_at_once_come_out_one_by_one_where_not_both_replaced(bases, tmp_path):
    base = bases("bert")
    first = train_adapter("bert", base, tmp_path / "first", WHOLE, seed=3)
    second = train_adapter("bert", base, tmp_path / "second", SECOND["low rank on a replaced weight"], seed=4)
    third = train_adapter("bert", base, tmp_path / "third", SECOND["the same norms replaced"], seed=5)
    surgery.merge(base, first, second).save(tmp_path / "both")
    with pytest.raises(MismatchError, match="second"):
        surgery.unmerge(tmp_path / "both", first)
    with pytest.raises(MismatchError, match=r"pooler\.dense\.weight.*together with second; name all of them"):
        surgery.unmerge(tmp_path / "both", second)
    together = surgery.unmerge(tmp_path / "both", first, second)
    assert all(raw(together[name]) == raw(value) for name, value in base_tensors(base).items())
    surgery.unmerge(tmp_path / "both", second, approximate=True).save(tmp_path / "first alone")
    alone, wanted = base_tensors(tmp_path / "first alone"), surgery.merge(base, first)
    assert all((alone[name] - wanted[name]).abs().max().item() <= 2**-22 for name in wanted)
    restored = surgery.unmerge(tmp_path / "first alone", first)
    assert_restored(restored.state_dict(), alone, base_tensors(base))
    both = surgery.merge(base, first, third)
    for adapter in (first, third):
        with pytest.raises(MismatchError, match="LayerNorm"):
            surgery.unmerge(both, adapter)


def test_dora_comes_out_with_the_base_only(bases, tmp_path):
    base = bases("gpt2")
    config = {"r": 3, "lora_alpha": 4, "target_modules": CONV1D, "use_dora": True, "fan_in_fan_out": True}
    adapter = train_adapter("gpt2", base, tmp_path / "adapter", config)
    merged = surgery.merge(base, adapter)
    with pytest.raises(MismatchError, match="--base"):
        surgery.unmerge(merged, adapter)
    restored = surgery.unmerge(merged, adapter, base=base)
    assert all(raw(restored[name]) == raw(value) for name, value in base_tensors(base).items())


def test_what_was_never_merged_or_merged_otherwise_is_not_unmerged(bases, tmp_path):
    base = bases("bert")
    config = {"r": 3, "lora_alpha": 4, "target_modules": ["query"]}
    adapter = train_adapter("bert", base, tmp_path / "adapter", config)
    stranger = train_adapter("bert", base, tmp_path / "stranger", config, seed=9)
    merged = surgery.merge(base, adapter, coeff=0.5)
    with pytest.raises(MismatchError, match="not merged into it"):
        surgery.unmerge(merged, stranger)
    with pytest.raises(MismatchError, match=r"0\.5"):
        surgery.unmerge(merged, adapter, coeff=1.0)
    with pytest.raises(MismatchError, match="not merged into it"):
        surgery.unmerge(surgery.unmerge(merged, adapter), adapter)


def test_a_base_that_is_not_the_one_merged_into_is_refused_when_saved(bases, tmp_path):
    base = bases("bert")
    adapter = train_adapter("bert", base, tmp_path / "adapter", {"r": 3, "lora_alpha": 4, "target_modules": ["query"]})
    surgery.merge(base, adapter).save(tmp_path / "merged")
    other = {name: value + 1 for name, value in base_tensors(base).items()}
    with pytest.raises(MismatchError, match="not what was merged into"):
        surgery.unmerge(tmp_path / "merged", adapter, base=other).save(tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_one_file_keeps_no_originals_and_says_so(bases, tmp_path):
    base = bases("bert")
    adapter = train_adapter("bert", base, tmp_path / "adapter", WHOLE)
    surgery.merge(base, adapter).save(tmp_path / "merged.safetensors")
    with pytest.raises(MismatchError, match="--base"):
        surgery.unmerge(tmp_path / "merged.safetensors", adapter)
    restored = surgery.unmerge(tmp_path / "merged.safetensors", adapter, base=base)
    assert all(raw(restored[name]) == raw(value) for name, value in base_tensors(base).items())


def test_an_adapter_merged_twice_on_purpose_comes_out_twice(bases, tmp_path):
    base = bases("bert")
    adapter = train_adapter("bert", base, tmp_path / "adapter", {"r": 3, "lora_alpha": 4, "target_modules": ["query"]})
    once = surgery.merge(base, adapter)
    with pytest.raises(MismatchError, match="already"):
        surgery.merge(once, adapter)
    twice = surgery.merge(once, adapter, coeff=0.5, allow_base_mismatch=True)
    back = surgery.unmerge(twice, adapter)
    assert all((back[name] - once[name]).abs().max().item() <= 2**-22 for name in once)
    restored = surgery.unmerge(back, adapter)
    assert all((restored[name] - value).abs().max().item() <= 2**-21 for name, value in base_tensors(base).items())
