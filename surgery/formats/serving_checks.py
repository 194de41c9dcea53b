"""The rules of :mod:`surgery.formats.servers`, held against one adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.formats import peft, peft_loading
from surgery.formats.kinds import CLASS_HEADS, Parts
from surgery.formats.servers import Level, Problem, Server, Unheld, missing_partners, start_with, unserved
from surgery.names import module_of
from surgery.report import join_shown
from surgery.tensor import ARITHMETIC, TensorSpec

_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways to start a LoRA that leave the base as it is, so that a saved adapter is a plain one."""


@dataclass
class Check:
    """One adapter held against one server."""

    server: Server
    document: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    config: peft.LoraConfig
    parts: Parts
    base: Mapping[str, TensorSpec]
    max_rank: int | None

    def everything(self) -> list[Problem]:
        """Run every check that is not PEFT's alone."""
        return [
            *self.fields(), *self.targets(), *self.kinds(), *self.heads(), *self.modules(), *self.pairing(),
            *self.ranks(), *self.largest_rank(), *self.scales(), *self.partners(), *self.dtypes(), *self.base_fits(),
        ]  # fmt: skip

    @property
    def remake(self) -> str:
        """How to get an adapter without what this one must not have."""
        return f"surgery merge BASE ADAPTER -o FT, then surgery extract-lora BASE FT --for {self.server.name}"

    def problem(self, level: Level, items: Iterable[str], why: str, mend: str | None) -> Iterable[Problem]:
        """Say one thing about many keys or modules; nothing where there is none."""
        listed = list(items)
        if listed:
            yield Problem.about(level, listed, why, mend)

    def fields(self) -> Iterable[Problem]:
        """Configuration fields that the server refuses, or should not overlook."""
        for name, why in self.server.fields.items():
            if self.document.get(name):
                yield Problem("refused", name, why, self.remake if name != "lora_bias" else "set it to false")
        for name, why in self.server.ignored.items():
            if self.document.get(name):
                yield Problem("wrong", name, why, None)
        start = self.document.get("init_lora_weights", True)
        if self.server.name != "peft" and isinstance(start, str) and start.lower() not in _INITS:
            level: Level = "refused" if self.server.name == "vllm" else "wrong"
            yield Problem(
                level, "init_lora_weights", f"{start!r:.40} belongs to a base that PEFT changes when it loads",
                "save it with PEFT's path_initial_model_for_weight_conversion",
            )  # fmt: skip
        if self.server.name == "vllm":
            yield from self.vllm_fields()
        if self.server.name == "llamacpp" and not self.document.get("base_model_name_or_path"):
            yield Problem("note", "base_model_name_or_path", "is not set, and the converter looks there for the base",
                          "pass the converter --base FOLDER")  # fmt: skip

    def vllm_fields(self) -> Iterable[Problem]:
        """``bias`` and ``modules_to_save`` as vLLM validates them."""
        bias = self.document.get("bias", "none")
        if bias != "none":
            mend = self.remake if self.parts.kinds.get("bias") else 'set it to "none"'
            yield Problem("refused", "bias", f"is {bias!r:.40}, and vLLM takes none", mend)
        saved = peft_loading.names(self.document, "modules_to_save")
        extra = [name for name in saved if name not in CLASS_HEADS]
        if extra:
            stored = [name for name in extra if any(name in key for key in self.specs)]
            yield Problem(
                "refused", "modules_to_save", f"holds {join_shown(extra)}; vLLM takes classifier or score only",
                self.remake if stored else "remove what has no tensors",
            )  # fmt: skip

    def targets(self) -> Iterable[Problem]:
        """``target_modules`` of servers that go by it."""
        targets = self.document.get("target_modules")
        if self.server.expressions or "target_modules" not in self.document:
            return
        if isinstance(targets, str):
            if targets not in ("all", "all-linear"):
                listed = peft.target_modules(sorted(self.parts.factors), self.base_modules)
                yield Problem("refused", "target_modules", f"is a string, and {self.server.title} takes a list",
                              f"write {listed!r:.200}")  # fmt: skip
            return
        if not isinstance(targets, list) or not all(type(item) is str for item in targets):
            yield Problem("refused", "target_modules", f"{self.server.title} takes a list of names", None)
            return
        known = self.server.modules or {}
        leaves = {target: target.rpartition(".")[2] for target in targets}
        unknown = sorted(target for target, leaf in leaves.items() if leaf not in known)
        yield from self.problem("refused", ["target_modules"] * bool(unknown),
                                f"names {join_shown(unknown)}, on which {self.server.title} has no LoRA", self.remake)  # fmt: skip
        wanted = {known[leaf] for leaf in leaves.values() if leaf in known}
        lost = [
            module for module in self.parts.factors
            if (fused := known.get(module.rpartition(".")[2])) is not None and fused not in wanted
        ]  # fmt: skip
        yield from self.problem("refused", lost, "target_modules does not name it", "add it to target_modules")

    @property
    def base_modules(self) -> list[str]:
        """Names of the base's modules; none where it is not known."""
        return sorted({module_of(name) for name in self.base})

    def kinds(self) -> Iterable[Problem]:
        """Kinds of tensor that the server does not hold."""
        for kind, keys in self.parts.kinds.items():
            verdict = self.server.unheld.get(kind)
            if verdict is None:
                continue
            by_level: dict[Unheld, list[str]] = {}
            for key in keys:
                found = self.unheld(kind, key, verdict)
                if found is not None:
                    by_level.setdefault(found, []).append(key)
            for (level, why), listed in by_level.items():
                yield from self.problem(level, listed, why, self.mend_kind(kind, level))

    def unheld(self, kind: str, key: str, verdict: Unheld) -> Unheld | None:
        """Refine a kind's verdict by the tensor's name."""
        if kind == "base_copy" and self.server.name in ("vllm", "sglang"):
            embedding = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
            return None if key.endswith(embedding) else verdict
        if self.server.layer and not re.search(self.server.layer, key) and verdict.level == "refused":
            return Unheld("wrong", f"{self.server.title} skips what lies outside of 'layers.N'")
        if self.server.name == "llamacpp":
            passes = "_layernorm" in key or ".norm" in key
            if kind == "norm" and not passes:
                return Unheld("refused", self.server.unheld["saved"].why)
            if kind == "head" and self.base and f"{peft.parse_key(key).module}.weight" not in self.base:
                return Unheld("refused", "the base ties it to its embedding, and the converter refuses that")
        return verdict

    def mend_kind(self, kind: str, level: Level) -> str | None:
        """Say what to do about tensors of a kind that is not held."""
        if kind == "base_copy":
            return "remove it: the base has it"
        if kind == "unknown":
            return "remove it, if nothing needs it"
        return None if level == "note" and kind != "head" else self.remake

    def heads(self) -> Iterable[Problem]:
        """Classification heads, which vLLM takes whole where the configuration names them."""
        keys = self.parts.kinds.get("class_head", [])
        if self.server.name != "vllm" or not keys:
            return
        leaves = {peft.parse_key(key).module.rpartition(".")[2] for key in keys}
        unnamed = leaves - set(peft_loading.names(self.document, "modules_to_save"))
        if unnamed:
            yield Problem.about("refused", keys, "modules_to_save does not name it",
                          f"add {join_shown(sorted(unnamed))} to modules_to_save")  # fmt: skip
        elif len(leaves) > 1 or not any(key.endswith(".weight") for key in keys):
            yield Problem.about("refused", keys, "vLLM takes one head, with its weight", None)
        else:
            yield Problem.about("note", keys, "loads in models that vLLM serves as classifiers, and with no more"
                          " labels than --max-lora-cls-labels", None)  # fmt: skip

    def modules(self) -> Iterable[Problem]:
        """Modules that the server puts no LoRA on."""
        reasons: dict[str, list[str]] = {}
        for module in self.parts.factors:
            kind = self.parts.kind_of_module[module]
            why = unserved(self.server, module) if kind not in self.server.unheld else None
            if why:
                reasons.setdefault(why, []).append(module)
        for why, modules in reasons.items():
            yield from self.problem("wrong" if "skips" in why else "refused", modules, why, self.remake)

    def pairing(self) -> Iterable[Problem]:
        """Factors without partners, twice there, or of no two dimensions."""
        level: Level = "wrong" if self.server.name == "peft" else "refused"
        for module, both in self.parts.factors.items():
            if len(both) == 1:
                present, absent = ("A", "B") if "A" in both else ("B", "A")
                yield Problem(level, module, f"has {present} but no {absent}", "the adapter is incomplete")
            elif min(len(spec.shape) for spec in both.values()) < 2:
                yield Problem("refused", module, "a factor has at least two dimensions", None)
        yield from self.problem("wrong", self.parts.twice, "stands for what another key stands for", "remove one")
        if not self.parts.factors:
            level = "refused" if self.server.name == "vllm" else "wrong"
            yield Problem(level, "no LoRA tensors", f"{self.server.title} would find nothing to add", None)

    def ranks(self) -> Iterable[Problem]:
        """Ranks of A and B, and of both and the configuration."""
        uneven, undeclared, ragged = [], [], []
        for module, (a, b) in self.parts.pairs.items():
            rank = a.shape[0]
            if rank != b.shape[1]:
                uneven.append(f"{module} (A {a.describe()}, B {b.describe()})")
            elif self.server.one_rank and rank != self.config.r:
                ragged.append(f"{module} ({rank})")
            elif not self.server.one_rank and rank != self.config.rank(module):
                undeclared.append(f"{module} ({rank}, not {self.config.rank(module)})")
        yield from self.problem("refused", uneven, "the ranks of A and B differ", "the adapter is damaged")
        yield from self.problem("refused", ragged, f"{self.server.title} needs every rank to be r = {self.config.r}",
                                self.remake)  # fmt: skip
        level: Level = "refused" if self.server.name == "peft" else "wrong"
        why = "its tensors' rank is not the configuration's, " + (
            "and PEFT refuses the sizes" if level == "refused" else "so its scale is not known"
        )
        yield from self.problem(level, undeclared, why, "set r, or rank_pattern and alpha_pattern, right")

    def largest_rank(self) -> Iterable[Problem]:
        """The rank that the server must be started for."""
        ranks = [a.shape[0] for a, _ in self.parts.pairs.values()]
        rank = max([self.config.r, *self.config.rank_pattern.values(), *ranks])
        if self.max_rank is not None and self.server.name in ("vllm", "sglang") and rank > self.max_rank:
            option = start_with(self.server.name, rank) or f"--max-lora-rank {rank}"
            yield Problem("refused", f"rank {rank}", f"is more than --max-lora-rank {self.max_rank}",
                          f"start the server with {option}, or extract with --max-rank {self.max_rank}")  # fmt: skip
        elif self.server.max_ranks and rank > self.server.max_ranks[-1]:
            most = self.server.max_ranks[-1]
            yield Problem("refused", f"rank {rank}", f"{self.server.title} takes {most} at most", f"{self.remake}"
                          f" --max-rank {most}")  # fmt: skip
        elif self.max_rank is None and (needed := start_with(self.server.name, rank)):
            yield Problem("note", f"rank {rank}", f"{self.server.title} takes {self.server.default_max_rank} unless it"
                          " is told otherwise", f"start it with {needed}")  # fmt: skip

    def scales(self) -> Iterable[Problem]:
        """Modules whose ``B @ A`` the server would multiply by another number than PEFT does."""
        off: dict[str, tuple[float, float]] = {}
        wanted = set()
        for module, (a, b) in self.parts.pairs.items():
            rank = a.shape[0]
            if rank != b.shape[1] or rank != self.config.rank(module):
                continue
            right, theirs = self.config.scaling(module, rank), self.scale(module, rank)
            wanted.add(right * rank)
            if not math.isclose(right, theirs, rel_tol=1e-6):
                off[module] = (theirs, right)
        if not off:
            return
        theirs, right = next(iter(off.values()))
        overlooked = [
            name for name in ("use_rslora", "alpha_pattern", "rank_pattern") if self.document.get(name)
        ] or ["an lora_alpha of 0"]  # fmt: skip
        mend = self.remake
        if len(wanted) == 1 and self.config.alpha:
            mend = f"set lora_alpha to {wanted.pop():.10g}, use_rslora to false, and clear alpha_pattern"
        yield from self.problem(
            "wrong", off, f"{self.server.title} overlooks {' and '.join(overlooked)}: it multiplies by {theirs:.4g}"
            f" where PEFT does by {right:.4g}", mend,
        )  # fmt: skip

    def scale(self, module: str, rank: int) -> float:
        """Return what the server multiplies a module's ``B @ A`` by."""
        if self.server.scale == "config":
            return self.config.alpha / self.config.r
        if self.server.scale == "tensor":
            return self.config.alpha / rank if self.config.alpha else 1.0
        return self.config.scaling(module, rank)

    def partners(self) -> Iterable[Problem]:
        """Neighbours without which the server cannot stack a module's factors."""
        modules = {m for m in self.parts.factors if self.parts.kind_of_module[m] in ("linear", "expert", "conv1d")}
        missing = missing_partners(self.server.name, modules, self.base_modules)
        yield from self.problem(
            "refused", missing, f"has no factors, and {self.server.title} stacks it with neighbours that have",
            f"give it factors of zeros, as surgery extract-lora BASE FT --for {self.server.name} does",
        )  # fmt: skip
        if not self.server.whole_experts or self.server.name != "vllm":
            return
        stems = {module for module, kind in self.parts.kind_of_module.items() if kind == "experts"}
        for module in sorted(stems):
            twin = module.removesuffix(".base_layer") if module.endswith(".base_layer") else f"{module}.base_layer"
            if twin not in stems:
                level: Level = "wrong" if module.endswith(".base_layer") else "refused"
                yield Problem(level, module, f"vLLM needs {twin} beside it", self.remake)

    def dtypes(self) -> Iterable[Problem]:
        """Factors that are no floating-point numbers of 16 bits or more."""
        odd: dict[str, list[str]] = {}
        for key, spec in self.specs.items():
            if spec.dtype not in ARITHMETIC and ".lora_" in key:
                odd.setdefault(spec.dtype, []).append(key)
        for dtype, keys in odd.items():
            level: Level = "note" if dtype.startswith("F8") else "wrong"
            yield from self.problem(level, keys, f"is {dtype}; loaders copy its numbers as they are, without a scale",
                                    "store factors as F32, BF16 or F16")  # fmt: skip

    def base_fits(self) -> Iterable[Problem]:
        """Names and shapes of the base."""
        if not self.base:
            return
        lost, misfit = [], []
        for module, (a, b) in self.parts.pairs.items():
            weight = self.base.get(f"{module}.weight")
            kind = self.parts.kind_of_module[module]
            if weight is None:
                if kind != "head":
                    lost.append(module)
                continue
            if kind == "conv" or len(weight.shape) != 2:
                continue
            shape = (a.shape[1], b.shape[0]) if kind in ("embedding", "conv1d") else (b.shape[0], a.shape[1])
            if weight.shape != shape:
                misfit.append(f"{module} ({list(shape)}, the base has {weight.describe()})")
        level: Level = "refused" if self.server.name == "llamacpp" else "wrong"
        yield from self.problem(level, lost, "the base has no such module" + (
            "" if level == "refused" else ", so it has no effect"), "is this its base?")  # fmt: skip
        yield from self.problem("refused", misfit, "its shape is not the base's", "is this its base?")
