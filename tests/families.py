"""Tiny models of many families, with the libraries' own layouts: what their checkpoints hold is what real ones hold."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors import safe_open

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SMALL | TOKENS | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
WHISPER = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1,
}  # fmt: skip
VIT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8, "norm_num_groups": 4, "attention_head_dim": 4,
}  # fmt: skip
EXPERTS = {"head_dim": 4, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", SMALL),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SMALL),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL | {"tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 4}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 2}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", GROUPED | EXPERTS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | {"head_dim": 4}),
    "phi": ("PhiForCausalLM", "PhiConfig", GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER | TOKENS),
    "unet": ("UNet2DConditionModel", "", UNET),
}  # fmt: skip


def build(family: str) -> Any:
    """Make a tiny model of a family, the same one each time."""
    model_class, config_class, settings = MODELS[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not config_class:
            import diffusers  # seconds, for the one model that needs it

            return getattr(diffusers, model_class)(**settings).eval()
        return getattr(hf, model_class)(getattr(hf, config_class)(**settings)).eval()


@functools.cache
def saved(family: str, folder: str) -> str:
    """Save a tiny model as transformers does, and return where."""
    build(family).save_pretrained(f"{folder}/{family}")
    return f"{folder}/{family}"


def shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Read names and shapes with the official reader."""
    (weights,) = Path(path).glob("*.safetensors")
    with safe_open(weights, "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping
