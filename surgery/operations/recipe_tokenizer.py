"""The tokenizer of a merged model: its vocabulary, its files, and the rows that its matrices take from the models.

Differs from mergekit in one thing: tokens that a union adds are numbered model by model in the recipe's order, and by
their own numbers within a model, so that the same recipe gives the same tokenizer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, MismatchError, SurgeryError
from surgery.formats import tokenizer as forms
from surgery.formats.recipe import Reference, TokenizerChoice, TokenRule
from surgery.formats.safetensors import encode_document, strict_object
from surgery.formats.tokenizer import Vocabulary
from surgery.operations.recipe_inputs import Spelled
from surgery.operations.recipe_templates import TEMPLATES
from surgery.operations.recipe_vocabulary import Cell, Remapped, Run, runs_of
from surgery.roles import layer_of, role_of
from surgery.sources import local
from surgery.tensor import LazyTensor

_POSITIONS = re.compile(r"(?i)wpe|position|token_type")


def reader(model: Checkpoint) -> forms.Read:
    """Return what reads a model's side files, be it stored or a stage."""
    made = model.origin.files if model.origin else {}

    def read(name: str) -> bytes | None:
        if name in made:
            return made[name]
        return local.read_small(model.side_files[name]) if name in model.side_files else None

    return read


def rows_of(model: Checkpoint) -> int | None:
    """Return how many rows a model's vocabulary matrices have, as its configuration says."""
    config: Mapping[str, Any] = model.config or {}
    inner = config.get("text_config")
    found = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return found if isinstance(found, int) else None


def is_vocabulary(tensor: LazyTensor, rows: int | None) -> bool:
    """Say whether a tensor has a row a token: an embedding or an output head, or the head's bias."""
    spec = tensor.spec
    if rows is None or not spec.shape or spec.shape[0] != rows or layer_of(spec.name) or _POSITIONS.search(spec.name):
        return False
    head_bias = spec.name.endswith(("lm_head.bias", "embed_out.bias", "predictions.bias"))
    return head_bias or (len(spec.shape) == 2 and role_of(spec) in ("embedding", "head"))


@dataclass(frozen=True, slots=True)
class Tokens:
    """The output's tokenizer, and how the models' rows become its rows."""

    vocabulary: Vocabulary
    rows: int
    files: Mapping[str, bytes]
    """Its files that differ from the donor's."""
    donor: Checkpoint
    """The model whose tokenizer files the output has."""
    own: Mapping[int, Vocabulary]
    """The vocabulary of every model, by ``id`` of its checkpoint."""
    rules: Mapping[str, tuple[TokenRule, int | None]]
    """What the recipe says about tokens, with ``id`` of the checkpoint that a rule names."""
    base: int | None

    def remap(self, tensors: Sequence[tuple[Checkpoint, LazyTensor]], name: str) -> list[LazyTensor]:
        """Give the vocabulary matrices of several models the output's order of tokens.

        Raises:
            MismatchError: a rule names a token or a model that is not there, or widths differ.
        """
        sources = tuple(tensor for _, tensor in tensors)
        places = {id(model): number for number, (model, _) in enumerate(tensors)}
        if len({tensor.spec.shape[1:] for tensor in sources}) > 1:
            first, other = (f"{tensor.spec.describe()} in {model.label}" for model, tensor in tensors[:2])
            raise MismatchError(f"is {first}, but {other}", tensor=name)
        own = [self.own[id(model)].within(tensor.spec.shape[0]).numbers for model, tensor in tensors]
        base = places.get(self.base) if self.base is not None else None
        columns: list[list[tuple[Cell, ...]]] = [[] for _ in tensors]
        for token in self._ordered():
            default, force = self._default(token, own, places, base, name)
            for number, numbers in enumerate(own):
                mine = None if force or token is None else numbers.get(token)
                columns[number].append(default if mine is None else ((number, mine),))
        return [self._matrix(sources, number, runs_of(column), name) for number, column in enumerate(columns)]

    def _matrix(self, sources: tuple[LazyTensor, ...], number: int, runs: tuple[Run, ...], name: str) -> LazyTensor:
        same = len(runs) == 1 and runs[0].cells == ((number, 0),) and runs[0].stop == self.rows
        if same and sources[number].spec.shape[0] == self.rows:
            return sources[number]
        return Remapped(sources, runs, self.rows, name)

    def _ordered(self) -> Iterator[str | None]:
        """Yield the token of every row; ``None`` for numbers that no token has."""
        by_number = {number: token for token, number in self.vocabulary.numbers.items()}
        for number in range(max(by_number, default=-1) + 1):
            yield by_number.get(number)

    def _default(
        self,
        token: str | None,
        own: Sequence[Mapping[str, int]],
        places: Mapping[int, int],
        base: int | None,
        name: str,
    ) -> tuple[tuple[Cell, ...], bool]:
        """Choose the row for models that lack a token, and say whether even those that have it take it."""
        rule, model = self.rules.get(token or "", (None, None))
        if token is not None and rule is not None and (rule.model is not None or rule.zero):
            return self._ruled(token, rule, model, own, places, name), rule.force
        having = [number for number, numbers in enumerate(own) if token is not None and token in numbers]
        if base in having and len(having) > 1:
            having = [number for number in having if number == base]
        return tuple((number, own[number][token or ""]) for number in having), False

    def _ruled(
        self, token: str, rule: TokenRule, model: int | None, own: Sequence[Mapping[str, int]],
        places: Mapping[int, int], name: str,
    ) -> tuple[Cell, ...]:  # fmt: skip
        if rule.zero:
            return ()
        place = places.get(model or 0)
        if place is None:
            raise MismatchError(
                f"line {rule.line}: {rule.model} has no such tensor, but token {token!r} wants its row", tensor=name
            )
        number = rule.token_id if rule.token_id is not None else own[place].get(rule.token or token)
        if number is None:
            raise MismatchError(f"line {rule.line}: {rule.model} has no token {rule.token!r}")
        return ((place, number),)


def choose_tokens(
    choice: TokenizerChoice, models: Sequence[Checkpoint], base: Checkpoint | None, inputs: Spelled
) -> Tokens:
    """Build the output's tokenizer.

    Args:
        choice: what the recipe says.
        models: all models of the merge, the base or else the first model in front.
        base: the base, if there is one.
        inputs: opens what the choice names.

    Raises:
        FormatError: a tokenizer that is not there or not understood.
    """
    first = models[0]
    found = {id(model): _vocabulary(model) for model in models}
    fallback = found[id(first)]
    if fallback is None:
        raise FormatError(f"line {choice.line}: {first.label} has no tokenizer.json, vocab.json or vocab.txt")
    own = {key: fallback if vocabulary is None else vocabulary for key, vocabulary in found.items()}
    donor = inputs.get(choice.source).model if isinstance(choice.source, Reference) else first
    vocabulary = own.get(id(donor)) or _vocabulary(donor)
    if vocabulary is None:
        raise FormatError(f"line {choice.line}: {donor.label} has no tokenizer.json, vocab.json or vocab.txt")
    added = _union(vocabulary, [own[id(model)] for model in models]) if choice.source == "union" else {}
    known = {**vocabulary.numbers, **{token: entry["id"] for token, entry in added.items()}}
    for token in choice.tokens:
        if token not in known:
            number = max(known.values(), default=-1) + 1
            known[token], added[token] = number, forms.plain_entry(token, number)
    try:
        files = forms.with_tokens(reader(donor), added) if added else {}
    except SurgeryError as error:
        raise error.at(file=donor.label) from None
    rows = max(known.values(), default=-1) + 1
    multiple = choice.pad_to_multiple_of or 1
    rules = {
        token: (rule, None if rule.model is None else id(inputs.get(rule.model).model))
        for token, rule in choice.tokens.items()
    }
    return Tokens(
        Vocabulary(known), -(-rows // multiple) * multiple, files, donor, own, rules, None if base is None else id(base)
    )


def _vocabulary(model: Checkpoint) -> Vocabulary | None:
    try:
        found = forms.read_vocabulary(reader(model))
    except SurgeryError as error:
        raise error.at(file=model.label) from None
    rows = rows_of(model)
    return found if found is None or rows is None else found.within(rows)


def _union(start: Vocabulary, others: Sequence[Vocabulary]) -> dict[str, dict[str, Any]]:
    """List the tokens that ``start`` lacks, numbered on from its own."""
    added: dict[str, dict[str, Any]] = {}
    number = max(start.numbers.values(), default=-1) + 1
    for special in (False, True):
        for vocabulary in others:
            for token in sorted(vocabulary.numbers, key=vocabulary.numbers.__getitem__):
                if (token in vocabulary.added) == special and token not in start.numbers and token not in added:
                    entry = vocabulary.added.get(token) or forms.plain_entry(token, number)
                    added[token] = {**entry, "id": number}
                    number += 1
    return added


def renumbered(document: Mapping[str, Any], donor: Vocabulary, out: Vocabulary) -> dict[str, Any]:
    """Translate the numbers of special tokens in a configuration (``eos_token_id`` …) into the output's.

    >>> renumbered({"eos_token_id": [1, 7]}, Vocabulary({"a": 0, "</s>": 1}), Vocabulary({"</s>": 0, "a": 1}))
    {'eos_token_id': [0, 7]}
    """
    tokens = {number: token for token, number in donor.numbers.items()}

    def one(number: Any) -> Any:
        return out.numbers.get(tokens.get(number, ""), number) if type(number) is int else number

    return {
        key: ([one(item) for item in value] if isinstance(value, list) else one(value))
        if key.endswith("_token_id")
        else value
        for key, value in document.items()
    }


def generation_config(donor: Checkpoint, tokens: Tokens) -> dict[str, bytes]:
    """Return ``generation_config.json`` with special tokens renumbered, where that changes anything."""
    data = reader(donor)("generation_config.json")
    if data is None:
        return {}
    document = strict_object(data)
    changed = renumbered(document, tokens.own[id(donor)], tokens.vocabulary)
    return {"generation_config.json": encode_document(changed)} if changed != document else {}


def chat_template(text: str, models: Sequence[Checkpoint], line: int) -> str | None:
    """Return the chat template that a recipe asks for.

    Args:
        text: ``auto`` for the one that most models have, a name of :data:`TEMPLATES`, or a template.
        models: all models of the merge.
        line: where the recipe asks.

    Raises:
        FormatError: no such name, and no template.
    """
    if text == "auto":
        found = Counter(filter(None, (forms.template_of(reader(model)) for model in models)))
        return found.most_common(1)[0][0] if found else None
    if text in TEMPLATES:
        return TEMPLATES[text]
    if "{" not in text:
        raise FormatError(f"line {line}: no chat template {text!r}", mend=f"there are auto, {', '.join(TEMPLATES)}")
    return text
