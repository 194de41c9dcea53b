"""Model cards: a README with metadata for the Hub, of which surgery rewrites its own part and nothing else.

A card is YAML between two lines of ``---``, then Markdown. What surgery has to say stands between two comments; text
and metadata that people wrote around it are kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from surgery.errors import FormatError

FILE = "README.md"
BEGIN = "<!-- surgery: begin; this section is rewritten by surgery, write around it -->"
END = "<!-- surgery: end -->"

_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What surgery has to say about a model."""

    metadata: Mapping[str, Any]
    """Keys of the Hub's metadata, in order; ``None`` is left out."""
    section: str
    """Markdown."""


def compose(card: ModelCard) -> bytes:
    """Write a card where there is none.

    >>> print(compose(ModelCard({"library_name": "peft", "license": None, "tags": ["lora"]}, "# A title")).decode())
    ---
    library_name: peft
    tags:
    - lora
    ---
    <BLANKLINE>
    <!-- surgery: begin; this section is rewritten by surgery, write around it -->
    # A title
    <!-- surgery: end -->
    <BLANKLINE>
    """
    return f"{_front(_given(card))}\n{_marked(card)}\n".encode()


def revise(existing: bytes, card: ModelCard) -> bytes:
    """Put a card into one that is there: its section is replaced, its metadata brought up to date, the rest kept.

    Keys that surgery does not set stay, and so does a licence; tags are joined.

    Raises:
        FormatError: the metadata that is there cannot be read.
    """
    text = _text(existing)
    found = metadata(existing)
    ours = _given(card)
    merged = {**found, **ours}
    merged["tags"] = list(dict.fromkeys([*_listed(found.get("tags")), *_listed(ours.get("tags"))]))
    if found.get("license"):
        merged["license"] = found["license"]
    front = _FRONT.match(text)
    body = text[front.end() :] if front else text
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: _marked(card), body, count=1)
    else:
        body = f"{body.rstrip()}\n\n{_marked(card)}\n" if body.strip() else f"\n{_marked(card)}\n"
    if front and merged == found:
        return (text[: front.end()] + body).encode()
    return (_front(merged) + body).encode()


def metadata(card: bytes) -> dict[str, Any]:
    """Read a card's metadata; empty where it has none.

    Raises:
        FormatError: it is not a mapping in YAML.

    >>> metadata(compose(ModelCard({"license": "mit"}, "words")))
    {'license': 'mit'}
    """
    front = _FRONT.match(_text(card))
    if front is None:
        return {}
    try:
        found = yaml.safe_load(front[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = str(error).splitlines()[0] if str(error) else "cannot be read"
        raise FormatError(f"its metadata is not YAML: {what}", file=FILE) from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise FormatError("its metadata is not a mapping of names to values", file=FILE)
    return found


def has_own_words(card: bytes) -> bool:
    """Say whether somebody wrote into a card, around the section of surgery.

    >>> card = ModelCard({"library_name": "peft"}, "# A title")
    >>> has_own_words(compose(card)), has_own_words(compose(card) + b"Mine.")
    (False, True)
    """
    text = _text(card)
    front = _FRONT.match(text)
    return bool(_SECTION.sub("", text[front.end() :] if front else text).strip())


def _text(card: bytes) -> str:
    try:
        return card.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"is not UTF-8 at byte {error.start}", file=FILE) from None


def _given(card: ModelCard) -> dict[str, Any]:
    return {key: value for key, value in card.metadata.items() if value is not None}


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _front(found: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(found), sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _marked(card: ModelCard) -> str:
    return f"{BEGIN}\n{card.section.strip()}\n{END}"
