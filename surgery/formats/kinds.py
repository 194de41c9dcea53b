"""What the tensors of an adapter are, for those who load it: a finer sorting than a merge needs.

A merge asks what a tensor does to a weight; a server, whether it has a place for such a tensor at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import UnsupportedError
from surgery.formats import peft
from surgery.formats.servers import EXPERT
from surgery.roles import role_of
from surgery.tensor import TensorSpec

KINDS: Mapping[str, str] = {
    "linear": "LoRA on linear weights",
    "expert": "LoRA on one expert's own weights",
    "experts": "LoRA on the fused weights of all experts",
    "conv1d": "LoRA on transposed weights (Conv1D)",
    "conv": "LoRA on convolutions",
    "embedding": "LoRA on embeddings",
    "head": "LoRA on the output head",
    "rows": "replaced token rows",
    "bias": "replaced biases",
    "norm": "replaced norms",
    "saved": "weights saved whole",
    "class_head": "classification heads saved whole",
    "lora_bias": "biases of B",
    "magnitude": "DoRA magnitudes",
    "base_copy": "copies of base weights",
    "unknown": "tensors of other methods",
}
"""Every kind of tensor that an adapter may have, in words."""

_HEADS = ("lm_head", "embed_out", "unembed_tokens")
CLASS_HEADS = ("classifier", "score")
"""Modules that vLLM takes whole."""


def kind_of(part: peft.Part, spec: TensorSpec, *, transposed: bool = False) -> str:
    """Name a tensor's kind, one of :data:`KINDS`.

    Args:
        part: what PEFT's key says.
        spec: its dtype and shape.
        transposed: the model keeps its linear weights as ``(in, out)``.

    >>> key = "base_model.model.layers.0.input_layernorm.weight"
    >>> kind_of(peft.parse_key(key), TensorSpec(key, "F32", (8,)))
    'norm'
    """
    leaf = part.module.rpartition(".")[2]
    if part.kind in ("a", "b"):
        if part.module.endswith((".experts", ".experts.base_layer")):
            return "experts"
        if len(spec.shape) > 2:
            return "experts" if "experts" in part.module else "conv"
        if EXPERT.match(part.module):
            return "expert"
        return "head" if leaf in _HEADS else "conv1d" if transposed else "linear"
    if part.kind != "full":
        return "embedding" if part.kind.startswith("embedding") else part.kind
    if part.key.endswith(".base_layer.weight"):
        return "base_copy"
    if leaf in CLASS_HEADS:
        return "class_head"
    if role_of(TensorSpec(f"{part.module}.weight", spec.dtype, spec.shape)) == "norm" and part.parameter == "weight":
        return "norm"
    return "bias" if part.parameter == "bias" else "saved"


@dataclass
class Parts:
    """An adapter's tensors by kind, and its factors by module."""

    kinds: dict[str, list[str]] = field(default_factory=dict)
    """Kind → keys."""
    factors: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    """Module → ``A`` and ``B``."""
    kind_of_module: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, document: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Parts:
        """Sort the tensors of an adapter."""
        parts = cls()
        for key, spec in sorted(specs.items()):
            try:
                part = peft.parse_key(key)
            except UnsupportedError:
                parts.kinds.setdefault("unknown", []).append(key)
                continue
            kind = kind_of(part, spec, transposed=document.get("fan_in_fan_out") is True)
            parts.kinds.setdefault(kind, []).append(key)
            if part.kind in ("a", "b", "embedding_a", "embedding_b"):
                role = part.kind[-1].upper()
                home = parts.factors.setdefault(part.module, {})
                if role in home:
                    parts.twice.append(key)
                home[role] = spec
                parts.kind_of_module[part.module] = kind
        return parts

    @property
    def pairs(self) -> dict[str, tuple[TensorSpec, TensorSpec]]:
        """Module → A and B, where both are there and have a rank that can be read."""
        return {
            module: (both["A"], both["B"])
            for module, both in self.factors.items()
            if len(both) == 2
            and min(len(spec.shape) for spec in both.values()) >= 2
            and self.kind_of_module[module] != "experts"
        }
