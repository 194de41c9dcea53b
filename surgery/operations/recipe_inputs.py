"""What a recipe's references stand for: other stages, folders, files, or models on the Hub, cached or not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from surgery.adapter import is_adapter, open_adapter
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import FormatError, HubError, UnsupportedError
from surgery.formats.recipe import Recipe, Reference
from surgery.sources import hub_cache, local
from surgery.sources.references import SCHEME, is_hub_reference, is_repository


@dataclass(frozen=True, slots=True)
class Input:
    """One model that goes into a merge."""

    model: Checkpoint
    native: Mapping[str, str]
    """The dtype of every tensor before an adapter widened it."""


class Inputs:
    """Opens each reference once. Stages are made when somebody refers to them, and never written."""

    def __init__(self, recipes: tuple[Recipe, ...], make: Callable[[Recipe, Inputs], Checkpoint]) -> None:
        self._stages = {recipe.name: recipe for recipe in recipes if recipe.name is not None}
        self._make = make
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
        native = {name: spec.dtype for name, spec in model.specs.items()}
        if reference.adapter is None:
            return Input(model, native)
        from surgery.operations.merge import as_model

        adapter = open_adapter(self._locate(reference.adapter))
        merged = as_model(model, adapter)
        merged.label = f"{model.label}+{adapter.label}"
        merged.config, merged.side_files = model.config, model.side_files
        return Input(merged, native)

    def _open_plain(self, reference: Reference) -> Checkpoint:
        key = (reference.path, reference.revision)
        if key not in self._plain:
            stage = self._stages.get(reference.path)
            self._plain[key] = self._open_stored(reference) if stage is None else self._open_stage(stage)
        return self._plain[key]

    def _open_stored(self, reference: Reference) -> Checkpoint:
        path = self._locate(reference)
        if is_adapter(path):
            raise UnsupportedError(
                f"line {reference.line}: {reference} is an adapter, not a model", mend=f"write BASE+{reference.path}"
            )
        return open_checkpoint(path)

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
