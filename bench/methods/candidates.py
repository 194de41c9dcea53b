"""The table of methods: what ``surgery add`` is asked for, and by which tool it is trained from the file, as users do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HEAD = "classifier."
"""The task's head, which every method trains, and no count includes."""


@dataclass(frozen=True)
class Tool:
    """How a file of ``surgery add`` becomes a model to train, and how what was trained is saved again."""

    name: str
    load: Callable[[Any, Path], torch.nn.Module]
    save: Callable[[Any, Path], None]


def _torch(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Train the parameters that the file names; all where there is no file."""
    listed = folder / "trainable.json"
    names = set(json.loads(listed.read_text())) if listed.exists() else {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or name.startswith(HEAD))
    return model


def _save_trained(model: torch.nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    save_file(trained, folder / "trained.safetensors")


def _save_all(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _peft(model: Any, folder: Path) -> torch.nn.Module:
    import peft

    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def _peft_prompt(model: Any, folder: Path) -> torch.nn.Module:
    """Start a prompt from a file: PEFT goes on training prompts only as a new method that is given their values."""
    import peft
    from safetensors.torch import load_file

    prompted = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder, inference_mode=False))
    peft.set_peft_model_state_dict(prompted, load_file(folder / "adapter_model.safetensors"))
    return prompted


def _adapterhub(model: Any, folder: Path) -> torch.nn.Module:
    import adapters

    adapters.init(model)
    name = model.load_adapter(str(folder), use_safetensors=True, set_active=True)
    model.train_adapter(name)
    return model


def _save_adapter(model: Any, folder: Path) -> None:
    model.save_adapter(str(folder), "adapter", use_safetensors=True)


TORCH = Tool("PyTorch", _torch, _save_trained)
WHOLE = Tool("PyTorch", _torch, _save_all)
PEFT = Tool("PEFT", _peft, _save_all)
PROMPT = Tool("PEFT", _peft_prompt, _save_all)
ADAPTERHUB = Tool("AdapterHub", _adapterhub, _save_adapter)


@dataclass(frozen=True)
class Candidate:
    """One row: a method, its file, its tool, and the learning rates that are tried on the validation sentences."""

    title: str
    tool: Tool
    rates: tuple[float, ...]
    add: tuple[str, ...] = ()
    """Arguments of ``surgery add``; nothing for what needs no file."""


CANDIDATES = {
    "full": Candidate("full fine-tuning", WHOLE, (5e-5, 1e-4, 2e-4)),
    "ft-top2": Candidate("FT-Top2", TORCH, (1e-4, 3e-4, 1e-3), ("ft-topk", "-p", "k=2")),
    "bitfit": Candidate("BitFit", PEFT, (1e-3, 3e-3, 1e-2), ("bitfit",)),
    "lora": Candidate("LoRA, r = 8 on q and v", PEFT, (1e-3, 3e-3, 1e-2), ("lora", "-p", "r=8")),
    "houlsby": Candidate("Houlsby, size 32", ADAPTERHUB, (3e-4, 1e-3, 3e-3), ("houlsby", "-p", "size=32")),
    "pfeiffer": Candidate("Pfeiffer, size 32", ADAPTERHUB, (3e-4, 1e-3, 3e-3), ("pfeiffer", "-p", "size=32")),
    "prompt": Candidate("prompt tuning, 20 tokens", PROMPT, (1e-2, 3e-2, 1e-1), ("prompt-tuning", "-p", "length=20")),
    "ia3": Candidate("IA³", PEFT, (3e-3, 1e-2, 3e-2), ("ia3",)),
    "head": Candidate("the head alone", TORCH, (1e-3, 3e-3, 1e-2), ("head", "-p", "labels=2")),
}
