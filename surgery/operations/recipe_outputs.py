"""Which tensors a recipe writes, and from which tensors of its models each of them is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.algorithms.registry import MERGEKIT
from surgery.errors import MismatchError
from surgery.formats.recipe import Module, Part, Reference, Slice
from surgery.operations.recipe_config import LayerOrigin
from surgery.operations.recipe_inputs import Input, Spelled
from surgery.operations.recipe_layers import Stack, comes_before, is_head, main_stack, stacks_of
from surgery.operations.recipe_tokenizer import is_vocabulary, rows_of
from surgery.report import join_shown


@dataclass(frozen=True, slots=True)
class Output:
    """One output tensor: where its inputs are, and which settings decide."""

    name: str
    inputs: Mapping[int, str]
    """Number of the part in its slice → the tensor's name there."""
    module: Module
    slice: Slice
    t: float


class Outline:
    """The tensors of all modules of one recipe.

    Args:
        modules: what to write.
        inputs: opens the models that they name.
        compat: decides ``t`` for tensors outside of the layers.
    """

    def __init__(self, modules: Sequence[Module], inputs: Spelled, compat: str) -> None:
        self.modules = modules
        self.inputs = inputs
        self.compat = compat

    def _input(self, part: Part) -> Input:
        return self.inputs.get(part.model)

    def outputs(self) -> list[Output]:
        """List every output tensor, in the order of the models.

        Raises:
            MismatchError: a name that two modules write, or a tensor of the first model that none does.
        """
        outputs: dict[str, Output] = {}
        for module in self.modules:
            found = self._whole(module) if module.whole else self._stacked(module)
            for output in found:
                if output.name in outputs:
                    raise MismatchError("is written by two modules", tensor=output.name)
                outputs[output.name] = output
        named = [module.name for module in self.modules if module.name]
        if named:
            first = self._input(self.modules[0].slices[0].parts[0]).model
            left = [name for name in first.tensors if name not in outputs and not any(_belongs(name, m) for m in named)]
            if left:
                raise MismatchError(
                    f"{len(left)} tensors belong to none of the modules {', '.join(named)}, {left[0]!r} among them",
                    file=first.label, mend="name modules as the tensors' names do",
                )  # fmt: skip
        return list(outputs.values())

    def _whole(self, module: Module) -> Iterator[Output]:
        """Merge all tensors of all models under their own names."""
        (piece,) = module.slices
        names = [self._names(module, part) for part in piece.parts]
        depths = _depths(names[0])
        for name in dict.fromkeys(name for own in names for name in own):
            t = depths.get(name, self._outside(comes_before(name)))
            yield Output(name, self._inputs_of(piece, name), module, piece, t)

    def _outside(self, before: bool) -> float:
        """Return the ``t`` of tensors outside of the layers. mergekit has 0 for all, even for those at the end."""
        return 0.0 if before or self.compat == MERGEKIT else 1.0

    def _stacked(self, module: Module) -> Iterator[Output]:
        """Number the layers of all slices through; what stands before and after them goes with the first and last."""
        stacks = {part.model: self._stack(module, part) for piece in module.slices for part in piece.parts}
        first, last = module.slices[0], module.slices[-1]
        prefix = stacks[first.parts[0].model].prefix
        yield from self._around(module, first, stacks, before=True)
        place = 0
        for piece in module.slices:
            ranges = [part.layers or (0, 0) for part in piece.parts]
            length = ranges[0][1] - ranges[0][0]
            for offset in range(length):
                t = offset / (length - 1) if length > 1 else 1.0
                ends = dict.fromkeys(
                    end for part, (start, _) in zip(piece.parts, ranges, strict=True)
                    for end in stacks[part.model].layers[start + offset]
                )  # fmt: skip
                for end in ends:
                    names = {
                        number: stacks[part.model].name(ranges[number][0] + offset, end)
                        for number, part in enumerate(piece.parts)
                    }
                    yield Output(Stack(prefix, ()).name(place + offset, end), names, module, piece, t)
            place += length
        yield from self._around(module, last, stacks, before=False)

    def _stack(self, module: Module, part: Part) -> Stack:
        model = self._input(part).model
        stack = main_stack(model, self._names(module, part))
        if part.layers and part.layers[1] > len(stack.layers):
            raise MismatchError(
                f"line {part.line}: layer_range {list(part.layers)} reaches beyond {model.label}, which has "
                f"{len(stack.layers)} layers"
            )
        return stack

    def _around(
        self, module: Module, piece: Slice, stacks: Mapping[Reference, Stack], *, before: bool
    ) -> Iterator[Output]:
        names: dict[str, None] = {}
        for part in piece.parts:
            stack = stacks[part.model]
            inside = {stack.name(number, end) for number, layer in enumerate(stack.layers) for end in layer}
            names |= dict.fromkeys(
                name for name in self._names(module, part)
                if name not in inside and comes_before(name) == before
            )  # fmt: skip
        for name in names:
            yield Output(name, self._inputs_of(piece, name), module, piece, self._outside(before))

    def _names(self, module: Module, part: Part) -> list[str]:
        """List the tensors of a model that belong to a module."""
        model = self._input(part).model
        names = [name for name in model.tensors if not module.name or _belongs(name, module.name)]
        if not names:
            tops = sorted({name.partition(".")[0] for name in model.tensors})
            raise MismatchError(
                f"line {module.line}: no tensor of {model.label} belongs to a module {module.name!r}",
                mend=f"modules are parts of names; there are {join_shown(tops, 8)}",
            )
        return names

    def _inputs_of(self, piece: Slice, name: str) -> dict[int, str]:
        """Name the tensor in every part: the same, but for a head that a model ties to its embedding and does not store."""
        found = {}
        for number, part in enumerate(piece.parts):
            model = self._input(part).model
            tied = name not in model.tensors and is_head(name) and (model.config or {}).get("tie_word_embeddings", True)
            embeddings = [
                other for other, tensor in model.tensors.items()
                if comes_before(other) and is_vocabulary(tensor, rows_of(model))
            ] if tied and name.endswith(".weight") else []  # fmt: skip
            found[number] = embeddings[0] if len(embeddings) == 1 else name
        return found

    def layer_origins(self) -> list[LayerOrigin] | None:
        """Tell for every output layer which model's configuration it follows; ``None`` where the layers are as they were."""
        stacked = [module for module in self.modules if not module.whole]
        if len(stacked) != 1:
            return None
        return [
            (self._input(piece.parts[0]).model.config, number)
            for piece in stacked[0].slices
            for number in range(*(piece.parts[0].layers or (0, 0)))
        ]


def _depths(names: Sequence[str]) -> dict[str, float]:
    """Give every tensor of a layer its place in its stack, from 0 to 1; a stack of one layer is at 1."""
    return {
        stack.name(number, end): number / (len(stack.layers) - 1) if len(stack.layers) > 1 else 1.0
        for stack in stacks_of(names).values()
        for number, layer in enumerate(stack.layers)
        for end in layer
    }


def _belongs(name: str, module: str) -> bool:
    """Say whether a module's name is a part of a tensor's; ``default`` is the whole model."""
    return module == "default" or f".{module}." in f".{name}"
