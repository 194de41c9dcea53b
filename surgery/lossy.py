"""Lossy deltas: a LoRA adapter whose factors are stored as small integers, with the error that they leave.

A factor is quantised component by component: the ``k``-th row of ``A``, and the ``k``-th column of ``B``, by a scale of its
own. Components come by falling singular value, and errors of the first weigh most: where the others get 4 bits, the first
eighth of them keeps 8.

The file is a safetensors container whose name ends in :data:`SUFFIX`. For a quantised factor ``KEY`` it holds ``KEY.int8``
(the components with 8 bits), ``KEY.int4`` (the others, two codes a byte, the earlier in the low half) and ``KEY.scales``;
everything else is as in the adapter. Its record has the adapter's configuration. It is no exact delta: see docs/delta-format.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from surgery.adapter import Adapter
from surgery.errors import FormatError, SurgeryError
from surgery.formats import peft
from surgery.history import read_record
from surgery.sources import local
from surgery.tensor import BytesTensor, LazyTensor, TensorSpec, read_bytes

SUFFIX = ".lossy.safetensors"
OPERATION = "extract-lossy-delta"
"""What the record of such a file says it is."""
BITS = ("int8", "int4")
SHARE_OF_8 = 8
"""With ``int4`` one component of so many, the first ones, keeps 8 bits."""

_EIGHT, _FOUR, _SCALES = ".int8", ".int4", ".scales"
_Values = NDArray[Any]


def is_lossy(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Say whether ``source`` is a file of a lossy delta, by its name."""
    return isinstance(source, str | os.PathLike) and os.fspath(source).endswith(SUFFIX)


def in_first(key: str) -> bool:
    """Say whether a factor's components are its rows: ``A``'s are, ``B``'s are columns."""
    return "lora_A" in key or "lora_embedding_A" in key


def is_factor(key: str, spec: TensorSpec) -> bool:
    """Say whether an adapter's tensor is a factor that is quantised."""
    return len(spec.shape) == 2 and spec.dtype == "F32" and any(
        part in key for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    )  # fmt: skip


def quantise(key: str, factor: _Values, bits: str) -> dict[str, LazyTensor]:
    """Turn a factor into codes and scales.

    Args:
        key: its PEFT key.
        factor: ``(r, in)`` or ``(out, r)``, float32, components by falling singular value.
        bits: ``int8``, or ``int4`` for all but the first components.

    Returns:
        The stored tensors, by name.
    """
    rows = factor if in_first(key) else factor.T
    rank = rows.shape[0]
    eight = rank if bits == "int8" else -(-rank // SHARE_OF_8)
    levels = np.where(np.arange(rank) < eight, 127, 7).astype(np.float32)
    scales = (np.abs(rows).max(axis=1, initial=0) / levels).astype(np.float32)
    codes = np.rint(rows / np.where(scales > 0, scales, 1)[:, None])
    codes = np.clip(codes, -levels[:, None], levels[:, None]).astype(np.int8)
    found: dict[str, LazyTensor] = {}
    _add(found, key + _EIGHT, "I8", codes[:eight])
    if eight < rank:
        _add(found, key + _FOUR, "U8", _packed(codes[eight:]))
    _add(found, key + _SCALES, "F32", scales)
    return found


def _add(found: dict[str, LazyTensor], name: str, dtype: str, values: _Values) -> None:
    data = np.ascontiguousarray(values).tobytes()
    found[name] = BytesTensor(TensorSpec(name, dtype, tuple(values.shape)), data)


def _packed(codes: _Values) -> _Values:
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))) & 15
    packed: _Values = (even[:, ::2] | even[:, 1::2] << 4).astype(np.uint8)
    return packed


def _unpacked(packed: _Values, length: int) -> _Values:
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    codes[:, ::2], codes[:, 1::2] = packed & 15, packed >> 4
    return ((codes ^ 8) - 8)[:, :length].astype(np.int8)


@dataclass(frozen=True)
class Dequantised:
    """A factor, made from its codes and scales when it is read: ``code · scale``, in float32."""

    spec: TensorSpec
    eight: LazyTensor
    four: LazyTensor | None
    scales: LazyTensor

    @property
    def unit(self) -> int:
        """All of it."""
        return max(self.spec.numel, 1)

    scratch, resident = 3, 0

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Multiply codes by their scales."""
        length = self.eight.spec.shape[1]
        codes = _array(self.eight, np.int8)
        if self.four is not None:
            codes = np.concatenate([codes, _unpacked(_array(self.four, np.uint8), length)])
        rows = codes.astype(np.float32) * _array(self.scales, np.float32)[:, None]
        values = rows if in_first(self.spec.name) else rows.T
        out[:] = np.ascontiguousarray(values).reshape(-1)[start:stop].view(np.uint8).data


def _array(tensor: LazyTensor, dtype: Any) -> _Values:
    return np.frombuffer(read_bytes(tensor), dtype).reshape(tensor.spec.shape)


def dequantised(stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Give an adapter's tensors back, lazily, from those that are stored.

    Raises:
        FormatError: codes and scales do not fit each other.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        if name.endswith(_EIGHT):
            key = name.removesuffix(_EIGHT)
            found[key] = _factor(key, tensor, stored.get(key + _FOUR), stored.get(key + _SCALES))
        elif not name.endswith((_FOUR, _SCALES)):
            found[name] = tensor
    return found


def _factor(key: str, eight: LazyTensor, four: LazyTensor | None, scales: LazyTensor | None) -> Dequantised:
    shape = eight.spec.shape
    if scales is None or len(shape) != 2 or (four is not None and len(four.spec.shape) != 2):
        raise FormatError("its codes and scales do not fit each other", tensor=key)
    rank = shape[0] + (0 if four is None else four.spec.shape[0])
    right = eight.spec.dtype == "I8" and (scales.spec.dtype, scales.spec.shape) == ("F32", (rank,))
    if four is not None:
        right = right and four.spec.dtype == "U8" and four.spec.shape[1] == -(-shape[1] // 2)
    if not right:
        raise FormatError("its codes and scales do not fit each other", tensor=key)
    whole = (rank, shape[1]) if in_first(key) else (shape[1], rank)
    return Dequantised(TensorSpec(key, "F32", whole), eight, four, scales)


def open_lossy(source: str | os.PathLike[str]) -> Adapter:
    """Open a lossy delta as the adapter that it stands for.

    Raises:
        FormatError: it is malformed, or no lossy delta.
    """
    stored = local.open_weights(source)
    try:
        record = read_record(Path(stored.path)) or {}
        if record.get("operation") != OPERATION:
            raise FormatError("is no lossy delta: its record does not say so")
        document = _document(record)
        tensors = dequantised(stored.tensors)
        peft.parse_config(document)
    except SurgeryError as error:
        stored.close()
        raise error.at(file=stored.path) from None
    return Adapter(tensors, document, label=stored.label, stored=[stored], taken_from=record.get("base", {}))


def _document(record: Mapping[str, Any]) -> dict[str, Any]:
    parameters = record.get("parameters")
    document = parameters.get("adapter") if isinstance(parameters, dict) else None
    if not isinstance(document, dict):
        raise FormatError("its record has no configuration")
    return document
