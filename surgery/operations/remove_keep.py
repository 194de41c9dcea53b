"""What ``remove`` took out, as a folder of its own: the inverse of adding it.

A state dict has a method's tensors but not its settings. What the tensors' shapes and names tell is taken from them; the
rest must be given (a LoRA's alpha) or comes from a configuration file. Either way the method is planned on the base once
more, and its tensors must be the ones that were taken out, by name and shape.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery import execute, provenance
from surgery.checkpoint import default_jobs
from surgery.errors import MismatchError, SurgeryError, UnsupportedError, UsageError
from surgery.formats import peft
from surgery.formats.wrapped import Taken
from surgery.methods.addition import Addition
from surgery.methods.model import Model
from surgery.methods.registry import find
from surgery.operations.remove import Removed, beside
from surgery.plan import NO_LIMIT
from surgery.roles import layer_of
from surgery.tensor import LazyTensor, renamed


class Kept:
    """A method's tensors with their configuration: what PEFT or AdapterHub loads.

    Args:
        tensors: by the file's keys.
        document: ``adapter_config.json``.
        removed: where they come from.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], document: Mapping[str, Any], removed: Removed) -> None:
        self.tensors = dict(tensors)
        self.document = dict(document)
        self._stem = "adapter" if "config" in document else peft.STEM
        self._removed = removed

    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Any]:
        """Write the folder, whole or not at all.

        Raises:
            OutputError: it exists.
        """
        return execute.publish(
            self.tensors, out, record=self._record, stem=self._stem, max_shard_size=NO_LIMIT, workers=default_jobs(),
            overwrite=overwrite, sources=self._removed.stored, files={peft.CONFIG: peft.encode_config(self.document)},
        )  # fmt: skip

    def _record(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        return provenance.record(
            "remove", parameters={}, inputs=[{"role": "source", "name": self._removed.label}],
            tensors=fingerprints,
        )  # fmt: skip


def keep(
    removed: Removed,
    *,
    method: str | None = None,
    adapter: str | None = None,
    document: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Kept:
    """Make an adapter of what was taken out.

    Args:
        removed: of :func:`surgery.remove`.
        method: a row of ``surgery methods``, where the tensors could be several's.
        adapter: which one, where there are several.
        document: the configuration; the one beside the checkpoint by default.
        settings: of the method, where neither tensors nor a configuration tell them: ``alpha=16``.

    Raises:
        UsageError: a setting that must be given is not, or several adapters are there.
        MismatchError: the method has other tensors than were taken out.
        UnsupportedError: no file is known for the method.
    """
    chosen = _choose(removed, adapter)
    try:
        unknown = next((taken for taken in chosen if not taken.key), None)
        if unknown:
            raise UnsupportedError(f"no file is known for {unknown.method}", tensor=unknown.name)
        tensors = {taken.key: renamed(removed.inside[taken.name], taken.key) for taken in chosen}
        document = document or beside(removed)
        if document is None:
            document = _planned(removed, chosen, tensors, method, settings)
        elif settings or method:
            raise UsageError(f"{peft.CONFIG} says the settings already", mend="drop the others")
        elif document.get("peft_type") == "LORA":
            _check_ranks(document, tensors)
    except SurgeryError as error:
        raise error.at(file=removed.label) from None
    return Kept(tensors, document, removed)


def _choose(removed: Removed, adapter: str | None) -> list[Taken]:
    names = sorted({taken.adapter for taken in removed.taken} - {""})
    if adapter is None and len(names) > 1:
        raise UsageError(f"there are adapters {', '.join(names)}", file=removed.label, mend="--adapter NAME keeps one")
    if adapter is not None and adapter not in names:
        raise UsageError(
            f"there is no adapter {adapter!r}", file=removed.label, mend=f"there are {', '.join(names) or 'none'}"
        )
    return [taken for taken in removed.taken if taken.adapter in ("", adapter or (names[0] if names else ""))]


def _check_ranks(document: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> None:
    """Hold a LoRA's configuration against its tensors: a wrong rank is a wrong scale."""
    config = peft.parse_config(document)
    for key, tensor in tensors.items():
        module = key.removeprefix(peft.PREFIX).removesuffix(".lora_A.weight")
        if key.endswith(".lora_A.weight") and not _is_experts(module):
            config.scaling(module, tensor.spec.shape[0])


def _is_experts(module: str) -> bool:
    return module.endswith((".experts", ".base_layer"))


def _planned(
    removed: Removed,
    chosen: Sequence[Taken],
    tensors: Mapping[str, LazyTensor],
    method: str | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Plan the method on the base that is left, and hold its tensors against those that were taken out."""
    model = Model(removed.specs, removed.config or {})
    saved = {taken.key for taken in chosen if taken.method == "saved"}
    shapes = {key: tensor.spec.shape for key, tensor in tensors.items() if key not in saved}
    kinds = {taken.method for taken in chosen} - {"saved"}
    if len(kinds) != 1 or kinds == {"token rows"}:
        told = f"tensors of {', '.join(sorted(kinds))}" if kinds else "modules that are saved whole"
        raise UsageError(f"{told} do not tell their configuration", mend=_FILE)
    (kind,) = kinds
    name = method or kind
    if kind in _SEVERAL and method is None:
        name = _only_fit(model, shapes) if kind == "prompts" else ""
        if not name:
            raise UsageError(f"{kind} could be {' or '.join(_SEVERAL[kind])}", mend="say which by --method")
    if name not in _SEVERAL.get(kind, (kind,)):
        raise UsageError(f"these are tensors of {kind}, not of {name}")
    if name == "lora" and settings.get("alpha") is None:
        raise UsageError("a LoRA's scale alpha/r is not in its tensors", mend=f"-p alpha=N, or {_FILE}")
    addition, planned = _plan(model, name, shapes, chosen, settings)
    for key in sorted(shapes.keys() | planned.keys()):
        if shapes.get(key) != planned.get(key):
            here, there = (_written(found.get(key)) for found in (shapes, planned))
            raise MismatchError(f"is {here} here, and {there} in what add {name} gives", tensor=key, mend=_MEND)
    document = dict(addition.config)
    if "modules_to_save" in document:
        document["modules_to_save"] = sorted({t.replaces.rpartition(".")[0] for t in chosen if t.key in saved}) or None
    if not {one.key for one in addition.head} <= saved:
        document["task_type"] = None  # for PEFT would look for a head
    return document


_SEVERAL = {
    "prompts": ("prompt-tuning", "prefix-tuning", "p-tuning"),
    "bottleneck": ("houlsby", "pfeiffer", "parallel", "lin"),
}  # fmt: skip
_FILE = "--adapter-config FILE tells it"
_MEND = "-p KEY=VALUE gives settings, --adapter-config FILE all of them"


def _written(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else "×".join(map(str, shape))


def _plan(
    model: Model, name: str, shapes: Mapping[str, tuple[int, ...]], chosen: Sequence[Taken], settings: Mapping[str, Any]
) -> tuple[Addition, dict[str, tuple[int, ...]]]:
    """Plan a method with the settings that its tensors tell and those that are given."""
    told = _told(model, name, shapes, chosen, settings)
    row = find(name)
    target = told.pop("target", ())
    addition = row.plan(model, target, row.settings({**told, **settings}))
    return addition, {one.key: one.shape for one in addition.new}


def _told(
    model: Model, name: str, shapes: Mapping[str, tuple[int, ...]], chosen: Sequence[Taken], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Read settings from names and shapes.

    Raises:
        UsageError: they differ from module to module.
    """
    if name in _SEVERAL["prompts"]:
        task = settings.get("task") or model.task
        sides = 2 if task == "SEQ_2_SEQ_LM" and name != "prefix-tuning" else 1
        return {"length": next(iter(shapes.values()))[0] // sides}
    if name in _SEVERAL["bottleneck"]:
        there = {layer_of(key) for key in shapes}
        blocks = [block for stack in model.blocks.values() for block in stack]
        return {
            "size": next(shape[1] for key, shape in shapes.items() if key.endswith(".adapter_up.weight")),
            "leave_out": [number for number, block in enumerate(blocks) if block not in there],
            "name": chosen[0].adapter,
        }  # fmt: skip
    modules = {
        re.sub(r"\.(lora_\w+|ia3_l|ln_tuning_layers)(\.\w+)?$", "", key.removeprefix(peft.PREFIX)) for key in shapes
    }
    told: dict[str, Any] = {"target": [f"re:{re.escape(module)}" for module in sorted(modules)]}
    if name == "lora":
        ranks = {shape[0] for key, shape in shapes.items() if re.search(r"\.lora_(embedding_)?A(\.weight)?$", key)}
        if len(ranks) != 1 or any(map(_is_experts, modules)):
            raise UsageError("the ranks of its modules differ", mend=_FILE)
        told |= {"r": ranks.pop(), "dora": any(key.endswith(".lora_magnitude_vector") for key in shapes)}
    return told


def _only_fit(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Tell prompts from prefixes by their width; nothing where it does not tell."""
    fits = []
    for name in ("prompt-tuning", "prefix-tuning"):
        with contextlib.suppress(MismatchError):  # a model that cannot have it
            if _plan(model, name, shapes, (), {})[1] == shapes:
                fits.append(name)
    return fits[0] if len(fits) == 1 else ""
