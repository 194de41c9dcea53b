"""Whether an adapter loads in a server, and if not why, and how to mend it: told from its configuration and headers.

The rules are data in :mod:`surgery.formats.servers`, and are held against an adapter in
:mod:`surgery.formats.serving_checks`; those of PEFT itself, which are about names and configuration rather than kinds of
tensor, are in :mod:`surgery.formats.peft_loading`. Nothing here reads a value or opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import FormatError
from surgery.formats import peft, peft_loading
from surgery.formats.kinds import KINDS, Parts, kind_of
from surgery.formats.servers import (
    SERVERS,
    Level,
    Problem,
    Server,
    holds,
    missing_partners,
    one_rank,
    server_named,
    start_with,
)
from surgery.formats.serving_checks import Check
from surgery.tensor import TensorSpec

__all__ = [
    "KINDS", "SERVERS", "Level", "Problem", "Server", "holds", "kind_of", "missing_partners", "one_rank", "problems",
    "server_named", "start_with",
]  # fmt: skip

_ORDER: tuple[Level, ...] = ("refused", "wrong", "note")


def problems(
    server: str,
    document: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    *,
    base_specs: Mapping[str, TensorSpec] | None = None,
    max_rank: int | None = None,
) -> list[Problem]:
    """Say what keeps an adapter from loading in a server, or from doing there what it does in PEFT.

    Args:
        server: ``peft``, ``vllm``, ``sglang`` or ``llamacpp``.
        document: ``adapter_config.json``.
        specs: the adapter's tensors by key.
        base_specs: the base's tensors, under the names that the adapter uses for them; without them, names and shapes
            are held against each other only.
        max_rank: the ``--max-lora-rank`` that the server was started with, where that is known.

    Returns:
        The worst first; empty where it loads and does what it says.

    Raises:
        FormatError: a pattern in the configuration is no regular expression, or could take for ever to match.
        UsageError: no server is called so.

    >>> a = TensorSpec("", "F32", (4, 8))
    >>> keys = {f"base_model.model.layers.0.q_proj.lora_{x}.weight": a for x in "A"}
    >>> print(*problems("vllm", {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}, keys))
    refused: layers.0.q_proj: has A but no B; the adapter is incomplete
    """
    found = server_named(server)
    method = peft_loading.method_problems(found, document)
    if method:
        return method
    config, broken = _configuration(found, document)
    if config is None:
        return broken
    parts = Parts.of(document, specs)
    check = Check(found, document, specs, config, parts, dict(base_specs or {}), max_rank)
    result = broken + check.everything()
    if found.name == "peft":
        result += peft_loading.problems(document, specs, parts.factors.keys(), check.base)
    return sorted(result, key=lambda problem: _ORDER.index(problem.level))


def _configuration(server: Server, document: Mapping[str, Any]) -> tuple[peft.LoraConfig | None, list[Problem]]:
    """Take out what decides rank and scale; ``None`` where that cannot be known."""
    broken = [
        Problem("refused", name, f"{server.title} needs this field of {peft.CONFIG}", f"add {name}")
        for name in server.required
        if name not in document
    ]
    numbers = {"r": document.get("r", 8), "lora_alpha": document.get("lora_alpha", 8)}
    for name, least in (("r", 1), ("lora_alpha", None)):
        value = numbers[name]
        if not peft.is_number(value) or (least and (type(value) is not int or value < least)):
            wanted = "a rank of 1 or more" if least else "a number"
            broken.append(Problem("refused", name, f"is {value!r:.40}; it must be {wanted}", None))
        elif abs(value) > peft.LARGEST:
            broken.append(Problem("refused", name, f"is beyond {peft.LARGEST:,}", None))
    patterns: dict[str, dict[str, Any]] = {}
    for name in ("rank_pattern", "alpha_pattern"):
        try:
            patterns[name] = peft.numbers(document, name, whole=name == "rank_pattern")
        except FormatError as error:
            broken.append(Problem("refused", name, error.what, error.mend))
    if any(problem.what in (*numbers, "rank_pattern", "alpha_pattern") and problem.mend is None for problem in broken):
        return None, broken
    if len(patterns) < 2:
        return None, broken
    return (
        peft.LoraConfig(
            r=numbers["r"],
            alpha=float(numbers["lora_alpha"]),
            use_rslora=document.get("use_rslora") is True,
            rank_pattern=patterns["rank_pattern"],
            alpha_pattern=patterns["alpha_pattern"],
        ),
        broken,
    )
