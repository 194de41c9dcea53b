"""The one precision policy: widen to float64, compute, round once, and draw random numbers by name.

* **Widening** is exact: every dtype surgery computes with fits into float64.
* **Narrowing** is to nearest, ties to even, *once*. float64 → bfloat16 by way of float32 would round twice; the
  float32 step therefore rounds to odd wherever it could matter (Boldo and Melquiond 2008, "Emulation of FMA and
  correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4), Theorem 3: rounding
  to odd with at least two extra bits, then to nearest, equals rounding once).
* **Seeds** are keyed by (seed, tensor name), so that no draw depends on shards, threads or order.
* **Working memory** is allocated once a thread and reused: on Linux the page faults of a fresh temporary cost ten
  times the write itself.

Nothing here knows what a checkpoint is.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from surgery.errors import NumericError
from surgery.tensor import LazyTensor, TensorSpec, byte_range, read_bytes

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK = 1 << 17
"""Elements a block: its float64 working set stays in a core's cache."""

_EXTRA_BITS = {"BF16": 15, "F16": 12}
"""Trailing float32 significand bits that are all zero in every value halfway between two of the dtype's."""

_local = threading.local()
T = TypeVar("T")


def scratch(role: str, count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return this thread's buffer for ``role``: ``count`` elements of old values, valid until asked for again."""
    buffers: dict[tuple[int, str, torch.dtype], torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    key = (_depth(), role, dtype)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < count:
        buffers[key] = buffer = torch.empty(max(count, 1), dtype=dtype)
    return buffer[:count]


def byte_buffer(role: str, count: int) -> memoryview:
    """Return this thread's buffer of ``count`` bytes for ``role``; see :func:`scratch`."""
    return scratch(role, count, torch.uint8).numpy().data


def thread_memo(owner: object, make: Callable[[], T]) -> T:
    """Return ``make()`` for ``owner``, remembered until this thread asks for another owner's."""
    memos: dict[int, tuple[object, T]] = _local.__dict__.setdefault("memos", {})
    depth = _depth()
    held = memos.get(depth)
    if held is None or held[0] is not owner:
        memos.pop(depth, None)  # let go of the old value before the new one is made
        memos[depth] = held = (owner, make())
    return held[1]


@contextmanager
def deeper() -> Iterator[None]:
    """Give a producer buffers of its own while another one, further out, reads from it."""
    _local.depth = _depth() + 1
    try:
        yield
    finally:
        _local.depth = _depth() - 1


def _depth() -> int:
    depth: int = _local.__dict__.get("depth", 0)
    return depth


def forget() -> None:
    """Drop this thread's buffers and remembered values."""
    _local.__dict__.clear()


def view(spec: TensorSpec, data: memoryview | bytearray, count: int | None = None) -> torch.Tensor:
    """See bytes as a flat tensor of ``spec``'s dtype, without copying."""
    count = spec.numel if count is None else count
    if count == 0:
        return torch.empty(0, dtype=DTYPES[spec.dtype])
    return torch.frombuffer(data, dtype=DTYPES[spec.dtype], count=count)


def load(tensor: LazyTensor) -> torch.Tensor:
    """Read a lazy tensor into a torch tensor of its own dtype and shape."""
    return view(tensor.spec, read_bytes(tensor)).reshape(tensor.spec.shape)


def load_wide(tensor: LazyTensor) -> torch.Tensor:
    """Read a lazy tensor, widened to float64, in its own shape."""
    return load(tensor).to(torch.float64)


def widen(tensor: LazyTensor, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
    """Read the elements ``[start, stop)`` into ``out`` (float64 or float32), widening exactly."""
    low, high = byte_range(tensor.spec, start, stop)
    data = byte_buffer("bytes", high - low)
    if high > low:
        tensor.read_into(start, stop, data)
    return out.copy_(view(tensor.spec, data, stop - start))


def narrow(values: torch.Tensor, spec: TensorSpec, out: memoryview, *, allow_nonfinite: bool = False) -> None:
    """Round ``values`` once, to nearest even, into the bytes of ``spec``'s dtype.

    Args:
        values: float64 or float32, flat.
        spec: gives the dtype, one of :data:`surgery.tensor.ARITHMETIC`.
        out: the bytes to fill.
        allow_nonfinite: let NaN, Inf and overflow through.

    Raises:
        NumericError: a value is NaN or infinite, or overflows the dtype.
    """
    if not values.numel():
        return
    target = view(spec, out, values.numel())
    twice = values.dtype == torch.float64 and spec.dtype in _EXTRA_BITS
    target.copy_(_round_to_odd(values, _EXTRA_BITS[spec.dtype]) if twice else values)
    if allow_nonfinite:
        return
    # One pass: a sum is finite unless a term is not (or, rarely, it overflows: then look closely). Sums of float16
    # would overflow often; those of bfloat16 are made in float32, and converting beforehand would take twice as long.
    if not math.isfinite(float(target.sum(dtype=torch.float32 if spec.dtype == "F16" else target.dtype))):
        _refuse_nonfinite(values, target)


def _round_to_odd(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Round float64 to float32 so that rounding on, to a dtype ``bits`` shorter, equals rounding once.

    To nearest is right already except where the float32 lies exactly halfway between two values of the shorter dtype
    although the float64 did not: there the inexact, even result steps to its odd neighbour on the float64's side.
    """
    single = torch.empty(0) if not values.numel() else scratch("single", values.numel(), torch.float32)
    single.copy_(values)
    pattern = single.numpy().view(np.int32)
    halfway = np.flatnonzero((pattern & ((1 << bits) - 1)) == 0)
    if halfway.size:
        exact = values.numpy()[halfway]
        near = single.numpy()[halfway]
        with np.errstate(invalid="ignore"):
            step = np.sign(np.abs(exact) - np.abs(near.astype(np.float64)))
        step[~np.isfinite(exact)] = 0
        pattern[halfway] += step.astype(np.int32)
    return single


def _refuse_nonfinite(values: torch.Tensor, target: torch.Tensor) -> None:
    source_bad = ~torch.isfinite(values)
    bad = ~torch.isfinite(target)
    if not bad.any():
        return
    count, first = int(bad.sum()), int(bad.nonzero()[0])
    if source_bad.any():
        what = f"{count:,} values are NaN or infinite, the first at element {first:,}"
    else:
        biggest = values.abs().max().item()
        limit = torch.finfo(target.dtype).max
        what = f"{count:,} values overflow {NAMES[target.dtype]} (largest {biggest:.6g}, limit {limit:.6g})"
    raise NumericError(what, mend="--allow-nonfinite lets them through")


def round_scalar(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round float64 values of any shape to ``dtype`` once; NaN and Inf pass."""
    flat = values.to(torch.float64).reshape(-1).clone()
    spec = TensorSpec("", dtype, (flat.numel(),))
    data = bytearray(spec.nbytes)
    narrow(flat, spec, memoryview(data), allow_nonfinite=True)
    return view(spec, data).reshape(values.shape)


def seed_for(seed: int, name: str, role: str = "") -> int:
    """Derive a 63-bit seed from a run's seed and a tensor's name (BLAKE2b)."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{role}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, name: str, role: str = "") -> torch.Generator:
    """Make a generator whose draws depend on (seed, name, role) alone."""
    return torch.Generator().manual_seed(seed_for(seed, name, role))


def random_words(seed: int, name: str, role: str, start: int, count: int) -> np.ndarray:
    """Draw uniform 32-bit words for the elements ``[start, start + count)`` of a tensor.

    Element ``i`` takes the ``i``-th word of a stream that (seed, name, role) alone decide, so that it does not matter
    where a tensor is cut. The stream is NumPy's PCG64DXSM, which can jump ahead, and which NumPy promises to keep.
    """
    stream = np.random.PCG64DXSM(seed_for(seed, name, role))
    if start:
        stream.advance(start // 2)
    odd = start % 2
    pairs: np.ndarray = stream.random_raw((odd + count + 1) // 2)
    return pairs.view(np.uint32)[odd : odd + count]


def squared_norm(values: torch.Tensor) -> float:
    """Return Σx², accumulated in float64 block by block: float32 sums read up to 0.1 % low on large matrices."""
    flat = values.reshape(-1)
    if flat.dtype == torch.float64 or flat.device.type != "cpu":
        wide = flat.double()
        return float(wide @ wide)
    total = 0.0
    for start in range(0, flat.numel(), BLOCK):
        block = flat[start : start + BLOCK]
        wide = scratch("norm", block.numel()).copy_(block)
        total += float(wide @ wide)
    return total


def release_freed_memory() -> None:
    """Give what was freed back to the system.

    The C library keeps freed blocks of up to 32 MB for itself and, between threads, in pieces: over the thousands of
    temporaries of a model's factorisations resident memory would creep up to several times what is in use.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # not the GNU C library
        return None
    return trim


_malloc_trim = _find_malloc_trim()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch on one thread inside: jobs are the parallelism, and their results must not depend on how many run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
