"""``convert``: cast, reshard, rename, drop, or turn pickles into safetensors. On lazy tensors each is a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery import provenance
from surgery.checkpoint import Checkpoint, Origin, Source, open_checkpoint, refuse_quantised, require_arithmetic
from surgery.errors import MismatchError, UsageError
from surgery.formats.safetensors import encode_document
from surgery.names import parse_patterns, parse_renames, select
from surgery.names import rename as spell
from surgery.operations.recipe_config import TORCH_NAMES
from surgery.roles import roles_of
from surgery.tensor import ARITHMETIC, LazyTensor, TensorSpec, renamed


def convert(
    source: Source,
    *,
    dtype: str | None = None,
    rename: Sequence[str] = (),
    drop: Sequence[str] = (),
    allow_nonfinite: bool = False,
) -> Checkpoint:
    """Convert a checkpoint.

    Args:
        source: the checkpoint.
        dtype: the new dtype of floating-point tensors (``"BF16"`` …), rounded once to nearest even; integers,
            booleans and tensors of that dtype already are copied as bytes.
        rename: ``OLD=NEW`` rules: a whole name, or a prefix that ends at a dot.
        drop: patterns of tensors to leave out.
        allow_nonfinite: let NaN, Inf and overflow through.

    Returns:
        The converted checkpoint, lazily.

    Raises:
        UsageError: an unknown dtype.
        MismatchError: a pattern or rule that matches nothing, or names that collide.

    >>> import torch
    >>> convert({"a.w": torch.ones(2)}, dtype="BF16", rename=["a=b"]).specs
    {'b.w': TensorSpec(name='b.w', dtype='BF16', shape=(2,))}
    """
    if dtype is not None and dtype not in ARITHMETIC:
        raise UsageError(f"--dtype can be {', '.join(ARITHMETIC)}, not {dtype!r}")
    checkpoint = open_checkpoint(source)
    dropped = select(roles_of(checkpoint.specs), parse_patterns(drop), "--drop") if drop else set()
    rules = parse_renames(rename)
    _refuse_idle_rules(rules, checkpoint)
    kept = [name for name in checkpoint.tensors if name not in dropped]
    if not kept:
        raise UsageError("nothing is left: --drop takes every tensor away")
    if dtype is not None:
        refuse_quantised(checkpoint, kept)  # casting scales would change what the codes mean
        require_arithmetic(checkpoint, [name for name in kept if _is_float(checkpoint.tensors[name].spec)])
    names = {name: spell(name, rules) for name in kept}
    tensors: dict[str, LazyTensor] = {}
    for old, new in names.items():
        if new in tensors:
            raise MismatchError(
                f"two tensors would be called so, {old!r} among them", tensor=new, mend="change --rename"
            )
        tensors[new] = _cast(renamed(checkpoint.tensors[old], new), dtype, allow_nonfinite, checkpoint.label)
    changed = sum(tensors[new].spec.dtype != checkpoint.tensors[old].spec.dtype for old, new in names.items())
    return Checkpoint(
        tensors,
        label=checkpoint.label,
        stored=checkpoint.stored,
        shards={new: checkpoint.shards[old] for old, new in names.items() if old in checkpoint.shards},
        config=config_in(checkpoint.config, dtype),
        side_files=checkpoint.side_files,
        notes=checkpoint.notes,
        origin=Origin(
            _recorder(checkpoint, {"dtype": dtype, "rename": list(rename), "drop": list(drop)}),
            counts={"cast": changed, "copied": len(tensors) - changed, "dropped": len(dropped)},
            files=config_file(checkpoint.config, dtype),
        ),
    )


def _is_float(spec: TensorSpec) -> bool:
    return spec.dtype.startswith(("F", "BF"))


def _cast(tensor: LazyTensor, dtype: str | None, allow_nonfinite: bool, label: str) -> LazyTensor:
    if dtype is None or not _is_float(tensor.spec) or tensor.spec.dtype == dtype:
        return tensor
    from surgery.delta import Cast  # only casting pays for torch

    return Cast(tensor, dtype, allow_nonfinite=allow_nonfinite, label=label)


def _refuse_idle_rules(rules: Mapping[str, str], checkpoint: Checkpoint) -> None:
    for old, new in rules.items():
        if all(spell(name, {old: new}) == name for name in checkpoint.tensors):
            raise MismatchError(f"--rename {old!r} matches no tensor", file=checkpoint.label)


def config_in(config: Mapping[str, Any] | None, dtype: str | None) -> Mapping[str, Any] | None:
    """Say the new dtype in ``config.json`` where the old one was said."""
    if config is None or dtype is None:
        return config
    return {key: TORCH_NAMES[dtype] if key in ("torch_dtype", "dtype") else value for key, value in config.items()}


def config_file(config: Mapping[str, Any] | None, dtype: str | None) -> dict[str, bytes]:
    """Return ``config.json`` as a side file, where saying the new dtype changes it."""
    changed = config_in(config, dtype)
    if changed is None or changed == config:
        return {}
    return {"config.json": encode_document(changed)}


def _recorder(source: Checkpoint, parameters: dict[str, Any]) -> Any:
    def record(fingerprints: Mapping[str, str]) -> dict[str, Any]:
        return provenance.record(
            "convert",
            parameters=parameters,
            inputs=[{"role": "source", "name": source.label, **source.pinned}],
            tensors=fingerprints,
        )

    return record
