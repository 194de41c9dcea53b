"""The one loop that trains every method, and what is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.methods.candidates import HEAD
from bench.methods.task import Example, padded, shuffled

EPOCHS, BATCH, WARM_UP = 3, 16, 0.1
"""Passes over the training sentences, sentences a step, and the share of steps in which the learning rate rises."""


def model_of(folder: Path) -> Any:
    """Load the model with its head, as transformers does."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder)


def train(model: torch.nn.Module, examples: Sequence[Example], rate: float, seed: int) -> float:
    """Train with AdamW, a linear warm-up and decay, and return the processor seconds that it took."""
    began = time.process_time()
    torch.manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    steps = EPOCHS * -(-len(examples) // BATCH)
    rising = WARM_UP * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / rising, (steps - step) / (steps - rising))
    )
    model.train()
    for epoch in range(EPOCHS):
        for batch in shuffled(examples, BATCH, seed=1000 * seed + epoch):
            model(**padded(batch)).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return time.process_time() - began


def accuracy(model: torch.nn.Module, examples: Sequence[Example]) -> float:
    """Return the share of sentences that are told right."""
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(ordered), 64):
            batch = padded(ordered[start : start + 64])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(examples)


def trained_parameters(model: torch.nn.Module) -> int:
    """Count what trains, without the head."""
    return sum(value.numel() for name, value in model.named_parameters() if value.requires_grad and HEAD not in name)
