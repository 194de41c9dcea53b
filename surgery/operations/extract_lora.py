"""``extract-lora``: take a LoRA adapter out of a pair of checkpoints.

What LoRA can hold (linear weights) is factored; biases and norms that moved are stored in full, in the forms that PEFT
loads; of embeddings the rows that training moved are stored, told apart from the uniform shrink of weight decay. What
is left out is listed with its share of ‖Δ‖², never lost in silence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from surgery import execute
from surgery.adapter import Adapter
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
from surgery.formats import peft
from surgery.names import align, module_of, parse_patterns, parse_renames, select, undecorated
from surgery.report import join_shown
from surgery.roles import role_of, transposed_weights
from surgery.sources.module_names import module_names
from surgery.sources.spool import MEMORY_LIMIT
from surgery.tensor import LazyTensor, TensorSpec, renamed
from surgery.writer import Publication


@dataclass
class Extraction:
    """What will be extracted, known from headers alone. :meth:`run` does it."""

    base: Checkpoint
    tuned: dict[str, LazyTensor]
    """The fine-tune's tensors under the base's names."""
    tuned_label: str
    tuned_stored: Sequence[Any]
    rank: int | None
    """``None`` for full rank."""
    dtype: str
    device: str
    seed: int
    jobs: int
    base_name: str | None
    matrices: list[str] = field(default_factory=list)
    full: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    transposed: set[str] = field(default_factory=set)
    unwanted: dict[str, str] = field(default_factory=dict)
    """Tensors that the caller left out, and by which option."""
    in_memory: dict[str, str] | None = None
    """Name on disk → name in memory, where the caller asked for it."""
    heads: list[str] = field(default_factory=list)
    """Modules that PEFT's wrapper of the model's task saves whole."""

    def spelled(self, name: str) -> str:
        """Spell a tensor's name as PEFT will: in memory, without the decorations of training tools."""
        return (self.in_memory or {}).get(name) or undecorated(name)

    def in_head(self, name: str) -> bool:
        """Say whether a tensor belongs to one of ``heads``."""
        return any(name.startswith(f"{head}.") for head in self.heads)

    @property
    def bytes_read(self) -> int:
        """Bytes of both models that will be read."""
        names = [*self.matrices, *self.full, *self.embeddings, *self.left_out]
        return sum(
            self.base.tensors[name].spec.nbytes + self.tuned[name].spec.nbytes for name in names if name in self.tuned
        )

    @property
    def bytes_written(self) -> int:
        """Size of the factors, if every matrix changed."""
        item = TensorSpec("", self.dtype, ()).itemsize
        return sum(item * self.rank_of(name) * sum(self.base.tensors[name].spec.shape) for name in self.matrices)

    @property
    def peak_memory(self) -> int:
        """Bytes at most: for each thread one of the largest matrices and its factorisation, and the spooled factors."""
        costs = sorted((self._cost(name) for name in self.matrices), reverse=True)
        return (96 << 20) + sum(costs[: self.jobs]) + self.jobs * (24 << 20) + min(self.bytes_written, MEMORY_LIMIT)

    def _cost(self, name: str) -> int:
        """Bytes to factor one matrix: ΔW, its float64 copy and Gram matrices, or the sketch's bases."""
        m, n = self.base.tensors[name].spec.shape
        side, width = min(m, n), min(2 * self.rank_of(name) + 16, m, n)
        gram = 12 * m * n + 40 * side * side if side <= 4096 else 4 * m * n + 32 * side * side
        return max(gram, 5 * m * n) + 64 * width * (m + n)

    def rank_of(self, name: str) -> int:
        """Rank of one matrix: the rank asked for, clamped to what the matrix has."""
        side = min(self.base.tensors[name].spec.shape)
        return side if self.rank is None else min(self.rank, side)

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

        return Run(self, progress or execute.Silent()).adapter()


def extract_lora(
    base: Source,
    tuned: Source,
    *,
    rank: int | Literal["full"] = 8,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "cpu",
    rename: Sequence[str] = (),
    base_id: str | None = None,
    names_in_memory: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    progress: execute.Progress | None = None,
) -> Adapter:
    r"""Extract a LoRA adapter: the best rank-``r`` approximation of every linear weight's delta.

    For ``ΔW = W_ft − W_base`` with truncated SVD ``U Σ Vᵀ``, ``B = U √Σ`` and ``A = √Σ Vᵀ``; ``lora_alpha = r``, so that
    the scale is 1. Differences are taken in float32.

    Args:
        base: the model before fine-tuning.
        tuned: the model after it.
        rank: 1 or more, clamped to each matrix; or ``"full"``.
        target: patterns of the weights to factor; all linear weights by default.
        exclude: patterns of weights to leave alone.
        dtype: of the factors; ``"F32"``, ``"BF16"`` or ``"F16"``. By default the fine-tune's own.
        device: where to factor, as torch names it.
        rename: ``OLD=NEW`` rules for the fine-tune's names.
        base_id: the base's Hub id, for the adapter's configuration; by default the base's folder name.
        names_in_memory: name modules as transformers calls them once loaded, where that differs from the names on
            disk (ViT and others); needs the extra ``hf``.
        seed: for random starts, which are keyed by tensor name.
        jobs: threads, each with one matrix; as many as there are cores by default.
        progress: somebody who watches.

    Returns:
        An adapter with ``.report``, ``.save(out)`` and ``.state_dict()``; pass it to :func:`surgery.merge`.

    Raises:
        UsageError: a rank below 1, or base and fine-tune are the same files.
        MismatchError: shapes differ, nothing matches, or nothing changed.
        NumericError: NaN or Inf, by tensor.

    Reference: Eckart and Young 1936; Hu et al. 2021, "LoRA", arXiv:2106.09685, eq. 3.
    """
    extraction = plan_extraction(
        base, tuned, rank=rank, target=target, exclude=exclude, dtype=dtype, device=device, rename=rename,
        base_id=base_id, names_in_memory=names_in_memory, seed=seed, jobs=jobs,
    )  # fmt: skip
    return extraction.run(progress)


def plan_extraction(
    base: Source,
    tuned: Source,
    *,
    rank: int | Literal["full"] = 8,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "cpu",
    rename: Sequence[str] = (),
    base_id: str | None = None,
    names_in_memory: bool = False,
    seed: int = 0,
    jobs: int | None = None,
) -> Extraction:
    """Decide from headers alone what :func:`extract_lora` will do; see there for the arguments."""
    if rank != "full" and (type(rank) is not int or rank < 1):
        raise UsageError(f"rank must be a whole number from 1, or 'full', not {rank!r}")
    if dtype is not None and dtype not in ("F32", "BF16", "F16"):
        raise UsageError(f"factors can be F32, BF16 or F16, not {dtype!r}")
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    _refuse_same(before, after)
    alignment = align(before.tensors.keys(), after.tensors.keys(), parse_renames(rename))
    renamed_tuned = {new: renamed(after.tensors[old], new) for old, new in alignment.names.items()}
    found = Extraction(
        before, {n: t for n, t in renamed_tuned.items() if n in before.tensors}, after.label, after.stored,
        None if rank == "full" else int(rank), dtype or _common_dtype(after), _device(device), seed, jobs or default_jobs(),
        base_id or (None if before.label.startswith("(") else before.label),
        notes=[*before.notes, *after.notes, *alignment.notes],
    )  # fmt: skip
    if not found.tuned:
        raise MismatchError(
            f"has no tensor in common with {before.label}",
            file=after.label,
            mend="--rename OLD=NEW brings names together",
        )
    for side, names in ((before, {n: n for n in before.tensors}), (after, alignment.names)):
        codes = quantised_modules(side)
        if codes and not target:
            module = min(codes)
            inside = [name for name in side.tensors if name.rpartition(".")[0] == module]
            raise quantised_error(side, names.get(inside[0], inside[0]) if inside else module, codes[module])
        refuse_quantised(side, [old for old, new in names.items() if new in found.tuned])
    if names_in_memory:
        found.in_memory = module_names(before.config or {}, before.tensors)
    _drop_tied(found, after)
    _note_unpaired(found, before.tensors.keys() - renamed_tuned.keys(), renamed_tuned.keys() - before.tensors.keys())
    _sort_tensors(found, target, exclude)
    return found


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


def _drop_tied(found: Extraction, after: Checkpoint) -> None:
    """Take a tied head that both sides store twice for what it is: the embedding once more."""
    tied = tied_weights(found.base)
    if not tied:
        return
    tuned = Checkpoint(
        {name: found.tuned[name] for name in tied if name in found.tuned}, label=after.label, config=after.config
    )
    if tied_weights(tuned).keys() == tied.keys():
        (head,) = [name for name in tied if role_of(found.base.specs[name]) != "embedding"]
        del found.tuned[head]
        found.notes.append(f"{head} is tied to {tied[head]}, so it is taken with it")


def _note_unpaired(found: Extraction, lost: set[str], added: set[str]) -> None:
    if lost:
        found.notes.append(f"only in the base, so not compared: {join_shown(sorted(lost))}")
    if added:
        found.notes.append(f"only in the fine-tune, so not in the adapter: {join_shown(sorted(added))}")


def _sort_tensors(found: Extraction, target: Sequence[str], exclude: Sequence[str]) -> None:
    """Decide for every tensor whether it is factored, stored in full, examined row by row, or left out."""
    specs = {name: found.base.tensors[name].spec for name in found.tuned}
    for name, spec in specs.items():
        if spec.shape != found.tuned[name].spec.shape:
            raise MismatchError(
                f"is {spec.describe()} in {found.base.label} and {found.tuned[name].spec.describe()} in {found.tuned_label}",
                tensor=name,
                mend="a resized vocabulary cannot be extracted yet; --rename or --exclude what does not belong together",
            )
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
        elif found.in_head(name):
            found.full.append(name)
        else:
            _sort_one(found, name, spec)
    if target and not found.matrices:
        raise MismatchError(
            "--target selects no linear weight", mend="LoRA factors 2-D weights; see surgery info --tensors"
        )
    if not found.matrices and not found.full and not found.embeddings:
        raise MismatchError("no tensor could be extracted", file=found.tuned_label)
    both = [*found.matrices, *found.embeddings, *found.full]
    for checkpoint, names in ((found.base, both), (Checkpoint(found.tuned, label=found.tuned_label), both)):
        require_arithmetic(checkpoint, names)


def _sort_one(found: Extraction, name: str, spec: TensorSpec) -> None:
    if found.in_memory is not None and name not in found.in_memory:
        found.left_out[name] = "in memory it is fused with others, or has no name of its own"
    elif not name.endswith((".weight", ".bias", ".gamma", ".beta")):
        found.left_out[name] = "PEFT has no place for a bare parameter or buffer"
    elif len(spec.shape) == 1 or not spec.numel:
        found.full.append(name)
    elif len(spec.shape) != 2:
        found.left_out[name] = f"a {len(spec.shape)}-D weight"
    elif role_of(spec) == "embedding":
        found.embeddings.append(name)
    else:
        found.matrices.append(name)


def default_output(tuned: str | os.PathLike[str], rank: int | str) -> str:
    """Name the default output: ``./<ft>-lora-r8``."""
    name = os.path.basename(os.path.abspath(os.fspath(tuned))).removesuffix(".safetensors")
    return f"./{name}-lora-r{rank}"
