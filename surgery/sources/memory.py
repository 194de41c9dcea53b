"""State dicts in memory: plain mappings from names to torch tensors or NumPy arrays, as ``model.state_dict()`` gives.

Values are never copied until they are read. This room asks a tensor for its bytes by the methods it has; it imports
torch only when handed a torch tensor, that is, when the caller has imported it long before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery.errors import UnsupportedError
from surgery.formats.safetensors import check_name
from surgery.names import unwrap
from surgery.tensor import BITS, BytesTensor, LazyTensor, TensorSpec

_NUMPY_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16", "int32": "I32",
    "uint32": "U32", "float32": "F32", "int64": "I64", "uint64": "U64", "float64": "F64", "complex64": "C64",
}  # fmt: skip
_TORCH_NAMES = {
    **_NUMPY_NAMES, "bfloat16": "BF16", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


def is_array(value: object) -> bool:
    """Say whether ``value`` is something this room can read: a torch tensor or a NumPy array."""
    return isinstance(value, np.ndarray) or (
        type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "stride")
    )


def open_mapping(state_dict: Mapping[str, Any]) -> tuple[dict[str, LazyTensor], list[str]]:
    """Turn a state dict into lazy tensors.

    Returns:
        Tensors by name, and notes about entries that are no tensors.

    Raises:
        UnsupportedError: a dtype that safetensors cannot hold, or a sparse or meta tensor.
    """
    arrays, notes = unwrap(state_dict, lambda value: is_array(value) or hasattr(value, "read_into"))
    tensors: dict[str, LazyTensor] = {}
    for name, value in arrays.items():
        check_name(name)
        tensors[name] = value if hasattr(value, "read_into") else _lazy(name, value)
    return tensors, notes


class ArrayTensor:
    """A torch tensor or NumPy array, turned into bytes range by range."""

    unit = 1
    scratch = 1
    resident = 0

    def __init__(self, spec: TensorSpec, array: Any) -> None:
        """Hold ``array``, whose dtype and shape ``spec`` describes."""
        self.spec = spec
        self._array = array

    def read_into(self, start: int, stop: int, out: memoryview) -> None:
        """Copy the range's bytes."""
        if start == stop:
            return
        flat = self._array.reshape(-1)[start:stop]
        if not isinstance(flat, np.ndarray):
            import torch  # the caller handed us a torch tensor, so it is loaded already

            flat = flat.detach().cpu().contiguous().view(torch.uint8).numpy()
        out[:] = np.ascontiguousarray(flat).view(np.uint8).data


def _lazy(name: str, value: Any) -> LazyTensor:
    names = _NUMPY_NAMES if isinstance(value, np.ndarray) else _TORCH_NAMES
    kind = value.dtype.name if isinstance(value, np.ndarray) else str(value.dtype).removeprefix("torch.")
    layout = str(getattr(value, "layout", "torch.strided"))
    if kind not in names or layout != "torch.strided" or getattr(value, "is_quantized", False):
        raise UnsupportedError(f"a {layout.removeprefix('torch.')} {kind} tensor cannot be stored", tensor=name)
    if str(getattr(value, "device", "cpu")) == "meta":
        raise UnsupportedError("a meta tensor has no values", tensor=name)
    spec = TensorSpec(name, names[kind], tuple(value.shape))
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if BITS[spec.dtype] == 8 and isinstance(value, np.ndarray) and value.flags.c_contiguous and value.ndim:
        return BytesTensor(spec, value.reshape(-1).view(np.uint8).data if value.size else b"")
    return ArrayTensor(spec, value)
