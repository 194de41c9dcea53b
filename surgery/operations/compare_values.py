"""Comparing the values of tensor pairs, streaming: the part of ``diff`` that needs torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from surgery import numerics
from surgery.algorithms.compare import Moments, RowMoments, effective_rank
from surgery.algorithms.lowrank import TruncatedSVD, truncated_svd
from surgery.errors import SurgeryError
from surgery.execute import Progress, Silent
from surgery.operations.diff import RANKS, DiffRow, is_matrix
from surgery.roles import layer_of, role_of
from surgery.sources.remote import expect
from surgery.tensor import ARITHMETIC, BITS, LazyTensor, TensorSpec

SKETCH_RANK = 64
"""Rank that a sketch of a delta is made for; it gives the leading 128 values about as well."""
Pair = tuple[LazyTensor, LazyTensor]


def compare(pairs: Mapping[str, Pair], *, spectrum: bool, jobs: int, progress: Progress | None = None) -> list[DiffRow]:
    """Compare tensors of equal shape.

    Args:
        pairs: name → the tensor before and after.
        spectrum: sketch the spectra of matrices' deltas; holds one matrix a thread.
        jobs: threads.
        progress: somebody who watches.
    """
    watcher = progress or Silent()
    expect(tensor for pair in pairs.values() for tensor in pair)
    watcher.start(sum(a.spec.nbytes + b.spec.nbytes for a, b in pairs.values()))

    def work(name: str) -> DiffRow:
        row = _compare_pair(name, *pairs[name], spectrum=spectrum)
        watcher.advance(sum(tensor.spec.nbytes for tensor in pairs[name]))
        return row

    # Large tensors first, so that no thread is left alone with one at the end.
    order = sorted(pairs, key=lambda name: -pairs[name][0].spec.nbytes)
    with ThreadPoolExecutor(jobs, thread_name_prefix="surgery") as pool, numerics.single_threaded():
        try:
            return list(pool.map(work, order))
        finally:
            pool.shutdown(cancel_futures=True)
            watcher.finish()


def _compare_pair(name: str, a: LazyTensor, b: LazyTensor, *, spectrum: bool) -> DiffRow:
    role, layer = role_of(a.spec), layer_of(name)
    same_dtype = a.spec.dtype == b.spec.dtype
    try:
        if a.spec.dtype not in ARITHMETIC or b.spec.dtype not in ARITHMETIC:
            equal = same_dtype and _equal_bytes(a, b)
            status = "identical" if equal else "changed" if same_dtype else "recast"
            return DiffRow(name, role, layer, status, a.spec, b.spec)
        return _compare_floats(name, a, b, spectrum=spectrum)
    except SurgeryError as error:
        raise error.at(tensor=name) from None


def _equal_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    unit = math.lcm(a.unit, b.unit)
    step = max(numerics.BLOCK // unit, 1) * unit
    for start in range(0, a.spec.numel, step):
        stop = min(start + step, a.spec.numel)
        size = (stop - start) * BITS[a.spec.dtype] // 8
        buffers = [numerics.byte_buffer(side, size) for side in ("a bytes", "b bytes")]
        a.read_into(start, stop, buffers[0])
        b.read_into(start, stop, buffers[1])
        if not np.array_equal(np.asarray(buffers[0]), np.asarray(buffers[1])):
            return False
    return True


def _compare_floats(name: str, a: LazyTensor, b: LazyTensor, *, spectrum: bool) -> DiffRow:
    spec = a.spec
    width = spec.shape[-1] if spec.shape else 1
    unit = math.lcm(a.unit, b.unit, max(width, 1))
    step = max(numerics.BLOCK // unit, 1) * unit
    moments = Moments()
    embedding = role_of(spec) == "embedding" and len(spec.shape) == 2 and spec.numel > 0
    by_row = RowMoments(spec.shape[0]) if embedding else None
    matrix = numerics.scratch("matrix", spec.numel, torch.float32) if spectrum and is_matrix(spec) else None
    for start in range(0, spec.numel, step):
        stop = min(start + step, spec.numel)
        old = numerics.widen(a, start, stop, numerics.scratch("old", stop - start))
        new = numerics.widen(b, start, stop, numerics.scratch("new", stop - start))
        delta = numerics.scratch("delta", stop - start)
        moments.update(old, new, delta)
        if matrix is not None:
            matrix[start:stop] = delta
        if by_row is not None and not moments.nonfinite:
            by_row.update(old.view(-1, width), delta.view(-1, width))
    row = _row(name, a.spec, b.spec, moments)
    if matrix is not None and moments.energy and not moments.nonfinite:
        svd = _sketch(name, matrix.view(spec.shape))
        numerics.release_freed_memory()
        kept = {rank: svd.captured(rank) / svd.energy for rank in RANKS}
        return row(effective_rank=effective_rank(svd, min(spec.shape)), kept=kept)
    if by_row is not None and moments.energy and not moments.nonfinite:
        rows, shrink, energy = by_row.trained(spec.dtype)
        return row(trained_rows=len(rows), rows_energy=float(energy[rows].sum()), shrink=shrink)
    return row()


def _sketch(name: str, delta: torch.Tensor) -> TruncatedSVD:
    return truncated_svd(delta, SKETCH_RANK, numerics.generator(0, name, "diff"), tolerance=1e-2)


def _row(name: str, before: TensorSpec, after: TensorSpec, moments: Moments) -> Callable[..., DiffRow]:
    """Begin a row: what is left to say is passed to the function returned."""
    status = "recast" if before.dtype != after.dtype else "identical" if moments.same else "changed"

    def finish(**more: Any) -> DiffRow:
        return DiffRow(
            name, role_of(before), layer_of(name), status, before, after,
            max_abs=moments.largest, relative_norm=moments.relative_norm, cosine=moments.cosine,
            changed=moments.changed / moments.count if moments.count else 0.0,
            energy=moments.energy, weight_energy=moments.a_energy, after_energy=moments.b_energy,
            product=moments.product, nonfinite=moments.nonfinite, **more,
        )  # fmt: skip

    return finish
