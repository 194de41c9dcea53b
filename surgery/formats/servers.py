"""What programs that serve LoRA adapters load: one literal table, and the questions that extraction asks it.

Every entry was read in the loader named beside it; nothing here was learnt from documentation alone. The checks that
hold an adapter against the table are in :mod:`surgery.formats.serving`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from surgery.errors import MismatchError, UsageError
from surgery.formats.peft import PREFIX
from surgery.report import join_shown

Level = Literal["refused", "wrong", "note"]
"""``refused``: it does not load · ``wrong``: it loads and does something else · ``note``: it loads on a condition."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that keeps an adapter from loading in a server, or from doing there what it says."""

    level: Level
    what: str
    """The keys, modules or configuration field concerned."""
    why: str
    mend: str | None = None
    keys: tuple[str, ...] = ()
    """All keys or modules concerned, where it is about some."""

    @classmethod
    def about(cls, level: Level, keys: Iterable[str], why: str, mend: str | None) -> Problem:
        """Say one thing about several keys or modules; the first few are shown."""
        listed = tuple(keys)
        return cls(level, join_shown([key.removeprefix(PREFIX) for key in listed]), why, mend, listed)

    def __str__(self) -> str:
        """Write it as one line.

        >>> str(Problem("refused", "use_dora", "vLLM has no DoRA"))
        'refused: use_dora: vLLM has no DoRA'
        """
        line = f"{self.level}: {self.what}: {self.why}"
        return f"{line}; {self.mend}" if self.mend else line


class Unheld(NamedTuple):
    """What becomes of a kind of tensor that a server does not hold."""

    level: Level
    why: str


@dataclass(frozen=True, slots=True)
class Server:
    """What one server loads."""

    name: str
    title: str
    """What people call it."""
    version: str
    """The version whose loader was read."""
    files: tuple[str, ...]
    """Names of weight files that it looks for in an adapter's folder; a pattern where it takes any."""
    required: tuple[str, ...]
    """Fields that ``adapter_config.json`` must have."""
    unheld: Mapping[str, Unheld]
    """The kinds of tensor (:data:`surgery.formats.kinds.KINDS`) that it does not hold; it holds all others."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Configuration fields that it refuses when they are set, and why."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Configuration fields that change what PEFT does and that it does not read, and what it does instead."""
    scale: Literal["module", "config", "tensor"] = "module"
    """What it multiplies ``B @ A`` by: PEFT's scale of every module (patterns and rsLoRA honoured) · one
    ``lora_alpha / r`` · ``lora_alpha`` over the rank of every tensor (1 for an alpha of 0)."""
    one_rank: bool = False
    """Every module must have rank ``r``."""
    max_ranks: tuple[int, ...] = ()
    """Values that ``--max-lora-rank`` takes; empty for any."""
    default_max_rank: int | None = None
    """The largest rank that it takes when it is started without ``--max-lora-rank``; ``None`` for any."""
    expressions: bool = True
    """``target_modules`` may be a regular expression."""
    modules: Mapping[str, str] | None = None
    """The modules that it can put LoRA on, by the last part of their name → the fused module it keeps them in.
    ``None`` for any linear layer of the model."""
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """A module → neighbours that must have factors where it has."""
    whole_experts: bool = False
    """Where one expert of a layer has factors, all of its experts must, on all three projections."""
    layer: str | None = None
    """It files tensors by the layer number that this pattern finds, and skips others without a word."""
    prefix: Literal["needed", "optional"] = "optional"
    """Whether keys must begin with ``base_model.model.``."""


_KEYS = "its key parser knows lora_A, lora_B, lora_embedding_A and lora_embedding_B only"

# vllm/lora/utils.py: parse_fine_tuned_lora_name, is_base_embedding_weights · vllm/lora/peft_helper.py: PEFTHelper ·
# vllm/lora/lora_model.py: check_unexpected_modules, from_lora_tensors · vllm/lora/lora_weights.py: pack_moe ·
# vllm/lora/model_manager.py: _stack_moe_lora_weights, _validate_moe_lora_format · vllm/config/lora.py: MaxLoRARanks
_VLLM = Server(
    name="vllm",
    title="vLLM",
    version="0.33.0",
    files=("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt"),
    required=("r", "lora_alpha", "target_modules"),
    unheld={
        "experts": Unheld("note", "loads in models whose experts vLLM keeps fused, elsewhere it must be started with"
                          " --enable-mixed-moe-lora-format and the request must set is_3d_lora_weight"),
        "conv": Unheld("refused", "vLLM puts LoRA on linear layers only"),
        "embedding": Unheld("note", "loads only in models whose class lists embedding_modules (Llama's does, Qwen2's"
                            " does not), and only with the base's own vocabulary"),
        "head": Unheld("note", "loads only in models whose class lists lm_head in embedding_modules (Llama's does,"
                       " Qwen2's does not)"),
        "rows": Unheld("refused", _KEYS),
        "bias": Unheld("refused", _KEYS),
        "norm": Unheld("refused", _KEYS),
        "saved": Unheld("refused", _KEYS),
        "lora_bias": Unheld("refused", _KEYS),
        "magnitude": Unheld("refused", _KEYS),
        "base_copy": Unheld("refused", f"{_KEYS}; of copies of the base it skips those of embed_tokens and lm_head"),
        "unknown": Unheld("refused", _KEYS),
    },
    fields={
        "use_dora": "vLLM has no DoRA",
        "lora_bias": "vLLM has no bias of B",
        "alora_invocation_tokens": "vLLM has no activated LoRA",
        "layer_replication": "vLLM cannot replicate layers",
        "use_bdlora": "vLLM has no block-diagonal LoRA",
        "use_qalora": "vLLM has no QALoRA",
    },
    max_ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    default_max_rank=16,
    whole_experts=True,
)  # fmt: skip

_AS_B = "SGLang takes every tensor in a layer that is no lora_A for a lora_B"
_ATTENTION = ("q_proj", "v_proj")

# sglang/srt/lora/lora.py: LoRAAdapter (scaling, _process_weight, normalize_qkv_proj, normalize_gate_up_proj,
# normalize_fused_qkv_a_proj, _normalize_in_proj_qkvz) · sglang/srt/lora/lora_config.py ·
# sglang/srt/lora/lora_manager.py: validate_new_adapter, init_lora_shapes · sglang/srt/lora/mem_pool.py:
# load_lora_weight_to_buffer · sglang/srt/lora/utils.py: get_normalized_target_modules, get_target_module_name,
# get_default_hidden_dim · sglang/srt/layers/utils/common.py: get_layer_id
_SGLANG = Server(
    name="sglang",
    title="SGLang",
    version="0.5.23",
    files=("*.safetensors", "*.bin", "*.pt"),
    required=("peft_type", "r", "lora_alpha", "target_modules"),
    unheld={
        "experts": Unheld("refused", "SGLang knows PEFT's names of fused experts for no module"),
        "conv": Unheld("refused", "SGLang puts LoRA on linear layers only"),
        "rows": Unheld("refused", _AS_B),
        "bias": Unheld("refused", _AS_B),
        "norm": Unheld("refused", _AS_B),
        "saved": Unheld("refused", _AS_B),
        "class_head": Unheld("refused", _AS_B),
        "lora_bias": Unheld("refused", _AS_B),
        "magnitude": Unheld("refused", _AS_B),
        "base_copy": Unheld("refused", _AS_B),
        "unknown": Unheld("refused", _AS_B),
    },
    fields={"use_dora": "SGLang has no DoRA"},
    ignored={
        "alora_invocation_tokens": "SGLang would let it act on every token",
        "layer_replication": "SGLang would not replicate layers",
        "use_bdlora": "SGLang would take it for plain LoRA",
        "use_qalora": "SGLang would take it for plain LoRA",
    },
    scale="config",
    one_rank=True,
    expressions=False,
    modules={
        "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "qkv_proj": "qkv_proj",
        "o_proj": "o_proj", "out_proj": "out_proj",
        "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "gate_up_proj": "gate_up_proj",
        "down_proj": "down_proj",
        "q_a_proj": "fused_qkv_a_proj_with_mqa", "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
        "q_b_proj": "q_b_proj", "kv_b_proj": "kv_b_proj",
        "in_proj": "in_proj", "in_proj_qkvz": "in_proj_qkvz",
        "fc1_latent_proj": "fc1_latent_proj", "fc2_latent_proj": "fc2_latent_proj",
        "embed_tokens": "embed_tokens", "lm_head": "lm_head", "unembed_tokens": "lm_head",
    },
    needs={
        "q_proj": _ATTENTION, "k_proj": _ATTENTION, "v_proj": _ATTENTION,
        "up_proj": ("gate_proj",),
        "q_a_proj": ("kv_a_proj_with_mqa",), "kv_a_proj_with_mqa": ("q_a_proj",),
    },
    layer=r"layers\.\d+\.",
)  # fmt: skip

_CONVERTER = "llama.cpp's converter stops at any tensor that is neither lora_A nor lora_B"

# llama.cpp convert_lora_to_gguf.py at 0b03adaa: get_base_tensor_name, LoraTorchTensor, LoraModel.get_tensors,
# LoraModel.modify_tensors · src/llama-adapter.cpp at 0650ea8c: llama_adapter_lora_init_impl · src/llama-adapter.h:
# get_scale
_LLAMACPP = Server(
    name="llamacpp",
    title="llama.cpp",
    version="convert_lora_to_gguf.py of 0b03adaa",
    files=("adapter_model.safetensors", "adapter_model.bin"),
    required=("lora_alpha",),
    unheld={
        "experts": Unheld("refused", "llama.cpp's converter has no names for PEFT's fused experts"),
        "conv1d": Unheld("refused", "llama.cpp's converter transposes GPT-2's weights, and the factors with them, whose"
                         " shapes then do not fit"),
        "conv": Unheld("refused", "llama.cpp's converter pairs matrices only"),
        "head": Unheld("note", "its converter refuses lm_head in models that tie their embeddings"),
        "rows": Unheld("refused", _CONVERTER),
        "bias": Unheld("refused", _CONVERTER),
        "norm": Unheld("wrong", "llama.cpp's converter keeps norms, and its runtime skips them"),
        "saved": Unheld("refused", _CONVERTER),
        "class_head": Unheld("refused", _CONVERTER),
        "lora_bias": Unheld("refused", _CONVERTER),
        "magnitude": Unheld("refused", _CONVERTER),
        "unknown": Unheld("refused", _CONVERTER),
    },
    ignored={
        "layer_replication": "llama.cpp would not replicate layers",
        "use_bdlora": "llama.cpp would take it for plain LoRA",
        "use_qalora": "llama.cpp would take it for plain LoRA",
    },
    scale="tensor",
    whole_experts=True,
)  # fmt: skip

# peft/utils/save_and_load.py: set_peft_model_state_dict · peft/tuners/tuners_utils.py: check_target_module_exists ·
# peft/utils/other.py: get_pattern_key, AuxiliaryTrainingWrapper · peft/tuners/lora: config.py, model.py, layer.py
_PEFT = Server(
    name="peft",
    title="PEFT",
    version="0.21.2",
    files=("adapter_model.safetensors", "adapter_model.bin"),
    required=("peft_type",),
    unheld={"unknown": Unheld("wrong", "PEFT drops keys that it does not know without a word")},
    prefix="needed",
)

SERVERS: Mapping[str, Server] = {server.name: server for server in (_PEFT, _VLLM, _SGLANG, _LLAMACPP)}
"""Every server, by the name that ``--for`` takes."""

EXPERT = re.compile(r"^(?P<stem>.*\bexperts)\.(?P<index>[0-9]{1,4})\.(?P<leaf>[^.]+)$")
"""A module of one expert."""
_MOST_EXPERTS = 1024
"""No model has more experts a layer; a stranger's number must not fill the memory."""
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_NOT_SERVED_ALIKE = ("embedding", "head", "experts")


def server_named(name: str) -> Server:
    """Find a server.

    Raises:
        UsageError: no server is called so.
    """
    if name not in SERVERS:
        raise UsageError(f"no server {name!r}; there are {', '.join(SERVERS)}")
    return SERVERS[name]


def holds(server: str, kind: str, module: str = "") -> str | None:
    """Say why a server cannot hold a kind of tensor; ``None`` where it can, always and in every model.

    What a server takes only on a condition is not held: an adapter that is *written for* it must load without one.

    Args:
        server: its name.
        kind: one of :data:`surgery.formats.kinds.KINDS`.
        module: the module it belongs to, where that matters too.

    >>> holds("vllm", "bias")
    'its key parser knows lora_A, lora_B, lora_embedding_A and lora_embedding_B only'
    >>> holds("peft", "bias") is None
    True
    >>> holds("sglang", "linear", "model.layers.0.mlp.gate")
    'SGLang has no LoRA on modules called gate'
    """
    found = server_named(server)
    if kind in found.unheld:
        return found.unheld[kind].why
    if server != "peft" and kind == "class_head":
        return "it is no linear weight, and loads in classification models only"
    if server != "peft" and kind in _NOT_SERVED_ALIKE:
        return "not every model takes it"
    return unserved(found, module) if module and kind in ("linear", "expert", "conv1d") else None


def unserved(server: Server, module: str) -> str | None:
    """Say why a server puts no LoRA on a linear module; ``None`` where it does."""
    leaf = module.rpartition(".")[2]
    if server.modules is not None and leaf not in server.modules:
        return f"{server.title} has no LoRA on modules called {leaf}"
    if server.layer and leaf not in ("embed_tokens", "lm_head") and not re.search(server.layer, f"{module}."):
        return f"{server.title} skips tensors outside of 'layers.N'"
    return None


def missing_partners(server: str, modules: Collection[str], others: Collection[str] = ()) -> list[str]:
    """Name the modules that need factors, of zeros at least, before a server takes those of ``modules``.

    SGLang stacks q, k and v, and gate and up, and cannot without q and v, or gate. vLLM and llama.cpp stack the experts
    of a layer, and cannot without all of them.

    Args:
        server: its name.
        modules: the modules that have factors.
        others: all modules of the model; without them, as many experts are taken to exist as are seen anywhere.

    Returns:
        Names in order, each once, none of them in ``modules``.

    >>> missing_partners("sglang", ["model.layers.0.self_attn.q_proj"])
    ['model.layers.0.self_attn.v_proj']
    >>> missing_partners("vllm", ["h.0.experts.0.w1", "h.0.experts.0.w2"])
    ['h.0.experts.0.w3']
    """
    found = server_named(server)
    wanted: set[str] = set()
    for module in modules:
        stem, dot, leaf = module.rpartition(".")
        wanted.update(f"{stem}{dot}{partner}" for partner in found.needs.get(leaf, ()))
    if found.whole_experts:
        wanted.update(_whole_experts(modules, others))
    return sorted(name for name in wanted if name not in modules and (not others or name in others))


def _whole_experts(modules: Iterable[str], others: Iterable[str]) -> Iterable[str]:
    """Name all experts' modules of the layers that have one."""
    seen = [match for module in modules if (match := EXPERT.match(module))]
    known = [match for module in others if (match := EXPERT.match(module))] or seen
    count = min(1 + max((int(match["index"]) for match in known), default=-1), _MOST_EXPERTS)
    for stem, leaf in {(match["stem"], match["leaf"]) for match in seen}:
        leaves = next((group for group in _PROJECTIONS if leaf in group), (leaf,))
        for index in range(count):
            yield from (f"{stem}.{index}.{one}" for one in leaves)


def one_rank(ranks: Iterable[int], server: str) -> int:
    """Choose the rank that all modules are padded to with zeros: the largest of them, which is exact.

    Raises:
        MismatchError: it is more than the server can be started with.

    >>> one_rank([3, 24, 16], "vllm"), start_with("vllm", 24)
    (24, '--max-lora-rank 32')
    """
    rank, found = max(ranks), server_named(server)
    if found.max_ranks and rank > found.max_ranks[-1]:
        raise MismatchError(
            f"rank {rank} is more than {found.max_ranks[-1]}, the most that {found.title} takes",
            mend=f"--max-rank {found.max_ranks[-1]}",
        )
    return rank


def start_with(server: str, rank: int) -> str | None:
    """Say which option a server must be started with to load an adapter of ``rank``; ``None`` where none is needed.

    >>> start_with("vllm", 16) is None, start_with("vllm", 300)
    (True, '--max-lora-rank 320')
    """
    found = server_named(server)
    if found.default_max_rank is None or rank <= found.default_max_rank:
        return None
    fitting = next((value for value in found.max_ranks if value >= rank), None)
    return None if fitting is None else f"--max-lora-rank {fitting}"
