"""Low-rank prediction in exact deltas: a merged LoRA costs its factors and what rounding did, and comes back bit for bit.

The oracle of the predicted bits is exact rational arithmetic.
"""

from __future__ import annotations

import json
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import SurgeryError, UsageError
from surgery.exact import open_delta
from surgery.formats import delta_manifest
from surgery.formats.delta_codec import Block
from surgery.formats.delta_prediction import Factors
from surgery.operations.delta_sample import sampled_rank
from surgery.tensor import read_bytes

ROWS, COLUMNS, RANK = 320, 256, 4


def pair(dtype, relative=0.01, seed=0):
    """A matrix, and it with a LoRA merged: one rounding."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).to(dtype)
    change = torch.randn(ROWS, RANK, generator=generator, dtype=torch.float64) @ torch.randn(
        RANK, COLUMNS, generator=generator, dtype=torch.float64
    )
    change *= relative * weight.double().norm() / change.norm()
    return {"q.weight": weight}, {"q.weight": (weight.double() + change).to(dtype)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A pair of files and the delta between them."""
    folder = tmp_path_factory.mktemp("lowrank")
    base, tuned = pair(torch.bfloat16)
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "ft.safetensors")
    surgery.extract_delta(folder / "base.safetensors", folder / "ft.safetensors").save(folder / "task.delta")
    return folder


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.5), (torch.float16, 0.4), (torch.float32, 0.6)])
def test_a_merged_lora_costs_a_part_of_its_dense_difference(dtype, share):
    base, tuned = pair(dtype)
    delta = surgery.extract_delta(base, tuned)
    assert delta.manifest.changes["q.weight"].prediction.rank == RANK
    assert delta.nbytes < share * surgery.extract_delta(base, tuned, reversible=True).nbytes
    restored = surgery.merge(base, delta)
    assert torch.equal(restored["q.weight"].view(torch.uint8), tuned["q.weight"].view(torch.uint8))
    assert surgery.info(delta).rows[0].how == "low-rank"


def test_a_dense_change_is_not_predicted():
    base, _ = pair(torch.bfloat16)
    moved = {"q.weight": (base["q.weight"].float() + 1e-4 * torch.randn(ROWS, COLUMNS)).bfloat16()}
    pairs = [(surgery.open(base).lazy("q.weight"), surgery.open(state).lazy("q.weight")) for state in (moved, base)]
    assert [sampled_rank(*each) for each in pairs] == [None, None]
    assert surgery.extract_delta(base, moved).manifest.changes["q.weight"].prediction is None


SPECIAL = {
    "BF16": [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x8001, 0x7F7F, 0x3F80],
    "F16": [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E01, 0xFFFF, 0x0001, 0x8001, 0x7BFF, 0x3C00],
    "F32": [0x0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x1, 0x80000001, 0x7F7FFFFF, 0x3F800000],
}
DIGITS = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}
"""Significand bits, and the exponent of the least subnormal."""


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SPECIAL)), st.integers(0, 2**32), st.integers(-40, 3))
def test_predicted_bits_are_those_of_exact_arithmetic(dtype, seed, exponent):
    generator = np.random.default_rng(seed)
    left = generator.integers(-40, 41, (6, 3)).astype(np.int16)
    right = generator.integers(-40, 41, (3, 5)).astype(np.int16)
    bits = generator.integers(0, 2 ** (8 * (4 if dtype == "F32" else 2)), 30, np.uint64)
    places = generator.random(30) < 0.5
    bits[places] = generator.choice(np.array(SPECIAL[dtype], np.uint64), int(places.sum()))
    known = bits.astype("<u4" if dtype == "F32" else "<u2")
    scale = float(generator.integers(1, 1 << 20)) * 2.0**exponent
    product = left.astype(object) @ right.astype(object)
    found = Factors(left, right, scale).predict(Block(dtype, known[7:].tobytes()), 7).bits
    wide = Block(dtype, known.tobytes()).bits
    for number in range(7, 30):
        value = _value(int(wide[number]), dtype)
        if value is None:
            assert found[number - 7] == known[number]  # NaN and infinities are left as they are
            continue
        step = Fraction(float(np.float64(float(product.reshape(-1)[number])) * np.float64(scale)))
        total = Fraction(float(np.float64(float(value)) + np.float64(float(step))))
        assert _value(int(found[number - 7]), dtype) in (_nearest(total, dtype), None)
        if _nearest(total, dtype) is not None:
            assert _value(int(found[number - 7]), dtype) == _nearest(total, dtype)


def _value(bits, dtype):
    """The number that a pattern means; ``None`` where it is none."""
    if dtype == "BF16":
        number = np.array(bits << 16, np.uint32).view(np.float32)
    else:
        number = np.array(bits, np.uint16 if dtype == "F16" else np.uint32).view("f2" if dtype == "F16" else "f4")
    return Fraction(float(number)) if np.isfinite(number) else None


def _nearest(value, dtype):
    """The nearest number of the dtype, ties to even; ``None`` beyond the largest."""
    digits, least = DIGITS[dtype]
    if not value:
        return Fraction(0)
    exponent = max(_log2(abs(value)) - digits + 1, least)
    rounded = round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent  # Fraction rounds ties to even
    top = 16 if dtype == "F16" else 128
    return rounded if abs(rounded) < Fraction(2) ** top else None


def _log2(value):
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def test_parts_of_a_predicted_tensor_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(1500, 1000, generator=generator) * 0.02).half()
    change = torch.randn(1500, 2, generator=generator) @ torch.randn(2, 1000, generator=generator)
    base, tuned = {"q.weight": weight}, {"q.weight": (weight.float() + 1e-4 * change).half()}
    delta = surgery.extract_delta(base, tuned)
    assert delta.manifest.changes["q.weight"].prediction is not None
    lazy = surgery.merge(base, delta).lazy("q.weight")
    whole = tuned["q.weight"].numpy().tobytes()
    assert bytes(read_bytes(lazy)) == whole
    assert bytes(read_bytes(lazy, lazy.unit)) == whole[2 * lazy.unit :]


def test_the_bytes_do_not_depend_on_the_number_of_threads(stored):
    for jobs in (1, 3):
        delta = surgery.extract_delta(stored / "base.safetensors", stored / "ft.safetensors", jobs=jobs)
        assert delta.head == open_delta(stored / "task.delta").head


def test_a_prediction_has_no_way_back_and_takes_the_base_to_squash(stored):
    with pytest.raises(UsageError, match="--reversible"):
        surgery.merge(stored / "ft.safetensors", stored / "task.delta", reverse=True)
    more = load_file(stored / "ft.safetensors")
    more["q.weight"] = (more["q.weight"].float() + 1e-3).bfloat16()
    then = surgery.extract_delta(stored / "ft.safetensors", more)
    with pytest.raises(UsageError, match=r"q\.weight: is predicted from the base.*--base"):
        surgery.squash_deltas(stored / "task.delta", then)
    both = surgery.squash_deltas(stored / "task.delta", then, base=stored / "base.safetensors")
    assert torch.equal(surgery.merge(stored / "base.safetensors", both)["q.weight"], more["q.weight"])


def test_flipped_bits_of_factors_are_found_by_verify_and_by_merge(stored, tmp_path):
    whole = (stored / "task.delta").read_bytes()
    size = open_delta(stored / "task.delta").manifest.changes["q.weight"].prediction.packed.size
    draw = random.Random(0)
    for _ in range(30):
        data = bytearray(whole)
        data[-1 - draw.randrange(size)] ^= 1 << draw.randrange(8)  # the factors lie last
        (tmp_path / "damaged.delta").write_bytes(data)
        with pytest.raises(SurgeryError):
            surgery.verify(tmp_path / "damaged.delta")
        with pytest.raises(SurgeryError):
            surgery.merge(stored / "base.safetensors", tmp_path / "damaged.delta")["q.weight"]


def test_malformed_predictions_end_in_our_errors(stored, tmp_path):
    tensors = load_file(stored / "task.delta")
    manifest = json.loads(zstandard.decompress(tensors["surgery.delta.manifest"].numpy().tobytes()))
    data = tensors["surgery.delta.data"].numpy().tobytes()
    good = manifest["task_tensors"]["q.weight"]["predicted"]
    wrong = [None, [], [1], {}, "x", [*good, 1], [0, *good[1:]], [True, *good[1:]], [10**9, *good[1:]], [good[0] + 1, *good[1:]],
             *([good[0], scale, *good[2:]] for scale in (None, "", "x", "nan", "inf", "-0x1p0", "0x0p0", "0x1p99999", 1.0)),
             [*good[:2], 0, good[3]], [*good[:2], -1, good[3]], [*good[:2], 1.5, good[3]], [*good[:3], None]]  # fmt: skip
    for value in wrong:
        manifest["task_tensors"]["q.weight"]["predicted"] = value
        packed = delta_manifest.compress(json.dumps(manifest).encode())
        (tmp_path / "bad.delta").write_bytes(delta_manifest.container(packed, len(data)) + packed + data)
        with pytest.raises(SurgeryError):
            surgery.merge(stored / "base.safetensors", tmp_path / "bad.delta")["q.weight"]
