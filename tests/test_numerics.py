"""The precision policy: one rounding to nearest even, held against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import surgery
from surgery import numerics
from surgery.adapter import Adapter
from surgery.errors import NumericError
from surgery.tensor import TensorSpec

# dtype: (bits of the significand with the leading one, smallest exponent of a normal number, largest finite value)
FORMATS = {
    "BF16": (8, -126, float.fromhex("0x1.fep127")),
    "F16": (11, -14, 65504.0),
    "F32": (24, -126, float(np.finfo(np.float32).max)),
}


def rounded_exactly(value, dtype):
    """Round a float64 once, to nearest even, with rational arithmetic; infinity beyond the last half step."""
    precision, smallest, largest = FORMATS[dtype]
    if value == 0 or not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1] - 1, smallest)
    step = Fraction(2) ** (exponent - precision + 1)
    nearest = round(Fraction(value) / step) * step  # Fraction's round is to even
    if abs(nearest) > Fraction(largest):
        return math.copysign(math.inf, value)
    return math.copysign(float(nearest), value)


def narrowed(values, dtype):
    flat = torch.tensor(values, dtype=torch.float64)
    spec = TensorSpec("w", dtype, (len(values),))
    out = bytearray(spec.nbytes)
    numerics.narrow(flat, spec, memoryview(out), allow_nonfinite=True)
    return [float(value) for value in numerics.view(spec, out)]


HALFWAY = 1 + 2**-8  # between two bfloat16 values; a float32
TIES = [
    HALFWAY,
    HALFWAY + 2**-40,
    HALFWAY - 2**-40,
    1 + 3 * 2**-8 + 2**-40,
    1 + 3 * 2**-8 - 2**-40,
    2**-133 * 1.5,
    2**-134,
]


@pytest.mark.parametrize("dtype", FORMATS)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
@example(values=TIES)
@example(values=[-value for value in TIES])
@example(values=[65519.999, 65520.0, 65504.0, 2**-24, 2**-25, 2**-25 * (1 + 2**-30), 3.4e38, 3.3961e38])
def test_narrowing_rounds_once(dtype, values):
    assert narrowed(values, dtype) == [rounded_exactly(value, dtype) for value in values]


@pytest.mark.parametrize("dtype", FORMATS)
def test_narrowing_is_right_where_rounding_twice_is_not(dtype):
    precision = FORMATS[dtype][0]
    generator = np.random.default_rng(0)
    # Values a hair beside the middle of two neighbours: float32 cannot tell them from the middle itself.
    middle = 1 + (2 * generator.integers(0, 2 ** (precision - 1), 500) + 1) * 2.0**-precision
    values = (middle * (1 + generator.choice([-1, 1], 500) * 2.0**-45)).tolist()
    assert narrowed(values, dtype) == [rounded_exactly(value, dtype) for value in values]


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65520.0), ("BF16", 3.4e38), ("F32", 1e39), ("F16", math.nan)])
def test_what_does_not_fit_is_refused_with_its_count(dtype, value):
    spec = TensorSpec("w", dtype, (3,))
    with pytest.raises(NumericError, match="1 values"):
        numerics.narrow(torch.tensor([1.0, value, 2.0], dtype=torch.float64), spec, memoryview(bytearray(spec.nbytes)))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_merge_is_the_exact_sum_rounded_once(dtype):
    generator = np.random.default_rng(1)
    base = generator.standard_normal((40, 30)).astype(np.float32)
    a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((3, 30), (40, 3)))
    weight = surgery.convert({"q.weight": base}, dtype=dtype) if dtype != "F32" else surgery.open({"q.weight": base})
    factors = surgery.open({"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b})
    adapter = Adapter(factors.tensors, {"peft_type": "LORA", "r": 3, "lora_alpha": 6}, label="adapter")
    merged = surgery.merge(weight, adapter, coeff=0.75)["q.weight"].double().numpy()
    wide = weight["q.weight"].double().numpy() + 1.5 * (b.astype(np.float64) @ a.astype(np.float64))
    wanted = np.vectorize(lambda value: rounded_exactly(value, dtype))(wide)
    assert (merged != wanted).mean() <= 1e-3  # a sum in another order may differ in the 53rd bit, next to a tie
    assert np.abs(merged - wanted).max() <= 2.0 ** (1 - FORMATS[dtype][0]) * np.abs(wanted).max()


def test_random_draws_depend_on_seed_name_and_role_alone():
    draws = {
        (seed, name, role): torch.rand(4, generator=numerics.generator(seed, name, role)).tolist()
        for seed in (0, 1)
        for name in ("a", "b")
        for role in ("", "x")
    }
    assert len({tuple(draw) for draw in draws.values()}) == len(draws)
    assert draws[0, "a", ""] == torch.rand(4, generator=numerics.generator(0, "a")).tolist()


def test_nested_producers_have_buffers_of_their_own():
    outer = numerics.scratch("role", 8)
    with numerics.deeper():
        inner = numerics.scratch("role", 8)
    assert outer.data_ptr() != inner.data_ptr()
    assert numerics.scratch("role", 8).data_ptr() == outer.data_ptr()
