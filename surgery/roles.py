"""What a tensor is in its model, told from its name and shape by one table of rules: no architecture files.

A *role* is ``q``, ``up``, ``norm``, ``embedding`` … The table is read from top to bottom; the first rule whose pattern
is found in the name wins. A name that no rule knows has the role ``other``: nothing is guessed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from surgery.names import module_of
from surgery.tensor import TensorSpec

# (role, pattern searched in the module's name). Order matters: fused before single, specific before general.
_RULES: tuple[tuple[str, str], ...] = (
    ("norm", r"(?i)(^|[._])(layer_?norm|rms_?norm|group_?norm|batch_?norm|norm\d*|ln(_?[a-z0-9]+)?|[a-z]+_norm(_out)?|[a-z]*layernorm(_[a-z]+)?)$"),
    ("head", r"(^|\.)(lm_head|embed_out|score|(pre_)?classifier(\.(dense|out_proj))?|qa_outputs|cls\.\w+(\.\w+)*|pooler(\.dense)?)$"),
    ("embedding", r"(?i)(^|\.)(wte|wpe|shared|(\w+_)?emb|embed\w*|\w*embeddings?|tok_embeddings|embed_(in|tokens|positions)|relative_attention_bias)$"),
    ("qkv", r"(^|\.)(c_attn|query_key_value|qkv_proj|qkv|Wqkv|in_proj|attn_qkv)$"),
    ("gate_up", r"(^|\.)(gate_up_proj|dense_h_to_2h)$"),
    ("router", r"(^|\.)(router|gate|block_sparse_moe\.gate|mlp\.gate|router\.\w+)$"),
    ("q", r"(^|\.)(q_proj|query|q_lin|wq|to_q|q|q_[ab]_proj)$"),
    ("k", r"(^|\.)(k_proj|key|k_lin|wk|to_k|k|kv_[ab]_proj\w*)$"),
    ("v", r"(^|\.)(v_proj|value|v_lin|wv|to_v|v)$"),
    ("down", r"(^|\.)(DenseReluDense|mlp|ffn|feed_forward)\.wo$"),
    ("o", r"(^|\.)(o_proj|out_proj|out_lin|wo|o|to_out(\.0)?|(attention|attn|self_attn|self_attention)\.(output\.dense|c_proj|dense|proj))$"),
    ("gate", r"(^|\.)(gate_proj|w1|wi_0)$"),
    ("down", r"(^|\.)(down_proj|w2|fc2|lin2|dense_4h_to_h|(mlp|ffn)\.c_proj|output\.dense|ff\.net\.2)$"),
    ("up", r"(^|\.)(up_proj|w3|fc1|lin1|c_fc|dense_h_to_4h|wi(_1)?|intermediate\.dense|ff\.net\.0\.proj)$"),
)  # fmt: skip
ROLES = (
    "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "router", "norm", "bias", "embedding", "head", "other",
)  # fmt: skip
"""Every role, in the order that tables show."""
_COMPILED = tuple((role, re.compile(pattern)) for role, pattern in _RULES)
LONGEST_RULE = 4
"""Dotted parts of a module's name that any rule looks at."""
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


def role_of(spec: TensorSpec) -> str:
    """Name a tensor's role.

    >>> role_of(TensorSpec("model.layers.0.self_attn.q_proj.weight", "BF16", (8, 8)))
    'q'
    >>> role_of(TensorSpec("encoder.layer.0.output.dense.bias", "F32", (8,)))
    'bias'
    """
    if is_fused_experts(spec):
        return _role_of_module(spec.name.rpartition(".")[2])
    # The parameter's own name stands last, and what is before the longest rule's reach first.
    role = _role_of_module(".".join(spec.name.rsplit(".", LONGEST_RULE + 1)[-LONGEST_RULE - 1 : -1]))
    flat = len(spec.shape) <= 1
    if role == "norm":
        return "norm" if flat else "other"
    if flat:
        return "bias" if spec.name.endswith("bias") else "other"
    return role


@functools.lru_cache(maxsize=1 << 16)
def _role_of_module(tail: str) -> str:
    """Find the first rule for the end of a module's name: models repeat few of them many times."""
    return next((role for role, pattern in _COMPILED if pattern.search(tail)), "other")


def roles_of(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Name the role of every tensor: what :func:`surgery.names.select` chooses from.

    >>> roles_of({"h.0.q_proj.weight": TensorSpec("h.0.q_proj.weight", "F32", (2, 2))})
    {'h.0.q_proj.weight': 'q'}
    """
    return {name: role_of(spec) for name, spec in specs.items()}


_BLOCK = re.compile(r"(.*?\b\d+)\.")


def layer_of(name: str) -> str:
    """Name the block that a tensor belongs to: its path up to the first number; ``""`` outside of blocks.

    >>> layer_of("encoder.layer.3.attention.self.query.weight"), layer_of("pooler.dense.weight")
    ('encoder.layer.3', '')
    """
    found = _BLOCK.match(name)
    return found[1] if found else ""


def numberless(name: str) -> str:
    """Write ``*`` for every number in a name: what all blocks have alike.

    >>> numberless("encoder.layer.3.attention.self.query.weight")
    'encoder.layer.*.attention.self.query.weight'
    """
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)


def transposed_weights(specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None = None) -> set[str]:
    """Find the 2-D weights that are stored ``(in, out)``, as GPT-2's Conv1D layers are.

    A bias has one entry an output, so a weight that is not square tells by its bias; square ones follow the others of
    the model. ``config.json`` decides only where no weight tells.
    """
    evidence = {False: 0, True: 0}
    square: list[str] = []
    found: set[str] = set()
    for name, spec in specs.items():
        bias = specs.get(f"{module_of(name)}.bias")
        if not name.endswith(".weight") or len(spec.shape) != 2 or bias is None or len(bias.shape) != 1:
            continue
        rows, columns = spec.shape
        if rows == columns:
            square.append(name)
        elif bias.shape[0] in spec.shape:
            transposed = bias.shape[0] == columns
            evidence[transposed] += 1
            if transposed:
                found.add(name)
    known = (config or {}).get("model_type") in _CONV1D_FAMILIES
    if evidence[True] > evidence[False] or (known and not evidence[False]):
        found.update(square)
    return found


_FUSED_EXPERTS = re.compile(r"\bexperts\.(gate_up|gate|up|down)_proj$")


def is_fused_experts(spec: TensorSpec) -> bool:
    """Recognise fused experts: bare 3-D parameters of a module called ``experts``, one matrix an expert.

    >>> is_fused_experts(TensorSpec("model.layers.0.mlp.experts.gate_up_proj", "BF16", (4, 64, 32)))
    True
    """
    return len(spec.shape) == 3 and _FUSED_EXPERTS.search(spec.name) is not None
