"""The settings of a recipe against its algorithm: what is known, what is ignored, and which value a tensor gets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from surgery.algorithms.registry import Algorithm, Parameter
from surgery.errors import FormatError, SurgeryError
from surgery.formats.recipe import Module
from surgery.formats.settings import Settings, first_value
from surgery.formats.yaml_strict import did_you_mean

ACCEPTED: Mapping[str, str] = {
    "int8_mask": "saves memory in mergekit and changes no value; surgery's blocks need none of it",
}
"""Parameters of mergekit that mean nothing here, whatever the algorithm."""


class Choices:
    """All settings of one recipe.

    Args:
        algorithm: whose parameters they are.
        general: the recipe's own settings.
        modules: its modules, with the settings of theirs.

    Raises:
        FormatError: a parameter that the algorithm does not take, or one of the merge that is given to one model.
    """

    def __init__(self, algorithm: Algorithm, general: Settings, modules: Sequence[Module]) -> None:
        self.algorithm = algorithm
        self.general = general
        self.modules = modules
        self.known = {parameter.recipe_name: parameter for parameter in algorithm.parameters}
        self.notes: list[str] = []
        self._check()

    def _check(self) -> None:
        """Refuse parameters that the algorithm does not take, and those of the merge that are given to one model."""
        for settings, own in self._all_settings():
            for name, setting in settings.items():
                line = f"line {setting.line}: "
                if name in ACCEPTED:
                    self._note(f"{line}{name} {ACCEPTED[name]}")
                elif name in self.algorithm.ignored:
                    self._note(f"{line}{self.algorithm.name} does not use {name}, in mergekit neither")
                elif name not in self.known:
                    raise FormatError(
                        f"{line}{self.algorithm.name} has no parameter {name!r}",
                        mend=did_you_mean(name, self.known) if self.known else "it has none",
                    )
                elif own > 1 and not self.known[name].per_model:
                    raise FormatError(f"{line}{name} belongs to the merge as a whole, not to one of its models")

    def _all_settings(self) -> Iterator[tuple[Settings, int]]:
        """Yield every level of settings, and for those of one model how many models are beside it."""
        yield self.general, 0
        for module in self.modules:
            yield module.settings, 0
            for piece in module.slices:
                yield piece.settings, 0
                for part in piece.parts:
                    yield part.settings, len(piece.parts)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def choose(self, levels: Sequence[Settings], tensor: str, t: float, *, per_model: bool) -> dict[str, float | bool]:
        """Choose the values that a recipe gives for one tensor, by the algorithm's own names."""
        found: dict[str, Any] = {}
        for name, parameter in self.known.items():
            if parameter.per_model == per_model:
                value = first_value(levels, name, tensor, t)
                if value is not None:
                    found[parameter.name] = self._checked(parameter, value, name, levels)
        return found

    @staticmethod
    def _checked(parameter: Parameter, value: Any, name: str, levels: Sequence[Settings]) -> float | bool:
        try:
            return parameter.check(value)
        except SurgeryError as error:
            line = next(level[name].line for level in levels if name in level)
            raise FormatError(f"line {line}: {name}: {error.what}") from None

    def check_filters(self, names: Collection[str]) -> None:
        """Note filters that select nothing: mergekit's recipes hold such, so they are no error."""
        for settings, _ in self._all_settings():
            for setting in settings.values():
                for condition in setting.conditions:
                    if not any(map(condition.fits, names)):
                        self._note(f"line {condition.line}: the filter {condition.filter!r} is in no tensor's name")
