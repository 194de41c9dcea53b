"""A look at a small part of a matrix's change, to see whether it is of low rank; NumPy alone, and cheap."""

from __future__ import annotations

import numpy as np

from surgery.formats.delta_prediction import PREDICTED
from surgery.tensor import LazyTensor, TensorSpec, read_bytes

SIDE = 64
"""Rows, and columns, of the part that is looked at: so few that LAPACK takes a third of a millisecond, on one thread."""
LARGEST = 40
"""Directions beyond which a change is not taken for one of low rank."""
SMALLEST, LARGEST_MATRIX = 1 << 14, 1 << 25
"""Elements of the matrices that are looked at: factors of small ones cost too much, large ones too much memory."""
ABOVE_NOISE = 1.15
"""How far a singular value must stand out of what rounding makes by chance."""
REST = 1.5
"""How much more than rounding may be left beside the directions that stand out: of a dense change there is more."""


def sampled_rank(base: LazyTensor, tuned: LazyTensor) -> int | None:
    """Count the directions that a part of ``FT − BASE`` moved along, beyond what rounding the fine-tune did.

    The fine-tune's rounding adds noise of variance ``u² / 12`` to an entry, ``u`` being the spacing of its dtype there: the
    largest singular value of such a matrix is about ``σ (√m + √n)``, and of what is left beside ``r`` directions that stand
    out ``‖·‖²`` is about ``σ² (m − r)(n − r)``.

    Args:
        base: the base's tensor, readable at any element.
        tuned: the fine-tune's, alike.

    Returns:
        The number, or ``None`` where it is none or many, or the tensor is no matrix to predict.
    """
    spec = tuned.spec
    if spec.dtype not in PREDICTED or len(spec.shape) < 2 or not SMALLEST <= spec.numel <= LARGEST_MATRIX:
        return None
    rows, columns = spec.shape[0], spec.numel // spec.shape[0]
    if min(rows, columns) < SIDE:
        return None
    first = (columns - SIDE) // 2
    starts = [row * columns + first for row in np.linspace(0, rows - 1, SIDE).astype(int).tolist()]
    after = _values(tuned, starts)
    delta = after - _values(base, starts)
    if not np.isfinite(delta).all() or not delta.any():
        return None
    noise = float(np.mean(np.square(_spacing(after, spec)))) / 12
    energies = np.square(np.linalg.svd(delta, compute_uv=False))
    found = int((energies > ABOVE_NOISE**2 * noise * 4 * SIDE).sum())
    few = 0 < found <= LARGEST and float(energies[found:].sum()) <= REST * noise * (SIDE - found) ** 2
    return found if few else None


def _values(tensor: LazyTensor, starts: list[int]) -> np.ndarray:
    data = b"".join(bytes(read_bytes(tensor, start, start + SIDE)) for start in starts)
    if tensor.spec.dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        values = bits.view(np.float32)
    else:
        values = np.frombuffer(data, np.float16 if tensor.spec.dtype == "F16" else np.float32)
    return values.reshape(SIDE, SIDE).astype(np.float64)


def _spacing(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    digits = {"BF16": 8, "F16": 11, "F32": 24}[spec.dtype]
    _, exponents = np.frexp(values)
    spacing: np.ndarray = np.ldexp(1.0, exponents - digits)
    return spacing
