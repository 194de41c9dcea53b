"""``remove``: take a method's parameters out of a state dict that has them inside, and leave the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery import provenance
from surgery.checkpoint import Checkpoint, Origin, Source, open_checkpoint
from surgery.errors import MismatchError, SurgeryError
from surgery.formats import peft
from surgery.formats.wrapped import Parted, part
from surgery.names import parse_patterns, select
from surgery.report import Table
from surgery.roles import roles_of
from surgery.sources import folders, local
from surgery.tensor import renamed

if TYPE_CHECKING:
    from surgery.operations.remove_keep import Kept


class Removed(Checkpoint):
    """The base that is left, which knows what was taken out of it.

    Args:
        whole: the checkpoint with both in it.
        parted: which tensors are whose.
    """

    def __init__(self, whole: Checkpoint, parted: Parted) -> None:
        super().__init__(
            {own: renamed(whole.tensors[name], own) for name, own in parted.base.items()},
            label=whole.label,
            stored=whole.stored,
            shards={own: whole.shards[name] for name, own in parted.base.items() if name in whole.shards},
            config=whole.config,
            side_files=whole.side_files,
            notes=whole.notes,
            origin=Origin(
                _recorder(whole, parted),
                counts={"copied": len(parted.base), "taken out": len(parted.taken) + len(parted.copies)},
                tables=(_table(whole, parted),),
            ),
        )
        self.taken = tuple(parted.taken.values())
        self.inside = {name: whole.tensors[name] for name in parted.taken}
        """The tensors of :attr:`taken`, by their names in the state dict."""

    @property
    def methods(self) -> tuple[str, ...]:
        """What was found, in words."""
        return tuple(sorted({taken.method for taken in self.taken}))

    def keep(
        self,
        *,
        method: str | None = None,
        adapter: str | None = None,
        document: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Kept:
        """Make an adapter of what was taken out; see :func:`surgery.operations.remove_keep.keep`."""
        from surgery.operations.remove_keep import keep

        return keep(self, method=method, adapter=adapter, document=document, **settings)


def remove(source: Source, *, spare: Sequence[str] = ()) -> Removed:
    """Take a method's parameters out of a state dict or checkpoint that has them inside.

    Told by their names and by how PEFT and AdapterHub wrap models: LoRA, IA³, LayerNorm tuning, prompts, saved modules,
    trained token rows and whatever else stands beside a ``base_layer``; bottlenecks and the other containers of
    AdapterHub; PreLayer's. What is left has the base's own names and is copied as bytes. A file does not tell whether
    an adapter was merged into its base before it was saved, or whether biases were trained in place, except by a
    PEFT configuration beside it.

    Args:
        source: a folder, a file, or a state dict.
        spare: patterns of the base's own tensors that are called like a method's.

    Returns:
        The base, lazily, which knows what was taken out.

    Raises:
        MismatchError: nothing in it is a method's, or everything; the base's own values are not in the file.
        UnsupportedError: a name looks like a method's, and no rule knows it.

    >>> import torch
    >>> wrapped = {"q.base_layer.weight": torch.ones(2, 2), "q.lora_A.default.weight": torch.zeros(1, 2)}
    >>> removed = remove(wrapped)
    >>> list(removed), removed.methods
    (['q.weight'], ('lora',))
    """
    checkpoint = open_checkpoint(source)
    patterns = parse_patterns(spare)
    try:
        parted = part(checkpoint.tensors, lambda name: any(pattern.matches(name) for pattern in patterns))
        _refuse_trained_in_place(checkpoint)
        _refuse_unequal_copies(checkpoint, parted)
    except SurgeryError as error:
        raise error.at(file=checkpoint.label) from None
    removed = Removed(checkpoint, parted)
    if patterns:
        select(roles_of(removed.specs), patterns, "--spare")
    return removed


def _refuse_trained_in_place(checkpoint: Checkpoint) -> None:
    """Refuse what PEFT's configuration beside the file says of the base's own tensors.

    Raises:
        MismatchError: biases were trained in place, or the start of the method changed the weights.
    """
    document = beside(checkpoint)
    if document is None:
        return
    if document.get("bias", "none") != "none":
        raise MismatchError(
            f"{peft.CONFIG} says bias={document['bias']!r}: biases were trained in place, so the base's are not in the file"
        )
    start = document.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(peft.MUTATING_INITS):
        raise MismatchError(f"{peft.CONFIG} says init_lora_weights={start!r}, which changed the base's weights at load")


def beside(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Read the adapter's configuration that lies in a checkpoint's folder, if one does."""
    folder = checkpoint.stored[0].path if checkpoint.stored else None
    if folder is None:
        return None
    return local.read_config(folder if folders.is_folder(folder) else folder.parent, peft.CONFIG)


def _refuse_unequal_copies(checkpoint: Checkpoint, parted: Parted) -> None:
    """Leave out second references to the embedding only where they are that: bit for bit a tensor of the base.

    Raises:
        MismatchError: a copy differs from every tensor.
    """
    for name in parted.copies:
        copy = checkpoint.tensors[name]
        wanted = provenance.fingerprint(copy)
        alike = [
            other
            for other in parted.base
            if (spec := checkpoint.tensors[other].spec).shape == copy.spec.shape and spec.dtype == copy.spec.dtype
        ]
        if not any(provenance.fingerprint(checkpoint.tensors[other]) == wanted for other in alike):
            raise MismatchError("is no copy of an embedding that is in the file", tensor=name)


def _table(checkpoint: Checkpoint, parted: Parted) -> Table:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, taken in parted.taken.items():
        groups.setdefault((taken.method, taken.adapter), []).append(name)
    if parted.copies:
        groups["copies of the embedding", ""] = parted.copies
    rows = tuple(
        (method, adapter or "–", f"{len(names):,}", f"{sum(checkpoint.tensors[name].spec.numel for name in names):,}")
        for (method, adapter), names in sorted(groups.items())
    )
    return Table("Taken out", ("method", "adapter", "tensors", "elements"), rows)


def _recorder(whole: Checkpoint, parted: Parted) -> Any:
    def record(fingerprints: Mapping[str, str]) -> dict[str, Any]:
        return provenance.record(
            "remove",
            parameters={"taken_out": sorted([*parted.taken, *parted.copies])},
            inputs=[{"role": "source", "name": whole.label, **whole.pinned}],
            tensors=fingerprints,
        )

    return record
