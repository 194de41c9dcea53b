"""The PEFT adapter format: ``adapter_config.json`` and the names of tensors in ``adapter_model.safetensors``.

Reading turns a configuration into a :class:`LoraConfig` and keys into :class:`Part` records, which say what each
tensor is and which module it belongs to. Writing composes both from parts. Only names, shapes and numbers are known
here; what a part does to a weight is told in :mod:`surgery.delta`.

Key names and rules were read from, and are tested against, PEFT 0.21.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import FormatError, MismatchError, UnsupportedError

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
STEM = "adapter_model"

# Keys of a LoRA configuration that this reader takes into account, or that cannot change what a merge does.
HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "use_dora", "lora_bias",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "target_parameters", "surgery",
}  # fmt: skip
MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
NOT_YET = {
    "alora_invocation_tokens": "activated LoRA acts only on some tokens, so it cannot be merged",
    "layer_replication": "its layers share base weights, so it cannot be merged",
    "use_qalora": "QALoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "kasa_config": "KaSA is not supported",
    "megatron_config": "Megatron's parallel LoRA must be exported to plain PEFT first",
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What a merge needs to know of ``adapter_config.json``."""

    r: int
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    """Bare parameters (fused experts) that carry LoRA, by full name or dotted ending."""
    base_name: str | None = None

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of ``B @ A`` for a module: ``alpha / r``, or ``alpha / √r`` with rsLoRA.

        Args:
            module: the module's name without ``base_model.model.``.
            rank: the rank that its tensors have.

        Raises:
            MismatchError: the tensors' rank is not the configuration's.
        """
        declared = self.rank(module)
        if rank != declared:
            raise MismatchError(
                f"its tensors have rank {rank}, {CONFIG} says {declared:g}",
                tensor=module,
                mend="r or rank_pattern is wrong, and with it the scale",
            )
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, module: str) -> int:
        """Return the rank that the configuration gives a module."""
        return int(_first_match(self.rank_pattern, module, self.r))


def _first_match(patterns: Mapping[str, float], module: str, default: float) -> float:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def parse_config(document: Mapping[str, Any]) -> LoraConfig:
    """Check a configuration and take out what a merge needs.

    Raises:
        FormatError: a field has the wrong type.
        MismatchError: the scale cannot be known, or a field may change the result in a way not known here.
        UnsupportedError: another method than LoRA, or a variant that cannot be merged.
    """
    if "peft_type" not in document:
        dialect = "AdapterHub's" if "config" in document else "MLX's" if "fine_tune_type" in document else "not PEFT's"
        raise UnsupportedError(f"the configuration has no peft_type: it is {dialect}", mend="export it to PEFT first")
    kind = document["peft_type"]
    if kind != "LORA":
        raise UnsupportedError(
            f"peft_type {kind!r} cannot be merged yet, only LORA (with DoRA and rsLoRA), IA3 and LN_TUNING"
        )
    for name, why in NOT_YET.items():
        if document.get(name):
            raise UnsupportedError(f"{name} is set: {why}")
    start = document.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(MUTATING_INITS):
        raise UnsupportedError(
            f"init_lora_weights is {start!r}: it belongs to a base that PEFT changes at load",
            mend="save it with path_initial_model_for_weight_conversion",
        )
    unknown = [key for key, value in document.items() if key not in HARMLESS and key not in NOT_YET and value]
    if unknown:
        raise MismatchError(
            f"{CONFIG} sets {unknown[0]!r}, which may change the result", mend="remove it if it does not"
        )
    _names(document, "modules_to_save")
    _names(document, "target_parameters")
    if isinstance(document.get("target_modules"), str):
        check_expression(document["target_modules"], "target_modules")
    else:
        _names(document, "target_modules")
    return LoraConfig(
        r=_integer(document, "r"),
        alpha=_number(document, "lora_alpha"),
        use_rslora=_flag(document, "use_rslora"),
        use_dora=_flag(document, "use_dora"),
        fan_in_fan_out=_flag(document, "fan_in_fan_out"),
        rank_pattern=numbers(document, "rank_pattern", whole=True),
        alpha_pattern=numbers(document, "alpha_pattern", whole=False),
        token_indices=_token_indices(document.get("trainable_token_indices")),
        target_parameters=tuple(document.get("target_parameters") or ()),
        base_name=document.get("base_model_name_or_path"),
    )


LARGEST = 10**9
"""Ranks and scales beyond this are mistakes, and beyond float64 they are not even numbers."""


def _integer(document: Mapping[str, Any], key: str) -> int:
    value = document.get(key)
    if type(value) is not int or value < 1:
        raise MismatchError(f"{CONFIG} gives {key} = {value!r:.40}, a rank of 1 or more is needed")
    if value > LARGEST:
        raise FormatError(f"{CONFIG} gives {key} a value of {len(str(value))} digits")
    return value


def _number(document: Mapping[str, Any], key: str) -> float:
    value = document.get(key)
    if value is None:
        raise MismatchError(f"{CONFIG} gives no {key}, so the scale is not known")
    if not is_number(value):
        raise MismatchError(f"{CONFIG} gives {key} = {value!r:.40}, so the scale is not known")
    if abs(value) > LARGEST:
        raise FormatError(f"{CONFIG} gives {key} = {str(value)[:20]}…, beyond {LARGEST:,}")
    return float(value)


def is_number(value: Any) -> bool:
    """Say whether a field holds a finite number."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _flag(document: Mapping[str, Any], key: str) -> bool:
    value = document.get(key, False)
    if type(value) is not bool and value is not None:
        raise FormatError(f"{CONFIG} gives {key} = {value!r:.40}, true or false is needed")
    return bool(value)


def numbers(document: Mapping[str, Any], key: str, *, whole: bool) -> dict[str, Any]:
    """Take out ``rank_pattern`` or ``alpha_pattern``.

    Raises:
        FormatError: it does not map regular expressions to numbers.
    """
    value = document.get(key) or {}
    if type(value) is not dict:
        raise FormatError(f"{CONFIG} gives a {key} that does not map names to numbers")
    for pattern, number in value.items():
        if not is_number(number) or (whole and type(number) is not int) or not 0 < number <= LARGEST:
            raise FormatError(f"{CONFIG} gives {pattern!r:.60} the value {str(number)[:20]} in {key}")
        check_expression(pattern, key)
    return value


def check_expression(pattern: str, key: str) -> None:
    """Refuse what is no regular expression, or could take exponential time to match.

    Raises:
        FormatError: either.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"{CONFIG} has {pattern!r:.60} in {key}, not a regular expression: {error}") from None
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+]|,\}", pattern)) > 4:
        raise FormatError(f"{CONFIG} has {pattern!r:.60} in {key}, which could take for ever to match")


def _names(document: Mapping[str, Any], key: str) -> None:
    value = document.get(key)
    if value is not None and not (isinstance(value, list) and all(type(item) is str for item in value)):
        raise FormatError(f"{CONFIG} gives a {key} that is no list of names")


def _token_indices(value: Any) -> dict[str, tuple[int, ...]]:
    """Map embedding names (``""`` for "the model's input embedding") to row numbers."""
    if not value:
        return {}
    named = value if isinstance(value, dict) else {"": value}
    result = {}
    for name, indices in named.items():
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise FormatError(f"{CONFIG} has trainable_token_indices that are not row numbers")
        if len(set(indices)) != len(indices):
            raise FormatError(f"{CONFIG} names a row twice in trainable_token_indices")
        result[name] = tuple(indices)
    return result


_PART_SUFFIXES = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_B.bias": "lora_bias",
    ".lora_embedding_A": "embedding_a", ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows", ".trainable_tokens_delta": "rows",
}  # fmt: skip
_FULL = re.compile(r"(?:\.base_layer)?\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an adapter."""

    key: str
    kind: str
    """``a``, ``b``, ``embedding_a``, ``embedding_b``, ``magnitude``, ``lora_bias``, ``rows`` or ``full``."""
    module: str
    """The module it belongs to, without prefix."""
    parameter: str = "weight"
    """Which of the module's parameters it changes."""


def parse_key(key: str) -> Part:
    """Say what a tensor of an adapter is.

    Raises:
        UnsupportedError: nothing that LoRA saves is called so.

    >>> parse_key("base_model.model.encoder.layer.0.attention.self.query.lora_A.weight").module
    'encoder.layer.0.attention.self.query'
    """
    name = key.removeprefix(PREFIX)
    for suffix, kind in _PART_SUFFIXES.items():
        if name.endswith(suffix):
            return Part(key, kind, name.removesuffix(suffix), "bias" if kind == "lora_bias" else "weight")
    full = _FULL.search(name)
    if full and "lora_" not in name:
        return Part(key, "full", name[: full.start()], full[1])
    raise UnsupportedError("is no tensor that a LoRA adapter has", tensor=key)


@dataclass
class AdapterParts:
    """The tensors of an adapter, collected by what they do."""

    low_rank: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module → part kind → key."""
    full: dict[str, str] = field(default_factory=dict)
    """Parameter name → key of its full replacement."""
    rows: dict[str, str] = field(default_factory=dict)
    """Module → key of its replaced rows."""


def collect(keys: Iterable[str]) -> AdapterParts:
    """Group an adapter's tensors.

    Raises:
        MismatchError: an A without its B, the other way round, or two tensors with one role.
        UnsupportedError: a tensor that LoRA does not have.
    """
    parts = AdapterParts()
    wrapped: dict[str, str] = {}
    for part in map(parse_key, keys):
        owner, _, wrapper = part.module.rpartition(".")
        if part.kind == "full" and wrapper in ("modules_to_save", "original_module"):
            # With bias="all" PEFT saves the inside of its wrappers too: the trained copy once more, and the original.
            if wrapper == "modules_to_save":
                wrapped[f"{owner}.{part.parameter}"] = part.key
            continue
        if part.kind == "full":
            home, name = parts.full, f"{part.module}.{part.parameter}"
        elif part.kind == "rows":
            home, name = parts.rows, part.module
        else:
            home, name = parts.low_rank.setdefault(part.module, {}), part.kind
        if name in home:
            raise MismatchError(f"has the same role as {home[name]!r}", tensor=part.key)
        home[name] = part.key
    parts.full = {**wrapped, **parts.full}
    for module, roles in parts.low_rank.items():
        for first, second in (("a", "b"), ("embedding_a", "embedding_b")):
            if (first in roles) != (second in roles):
                present = roles.get(first) or roles[second]
                raise MismatchError(
                    "its partner is not in the adapter", tensor=present, mend="the adapter is incomplete"
                )
        if not {"a", "embedding_a"} & roles.keys():
            raise MismatchError("has a DoRA magnitude or LoRA bias but no A and B", tensor=module)
    return parts


def parameter_order(name: str) -> tuple[bool, str]:
    """Sort key of bare parameters of one module: the order in which models define them, and PEFT wraps them.

    The first is wrapped innermost: its factors are called ``base_layer.lora_A.weight`` where another one follows.

    >>> sorted(["experts.down_proj", "experts.gate_up_proj"], key=parameter_order)
    ['experts.gate_up_proj', 'experts.down_proj']
    """
    return name.endswith("down_proj"), name


def bare_parameters(config: LoraConfig, modules: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Find the bare parameters that modules of an adapter stand for.

    Args:
        config: says which parameters are meant.
        modules: the adapter's modules, as :func:`collect` names them.
        names: all parameters of the base, under the adapter's spelling.

    Returns:
        Module (with its ``.base_layer`` wrappers) → parameter.

    >>> config = LoraConfig(2, 2.0, target_parameters=("experts.gate_up_proj", "experts.down_proj"))
    >>> bare_parameters(config, ["h.experts.base_layer", "h.experts"], ["h.experts.gate_up_proj", "h.experts.down_proj"])
    {'h.experts.base_layer': 'h.experts.gate_up_proj', 'h.experts': 'h.experts.down_proj'}
    """
    if not config.target_parameters:
        return {}
    owners: dict[str, list[str]] = {}
    for name in names:
        if any(name == target or name.endswith(f".{target}") for target in config.target_parameters):
            owners.setdefault(name.rpartition(".")[0], []).append(name)
    found = {}
    for module in modules:
        owner = module
        while owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
        inner = module.count(".base_layer")
        parameters = sorted(owners.get(owner, ()), key=parameter_order)
        if inner < len(parameters):
            found[module] = parameters[len(parameters) - 1 - inner]
    return found


def token_rows_key(module: str) -> str:
    """Name the tensor of an embedding's trained rows."""
    return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"


def task_type(config: Mapping[str, Any] | None) -> str | None:
    """Name the PEFT task of a model's ``config.json``: the wrapper class that PEFT loads it in.

    >>> task_type({"architectures": ["BertModel"]}), task_type({"architectures": ["Qwen2ForCausalLM"]})
    ('FEATURE_EXTRACTION', 'CAUSAL_LM')
    """
    architectures = (config or {}).get("architectures") or []
    if not isinstance(architectures, list) or not architectures or type(architectures[0]) is not str:
        return None
    known = {
        "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    }  # fmt: skip
    for suffix, task in known.items():
        if architectures[0].endswith(suffix):
            return task
    seen = any(key in (config or {}) for key in ("num_mel_bins", "input_feat_per_channel", "vision_config", "encoder"))
    if architectures[0].endswith("ForConditionalGeneration") and (config or {}).get("is_encoder_decoder") and not seen:
        return "SEQ_2_SEQ_LM"  # whose wrapper feeds tokens: what hears or sees is loaded by the plain one
    return "FEATURE_EXTRACTION" if architectures[0].endswith("Model") else None


def refused_modules(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Name modules that PEFT refuses to adapt in a model, whose fused kernels would pass the adapter by."""
    return ("out_proj", "conv1d") if (config or {}).get("model_type") in _MAMBAS else ()


_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def experts_transposed(config: Mapping[str, Any] | None) -> bool:
    """Say whether PEFT takes fused experts for ``(E, in, out)``: a property of the model's class, told by its type."""
    return (config or {}).get("model_type") in ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")


def has_language_head(config: Mapping[str, Any] | None) -> bool:
    """Say whether a model's architecture ends in a head over its vocabulary.

    >>> has_language_head({"architectures": ["Qwen2ForCausalLM"]}), has_language_head({"architectures": ["BertModel"]})
    (True, False)
    """
    architectures = (config or {}).get("architectures")
    names = architectures if isinstance(architectures, list) else []
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
    return any(isinstance(name, str) and name.endswith(endings) for name in names)


TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip
"""Modules that PEFT's wrapper of a task always saves whole, whatever the configuration says."""


def task_heads(task: str | None, modules: Iterable[str]) -> list[str]:
    """Find the modules of a model that the wrapper of ``task`` saves whole: they must be in the file, and not adapted.

    >>> task_heads("SEQ_CLS", ["bert.pooler.dense", "classifier.dense", "classifier.out_proj"])
    ['classifier']
    """
    found = set()
    for module in modules:
        parts = module.split(".")
        for depth, part in enumerate(parts):
            if part in TASK_HEADS.get(task or "", ()):
                found.add(".".join(parts[: depth + 1]))
                break
    return sorted(found)


def target_modules(adapted: Sequence[str], others: Iterable[str]) -> list[str]:
    """Write ``target_modules`` so that exactly ``adapted`` is meant.

    For each module the shortest dotted suffix of its name that no other module ends in. Always a list: some servers
    refuse a regular expression.

    Args:
        adapted: names of the adapted modules.
        others: names of all modules with a weight.

    >>> target_modules(["h.0.q", "h.1.q", "h.0.v"], ["h.0.q", "h.1.q", "h.0.v", "h.1.v"])
    ['h.0.v', 'q']
    """
    chosen = set(adapted)
    owners: dict[str, bool] = {}
    for module in {*chosen, *others}:
        for suffix in _suffixes(module):
            owners[suffix] = owners.get(suffix, True) and module in chosen
    # A suffix that begins with a number (``to_out.0``) says nothing to a reader.
    return sorted(
        {
            next(s for s in _suffixes(module) if s == module or (owners[s] and not s.partition(".")[0].isdigit()))
            for module in chosen
        }
    )


def _suffixes(module: str) -> list[str]:
    """List a module's dotted suffixes, shortest first."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def lora_config(
    *,
    r: int,
    targets: Sequence[str],
    parameters: Sequence[str] = (),
    ranks: Mapping[str, int],
    base_name: str | None,
    revision: str | None = None,
    task: str | None = None,
    bias: bool = False,
    modules_to_save: Sequence[str] = (),
    fan_in_fan_out: bool = False,
    token_indices: Mapping[str, Sequence[int]] | None = None,
    dora: bool = False,
) -> dict[str, Any]:
    """Compose ``adapter_config.json`` of an extracted adapter.

    ``lora_alpha == r`` everywhere, so that the scale is 1 for every reader; modules whose rank is not ``r`` stand in
    ``rank_pattern`` and, lest their scale change, in ``alpha_pattern``, under full names.
    """
    # Unescaped full paths: as a regular expression one names its module, and old readers compare literally.
    pattern = {module: rank for module, rank in sorted(ranks.items()) if rank != r}
    return {
        "alpha_pattern": pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "all" if bias else "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": r,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": dict(pattern),
        "revision": revision,
        "target_modules": list(targets),
        **({"target_parameters": list(parameters)} if parameters else {}),
        "task_type": task,
        "trainable_token_indices": {name: list(rows) for name, rows in token_indices.items()}
        if token_indices
        else None,
        "use_dora": dora,
        "use_rslora": False,
    }


def encode_config(document: Mapping[str, Any]) -> bytes:
    """Write a configuration as PEFT does: indented, keys sorted."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
