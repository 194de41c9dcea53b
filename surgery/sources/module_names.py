"""Names in memory: what transformers calls the weights of a checkpoint once they are loaded.

For some architectures transformers 5 renames tensors while it loads them: a ViT's
``vit.encoder.layer.0.attention.attention.query.weight`` becomes ``vit.layers.0.attention.q_proj.weight``. Surgery works
with the names on disk; PEFT names modules in memory. :func:`module_names` brings the two together by asking
transformers itself, and is the only place that imports it. No table of architectures may enter here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

from surgery.errors import MismatchError

_MEND = "pip install 'checkpoint-surgery[hf]'"

# Settings that name code, kernels or other models to fetch, or that only matter to a model that runs. A key with a
# leading underscore is transformers' own bookkeeping, `_attn_implementation` (which may name a kernel) among it.
_IGNORED = (
    "auto_map", "attn_implementation", "experts_implementation", "fusion_config", "gradient_checkpointing",
    "kernel_config", "name_or_path", "quantization_config",
)  # fmt: skip
_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
_SPARE_LAYERS = 1000
"""A configuration may ask for this many layers more than there are tensors, lest a stranger's number fill the memory."""

_LOCK = threading.Lock()


def available() -> bool:
    """Say whether transformers is installed, without importing it; its version is checked by :func:`module_names`."""
    return importlib.util.find_spec("transformers") is not None


def module_names(config: Mapping[str, Any], on_disk: Collection[str]) -> dict[str, str]:
    """Say what transformers calls each tensor of a checkpoint in memory.

    The model is built without values (on torch's meta device), from transformers' own classes only: ``auto_map`` and
    everything else that names code or other models is ignored, and nothing is fetched. Meanwhile the process is
    offline to ``huggingface_hub``, warnings are off, and other calls wait.

    Args:
        config: ``config.json``; its ``model_type`` and first entry of ``architectures`` decide.
        on_disk: names of all tensors of the checkpoint.

    Returns:
        Name on disk → name in memory, also where the two are equal. Tensors that are fused, split or transposed in
        memory are left out, as are those that the model does not have and those that two names on disk stand for.

    Raises:
        MismatchError: transformers 5 is not installed, or does not know the model.
    """
    document = dict(config)
    model_type = document.pop("model_type", None)
    if not isinstance(model_type, str):
        raise MismatchError("has no model_type, so its modules' names are not known", file="config.json")
    transformers, conversion, loading = _libraries()
    with _LOCK, _offline_and_quiet(transformers):
        model = _build(transformers, model_type, _harmless(document, len(on_disk) + _SPARE_LAYERS))
        # The lines below do what transformers' loader does (convert_and_load_state_dict_in_model), on names alone. The
        # order matters: some renamings depend on what was seen before.
        transforms = conversion.get_model_conversion_mapping(model)
        renamings = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
        known, prefix = model.state_dict(), model.base_model_prefix
        found: dict[str, str] = {}
        for name in sorted(on_disk, key=loading.dot_natural_key):
            renamed, converter = loading.rename_source_key(name, renamings, converters, prefix, known)
            if renamed not in known and name in known:
                renamed, converter = loading.rename_source_key(name, [], [], prefix, known)
            if renamed in known and converter is None:
                found[name] = renamed
    owners: dict[str, list[str]] = {}
    for name, renamed in found.items():
        owners.setdefault(renamed, []).append(name)
    return {name: renamed for name, renamed in found.items() if len(owners[renamed]) == 1}


def _libraries() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Import transformers: by name, since it is heavy, optional, and too large to be type-checked along."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers = importlib.import_module("transformers")
            conversion = importlib.import_module("transformers.conversion_mapping")
            loading = importlib.import_module("transformers.core_model_loading")
    except ImportError as error:
        raise MismatchError(f"transformers 5 is needed to name modules: {error}", mend=_MEND) from None
    return transformers, conversion, loading


@contextlib.contextmanager
def _offline_and_quiet(transformers: ModuleType) -> Iterator[None]:
    """Refuse every request to the Hub, and silence advice about running the model, which nobody is going to do."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    offline, verbosity = constants.HF_HUB_OFFLINE, transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            constants.HF_HUB_OFFLINE = True
            transformers.logging.set_verbosity(transformers.logging.CRITICAL)
            yield
        finally:
            constants.HF_HUB_OFFLINE = offline
            transformers.logging.set_verbosity(verbosity)


def _harmless(value: Any, limit: int) -> Any:
    """Copy a configuration without :data:`_IGNORED` keys, at any depth.

    Raises:
        MismatchError: it asks for more than ``limit`` layers.
    """
    if isinstance(value, list | tuple):
        return [_harmless(item, limit) for item in value]
    if not isinstance(value, Mapping):
        return value
    for key in _DEPTHS:
        if isinstance(value.get(key), int | float) and value[key] > limit:
            raise MismatchError(f"{key} is {value[key]}, far more than the checkpoint has tensors", file="config.json")
    return {
        key: _harmless(item, limit)
        for key, item in value.items()
        if key not in _IGNORED and not (isinstance(key, str) and key.startswith("_"))
    }


def _build(transformers: ModuleType, model_type: str, document: dict[str, Any]) -> Any:
    """Build the model that a configuration describes, without values."""
    import torch

    invalid = importlib.import_module("huggingface_hub.errors").StrictDataclassError
    try:
        try:
            config_class = transformers.CONFIG_MAPPING[model_type]
        except KeyError:
            raise MismatchError(
                f"transformers {transformers.__version__} does not know model_type {model_type!r}", file="config.json"
            ) from None
        config = config_class.from_dict(document)
        model_class = _model_class(transformers, config, document.get("architectures"))
        with torch.device("meta"):
            return model_class(config)
    # What the constructors of some 500 models raise for a configuration that makes no sense to them, or for an
    # optional library that is not there.
    except (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
        ValueError, invalid,
    ) as error:  # fmt: skip
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise MismatchError(f"transformers cannot build this {model_type}: {why}", file="config.json") from None


def _model_class(transformers: ModuleType, config: Any, architectures: Any) -> Any:
    """Find the class that a configuration names, or the plain model where it names none.

    Raises:
        MismatchError: transformers has no such class (other people's code may name its modules in any way), or no
            plain model.
    """
    if not architectures:
        plain: Any = transformers.MODEL_MAPPING.get(type(config), None)
        if plain is None:
            raise MismatchError("names no architecture, and there is no plain model of its kind", file="config.json")
        return plain[0] if isinstance(plain, list | tuple) else plain
    name = architectures[0] if isinstance(architectures, list) else architectures
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise MismatchError(f"transformers {transformers.__version__} has no architecture {name!r}", file="config.json")
    return found
