"""What a method may know of a model: names, shapes, roles, ``config.json``. Answers that are not there are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from surgery.errors import MismatchError, UnsupportedError
from surgery.formats import peft
from surgery.methods.addition import New
from surgery.methods.starts import Copy
from surgery.names import Pattern, module_of, parse_patterns, select
from surgery.roles import ROLES, is_fused_experts, layer_of, roles_of, transposed_weights
from surgery.tensor import ARITHMETIC, TensorSpec

_ASK = "name the modules by --target; surgery info --roles shows what each is taken for"


@dataclass(frozen=True)
class Model:
    """A model's header.

    Args:
        specs: every tensor.
        config: ``config.json``.
        in_memory: name on disk → name in memory, where the two differ and the caller asked for it.
    """

    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any] = field(default_factory=dict)
    in_memory: Mapping[str, str] | None = None

    @cached_property
    def roles(self) -> dict[str, str]:
        """Name → role."""
        return roles_of(self.specs)

    @cached_property
    def transposed(self) -> set[str]:
        """Weights stored ``(in, out)``."""
        return transposed_weights(self.specs, self.config)

    @cached_property
    def modules(self) -> list[str]:
        """Every module with a parameter, as PEFT names it."""
        return list(dict.fromkeys(self.module(name) for name in self.specs))

    @cached_property
    def task(self) -> str | None:
        """The PEFT task of the model's class."""
        return peft.task_type(self.config)

    def name(self, name: str) -> str:
        """Name a tensor as PEFT does.

        Raises:
            MismatchError: it is fused with others in memory.
        """
        if self.in_memory is None:
            return name
        if name not in self.in_memory:
            raise MismatchError("has no name of its own in memory", tensor=name, mend="choose other modules")
        return self.in_memory[name]

    def module(self, name: str) -> str:
        """Name the module of a tensor as PEFT does."""
        return module_of(name if self.in_memory is None else self.in_memory.get(name, name))

    def having(self, *roles: str) -> list[str]:
        """List the tensors of some roles, in the checkpoint's order."""
        return [name for name, role in self.roles.items() if role in roles]

    def choose(self, target: Sequence[str], default: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
        """Choose the tensors that a method works on.

        A bare word that no module is called, but a role is, is taken for the role.

        Args:
            target: patterns, or nothing for the method's own choice.
            default: that choice: roles. Where q, k and v are fused, all of them are taken.

        Returns:
            Names in the checkpoint's order, and notes.

        Raises:
            MismatchError: a pattern matches nothing, or no tensor has one of the default roles.
        """
        if target:
            patterns = [self._pattern(pattern) for pattern in parse_patterns(target)]
            chosen = select(self.roles, patterns, "--target")
            return [name for name in self.specs if name in chosen], ()
        roles = set(default) & set(self.roles.values())
        notes: tuple[str, ...] = ()
        if not roles & {"q", "k", "v"} and {"q", "k", "v"} & set(default) and self.having("qkv"):
            roles.add("qkv")
            notes = ("q, k and v are one weight in this model: all three are adapted",)
        found = [name for name in self.having(*roles) if not self.is_expert(name)]
        if len(found) < len(self.having(*roles)):
            notes = (*notes, "experts are left out; --target chooses them, for LoRA")
            roles &= {self.roles[name] for name in found}
        if not roles or (not roles & {"q", "k", "v", "qkv"} and {"q", "k", "v"} & set(default)):
            raise MismatchError(f"no rule finds {' or '.join(default)} in this model", mend=_ASK)
        return found, notes

    def is_expert(self, name: str) -> bool:
        """Say whether a tensor is of experts: of one, or of all of them fused."""
        return is_fused_experts(self.specs[name]) or re.search(r"\.experts\.\d+\.", name) is not None

    def _pattern(self, pattern: Pattern) -> Pattern:
        plain = pattern.role is None and pattern.text in ROLES
        if plain and not any(pattern.matches(name) for name in self.specs):
            return Pattern(f"role:{pattern.text}")
        return pattern

    @cached_property
    def hidden(self) -> int:
        """Width of the residual stream.

        Raises:
            MismatchError: neither ``config.json`` nor an embedding tells.
        """
        for key in ("hidden_size", "n_embd", "d_model", "dim"):
            if isinstance(self._text_config.get(key), int):
                return int(self._text_config[key])
        return self.specs[self.embedding].shape[1]

    @cached_property
    def _text_config(self) -> Mapping[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    @cached_property
    def embedding(self) -> str:
        """The input embedding of tokens: the 2-D embedding with most rows outside of blocks.

        Raises:
            MismatchError: there is none.
        """
        found = [n for n in self.having("embedding") if len(self.specs[n].shape) == 2 and not layer_of(n)]
        words = [name for name in found if not re.search(r"pos|type|wpe", name)]
        if not words:
            raise MismatchError(
                "no rule finds its input embedding", mend="the model takes no tokens, or names them oddly"
            )
        return max(words, key=lambda name: self.specs[name].shape[0])

    @cached_property
    def blocks(self) -> dict[str, list[str]]:
        """Stem of a stack → its blocks in order: ``{"encoder.layer": ["encoder.layer.0", …]}``.

        Raises:
            MismatchError: no block has an attention.
        """
        found = {layer_of(name) for name in self.having("q", "qkv")} - {""}
        if not found:
            raise MismatchError("no rule finds blocks with an attention in this model", mend=_ASK)
        stacks: dict[str, list[str]] = {}
        for block in sorted(found, key=lambda name: (name.rpartition(".")[0], int(name.rpartition(".")[2]))):
            stacks.setdefault(block.rpartition(".")[0], []).append(block)
        return stacks

    @cached_property
    def depth(self) -> int:
        """Blocks in all stacks."""
        return sum(map(len, self.blocks.values()))

    def setting(self, *keys: str) -> int | None:
        """Look up a whole number of ``config.json`` under any of its names."""
        for key in keys:
            if isinstance(self._text_config.get(key), int):
                return int(self._text_config[key])
        return None

    def sides(self, name: str) -> tuple[int, int]:
        """Return ``(out, in)`` of a linear weight.

        Raises:
            MismatchError: not a 2-D weight.
        """
        shape = self.specs[name].shape
        if len(shape) != 2:
            raise MismatchError(f"is {len(shape)}-D, not a linear weight", tensor=name, mend="choose matrices")
        return (shape[1], shape[0]) if name in self.transposed else (shape[0], shape[1])

    def check_adaptable(self, name: str, *, experts: bool = False) -> None:
        """Refuse what PEFT has no module for.

        Args:
            name: of a tensor.
            experts: whether the method can have matrices of single experts.

        Raises:
            UnsupportedError: experts, bare parameters, codes.
        """
        spec = self.specs[name]
        if self.is_expert(name) and not experts:
            raise UnsupportedError("is an expert: PEFT adapts those by LoRA alone", tensor=name, mend=_ASK)
        if not name.endswith((".weight", ".bias")):
            raise UnsupportedError("is a bare parameter: PEFT adapts modules", tensor=name, mend=_ASK)
        if spec.dtype not in ARITHMETIC:
            raise UnsupportedError(f"is {spec.dtype}, not floating point", tensor=name, mend="dequantise it first")

    def task_head(self, prefix: str) -> tuple[list[str], tuple[New, ...]]:
        """Find the head that PEFT trains and saves whole for the model's task.

        Returns:
            Its modules, and its parameters as they are now.
        """
        heads = peft.task_heads(self.task, self.modules)
        inside = tuple(f"{head}." for head in heads)
        found = [name for name in self.specs if self.module(name) and f"{self.module(name)}.".startswith(inside)]
        new = (
            [New(f"{prefix}{self.name(name)}", self.specs[name].shape, Copy(name)) for name in found] if inside else []
        )
        return heads, tuple(new)
