"""Tokens of a text, by a model's own ``tokenizer.json``; the only place that imports ``tokenizers``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, MismatchError
from surgery.formats.tokenizer import MAIN
from surgery.sources import local

FILE = MAIN


def of_text(text: str, path: Path | None, label: str) -> tuple[int, ...]:
    """Turn a text into tokens, with the special ones that the tokenizer puts around it.

    Args:
        text: what to encode.
        path: of ``tokenizer.json``, where the model has one.
        label: the model, for messages.

    Raises:
        MismatchError: there is no such file, ``tokenizers`` is not installed, or the text has no tokens.
        FormatError: the file is no tokenizer.
    """
    if path is None:
        raise MismatchError(f"has no {FILE}, so a text has no tokens", file=label, mend="give them by -p tokens=1,2,3")
    try:
        library: Any = importlib.import_module("tokenizers")
    except ImportError as error:
        mend = "pip install 'checkpoint-surgery[hf]', or give tokens by -p tokens=1,2,3"
        raise MismatchError(f"tokenizers is needed to encode a text: {error}", mend=mend) from None
    tokenizer = local.read_small(path)
    try:
        found = tuple(library.Tokenizer.from_str(tokenizer.decode()).encode(text).ids)
    except UnicodeDecodeError as error:
        raise FormatError(f"is no tokenizer: {error}", file=path) from None
    except BaseException as error:
        if type(error) is not Exception:  # all that the library raises for a file it cannot read is a bare one
            raise
        raise FormatError(f"is no tokenizer: {error}", file=path) from None
    if not found:
        raise MismatchError(f"{text!r:.60} has no tokens", file=path)
    return found
