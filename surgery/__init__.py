"""surgery: operate directly on model checkpoints.

Add the parameters of parameter-efficient methods, diff fine-tuned against base checkpoints, extract low-rank
adapters, merge and unmerge deltas. The same functions take a path or a state dict in memory, and return lazy objects.

>>> import surgery, torch
>>> base = {"q_proj.weight": torch.zeros(4, 4)}
>>> tuned = {"q_proj.weight": torch.eye(4)}
>>> adapter = surgery.extract_lora(base, tuned, rank=4)
>>> merged = surgery.merge(base, adapter)
>>> torch.equal(merged["q_proj.weight"], torch.eye(4))
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from surgery.adapter import Adapter
    from surgery.checkpoint import Checkpoint
    from surgery.checkpoint import open_checkpoint as open
    from surgery.errors import SurgeryError
    from surgery.operations.add import add
    from surgery.operations.convert import convert
    from surgery.operations.delta_squash import squash_deltas
    from surgery.operations.delta_switch import switch_delta
    from surgery.operations.diff import diff
    from surgery.operations.extract_delta import extract_delta
    from surgery.operations.extract_lora import extract_lora
    from surgery.operations.info import info
    from surgery.operations.merge import merge
    from surgery.operations.push import push
    from surgery.operations.recipe import merge_recipe
    from surgery.operations.remove import remove
    from surgery.operations.spectrum import spectrum
    from surgery.operations.unmerge import unmerge
    from surgery.operations.verify import verify

__all__ = [
    "Adapter",
    "Checkpoint",
    "SurgeryError",
    "__version__",
    "add",
    "convert",
    "diff",
    "extract_delta",
    "extract_lora",
    "info",
    "merge",
    "merge_recipe",
    "open",
    "push",
    "remove",
    "spectrum",
    "squash_deltas",
    "switch_delta",
    "unmerge",
    "verify",
]

# Public names are imported when first used: `surgery --help` and header-only work must not pay for torch.
_HOMES = {
    "Adapter": ("surgery.adapter", "Adapter"),
    "Checkpoint": ("surgery.checkpoint", "Checkpoint"),
    "SurgeryError": ("surgery.errors", "SurgeryError"),
    "add": ("surgery.operations.add", "add"),
    "convert": ("surgery.operations.convert", "convert"),
    "diff": ("surgery.operations.diff", "diff"),
    "extract_delta": ("surgery.operations.extract_delta", "extract_delta"),
    "extract_lora": ("surgery.operations.extract_lora", "extract_lora"),
    "info": ("surgery.operations.info", "info"),
    "merge": ("surgery.operations.merge", "merge"),
    "merge_recipe": ("surgery.operations.recipe", "merge_recipe"),
    "open": ("surgery.checkpoint", "open_checkpoint"),
    "push": ("surgery.operations.push", "push"),
    "remove": ("surgery.operations.remove", "remove"),
    "spectrum": ("surgery.operations.spectrum", "spectrum"),
    "squash_deltas": ("surgery.operations.delta_squash", "squash_deltas"),
    "switch_delta": ("surgery.operations.delta_switch", "switch_delta"),
    "unmerge": ("surgery.operations.unmerge", "unmerge"),
    "verify": ("surgery.operations.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
