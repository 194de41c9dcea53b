"""The task: is a sentence of a film review for the film, or against it?

10,605 sentences that twenty people each rated from −4 to 4, from the source package of ``vaderSentiment`` (MIT): Hutto and
Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM. A label is the
sign of the mean rating. The file is read where pip put it; none of it is part of this repository.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACKAGE = "vaderSentiment-3.3.2"
_ARCHIVE = f"{PACKAGE}/additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

SIZES = {"train": 480, "validation": 200, "test": 800}
LONGEST = 16
"""Tokens of a sentence that is taken: the short ones, so that two cores are done in minutes."""
_SHUFFLED_APART = 8
"""Batches that are sorted by length together."""


@dataclass(frozen=True)
class Example:
    """A sentence as tokens, and whether it speaks for the film."""

    tokens: list[int]
    label: int


def read(folder: Path, tokenizer: Any) -> dict[str, list[Example]]:
    """Split the sentences into training, validation and test examples, the same ones each time."""
    rated = list(_sentences(folder / f"{PACKAGE}.tar.gz").items())
    random.Random(0).shuffle(rated)
    tokens = tokenizer([text for text, _ in rated])["input_ids"]
    examples = (Example(ids, label) for ids, (_, label) in zip(tokens, rated, strict=True) if len(ids) <= LONGEST)
    return {name: [next(examples) for _ in range(size)] for name, size in SIZES.items()}


def _sentences(archive: Path) -> dict[str, int]:
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(_ARCHIVE)) as inner:
        file = inner.extractfile(_MEMBER)
        assert file is not None
        rows = [line.split("\t") for line in file.read().decode().splitlines()]
    return {text: int(float(rating) > 0) for _, rating, text in rows if float(rating) != 0}


def shuffled(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches in an order drawn from ``seed``, of sentences of about one length each."""
    drawn = list(examples)
    random.Random(seed).shuffle(drawn)
    stretch = size * _SHUFFLED_APART
    for start in range(0, len(drawn), stretch):
        together = sorted(drawn[start : start + stretch], key=lambda example: len(example.tokens))
        batches = [together[at : at + size] for at in range(0, len(together), size)]
        yield from random.Random(seed).sample(batches, len(batches))


def padded(batch: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Make one batch as a model takes it."""
    width = max(len(example.tokens) for example in batch)
    rows = [example.tokens + [0] * (width - len(example.tokens)) for example in batch]
    mask = [[1] * len(example.tokens) + [0] * (width - len(example.tokens)) for example in batch]
    labels = [example.label for example in batch]
    return {
        "input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels),
    }  # fmt: skip
