"""``extract-lora``: take a LoRA adapter out of a pair of checkpoints.

What LoRA can hold (linear weights, convolutions, experts, untied embeddings) is factored; biases and norms that moved
are stored in full, in the forms that PEFT loads; of embeddings the rows that training moved are stored, told apart from
the uniform shrink of weight decay. What is left out is listed with its share of ‖Δ‖², never lost in silence.

This file decides from headers alone what happens to every tensor; :mod:`surgery.operations.extraction_run` does it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from surgery import execute
from surgery.adapter import Adapter
from surgery.algorithms.lowrank import working_bytes
from surgery.checkpoint import (
    Checkpoint,
    Source,
    default_jobs,
    open_checkpoint,
    quantised_error,
    quantised_modules,
    refuse_quantised,
    require_arithmetic,
    tied_weights,
)
from surgery.errors import MismatchError, UsageError
from surgery.formats import peft, servers
from surgery.names import align, module_of, parse_patterns, parse_renames, select, undecorated
from surgery.operations.extraction_units import EXPERTS, Unit
from surgery.operations.rank_rule import RankRule, parse_rule
from surgery.report import join_shown
from surgery.roles import is_fused_experts, role_of, transposed_weights
from surgery.sources.module_names import module_names
from surgery.sources.spool import MEMORY_LIMIT
from surgery.tensor import LazyTensor, TensorSpec, renamed
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
        costs = sorted(map(self._cost, self.units.values()), reverse=True)
        costs += [0] * self.settings.jobs
        workers = sum(costs[: self.settings.jobs]) + self.settings.jobs * (24 << 20)
        return (96 << 20) + workers + min(2 * self.bytes_written, MEMORY_LIMIT)

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
        from surgery.operations.extraction_run import Run

        return Run(self).adapter(progress or execute.Silent())


def extract_lora(
    base: Source,
    tuned: Source,
    *,
    rank: int | Literal["full"] | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | str | None = None,
    noise_floor: bool = False,
    max_rank: int | None = None,
    rank_multiple: int = 1,
    layout: Literal["compact", "portable"] = "compact",
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: Embeddings = "auto",
    server: str = "peft",
    dtype: str | None = None,
    device: str = "cpu",
    tolerance: float = 1e-3,
    exact: bool = False,
    rename: Sequence[str] = (),
    base_id: str | None = None,
    names_in_memory: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    progress: execute.Progress | None = None,
) -> Adapter:
    r"""Extract a LoRA adapter from a fine-tune and its base.

    For every weight ``Δ = W_tuned − W_base`` is approximated by ``B @ A`` of rank ``r``, with ``√σ`` on both sides and
    ``lora_alpha == r``, so that the scale is 1 for every reader. The error is certified to be within ``tolerance`` of
    the best possible at that rank.

    Args:
        base: the checkpoint before training.
        tuned: the checkpoint after it.
        rank: of every matrix, clamped to what it has; ``"full"`` reproduces the fine-tune. 8 by default.
        energy: instead, in each matrix the least rank that keeps this share of ‖Δ‖².
        error: instead, the fewest bytes whose total relative error ``‖Δ − BA‖ / ‖Δ‖``, over all that the adapter may hold,
            is at most this.
        budget: instead, the least total error in this many bytes of weights file: a number, ``"50MB"``, or ``"1%"`` of
            the base.
        noise_floor: drop components that the rounding of the fine-tune's own dtype cannot tell from zero; alone, or on
            top of another rule.
        max_rank: largest rank.
        rank_multiple: ranks are multiples of this.
        layout: ``"portable"`` pads all factors with zeros to one rank, which servers need that read no rank_pattern.
        target: patterns of weights to factor; all that LoRA can hold by default. Nothing else is touched then.
        exclude: patterns of tensors to leave out.
        embeddings: ``"auto"``: trained rows; where all moved, low rank if untied, and in full if tied and a byte of it
            brings as much as the last byte of the factors does. ``"full"``: whole, if moved at all. ``"none"``: left out.
        server: what the adapter is for: ``"peft"`` reproduces the fine-tune best; ``"vllm"``, ``"sglang"`` and
            ``"llamacpp"`` get what they load, and the rest is listed as left out.
        dtype: of factors and token rows: ``F32``, ``BF16`` or ``F16``; the fine-tune's own by default.
        device: where to factor, as torch names it.
        tolerance: certified relative excess of each matrix's error over the best possible.
        exact: factor with LAPACK's SVD.
        rename: ``OLD=NEW`` rules for the fine-tune's names.
        base_id: the base's Hub id, for the adapter's configuration; by default the base's folder name.
        names_in_memory: name modules as transformers calls them once loaded, where that differs from the names on
            disk (ViT and others); needs the extra ``hf``.
        seed: for random starts, which are keyed by tensor name.
        jobs: threads, each with one matrix; as many as there are cores by default.
        progress: somebody who watches.

    Returns:
        The adapter, with its ``report``. Save it with ``.save(folder)``, or merge it as it is.

    Raises:
        UsageError: an argument is out of range.
        MismatchError: the two do not belong together, nothing differs, or nothing fits the budget.
        NumericError: NaN or Inf in either.

    Reference: Eckart and Young 1936; Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1; budgets and errors:
    :mod:`surgery.algorithms.ranks`; the certificate: :mod:`surgery.algorithms.lowrank`.
    """
    extraction = plan_extraction(
        base, tuned, rank=rank, energy=energy, error=error, budget=budget, noise_floor=noise_floor, max_rank=max_rank,
        rank_multiple=rank_multiple, layout=layout, target=target, exclude=exclude, embeddings=embeddings, server=server,
        dtype=dtype, device=device, tolerance=tolerance, exact=exact, rename=rename, base_id=base_id,
        names_in_memory=names_in_memory, seed=seed, jobs=jobs,
    )  # fmt: skip
    return extraction.run(progress)


def plan_extraction(
    base: Source,
    tuned: Source,
    *,
    layout: str = "compact",
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: Embeddings = "auto",
    server: str = "peft",
    dtype: str | None = None,
    device: str = "cpu",
    tolerance: float = 1e-3,
    exact: bool = False,
    rename: Sequence[str] = (),
    base_id: str | None = None,
    names_in_memory: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    **rule: Any,
) -> Extraction:
    """Decide from headers alone what :func:`extract_lora` will do; see there for the arguments."""
    if dtype is not None and dtype not in ("F32", "BF16", "F16"):
        raise UsageError(f"factors can be F32, BF16 or F16, not {dtype!r}")
    if not 0 < tolerance < 1:
        raise UsageError(f"--tol is a share between 0 and 1, not {tolerance:g}")
    if layout not in ("compact", "portable"):
        raise UsageError(f"--layout is compact or portable, not {layout!r}")
    portable = layout == "portable" or servers.server_named(server).name != "peft"
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    _refuse_same(before, after)
    alignment = align(before.tensors.keys(), after.tensors.keys(), parse_renames(rename))
    renamed_tuned = {new: renamed(after.tensors[old], new) for old, new in alignment.names.items()}
    settings = Settings(
        parse_rule(**rule, portable=portable, model_bytes=before.nbytes),
        dtype, _device(device), seed, jobs or default_jobs(), tolerance, exact, embeddings, server,
    )  # fmt: skip
    found = Extraction(
        before, {n: t for n, t in renamed_tuned.items() if n in before.tensors}, after.label, after.stored,
        settings, dtype or _common_dtype(after), base_id or (None if before.label.startswith("(") else before.label),
        notes=[*before.notes, *after.notes, *alignment.notes],
    )  # fmt: skip
    if not found.tuned:
        raise MismatchError(
            f"has no tensor in common with {before.label}",
            file=after.label,
            mend="--rename OLD=NEW brings names together",
        )
    _refuse_codes(found, after, alignment.names, bool(target))
    if names_in_memory:
        found.in_memory = module_names(before.config or {}, before.tensors)
    _settle_ties(found, after)
    _note_unpaired(found, before.tensors.keys() - renamed_tuned.keys(), renamed_tuned.keys() - before.tensors.keys())
    _sort_tensors(found, target, exclude)
    _leave_out_unserved(found)
    _refuse_nothing(found, bool(target))
    return found


def _refuse_codes(found: Extraction, after: Checkpoint, names: Mapping[str, str], targeted: bool) -> None:
    """Refuse quantised weights, by name."""
    for side, own in ((found.base, {n: n for n in found.base.tensors}), (after, names)):
        codes = quantised_modules(side)
        if codes and not targeted:
            module = min(codes)
            inside = [name for name in side.tensors if name.rpartition(".")[0] == module]
            raise quantised_error(side, own.get(inside[0], inside[0]) if inside else module, codes[module])
        refuse_quantised(side, [old for old, new in own.items() if new in found.tuned])


def _refuse_same(before: Checkpoint, after: Checkpoint) -> None:
    files = [{file.identity for s in side.stored for file in s.files} for side in (before, after)]
    same_files = files[0] and files[0] == files[1]
    if before is after or (same_files and before.origin is None and after.origin is None):
        raise UsageError("base and fine-tune are the same files", file=after.label)


def _common_dtype(checkpoint: Checkpoint) -> str:
    sizes: dict[str, int] = {}
    for spec in checkpoint.specs.values():
        if spec.dtype in ("F32", "BF16", "F16"):
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default="F32")


def _device(name: str) -> str:
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name


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


def _sort_tensors(found: Extraction, target: Sequence[str], exclude: Sequence[str]) -> None:
    """Decide for every tensor whether it is factored, stored in full, examined row by row, or left out."""
    specs = {name: found.base.tensors[name].spec for name in found.tuned}
    found.transposed = transposed_weights(found.base.specs, found.base.config)
    chosen = select(specs, parse_patterns(target), "--target") if target else set(specs)
    dropped = select(specs, parse_patterns(exclude), "--exclude") if exclude else set()
    found.unwanted = {
        name: "excluded" if name in dropped else "not targeted" for name in dropped | (specs.keys() - chosen)
    }
    found.heads = peft.task_heads(peft.task_type(found.base.config), map(module_of, found.base.tensors))
    for name, spec in specs.items():
        if name in found.unwanted:
            found.left_out[name] = found.unwanted[name]
        elif spec.shape != found.tuned[name].spec.shape:
            _sort_reshaped(found, name, spec)
        elif found.in_head(name):
            found.full.append(name)
        else:
            _sort_one(found, name, spec)
    for name in [name for name, why in found.unwanted.items() if specs[name].shape != found.tuned[name].spec.shape]:
        del found.tuned[name], found.left_out[name]  # not wanted, and nothing to compare
        found.notes.append(f"{found.unwanted[name]}, and of another shape, so not compared: {name}")


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
        raise MismatchError("no tensor could be extracted", file=found.tuned_label)
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


def default_output(tuned: str | os.PathLike[str], rule: RankRule) -> str:
    """Name the default output: ``./<ft>-lora-r8``."""
    return f"./{stem_of(tuned)}-lora-{rule.slug}"


def stem_of(source: str | os.PathLike[str]) -> str:
    """Name a checkpoint by its folder, or by its file without the ending."""
    return os.path.basename(os.path.abspath(os.fspath(source))).removesuffix(".safetensors")
