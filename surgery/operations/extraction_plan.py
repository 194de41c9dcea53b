"""What will be extracted, decided from headers alone: which weights are factored, stored in full, examined, left out."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from surgery import execute
from surgery.adapter import Adapter
from surgery.algorithms.lowrank import working_bytes
from surgery.checkpoint import (
    Checkpoint,
    quantised_error,
    quantised_tensors,
    require_arithmetic,
    tied_weights,
)
from surgery.errors import IOFailure, MismatchError
from surgery.formats import peft, servers
from surgery.names import module_of, parse_patterns, select, undecorated
from surgery.operations.extraction_units import EXPERTS, Unit
from surgery.operations.pairs import Pair
from surgery.operations.rank_rule import RankRule
from surgery.report import join_shown
from surgery.roles import is_fused_experts, role_of, roles_of, transposed_weights
from surgery.sources.remote import is_remote
from surgery.sources.spool import MEMORY_LIMIT
from surgery.tensor import LazyTensor, TensorSpec, human_bytes
from surgery.writer import Publication

Embeddings = Literal["auto", "full", "none"]


@dataclass(frozen=True)
class Settings:
    """How to extract; see :func:`extract_lora` for what each field means."""

    rule: RankRule
    dtype: str | None = None
    device: str = "cpu"
    seed: int = 0
    jobs: int = 1
    tolerance: float = 1e-3
    exact: bool = False
    embeddings: Embeddings = "auto"
    server: str = "peft"
    dora: bool = False


@dataclass
class Extraction:
    """What will be extracted, known from headers alone. :meth:`run` does it."""

    base: Checkpoint
    tuned: dict[str, LazyTensor]
    """The fine-tune's tensors under the base's names."""
    tuned_label: str
    tuned_stored: Sequence[Any]
    settings: Settings
    dtype: str
    """Of the factors."""
    base_name: str | None
    units: dict[str, Unit] = field(default_factory=dict)
    full: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    """Embeddings and heads whose number of rows changed."""
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    transposed: set[str] = field(default_factory=set)
    codes: dict[str, str] = field(default_factory=dict)
    """Tensors of quantised modules, and by what scheme: they may not differ."""
    unwanted: dict[str, str] = field(default_factory=dict)
    """Tensors that the caller left out, and by which option."""
    in_memory: dict[str, str] | None = None
    """Name on disk → name in memory, where the caller asked for it."""
    heads: list[str] = field(default_factory=list)
    """Modules that PEFT's wrapper of the model's task saves whole."""
    tied: bool = False
    """The input embedding is the output head too, and stored once."""

    @property
    def rule(self) -> RankRule:
        """How ranks are chosen."""
        return self.settings.rule

    def spelled(self, name: str) -> str:
        """Spell a tensor's name as PEFT will: in memory, without the decorations of training tools."""
        return (self.in_memory or {}).get(name) or undecorated(name)

    def module(self, name: str) -> str:
        """Name a weight's module as PEFT does."""
        return module_of(self.spelled(name))

    def pair(self, name: str, base: LazyTensor | None = None) -> Pair:
        """Pair a tensor before and after; ``base`` gives its values before, from wherever they are at hand."""
        before = self.base.tensors[name] if base is None else base
        return Pair(before, self.tuned[name], (self.base.label, self.tuned_label))

    def in_head(self, name: str) -> bool:
        """Say whether a tensor belongs to one of ``heads``."""
        return any(name.startswith(f"{head}.") for head in self.heads)

    def is_input_embedding(self, name: str) -> bool:
        """Tell the embedding that a tied head shares from those of positions and token types."""
        rows = (self.base.config or {}).get("vocab_size")
        spec = self.base.tensors[name].spec
        return role_of(spec) == "embedding" and (rows is None or spec.shape[0] == rows)

    @property
    def names(self) -> list[str]:
        """All tensors to examine, by what is done with them."""
        return [*self.units, *self.full, *self.embeddings, *self.resized, *self.left_out]

    @property
    def tuned_bytes(self) -> int:
        """Bytes of the fine-tune that will be read."""
        return sum(self.tuned[name].spec.nbytes for name in self.names)

    @property
    def bytes_read(self) -> int:
        """Bytes of both models that will be read."""
        return self.tuned_bytes + sum(self.base.tensors[name].spec.nbytes for name in self.names)

    @property
    def bytes_written(self) -> int:
        """Size of the factors, if every matrix changed and got the most that the rule allows (or first looks at)."""
        if self.rule.budget is not None:
            return self.rule.budget
        item = TensorSpec("", self.dtype, ()).itemsize
        return sum(item * self.rule.first_depth(unit.limit) * unit.cost for unit in self.units.values())

    @property
    def peak_memory(self) -> int:
        """Bytes at most: for each thread one of the largest matrices and its factorisation, and the spooled factors."""
        costs = sorted(map(self._cost, self._may_be_factored()), reverse=True)
        costs += [0] * self.settings.jobs
        workers = sum(costs[: self.settings.jobs]) + self.settings.jobs * (24 << 20)
        return (96 << 20) + workers + min(2 * self.bytes_written, MEMORY_LIMIT)

    def fit(self, max_memory: int) -> None:
        """Use as few threads as ``max_memory`` bytes ask for.

        Raises:
            IOFailure: one is too many: the largest matrix and its factorisation need more.
        """
        while self.peak_memory > max_memory:
            if self.settings.jobs == 1:
                largest = max(self._may_be_factored(), key=self._cost, default=None)
                raise IOFailure(
                    f"the plan needs up to {human_bytes(self.peak_memory)} of memory, "
                    f"--max-memory allows {human_bytes(max_memory)}",
                    file=self.tuned_label,
                    tensor=largest.name if largest else None,
                    mend="a matrix is factored whole: raise --max-memory, or --exclude it",
                )
            self.settings = replace(self.settings, jobs=self.settings.jobs - 1)

    def _may_be_factored(self) -> list[Unit]:
        """List what may have to be in memory whole: embeddings too, unless they are tied or not wanted."""
        whole = () if self.settings.embeddings != "auto" else self.embeddings
        embeddings = [name for name in whole if not (self.tied and self.is_input_embedding(name))]
        return [*self.units.values(), *(Unit(self.base.tensors[name].spec, "embedding") for name in embeddings)]

    def _cost(self, unit: Unit) -> int:
        """Bytes to factor one weight: ΔW in float32, and what one of its matrices needs beside it."""
        depth = self.rule.first_depth(unit.limit)
        factors = 24 * depth * unit.cost
        lapack = 40 * math.prod(unit.matrix) if self.settings.exact else 0
        return 4 * unit.spec.numel + working_bytes(unit.matrix, depth) + lapack + factors

    def check_output(self, out: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Refuse an output that could not be written, before the work is done.

        Raises:
            OutputError: see :class:`surgery.writer.Publication`.
        """
        Publication(out, overwrite=overwrite, inputs=[s.path for s in (*self.base.stored, *self.tuned_stored)])

    def run(self, progress: execute.Progress | None = None) -> Adapter:
        """Read both models, factor, and compose the adapter.

        Raises:
            NumericError: NaN or Inf in either model, by tensor.
            MismatchError: nothing differs.
        """
        from surgery.operations.extraction_run import run_extraction

        return run_extraction(self, progress or execute.Silent())


def decide(
    found: Extraction, after: Checkpoint, names: Mapping[str, str], target: Sequence[str], exclude: Sequence[str]
) -> None:
    """Decide for every tensor what happens to it.

    Args:
        found: the plan to fill in.
        after: the fine-tune.
        names: the fine-tune's names → the base's.
        target: patterns of what may be taken.
        exclude: patterns of what may not.

    Raises:
        MismatchError: shapes differ, or nothing is left.
        UnsupportedError: quantised weights, or integers where numbers are needed.
    """
    _refuse_codes(found, after, names, bool(target), exclude)
    if not _is_far_and_unwanted(found, target):
        _settle_ties(found, after)
    _note_unpaired(
        found, found.base.tensors.keys() - set(names.values()), set(names.values()) - found.base.tensors.keys()
    )
    _sort_tensors(found, {names.get(name, name): spec for name, spec in after.specs.items()}, target, exclude)
    _leave_unfetched(found)
    _leave_out_unserved(found)
    _refuse_nothing(found, bool(target))


def _is_far_and_unwanted(found: Extraction, target: Sequence[str]) -> bool:
    """Say whether to find a tied head would mean to fetch it and the embedding, of which neither was asked for."""
    specs = {name: found.base.tensors[name].spec for name in found.tuned}
    heads = {name for name in specs if name.endswith(("lm_head.weight", "embed_out.weight"))}
    far = any(is_remote(side[name]) for name in heads for side in (found.base.tensors, found.tuned))
    return bool(target) and far and not heads & select(roles_of(specs), parse_patterns(target), "--target")


def _leave_unfetched(found: Extraction) -> None:
    """Forget what is not wanted and would have to be fetched from the Hub only to say how much of the change it holds."""
    far = [name for name in found.unwanted if is_remote(found.base.tensors[name]) or is_remote(found.tuned[name])]
    for name in far:
        del found.tuned[name], found.left_out[name]
    if far:
        found.notes.append(
            f"{len(far):,} tensors that are not wanted were left on the Hub: shares and errors are of the others"
        )


def _refuse_codes(
    found: Extraction, after: Checkpoint, names: Mapping[str, str], targeted: bool, exclude: Sequence[str]
) -> None:
    """Refuse quantised weights, by name; those that look alike on both sides only once they turn out to differ."""
    unwanted = parse_patterns(exclude)
    for side, own in ((found.base, {n: n for n in found.base.tensors}), (after, names)):
        for name, what in quantised_tensors(side).items():
            base_name = own.get(name, name)
            paired = found.tuned.get(base_name)
            if paired is not None and paired.spec == found.base.tensors[base_name].spec:
                found.codes[base_name] = what
            elif any(pattern.matches(base_name, role_of(side.tensors[name].spec)) for pattern in unwanted):
                continue
            elif paired is not None or not targeted:
                raise quantised_error(side, base_name, what)


def _settle_ties(found: Extraction, after: Checkpoint) -> None:
    """Take a tied head that both sides store twice for what it is: the embedding once more."""
    config = found.base.config or {}
    heads = [name for name, spec in found.base.specs.items() if name.endswith(("lm_head.weight", "embed_out.weight"))]
    found.tied = not heads and peft.has_language_head(config) and config.get("tie_word_embeddings", True) is not False
    tied = tied_weights(found.base)
    if not tied:
        return
    tuned = Checkpoint(
        {name: found.tuned[name] for name in tied if name in found.tuned}, label=after.label, config=after.config
    )
    if tied_weights(tuned).keys() == tied.keys():
        (head,) = [name for name in tied if role_of(found.base.specs[name]) != "embedding"]
        del found.tuned[head]
        found.tied = True
        found.notes.append(f"{head} is tied to {tied[head]}, so it is taken with it")


def _note_unpaired(found: Extraction, lost: set[str], added: set[str]) -> None:
    if lost:
        found.notes.append(f"only in the base, so not compared: {join_shown(sorted(lost))}")
    if added:
        found.notes.append(f"only in the fine-tune, so not in the adapter: {join_shown(sorted(added))}")


def _sort_tensors(
    found: Extraction, after: Mapping[str, TensorSpec], target: Sequence[str], exclude: Sequence[str]
) -> None:
    """Decide for every tensor whether it is factored, stored in full, examined row by row, or left out."""
    specs = {name: found.base.tensors[name].spec for name in found.tuned}
    found.transposed = transposed_weights(found.base.specs, found.base.config)
    roles = roles_of(specs)
    chosen = select(roles, parse_patterns(target), "--target") if target else set(specs)
    everywhere = roles_of({**after, **found.base.specs})
    dropped = select(everywhere, parse_patterns(exclude), "--exclude") & specs.keys() if exclude else set()
    found.unwanted = {
        name: "excluded" if name in dropped else "not targeted" for name in dropped | (specs.keys() - chosen)
    }
    found.heads = peft.task_heads(peft.task_type(found.base.config), map(module_of, found.base.tensors))
    for name, spec in specs.items():
        if name in found.unwanted:
            found.left_out[name] = found.unwanted[name]
        elif name in found.codes:
            found.left_out[name] = f"quantised ({found.codes[name]})"
        elif spec.shape != found.tuned[name].spec.shape:
            _sort_reshaped(found, name, spec)
        elif found.in_head(name):
            found.full.append(name)
        else:
            _sort_one(found, name, spec)
    for name in [name for name in found.unwanted if specs[name].shape != found.tuned[name].spec.shape]:
        del found.tuned[name], found.left_out[name]  # not wanted, and nothing to compare
        found.notes.append(f"{found.unwanted.pop(name)}, and of another shape, so not compared: {name}")


def _leave_out_unserved(found: Extraction) -> None:
    """Leave out what the server that the adapter is for does not hold."""
    server = found.settings.server
    kinds: dict[str, str] = {name: _kind_of(unit) for name, unit in found.units.items()}
    kinds |= dict.fromkeys(found.embeddings, "rows") | dict.fromkeys(found.resized, "saved")
    for name in found.full:
        role = role_of(found.base.specs[name])
        kinds[name] = "class_head" if found.in_head(name) else role if role in ("bias", "norm") else "saved"
    for name, kind in kinds.items():
        why = servers.holds(server, kind, module_of(name))
        if found.settings.dora and name in found.units and kind not in ("linear", "expert", "conv1d", "head"):
            why = "DoRA is for linear weights"
        if why is None:
            continue
        if name in found.resized:
            title = servers.server_named(server).title
            raise MismatchError(
                "its number of rows changed, and "
                + title
                + " loads no adapter with another vocabulary than the base's",
                file=found.tuned_label,
                tensor=name,
                mend="--exclude it, or serve the merged model",
            )
        found.left_out[name] = why
        found.units.pop(name, None)
        for home in (found.embeddings, found.full):
            if name in home:
                home.remove(name)


def _kind_of(unit: Unit) -> str:
    if unit.kind != "linear":
        return unit.kind
    if unit.group == EXPERTS:
        return "expert"
    head = module_of(unit.name).rpartition(".")[2] in ("lm_head", "embed_out")
    return "head" if head else "conv1d" if unit.flipped else "linear"


def _refuse_nothing(found: Extraction, targeted: bool) -> None:
    if targeted and not found.units:
        raise MismatchError(
            "--target selects no linear weight", mend="LoRA factors 2-D weights; see surgery info --tensors"
        )
    both = [*found.units, *found.embeddings, *found.full, *found.resized]
    if not both:
        name, why = next(((n, w) for n, w in found.left_out.items() if n not in found.unwanted), (None, ""))
        reason = f"no tensor could be extracted{', this one because: ' if name else ''}{why}"
        raise MismatchError(reason, file=found.tuned_label, tensor=name)
    for checkpoint in (found.base, Checkpoint(found.tuned, label=found.tuned_label)):
        require_arithmetic(checkpoint, both)


def _sort_reshaped(found: Extraction, name: str, spec: TensorSpec) -> None:
    """Take a vocabulary that was resized; refuse any other change of shape."""
    new = found.tuned[name].spec
    vocabulary = role_of(spec) in ("embedding", "head") and len(spec.shape) == 2 and spec.shape[1:] == new.shape[1:]
    if not vocabulary or spec.dtype != new.dtype:
        raise MismatchError(
            f"is {spec.describe()} in {found.base.label} and {new.describe()} in {found.tuned_label}",
            tensor=name,
            mend="--rename or --exclude what does not belong together",
        )
    found.resized.append(name)
    found.notes.append(
        f"{name} has {new.shape[0]:,} rows where the base has {spec.shape[0]:,}, so it is stored whole; before PEFT loads the "
        f"adapter: model.resize_token_embeddings({new.shape[0]})"
    )


def _sort_one(found: Extraction, name: str, spec: TensorSpec) -> None:
    config, group = found.base.config, _expert_group(name)
    if found.in_memory is not None and name not in found.in_memory and not group:
        found.left_out[name] = "in memory it is fused with others, or has no name of its own"
    elif is_fused_experts(spec):
        found.units[name] = Unit(spec, "experts", peft.experts_transposed(config), name.rpartition(".")[0])
    elif not name.endswith((".weight", ".bias", ".gamma", ".beta")):
        found.left_out[name] = "PEFT has no place for a bare parameter or buffer"
    elif len(spec.shape) <= 1 or not spec.numel:
        found.full.append(name)
    elif len(spec.shape) > 5:
        found.left_out[name] = f"a {len(spec.shape)}-D weight"
    elif len(spec.shape) > 2:
        _sort_convolution(found, name, spec)
    elif role_of(spec) == "embedding":
        found.embeddings.append(name)
    elif role_of(spec) == "router" and "block_sparse_moe" in name and not found.in_memory:
        found.left_out[name] = "in memory it is called otherwise; --names-in-memory stores it"
    elif role_of(spec) == "router":
        found.full.append(name)  # small, and in most models no linear layer that PEFT could adapt
    elif module_of(name).rpartition(".")[2] in peft.refused_modules(config):
        found.left_out[name] = "PEFT refuses LoRA on it in models of this type"
    else:
        found.units[name] = Unit(spec, "linear", name in found.transposed, group)


def _sort_convolution(found: Extraction, name: str, spec: TensorSpec) -> None:
    """A depthwise convolution is small and PEFT factors none: it is stored in full."""
    if spec.shape[1] == 1 < spec.shape[0]:
        found.full.append(name)
    else:
        found.units[name] = Unit(spec, "conv")


def _expert_group(name: str) -> str:
    """Group the experts stored one by one: PEFT fuses them as the model does in memory, and then knows one rank for all.

    >>> _expert_group("model.layers.0.mlp.experts.3.up_proj.weight"), _expert_group("h.0.mlp.up_proj.weight")
    ('experts', '')
    """
    _, mark, tail = name.partition(".experts.")
    return EXPERTS if mark and tail.split(".")[0].isdigit() else ""
