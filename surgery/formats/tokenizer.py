"""Tokenizers as JSON: which token has which number, and how further tokens are added. No tokenizer is ever run.

Three forms are read: ``tokenizer.json`` of the tokenizers library, ``vocab.json`` (BPE) and ``vocab.txt`` (WordPiece),
the latter two with ``added_tokens.json`` beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import FormatError, SurgeryError
from surgery.formats.safetensors import encode_document, strict_object

MAIN, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILE_STARTS = ("tokenizer", "special_tokens_map", "added_tokens", "merges", "vocab", "chat_template", "spiece")
"""How the names of a tokenizer's files start."""
Read = Callable[[str], bytes | None]
"""Returns a file of a model's folder; ``None`` where there is none."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer."""

    numbers: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Tokens beside the model's own vocabulary, with how they are matched, as ``tokenizer.json`` has it."""

    def within(self, rows: int) -> Vocabulary:
        """Drop the tokens that have no row in an embedding of so many."""
        numbers = {token: number for token, number in self.numbers.items() if number < rows}
        return Vocabulary(numbers, {token: entry for token, entry in self.added.items() if token in numbers})


def read_vocabulary(read: Read) -> Vocabulary | None:
    """Find a model's vocabulary among its files; ``None`` where it has no tokenizer that is understood.

    Raises:
        FormatError: malformed.
    """
    for name, parse in ((MAIN, _parse_main), ("vocab.json", _parse_map), ("vocab.txt", _parse_lines)):
        data = read(name)
        if data is None:
            continue
        try:
            found = parse(data)
            more = None if name == MAIN else read("added_tokens.json")
            return found if more is None else _joined(found, _parse_map(more))
        except SurgeryError as error:
            raise error.at(file=name) from None
    return None


def _parse_main(data: bytes) -> Vocabulary:
    """Read the numbers from ``tokenizer.json``.

    >>> _parse_main(b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<s>"}]}').numbers
    {'a': 0, '<s>': 1}
    """
    document = strict_object(data)
    model, added = document.get("model"), document.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: a list of [token, score]
        pairs = [entry[0] if isinstance(entry, list) and entry else None for entry in vocabulary]
        vocabulary = {token: number for number, token in enumerate(pairs)}
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise FormatError("has no vocabulary that is understood")
    entries = {str(entry.get("content")): entry for entry in added if isinstance(entry, dict)}
    numbers = {**vocabulary, **{token: entry.get("id") for token, entry in entries.items()}}
    return Vocabulary(_checked(numbers), entries)


def _parse_map(data: bytes) -> Vocabulary:
    return Vocabulary(_checked(strict_object(data)))


def _parse_lines(data: bytes) -> Vocabulary:
    lines = data.decode("utf-8", "replace").splitlines()
    return Vocabulary({token: number for number, token in enumerate(lines)})


def _checked(numbers: Mapping[Any, Any]) -> dict[str, int]:
    if not all(isinstance(token, str) and type(number) is int and number >= 0 for token, number in numbers.items()):
        raise FormatError("a token has no number")
    if len(set(numbers.values())) != len(numbers):
        raise FormatError("two tokens have the same number")
    return dict(numbers)


def _joined(one: Vocabulary, other: Vocabulary) -> Vocabulary:
    entries = {token: plain_entry(token, number) for token, number in other.numbers.items()}
    return Vocabulary(_checked({**one.numbers, **other.numbers}), entries)


def plain_entry(token: str, number: int) -> dict[str, Any]:
    """Describe an added token that is matched as it stands."""
    return {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": False}  # fmt: skip


def with_tokens(files: Read, added: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """Return the files of a tokenizer that change when tokens are added to it.

    Args:
        files: reads the tokenizer's own.
        added: the new tokens' entries, by token.

    Raises:
        FormatError: it has no ``tokenizer.json``.
    """
    data = files(MAIN)
    if data is None:
        raise FormatError(f"has no {MAIN}, so no token can be added", mend="save it as a fast tokenizer first")
    document = strict_object(data)
    document["added_tokens"] = [*(document.get("added_tokens") or []), *added.values()]
    changed = {MAIN: encode_document(document)}
    config = files(CONFIG)
    settings = strict_object(config) if config is not None else {}
    known = settings.get("added_tokens_decoder")
    if isinstance(known, dict):
        settings = copy.deepcopy(settings)
        for entry in added.values():
            settings["added_tokens_decoder"][str(entry["id"])] = {k: v for k, v in entry.items() if k != "id"}
        changed[CONFIG] = encode_document(settings)
    return changed


def with_template(config: bytes | None, template: str) -> dict[str, bytes]:
    """Return the files that give a tokenizer a chat template."""
    settings = strict_object(config) if config is not None else {}
    return {TEMPLATE: template.encode(), CONFIG: encode_document({**settings, "chat_template": template})}


def template_of(read: Read) -> str | None:
    """Find a model's chat template."""
    data = read(TEMPLATE)
    if data is not None:
        return data.decode("utf-8", "replace").strip() or None
    config = read(CONFIG)
    found = strict_object(config).get("chat_template") if config is not None else None
    if isinstance(found, list):  # several, by name
        found = next(
            (item.get("template") for item in found if isinstance(item, dict) and item.get("name") == "default"), None
        )
    return found.strip() or None if isinstance(found, str) else None
