"""``extract-lora``: take a LoRA adapter out of a pair of checkpoints.

What LoRA can hold (linear weights, convolutions, experts, untied embeddings) is factored; biases and norms that moved
are stored in full, in the forms that PEFT loads; of embeddings the rows that training moved are stored, told apart from
the uniform shrink of weight decay. What is left out is listed with its share of ‖Δ‖², never lost in silence.

What happens to every tensor is decided from headers alone (:mod:`surgery.operations.extraction_plan`); then
:mod:`surgery.operations.extraction_run` does it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch

from surgery import execute
from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint, Source, default_jobs, open_checkpoint
from surgery.errors import MismatchError, UsageError
from surgery.formats import servers
from surgery.names import align, parse_renames
from surgery.operations.extraction_plan import Embeddings, Extraction, Settings, decide
from surgery.operations.rank_rule import RankRule, parse_rule
from surgery.sources.local import stem_of
from surgery.sources.module_names import module_names
from surgery.tensor import renamed


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
    dora: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    tolerance: float = 1e-3,
    exact: bool = False,
    rename: Sequence[str] = (),
    base_id: str | None = None,
    names_in_memory: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    max_memory: int | None = None,
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
        dora: fit DoRA's magnitudes and directions to linear weights; the rank is then fixed.
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
        max_memory: bytes; fewer threads are used where they would need more, and what one thread cannot do is refused.
        progress: somebody who watches.

    Returns:
        The adapter, with its ``report``. Save it with ``.save(folder)``, or merge it as it is.

    Raises:
        UsageError: an argument is out of range.
        MismatchError: the two do not belong together, nothing differs, or nothing fits the budget.
        NumericError: NaN or Inf in either.
        IOFailure: the plan needs more than ``max_memory``.

    Reference: Eckart and Young 1936; Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1; budgets and errors:
    :mod:`surgery.algorithms.ranks`; the certificate: :mod:`surgery.algorithms.lowrank`.
    """
    extraction = plan_extraction(
        base, tuned, rank=rank, energy=energy, error=error, budget=budget, noise_floor=noise_floor, max_rank=max_rank,
        rank_multiple=rank_multiple, layout=layout, target=target, exclude=exclude, embeddings=embeddings, server=server,
        dora=dora, dtype=dtype, device=device, tolerance=tolerance, exact=exact, rename=rename, base_id=base_id,
        names_in_memory=names_in_memory, seed=seed, jobs=jobs, max_memory=max_memory,
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
    dora: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    tolerance: float = 1e-3,
    exact: bool = False,
    rename: Sequence[str] = (),
    base_id: str | None = None,
    names_in_memory: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    max_memory: int | None = None,
    **rule: Any,
) -> Extraction:
    """Decide from headers alone what :func:`extract_lora` will do; see there for the arguments."""
    if dtype is not None and dtype not in ("F32", "BF16", "F16"):
        raise UsageError(f"factors can be F32, BF16 or F16, not {dtype!r}")
    if not 0 < tolerance < 1:
        raise UsageError(f"--tol is a share between 0 and 1, not {tolerance:g}")
    if layout not in ("compact", "portable"):
        raise UsageError(f"--layout is compact or portable, not {layout!r}")
    if dora and (
        server != "peft" or rule.get("rank") == "full" or any(v for k, v in rule.items() if k != "rank" and v != 1)
    ):
        raise UsageError("DoRA goes with --rank N only, and --for peft")
    portable = layout == "portable" or servers.server_named(server).name != "peft"
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    _refuse_same(before, after)
    alignment = align(before.tensors.keys(), after.tensors.keys(), parse_renames(rename))
    renamed_tuned = {new: renamed(after.tensors[old], new) for old, new in alignment.names.items()}
    settings = Settings(
        parse_rule(**rule, portable=portable, model_bytes=before.nbytes),
        dtype, _device(device), seed, jobs or default_jobs(), tolerance, exact, embeddings, server, dora,
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
    if names_in_memory:
        found.in_memory = module_names(before.config or {}, before.tensors)
    decide(found, after, alignment.names, target, exclude)
    if max_memory is not None:
        found.fit(max_memory)
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


def default_output(tuned: str | os.PathLike[str], rule: RankRule) -> str:
    """Name the default output: ``./<ft>-lora-r8``."""
    return f"./{stem_of(tuned)}-lora-{rule.slug}"
