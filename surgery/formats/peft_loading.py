"""What PEFT makes of an adapter: which modules it puts LoRA on, which keys it drops, what it refuses.

PEFT builds wrappers from the configuration, then loads the file into them without a word about keys that found no
place. So an adapter can load and do nothing; these checks say when. Read from, and tested against, PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from surgery.errors import UnsupportedError
from surgery.formats import peft
from surgery.formats.servers import Problem, Server
from surgery.names import module_of
from surgery.report import join_shown
from surgery.tensor import TensorSpec

METHODS = frozenset((
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT",
    "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS",
    "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA",
    "P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA",
    "VBLORA", "VERA", "WAVEFT", "XLORA",
))  # fmt: skip
"""Values of ``peft_type`` that PEFT 0.21 knows."""
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_BIASES = ("none", "all", "lora_only")


def method_problems(server: Server, document: Mapping[str, Any]) -> list[Problem]:
    """Say what speaks against an adapter that is no LoRA; empty for a LoRA.

    Servers load LoRA only. PEFT loads its other methods, whose keys are not checked here.
    """
    kind = document.get("peft_type")
    if kind == "LORA":
        return []
    if "peft_type" not in document:
        dialect = "AdapterHub's" if "config" in document else "MLX's" if "fine_tune_type" in document else "not PEFT's"
        return [Problem("refused", "peft_type", f"is not there: the configuration is {dialect}", "export it to PEFT")]
    if not isinstance(kind, str) or kind not in METHODS:
        return [Problem("refused", "peft_type", f"is {kind!r:.40}, which PEFT 0.21 does not know", None)]
    if server.name == "peft":
        return [Problem("note", "peft_type", f"is {kind}: PEFT loads it, surgery checks LoRA adapters only", None)]
    return [Problem("refused", "peft_type", f"is {kind}, and {server.title} loads LoRA only", None)]


def names(document: Mapping[str, Any], key: str) -> list[str]:
    """Take out a list of names; empty where there is none."""
    return _strings(document.get(key))


def is_target(document: Mapping[str, Any], module: str) -> bool:
    """Say whether PEFT puts LoRA on a linear module.

    Args:
        document: ``adapter_config.json``; its ``target_modules``, ``exclude_modules``, ``modules_to_save``,
            ``layers_to_transform`` and ``layers_pattern`` decide.
        module: the module's name, without ``base_model.model.``.

    Raises:
        FormatError: a field is no regular expression, or could take for ever to match.

    >>> is_target({"target_modules": ["q_proj"]}, "layers.0.q_proj")
    True
    >>> is_target({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "model.layers.0.q_proj")
    False
    """
    excluded = document.get("exclude_modules")
    if excluded and _named(excluded, module, "exclude_modules"):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in names(document, "modules_to_save")):
        return False
    targets = document.get("target_modules")
    if targets is None or targets == "all-linear":
        return True  # PEFT chooses by the model's type; what it chose is what it saved
    if not _named(targets, module, "target_modules"):
        return False
    return isinstance(targets, str) or module in targets or _in_layers(document, module)


def _named(entries: Any, module: str, key: str) -> bool:
    if isinstance(entries, str):
        peft.check_expression(entries, key)
        return re.fullmatch(entries, module) is not None
    return any(module == entry or module.endswith(f".{entry}") for entry in _strings(entries))


def _in_layers(document: Mapping[str, Any], module: str) -> bool:
    layers = document.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = document.get("layers_pattern")
    if isinstance(patterns, str) and patterns:
        patterns = [patterns]
    expressions = [rf"(?:^|.*?\.){pattern}\.([0-9]{1, 9})\." for pattern in _strings(patterns)] or [
        r".*?\.[^.]*\.([0-9]{1,9})\."
    ]
    for expression in expressions:
        peft.check_expression(expression.removeprefix(r"(?:^|.*?\.)"), "layers_pattern")
    found = next((match for expression in expressions if (match := re.match(expression, module))), None)
    return found is not None and int(found[1]) in (layers if isinstance(layers, list) else [layers])


def _strings(value: Any) -> list[str]:
    return [item for item in value if type(item) is str and item] if isinstance(value, list) else []


def problems(
    document: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    adapted: Collection[str],
    base: Mapping[str, TensorSpec],
) -> list[Problem]:
    """Say what PEFT would refuse, drop, or leave at its initial value.

    Args:
        document: ``adapter_config.json`` of a LoRA.
        specs: the adapter's tensors by key.
        adapted: modules that have factors.
        base: the base's tensors; may be empty.
    """
    return [
        *_fields(document), *_prefix(specs), *_targets(document, adapted, base), *_patterns(document, adapted),
        *_declared(document, specs, adapted), *_saved(document, specs, base), *_full(specs, adapted, base),
    ]  # fmt: skip


def _fields(document: Mapping[str, Any]) -> Iterable[Problem]:
    """Fields of the configuration itself."""
    bias, task = document.get("bias", "none"), document.get("task_type")
    if bias not in _BIASES:
        yield Problem("refused", "bias", f"is {bias!r:.40}, not one of {', '.join(_BIASES)}", None)
    if task is not None and task not in _TASKS:
        yield Problem("refused", "task_type", f"is {task!r:.40}, not one of {', '.join(_TASKS)}", "set it to null")
    for name in ("rank_pattern", "alpha_pattern"):
        if name in document and document[name] is None:
            yield Problem("refused", name, "is null, where PEFT needs an object", "write {}")
    for name in ("r", "lora_alpha"):
        if name not in document:
            yield Problem("wrong", name, "is not there, and PEFT takes 8", f"add {name}")
    unknown = [key for key, value in document.items() if value and key not in peft.HARMLESS and key not in peft.NOT_YET]
    if unknown:
        yield Problem.about("note", unknown, "is no field that surgery knows; it may change the result", None)


def _prefix(specs: Mapping[str, TensorSpec]) -> Iterable[Problem]:
    bare = sorted(key for key in specs if not key.startswith(peft.PREFIX))
    if bare:
        yield Problem.about("wrong", bare, f"does not begin with {peft.PREFIX}, so PEFT drops it",
                      f"put {peft.PREFIX} before every key")  # fmt: skip


def _targets(
    document: Mapping[str, Any], adapted: Collection[str], base: Mapping[str, TensorSpec]
) -> Iterable[Problem]:
    """``target_modules`` against the file's modules and the base's."""
    targets = document.get("target_modules")
    if targets is not None and not isinstance(targets, str) and not (
        isinstance(targets, list) and all(type(item) is str for item in targets)
    ):  # fmt: skip
        yield Problem("refused", "target_modules", "is neither a string nor a list of names", None)
        return
    if document.get("target_parameters"):
        return
    if targets in ([], ""):
        yield Problem("refused", "target_modules", "is empty: PEFT loads no adapter that targets nothing", None)
        return
    dropped = sorted(module for module in adapted if not is_target(document, module))
    if dropped:
        none = len(dropped) == len(adapted)
        mend = f"set target_modules to {peft.target_modules(sorted(adapted), map(module_of, base))!r:.200}"
        yield Problem.about(
            "refused" if none and not _any_target(document, base) else "wrong", dropped,
            "target_modules does not match it, so PEFT drops its factors", mend,
        )  # fmt: skip
    if base and targets is not None and targets != "all-linear":
        matrices = {module_of(name) for name, spec in base.items() if name.endswith(".weight") and len(spec.shape) > 1}
        empty = sorted(module for module in matrices - set(adapted) if is_target(document, module))
        if empty:
            yield Problem.about("wrong", empty, "target_modules matches it, and no tensor is for it",
                          "the adapter is incomplete, or target_modules says too much")  # fmt: skip


def _any_target(document: Mapping[str, Any], base: Mapping[str, TensorSpec]) -> bool:
    return any(is_target(document, module_of(name)) for name in base if name.endswith(".weight"))


def _patterns(document: Mapping[str, Any], adapted: Collection[str]) -> Iterable[Problem]:
    """Patterns whose order decides: PEFT sorts them when it saves, and the first that matches wins."""
    for name in ("rank_pattern", "alpha_pattern"):
        found = document.get(name)
        if not isinstance(found, dict):
            continue
        for module in adapted:
            matching = [key for key in found if re.match(rf"(.*\.)?({key})$", module)]
            if len({found[key] for key in matching}) > 1 and matching[0] != min(matching):
                yield Problem(
                    "note", name, f"{matching[0]!r} and {min(matching)!r} both match {module}; PEFT sorts them when it"
                    " saves, and then the other wins", "write one full module name a key",
                )  # fmt: skip
                break
    ranks, alphas = document.get("rank_pattern") or {}, document.get("alpha_pattern") or {}
    if isinstance(ranks, dict) and isinstance(alphas, dict):
        alone = [key for key in ranks if key not in alphas]
        if alone:
            yield Problem("note", "rank_pattern", f"{join_shown(alone)} has no alpha_pattern: its scale is lora_alpha over"
                          " its own rank", "give it an alpha_pattern if that is not what was trained")  # fmt: skip


def _declared(
    document: Mapping[str, Any], specs: Mapping[str, TensorSpec], adapted: Collection[str]
) -> Iterable[Problem]:
    """Tensors that need a field of the configuration, and fields that need tensors."""
    kinds: dict[str, dict[str, str]] = {"lora_bias": {}, "magnitude": {}, "rows": {}}
    for key in sorted(specs):
        try:
            part = peft.parse_key(key)
        except UnsupportedError:
            continue
        if part.kind in kinds:
            kinds[part.kind][part.module] = key
    for field, kind, what in (("lora_bias", "lora_bias", "lora_B.bias"), ("use_dora", "magnitude", "DoRA magnitude")):
        declared, found = bool(document.get(field)), kinds[kind]
        if found and not declared:
            yield Problem.about("wrong", list(found.values()), f"{field} is not set, so PEFT drops it",
                          f"set {field} to true")  # fmt: skip
        elif declared and (lost := sorted(set(adapted) - set(found))):
            yield Problem.about("wrong", lost, f"{field} is set, and its {what} is not in the adapter",
                          "the adapter is incomplete")  # fmt: skip
    yield from _rows(document, {module: specs[key] for module, key in kinds["rows"].items()})


def _rows(document: Mapping[str, Any], found: Mapping[str, TensorSpec]) -> Iterable[Problem]:
    declared = document.get("trainable_token_indices")
    if not declared:
        if found:
            yield Problem.about("wrong", sorted(found), "trainable_token_indices does not say which rows these"
                          " are, so PEFT drops them", None)  # fmt: skip
        return
    entries = declared if isinstance(declared, dict) else {"": declared}
    for name, rows in entries.items():
        if not isinstance(rows, list):
            yield Problem("refused", "trainable_token_indices", "does not list row numbers", None)
            continue
        owned = [spec for module, spec in found.items() if not name or module == name or module.endswith(f".{name}")]
        label = f"trainable_token_indices of {name}" if name else "trainable_token_indices"
        if not owned:
            yield Problem("refused", label, "has no tensor", "the adapter is incomplete")
        elif owned[0].shape[:1] != (len(rows),):
            yield Problem("refused", label, f"names {len(rows)} rows, the tensor is {owned[0].describe()}", None)


def _saved(
    document: Mapping[str, Any], specs: Mapping[str, TensorSpec], base: Mapping[str, TensorSpec]
) -> Iterable[Problem]:
    """``modules_to_save``: PEFT wraps every module whose name *ends* with an entry, and needs all tensors of each."""
    value = document.get("modules_to_save")
    if value is None:
        return
    if not isinstance(value, list) or not all(type(item) is str for item in value):
        yield Problem("refused", "modules_to_save", "is no list of names", None)
        return
    stored = {key.removeprefix(peft.PREFIX) for key in specs}
    heads = peft.TASK_HEADS.get(document.get("task_type") or "", ())
    any_head = any(head in name.split(".") for head in heads for name in stored)
    for entry in value:
        if base:
            wanted = {name for name in base if _is_saved(entry, name)}
            lost = sorted(wanted - stored)
        else:
            inside = any(module_of(name).endswith(entry) or f"{entry}." in name for name in stored)
            lost = [] if inside or (entry in heads and any_head) else [f"{entry}.weight"]
        if lost:
            yield Problem("refused", "modules_to_save", f"{entry!r} wraps {join_shown(lost)}, which is not in the adapter",
                          "write full module names, and remove what has no tensors")  # fmt: skip


def _is_saved(entry: str, name: str) -> bool:
    """Say whether a parameter lies in a module that an entry of ``modules_to_save`` wraps."""
    parts = name.split(".")[:-1]
    return any(".".join(parts[:depth]).endswith(entry) for depth in range(1, len(parts) + 1))


def _full(
    specs: Mapping[str, TensorSpec],
    adapted: Collection[str],
    base: Mapping[str, TensorSpec],
) -> Iterable[Problem]:
    """Tensors that replace the base's: PEFT calls those of adapted modules ``base_layer``, and only those."""
    wrong, copies, lost, misfit = [], [], [], []
    rows = {peft.parse_key(key).module for key in specs if key.endswith("trainable_tokens_delta")}
    for key in sorted(specs):
        try:
            part = peft.parse_key(key)
        except UnsupportedError:
            continue
        if part.kind != "full":
            continue
        name = f"{part.module}.{part.parameter}"
        inner = f".base_layer.{part.parameter}" in key
        if inner and part.parameter == "weight" and part.module in adapted:
            copies.append(key)
        elif inner != (part.module in adapted) and part.module not in rows:
            wrong.append(key)
        elif base and name not in base and not {"modules_to_save", "original_module"} & set(name.split(".")):
            lost.append(key)
        elif name in base and base[name].shape != specs[key].shape:
            misfit.append(key)
    for level, keys, why, mend in (
        ("wrong", wrong, "no module is called so once PEFT has wrapped the model, so PEFT drops it",
         "base_layer stands in the names of modules that have factors, and of no others"),
        ("note", copies, "overwrites the base's weight with the copy in the adapter", "remove it: the base has it"),
        ("wrong", lost, "the base has no such tensor, so PEFT drops it", "is this its base?"),
        ("refused", misfit, "its shape is not the base's", "is this its base?"),
    ):  # fmt: skip
        if keys:
            yield Problem.about(level, keys, why, mend)  # type: ignore[arg-type]
