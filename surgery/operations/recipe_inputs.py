"""What a recipe's references stand for: other stages, folders, files, or models on the Hub, cached or not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import FormatError, HubError, UnsupportedError
from surgery.exact import is_delta
from surgery.formats.recipe import Recipe, Reference, Slice
from surgery.operations.model_inputs import buffered, is_change, kind_of, respelled, with_change
from surgery.sources import hub_cache, local
from surgery.sources.references import SCHEME, is_hub_reference, is_repository


@dataclass(frozen=True, slots=True)
class Input:
    """One model that goes into a merge."""

    model: Checkpoint
    native: Mapping[str, str]
    """The dtype of every tensor before an adapter widened it."""


Make = Callable[[Recipe, "Inputs"], Checkpoint]


class Inputs:
    """Opens each reference once. Stages are made when somebody refers to them, and never written.

    Args:
        recipes: all of a file.
        make: composes the checkpoint of a stage.
        allow_base_mismatch: take adapters for models although they were taken from another base.
    """

    def __init__(self, recipes: tuple[Recipe, ...], make: Make, *, allow_base_mismatch: bool = False) -> None:
        self._stages = {recipe.name: recipe for recipe in recipes if recipe.name is not None}
        self._make = make
        self._allow_base_mismatch = allow_base_mismatch
        self._opened: dict[Reference, Input] = {}
        self._plain: dict[tuple[str, str | None], Checkpoint] = {}
        self._making: list[str] = []

    def get(self, reference: Reference) -> Input:
        """Open what a reference stands for; headers are read, data is not.

        Raises:
            FormatError: stages that need each other, or a malformed checkpoint.
            HubError: a model that is neither a folder, nor in the cache, nor on the Hub.
        """
        if reference not in self._opened:
            self._opened[reference] = self._open(reference)
        return self._opened[reference]

    def _open(self, reference: Reference) -> Input:
        model = self._open_plain(reference)
        if reference.adapter is None:
            return Input(model, _dtypes(model))
        change = self._locate(reference.adapter)
        changed = with_change(model, change, allow_base_mismatch=self._allow_base_mismatch)
        changed.label = f"{model.label}+{changed.label}"
        return Input(changed, _dtypes(changed) if is_delta(change) else _dtypes(model))

    def on_base(self, reference: Reference, base: Reference | None) -> Reference:
        """Return what a reference to an adapter or a delta alone means: the base with it; any other as it is.

        Raises:
            UnsupportedError: there is no base, or one with an adapter of its own.
        """
        if reference.adapter is not None or reference.path in self._stages:
            return reference
        path = self._locate(reference)
        if not is_change(path):
            return reference
        where = f"line {reference.line}: {reference} is {kind_of(path)}"
        if base is None or base == reference:
            raise UnsupportedError(f"{where}, not a model", mend=f"write BASE+{reference.path}, or name a base_model")
        if base.adapter is not None:
            raise UnsupportedError(
                f"{where}, and its base_model {base} has one already", mend="make a stage of the base, with a name"
            )
        return replace(base, adapter=reference, line=reference.line)

    def _open_plain(self, reference: Reference) -> Checkpoint:
        key = (reference.path, reference.revision)
        if key not in self._plain:
            stage = self._stages.get(reference.path)
            self._plain[key] = self._open_stored(reference) if stage is None else self._open_stage(stage)
        return self._plain[key]

    def _open_stored(self, reference: Reference) -> Checkpoint:
        path = self._locate(reference)
        if is_change(path):
            raise UnsupportedError(
                f"line {reference.line}: {reference} is {kind_of(path)}, not a model",
                mend=f"write BASE+{reference.path}",
            )
        return buffered(open_checkpoint(path))

    def _open_stage(self, stage: Recipe) -> Checkpoint:
        name = str(stage.name)
        if name in self._making:
            circle = " → ".join([*self._making[self._making.index(name) :], name])
            raise FormatError(f"line {stage.lines.get('name', 0)}: the stages need each other: {circle}")
        self._making.append(name)
        made = self._make(stage, self)
        self._making.pop()
        made.label = name
        return made

    @staticmethod
    def _locate(reference: Reference) -> str:
        """Find the folder or file: under the working directory, else in the Hugging Face cache, else on the Hub.

        Raises:
            FormatError: neither a file nor the name of a repository.
            HubError: nowhere.
        """
        revision = "" if reference.revision is None else f"@{reference.revision}"
        if is_hub_reference(reference.path):
            return reference.path + revision
        path = os.path.expanduser(reference.path)
        if reference.revision is None and os.path.lexists(path):
            return path
        snapshot = hub_cache.find_snapshot(reference.path, reference.revision)
        if snapshot is not None and hub_cache.is_whole(snapshot):
            return os.fspath(snapshot)
        where = f"line {reference.line}: {reference} is no folder here"
        if not is_repository(reference.path):
            raise FormatError(where)
        named = f"{SCHEME}{reference.path}{revision}"
        try:
            local.resolve(named)
        except HubError as error:
            raise HubError(f"{where}; {error.what}", mend=error.mend) from None
        return named


class Spelled:
    """The inputs of one stage, with their tensors under the names that its base, else its first model, has for them.

    Args:
        inputs: opens what references stand for.
        first: the reference whose names decide.
    """

    def __init__(self, inputs: Inputs, first: Reference) -> None:
        self._inputs = inputs
        self._names = inputs.get(first).model.tensors
        self._spelled: dict[Reference, Input] = {}

    def get(self, reference: Reference) -> Input:
        """Open what a reference stands for; see :meth:`Inputs.get`."""
        if reference not in self._spelled:
            found = self._inputs.get(reference)
            model = respelled(found.model, self._names)
            same = model is found.model
            dtypes = zip(model.tensors, (found.native[name] for name in found.model.tensors), strict=True)
            self._spelled[reference] = found if same else Input(model, dict(dtypes))
        return self._spelled[reference]


def on_bases(recipe: Recipe, inputs: Inputs) -> Recipe:
    """Put the adapters and deltas that a recipe names alone onto the base of their slice, else of the recipe."""

    def piece(own: Slice) -> Slice:
        base = own.base or recipe.base
        return replace(own, parts=tuple(replace(part, model=inputs.on_base(part.model, base)) for part in own.parts))

    modules = (replace(module, slices=tuple(map(piece, module.slices))) for module in recipe.modules)
    return replace(recipe, modules=tuple(modules))


def _dtypes(model: Checkpoint) -> dict[str, str]:
    return {name: spec.dtype for name, spec in model.specs.items()}


def last_stage(recipes: tuple[Recipe, ...]) -> Recipe:
    """Choose the recipe whose result is written: the one without a name, or the only one that no other uses.

    Raises:
        FormatError: there is no such, or a stage that nothing uses.
    """
    used = {reference.path for recipe in recipes for reference in recipe.references()}
    ends = [recipe for recipe in recipes if recipe.name is None or recipe.name not in used]
    unnamed = [recipe for recipe in ends if recipe.name is None]
    if len(ends) == 1:
        return ends[0]
    if not ends:
        raise FormatError("the stages need each other: none is the last")
    loose = [str(recipe.name) for recipe in ends if recipe.name is not None]
    if unnamed:
        raise FormatError(f"nothing uses the stage {loose[0]!r}", mend="refer to it, or remove it")
    raise FormatError(f"{' and '.join(map(repr, loose))} are both last", mend="a run writes one model")
