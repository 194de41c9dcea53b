"""``merge_recipe``: the merge that a recipe describes, as one lazy checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import provenance
from surgery.algorithms.registry import MERGEKIT, find
from surgery.checkpoint import Checkpoint, Origin, refuse_quantised
from surgery.errors import FormatError, MismatchError, SurgeryError
from surgery.formats.recipe import Module, Part, Recipe, Slice, parse
from surgery.formats.safetensors import encode_document
from surgery.formats.tokenizer import CONFIG, FILE_STARTS, with_template
from surgery.merged import merged
from surgery.operations import recipe_config
from surgery.operations.merge_rules import Rule, describe, rules_table
from surgery.operations.model_inputs import bytes_read, input_entry
from surgery.operations.recipe_inputs import Input, Inputs, Spelled, last_stage, on_bases
from surgery.operations.recipe_outputs import Outline, Output
from surgery.operations.recipe_settings import Choices
from surgery.operations.recipe_tokenizer import (
    Tokens,
    chat_template,
    choose_tokens,
    generation_config,
    is_vocabulary,
    renumbered,
    rows_of,
)
from surgery.report import Table, join_shown
from surgery.roles import numberless
from surgery.sources import local
from surgery.tensor import ARITHMETIC, LazyTensor, renamed


def merge_recipe(
    recipe: str | os.PathLike[str] | bytes,
    *,
    compat: str = MERGEKIT,
    seed: int = 0,
    allow_base_mismatch: bool = False,
    allow_nonfinite: bool = False,
) -> Checkpoint:
    """Compose the merge that a recipe describes; headers are read and everything is checked, data is not read.

    The language is mergekit's YAML: ``models``, ``slices`` or ``modules``, parameters as numbers, gradients and
    conditions, several stages in one file (:mod:`surgery.formats.recipe`). Models are folders or files under the
    working directory, or models in the Hugging Face cache; adapters and exact deltas stand for their base with them.

    Args:
        recipe: a file, or its bytes.
        compat: ``"mergekit"``, which its recipes imply, or ``"paper"``.
        seed: keys random draws, together with the tensor's name.
        allow_base_mismatch: take adapters for models although they were taken from another base.
        allow_nonfinite: let NaN, Inf and overflow through.

    Returns:
        The merged checkpoint, lazily: stages before the last are never written.

    Raises:
        FormatError: what is not understood; the line is named.
        UsageError: an algorithm or a parameter that is not known, or a number of models that does not fit it.
        HubError: a model that is not on this machine.
        MismatchError: models that do not fit together, or layers that a model does not have.

    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> folder = tempfile.mkdtemp()
    >>> for name, value in (("a", 0.0), ("b", 1.0)):
    ...     save_file({"w": torch.full((2,), value)}, f"{folder}/{name}.safetensors")
    >>> models = f"[{{model: {folder}/a.safetensors}}, {{model: {folder}/b.safetensors}}]"
    >>> merge_recipe(f"{{merge_method: linear, models: {models}}}".encode())["w"].tolist()
    [0.5, 0.5]
    """
    data, label = (recipe, "recipe") if isinstance(recipe, bytes) else (read_recipe(recipe), os.fspath(recipe))
    try:
        recipes = parse(data)
        last = last_stage(recipes)

        def make(stage: Recipe, inputs: Inputs) -> Checkpoint:
            own = on_bases(stage, inputs)
            spelled = Spelled(inputs, next(own.references()))
            return _Merge(own, data.decode(), spelled, compat, seed, allow_nonfinite).result()

        return make(last, Inputs(recipes, make, allow_base_mismatch=allow_base_mismatch))
    except SurgeryError as error:
        raise error.at(file=label) from None


def read_recipe(path: str | os.PathLike[str]) -> bytes:
    """Read a recipe's file."""
    return local.read_small(local.resolve(path))


@dataclass
class _Tally:
    """What happens to how many tensors."""

    merged: int = 0
    copied: int = 0

    def counts(self) -> dict[str, int]:
        return {"merged": self.merged, "copied": self.copied}


@dataclass
class _Merge:
    """One stage in the making."""

    recipe: Recipe
    text: str
    """The whole file, for the record."""
    inputs: Spelled
    compat: str
    seed: int
    allow_nonfinite: bool

    def __post_init__(self) -> None:
        self.algorithm = find(self.recipe.algorithm)
        self.modules = [self._with_base(module) for module in self.recipe.modules]
        self.choices = Choices(self.algorithm, self.recipe.settings, self.modules)
        self.outline = Outline(self.modules, self.inputs, self.compat)
        self.traced: dict[int, dict[str, provenance.Traced]] = {}
        self.members: list[Input] = []
        self.tokens = self._choose_tokens()
        self.tally = _Tally()
        self.rules: dict[str, Rule] = {}

    # --- what goes in

    def _with_base(self, module: Module) -> Module:
        """Add the base to the models of a whole merge that do not name it."""
        base = self.recipe.base
        if not module.whole or base is None or any(part.model == base for part in module.slices[0].parts):
            return module
        (piece,) = module.slices
        whole = Slice((*piece.parts, Part(base, line=base.line)), piece.base, piece.settings, piece.line)
        return Module(module.name, (whole,), module.settings, module.whole, module.line)

    def _input(self, part: Part) -> Input:
        return self.inputs.get(part.model)

    # --- what comes out

    def result(self) -> Checkpoint:
        """Compose the checkpoint."""
        for module in self.modules:
            for piece in module.slices:
                self._check_arity(piece)
        outputs = self.outline.outputs()
        self.choices.check_filters({name for output in outputs for name in (output.name, *output.inputs.values())})
        tensors = {output.name: self._tensor(output) for output in outputs}
        donor = self._donor()
        config = self._config(donor, tensors)
        side_files, files = self._side_files(donor)
        if config is not None and (config != donor.config or donor.origin is not None):  # a stage has no file of it
            files["config.json"] = encode_document(config)
        return Checkpoint(
            tensors,
            label=self.recipe.name or self.recipe.algorithm,
            stored=list({id(item): item for member in self.members for item in member.model.stored}.values()),
            shards=donor.shards if self._keeps_names(donor, tensors) else None,
            config=config,
            side_files=side_files,
            notes=[*dict.fromkeys(note for member in self.members for note in member.model.notes), *self.choices.notes],
            origin=Origin(
                self._record,
                files=files,
                counts=self.tally.counts(),
                work=self._work(),
                bytes_read=sum(map(self._bytes_read, range(len(self.members)))),
                tables=(rules_table(self.rules, tensors), *self._unused()),
            ),
        )

    def _check_arity(self, piece: Slice) -> None:
        base, models = self._roles(piece)
        wanted = piece.base or self.recipe.base
        if self.algorithm.base == "required" and wanted is not None and base is None:
            raise FormatError(f"line {piece.line}: the base_model {wanted} is not among the sources of this slice")
        try:
            self.algorithm.check_arity(len(models), base is not None)
        except SurgeryError as error:
            error.what = f"line {piece.line}: {error.what}"
            raise

    def _roles(self, piece: Slice) -> tuple[int | None, list[int]]:
        """Tell the base from the models, by their numbers in the slice.

        An algorithm that takes no base merges it as a model like others, the first of them.
        """
        reference = piece.base or self.recipe.base
        numbers = list(range(len(piece.parts)))
        base = next((number for number in numbers if piece.parts[number].model == reference), None)
        if base is None:
            return None, numbers
        others = [number for number in numbers if number != base]
        return (None, [base, *others]) if self.algorithm.base == "none" else (base, others)

    # --- one tensor

    def _tensor(self, output: Output) -> LazyTensor:
        """Compose one output tensor from headers alone."""
        piece = output.slice
        base, models = self._roles(piece)
        members = {number: self._input(part) for number, part in enumerate(piece.parts)}
        self._refuse_missing(output, members)
        dtype = self.recipe.out_dtype or self.recipe.dtype
        native = members[models[0] if base is None else base]
        first = native.model.tensors[output.inputs[models[0] if base is None else base]].spec
        out_dtype = dtype or native.native[first.name]
        levels = [piece.settings, output.module.settings, self.recipe.settings]
        alone = piece.parts[models[0]].settings if len(piece.parts) == 1 else {}
        whole = self.choices.choose([alone, *levels], output.name, output.t, per_model=False)
        order = models if base is None else [base, *models]
        sources = self._sources(output, {number: members[number] for number in order})
        if len(order) == 1 and self._is_copy(whole, members[order[0]], sources[order[0]], out_dtype):
            self.tally.copied += 1
            self.rules[output.name] = Rule(f"copy of {members[order[0]].model.label}")
            return renamed(sources[order[0]], output.name)
        each = [
            self.choices.choose(
                [piece.parts[number].settings, *levels], output.inputs[number], output.t, per_model=True
            )
            for number in models
        ]
        for number, member in members.items():
            refuse_quantised(member.model, [output.inputs[number]])
        numeric = any(source.spec.dtype in ARITHMETIC for source in sources.values())
        labels = [members[number].model.label for number in order]
        onto = "" if base is None else f" onto {labels[0]}"
        self.rules[output.name] = Rule(
            f"{self.algorithm.name} of {', '.join(labels[base is not None :])}{onto}", describe(whole, each)
        )
        self.tally.merged += numeric
        self.tally.copied += not numeric
        return merged(
            output.name, [sources[number] for number in models], None if base is None else sources[base],
            self.algorithm, whole, each, dtype=out_dtype if numeric else None,
            labels=labels, compat=self.compat, seed=self.seed,
            allow_nonfinite=self.allow_nonfinite,
        )  # fmt: skip

    def _refuse_missing(self, output: Output, members: Mapping[int, Input]) -> None:
        lacking = [number for number, member in members.items() if output.inputs[number] not in member.model.tensors]
        if lacking:
            having = [member.model.label for number, member in members.items() if number not in lacking]
            raise MismatchError(
                f"is not there, but in {join_shown(having)}",
                file=members[lacking[0]].model.label, tensor=output.inputs[lacking[0]],
            )  # fmt: skip

    def _is_copy(self, whole: Mapping[str, Any], member: Input, source: LazyTensor, dtype: str) -> bool:
        """Say whether the tensor only takes another place: copied as bytes, whatever it holds."""
        plain = all(value == 1.0 for value in whole.values())
        keeps = source.spec.dtype == dtype or source.spec.dtype not in ARITHMETIC
        untouched = source.spec.dtype == member.native[source.spec.name]  # no adapter changed it
        return self.algorithm.name == "passthrough" and plain and keeps and untouched

    def _sources(self, output: Output, members: Mapping[int, Input]) -> dict[int, LazyTensor]:
        """Return the members' tensors, in the output's vocabulary where they have a row a token."""
        found = {number: self._source(member, output.inputs[number]) for number, member in members.items()}
        if self.tokens is not None and all(
            is_vocabulary(tensor, rows_of(members[number].model)) for number, tensor in found.items()
        ):
            pairs = [(members[number].model, tensor) for number, tensor in found.items()]
            return dict(zip(found, self.tokens.remap(pairs, output.name), strict=True))
        return found

    def _source(self, member: Input, name: str) -> LazyTensor:
        """Return a member's tensor, fingerprinted as it is read."""
        number = next((place for place, known in enumerate(self.members) if known is member), len(self.members))
        if number == len(self.members):
            self.members.append(member)
        own = self.traced.setdefault(number, {})
        if name not in own:
            own[name] = provenance.Traced(member.model.tensors[name])
        return own[name]

    # --- beside the tensors

    def _donor(self) -> Checkpoint:
        """Return the model whose configuration and side files the output has: the base, else the first."""
        return self.inputs.get(next(self.recipe.references())).model

    def _choose_tokens(self) -> Tokens | None:
        """Build the tokenizer that the recipe asks for, if it asks for one."""
        if self.recipe.tokenizer is None:
            return None
        base = None if self.recipe.base is None else self.inputs.get(self.recipe.base).model
        return choose_tokens(self.recipe.tokenizer, self._models(), base, self.inputs)

    def _models(self) -> list[Checkpoint]:
        """List all models once, the base in front if there is one."""
        return list(
            {id(model): model for model in (self.inputs.get(r).model for r in self.recipe.references())}.values()
        )

    def _side_files(self, donor: Checkpoint) -> tuple[dict[str, Path], dict[str, bytes]]:
        """Collect the files that lie beside the weights: those that are copied, and those that are written."""
        copied = dict(donor.side_files)
        written = dict(donor.origin.files) if donor.origin else {}
        written.pop("config.json", None)
        if self.tokens is not None:
            if self.tokens.donor is not donor:
                copied = {name: path for name, path in copied.items() if not name.startswith(FILE_STARTS)}
                others = self.tokens.donor.side_files
                copied |= {name: path for name, path in others.items() if name.startswith(FILE_STARTS)}
            written |= {**self.tokens.files, **generation_config(donor, self.tokens)}
        if self.recipe.chat_template is not None:
            line = self.recipe.lines["chat_template"]
            template = chat_template(self.recipe.chat_template, self._models(), line)
            config = written.get(CONFIG) or (local.read_small(copied[CONFIG]) if CONFIG in copied else None)
            written |= {} if template is None else with_template(config, template)
        return copied, written

    @staticmethod
    def _keeps_names(donor: Checkpoint, tensors: Mapping[str, LazyTensor]) -> bool:
        return set(donor.tensors) == set(tensors)

    def _config(self, donor: Checkpoint, tensors: Mapping[str, LazyTensor]) -> dict[str, Any] | None:
        if donor.config is None:
            return None
        config: Mapping[str, Any] = donor.config
        if self.tokens is not None:
            config = renumbered(config, self.tokens.own[id(donor)], self.tokens.vocabulary)
        return recipe_config.corrected(
            config, layers=self.outline.layer_origins(), dtype=self.recipe.out_dtype or self.recipe.dtype,
            tied=self._tied(donor, tensors), vocabulary=None if self.tokens is None else self.tokens.rows,
        )  # fmt: skip

    @staticmethod
    def _tied(donor: Checkpoint, tensors: Mapping[str, LazyTensor]) -> bool | None:
        """A head that the merge writes although the donor's configuration ties it is untied."""
        heads = ("lm_head.weight", "embed_out.weight")
        gains = any(name in tensors and name not in donor.tensors for name in heads)
        return False if gains and (donor.config or {}).get("tie_word_embeddings") else None

    def _work(self) -> str:
        """Say everything that decides the values, beside the inputs."""
        return repr((self.text, self.compat, self.seed, self.allow_nonfinite))

    def _bytes_read(self, number: int) -> int:
        """Return what a member costs to read: the share of its bytes that is used."""
        model, used = self.members[number].model, self.traced[number].values()
        return bytes_read(model) * sum(tensor.spec.nbytes for tensor in used) // max(model.nbytes, 1)

    def _unused(self) -> list[Table]:
        """List the tensors of the models that go into nothing: layers that were left out."""
        rows = []
        for number, member in enumerate(self.members):
            left = [name for name in member.model.tensors if name not in self.traced[number]]
            if left:
                rows.append(
                    (member.model.label, f"{len(left):,}", join_shown(list(dict.fromkeys(map(numberless, left)))))
                )
        return [Table("Not used", ("model", "tensors", "which"), tuple(rows))] if rows else []

    def _record(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """Compose the provenance record: the recipe's own words, and a fingerprint of every input."""
        draft = provenance.PLACEHOLDER in fingerprints.values()
        inputs = [
            input_entry("model", member.model, self.traced[number], draft=draft)
            for number, member in enumerate(self.members)
        ]
        parameters: dict[str, Any] = {"algorithm": self.algorithm.name, "compat": self.compat, "recipe": self.text}
        if self.algorithm.random:
            parameters["seed"] = self.seed
        return provenance.record("merge", parameters=parameters, inputs=inputs, tensors=fingerprints)
