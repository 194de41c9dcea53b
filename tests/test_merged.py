"""The engine: the same bytes however a tensor is cut, exact statistics, one rounding, and the memory that was planned."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from fixtures import generate
from surgery import merged as engine_room
from surgery import numerics
from surgery.algorithms import order
from surgery.algorithms.custom import algorithm
from surgery.algorithms.kernel import merge_tensors
from surgery.algorithms.order import Order, Rank
from surgery.algorithms.registry import ALGORITHMS, find
from surgery.checkpoint import open_checkpoint
from surgery.errors import MismatchError, NumericError, UnsupportedError, UsageError
from surgery.merged import Agreed, Merged, merged
from surgery.tensor import TensorSpec, read_bytes

NAMES = sorted(ALGORITHMS)
SHAPE = (36, 100)


def inputs(dtype=torch.bfloat16, shape=SHAPE, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(shape, generator=generator)
    return base.to(dtype), [(base + 2e-3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]


def lazily(tensors):
    return [open_checkpoint({"w": tensor}).lazy("w") for tensor in tensors]


def engine(name, base, models, parameters=None, **options):
    algorithm = find(name)
    low, high = algorithm.models
    models = models[: min(max(low, 3), high or 3)]
    known = {"density": 0.4, "t": 0.3, "epsilon": 0.2 if "della" in name else 1e-4, **(parameters or {})}
    own = {p.name for p in algorithm.parameters}
    given = {key: value for key, value in known.items() if key in own}
    lazy_base = lazily([base])[0] if algorithm.base == "required" else None
    return Merged("w", lazily(models), lazy_base, name, given, **options)


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut into blocks of 300 elements, so that small tensors are cut too, and thresholds take all their passes."""
    monkeypatch.setattr(engine_room, "BLOCK", 300)
    monkeypatch.setattr(order, "BLOCK", 300)
    monkeypatch.setattr(engine_room, "_PASS_RUN", 900)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_do_not_depend_on_where_the_output_is_cut_or_on_threads(name, dtype, small_blocks):
    base, models = inputs(dtype)
    whole = bytes(read_bytes(engine(name, base, models)))
    pieces = engine(name, base, models)
    size, step = pieces.spec.itemsize, pieces.unit * max(700 // pieces.unit, 1)
    cuts = [(low, min(low + step, pieces.spec.numel)) for low in range(0, pieces.spec.numel, step)]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda cut: bytes(read_bytes(pieces, *cut)), reversed(cuts)))
    assert b"".join(reversed(parts)) == whole
    assert len(whole) == base.numel() * size


@pytest.mark.parametrize("name", NAMES)
def test_many_blocks_give_what_one_gives(name, monkeypatch):
    base, models = inputs(torch.float64)
    once = numerics.load(engine(name, base, models))
    monkeypatch.setattr(engine_room, "BLOCK", 300)
    monkeypatch.setattr(order, "BLOCK", 300)
    often = numerics.load(engine(name, base, models))
    assert torch.allclose(once, often, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_short_dtypes_are_computed_in_float32_and_rounded_once(name, dtype):
    base, models = inputs(dtype)
    lazy = engine(name, base, models)
    wide = engine(name, base.float(), [model.float() for model in models], dtype="F32")
    assert lazy.spec.dtype == numerics.NAMES[dtype]
    algorithm = find(name)
    used = [model.float() for model in models[: len(lazy.inputs)]]
    parameters = {"density": 0.4, "t": 0.3, "epsilon": 0.2 if "della" in name else 1e-4}
    given = {p.name: parameters[p.name] for p in algorithm.parameters if p.name in parameters}
    own = base.float() if algorithm.base == "required" else None
    single = merge_tensors(name, used, own, given, name="w")
    assert torch.equal(numerics.load(lazy), single.to(dtype))
    # Beside float64, which float32 outputs are computed in, that is right to a rounding or two of the short dtype.
    if name not in ("dare_linear", "dare_ties", "della", "della_linear", "arcee_fusion", "sce", "ties"):
        exact = numerics.load(wide).double()
        ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).smallest_normal)
        assert ((numerics.load(lazy).double() - exact).abs() <= ulp).all()


def test_linear_and_task_arithmetic_are_numpys_float32_to_the_bit():
    base, models = inputs(torch.bfloat16)
    b, *x = [tensor.float().numpy() for tensor in (base, *models)]
    coeffs = [np.float32(0.3), np.float32(-0.7), np.float32(1.1)]
    each = [{"coeff": float(c)} for c in coeffs]
    total = x[0] * coeffs[0] + x[1] * coeffs[1] + x[2] * coeffs[2]
    lazy = Merged("w", lazily(models), None, "linear", {"normalize": False}, each)
    assert torch.equal(numerics.load(lazy), torch.from_numpy(total).bfloat16())
    total = b + ((x[0] - b) * coeffs[0] + (x[1] - b) * coeffs[1] + (x[2] - b) * coeffs[2])
    lazy = Merged("w", lazily(models), lazily([base])[0], "task_arithmetic", {}, each)
    assert torch.equal(numerics.load(lazy), torch.from_numpy(total).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["continuous", "few values", "zeros", "bfloat16 differences"])
def test_order_statistics_are_those_of_a_full_sort(kind, dtype, small_blocks):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5000, generator=generator, dtype=dtype).abs()
    if kind == "few values":
        values = (values * 4).round() / 4
    if kind == "zeros":
        values[torch.randperm(5000, generator=generator)[:4000]] = 0
    if kind == "bfloat16 differences":
        a = torch.randn(5000, generator=generator).mul_(0.02)
        b = a + 1e-3 * torch.randn(5000, generator=generator)
        values = (a.bfloat16().to(dtype) - b.bfloat16().to(dtype)).abs()
    ranks = [Rank(0, rank) for rank in (1, 999, 1000, 2500, 5000)]
    sorted_values = values.sort(descending=True).values
    wanted = {rank: float(sorted_values[rank.rank - 1]) for rank in ranks}
    # With a sample that tells the truth, one that misleads, and none.
    for sample in (values, values * 1.5 + 1, None):
        seeker = Order(ranks, 5000, dtype)
        if sample is not None:
            seeker.sample([sample])
        found, passes = [], 0
        for _ in range(seeker.stages):
            if not seeker.needs(found):
                found.append(None)
                continue
            passes += 1
            parts = [seeker.observe([part], found) for part in values.split(1250)]
            found.append(seeker.conclude(tuple(map(sum, zip(*parts, strict=True))), found))
        assert seeker.values(found) == wanted
        assert passes == (
            dtype.itemsize // 2 if sample is None or dtype == torch.float64 else 1 if sample is values else 3
        )


def test_random_words_can_be_cut_anywhere():
    whole = numerics.random_words(7, "w", "r", 0, 1001)
    for start, stop in ((0, 1), (1, 2), (3, 10), (500, 1001), (999, 1001)):
        assert np.array_equal(numerics.random_words(7, "w", "r", start, stop - start), whole[start:stop])
    assert not np.array_equal(numerics.random_words(7, "v", "r", 0, 100), whole[:100])


def test_a_sample_spares_a_pass_and_changes_no_byte(small_blocks, monkeypatch):
    base, models = inputs(shape=(200, 100))
    without = bytes(read_bytes(engine("ties", base, models)))
    monkeypatch.setattr(engine_room, "_SAMPLE_OF", 1000)
    lazy = engine("breadcrumbs_ties", base, models)
    assert bytes(read_bytes(engine("ties", base, models))) == without
    read_bytes(lazy, 0, 100)
    assert lazy._passes.get()[1:] == [None, None]


def test_statistics_are_gathered_once_whoever_asks(small_blocks):
    base, models = inputs()
    lazy = engine("ties", base, models)
    reads = []

    class Counting:
        def __init__(self, source):
            self.source, self.spec, self.unit, self.scratch, self.resident = source, source.spec, 1, 0, 0

        def read_into(self, start, stop, out):
            reads.append(stop - start)
            self.source.read_into(start, stop, out)

    lazy.inputs = tuple(map(Counting, lazy.inputs))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: read_bytes(lazy, 900 * k, 900 * (k + 1)), range(4)))
    assert sum(reads) == 3 * lazy.spec.numel * (2 + 1)  # three models: two passes, and once to combine


def test_shapes_must_agree_exactly():
    base, models = inputs()
    with pytest.raises(MismatchError, match=r"has shape \[100\], but \[36, 100\] in first"):
        Merged("w", lazily([models[0], models[0][0]]), None, "linear", labels=["first", "second"])
    with pytest.raises(MismatchError, match="nothing is stretched"):
        Merged("w", lazily([models[0]]), lazily([base[:1]])[0], "ties")


def test_what_is_no_number_is_copied_where_all_agree_and_refused_by_name_where_not():
    same = torch.arange(6)
    found = merged("m", lazily([same, same.clone()]), None, "linear", labels=["a", "b"])
    assert torch.equal(numerics.load(found), same)
    assert found.spec == TensorSpec("m", "I64", (6,))
    other = same.clone()
    other[4] = 9
    with pytest.raises(MismatchError, match="b: w: is I64 and differs from a's"):
        numerics.load(merged("m", lazily([same, other]), None, "linear", labels=["a", "b"]))
    with pytest.raises(MismatchError, match=r"is I64\[5\], but I64\[6\] in a"):
        Agreed(lazily([same, same[:5]]), ["a", "b"])
    with pytest.raises(UnsupportedError, match="b: w: is I64; surgery computes with"):
        merged("m", lazily([same.float(), same]), None, "linear", labels=["a", "b"])


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_refused_in_the_input_that_has_it(name):
    base, models = inputs(torch.float32)
    models[0][2, 3] = float("nan")
    count = len(engine(name, base, models).inputs)
    labels = ["base"] * (find(name).base == "required") + [f"model {k}" for k in range(count)]
    lazy = engine(name, base, models, labels=labels)
    with pytest.raises(NumericError, match="model 0: w: is NaN or infinite at element 203"):
        read_bytes(lazy)


def test_overflow_is_refused_and_both_can_be_let_through():
    large = torch.full((4,), 60000.0, dtype=torch.float16)
    lazy = Merged("w", lazily([large, large]), None, "linear", {"normalize": False})
    with pytest.raises(NumericError, match="w: 4 values overflow F16"):
        read_bytes(lazy)
    lazy = Merged("w", lazily([large, large]), None, "linear", {"normalize": False}, allow_nonfinite=True)
    assert numerics.load(lazy).isinf().all()


def test_unknown_semantics_are_refused():
    with pytest.raises(UsageError, match="compat is paper or mergekit"):
        Merged("w", lazily([torch.zeros(2)]), None, "linear", compat="theirs")


@pytest.mark.parametrize("scope", ["element", "row", "tensor"])
def test_a_function_of_ones_own_streams_in_its_scope(scope, small_blocks):
    seen = []

    @algorithm(scope=scope, base="required")
    def halfway(models, base, coeffs):
        seen.append(tuple(base.shape))
        return base + sum(c * (model - base) for c, model in zip(coeffs, models, strict=True))

    base, models = inputs(torch.float32)
    lazy = Merged("w", lazily(models), lazily([base])[0], halfway, {"coeff": 0.5})
    plain = Merged("w", lazily(models), lazily([base])[0], "task_arithmetic", {"coeff": 0.5})
    assert torch.allclose(numerics.load(lazy), numerics.load(plain), rtol=1e-6)
    assert seen[0] == {"element": (300,), "row": (3, 100), "tensor": SHAPE}[scope]
    wrong = algorithm(scope="element")(lambda models, base, coeffs: models[0][:1])
    with pytest.raises(UsageError, match=r"returned \[1\] for \[300\]"):
        numerics.load(Merged("w", lazily(models), None, wrong))
    with pytest.raises(UsageError, match="element, row or tensor"):
        algorithm(scope="statistics")


def write(folder, tensors, shards):
    folder.mkdir()
    names = sorted(tensors)
    groups = [names[k::shards] for k in range(shards)]
    index = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in group}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def loaded(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties", "della", "sce", "model_stock"])
def test_jobs_and_shards_do_not_change_a_byte(name, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (3000, 200), "layer.0.weight": (500, 200), "layer.0.bias": (500,), "norm.weight": (200,)}
    base = {k: (0.02 * torch.randn(s, generator=generator)).bfloat16() for k, s in shapes.items()}
    tuned = [
        {k: (v + 2e-3 * torch.randn(v.shape, generator=generator)).bfloat16() for k, v in base.items()} for _ in "ab"
    ]
    for split in (2, 3):
        for label, tensors in (("base", base), ("a", tuned[0]), ("b", tuned[1])):
            write(tmp_path / f"{label}{split}", tensors, split)
    given = {"density": 0.4} if any(p.name == "density" for p in find(name).parameters) else {}
    results = []
    for split, jobs in ((2, 1), (2, 2), (2, 4), (3, 2)):
        paths = [tmp_path / f"{label}{split}" for label in ("base", "a", "b")]
        out = tmp_path / f"out{split}{jobs}"
        surgery.merge(*paths, algorithm=name, **given).save(out, jobs=jobs)
        results.append(loaded(out))
        record = json.loads((out / "surgery.json").read_text())
        assert record["parameters"]["algorithm"] == name
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(results[0][k], other[k]) for k in other)


PROBE = """
import json, sys, surgery, torch
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
algorithm, parameters, out, *models = sys.argv[1:]
def work(models, out):
    lazy = surgery.merge(*models, algorithm=algorithm, **json.loads(parameters))
    estimate = lazy.plan(jobs=2).peak_memory
    lazy.save(out, jobs=2)
    return estimate
work([model + "-warm" for model in models], out + "-warm")
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")
before = status("VmRSS")
estimate = work(models, out)
print(json.dumps({"peak": status("VmHWM") - before, "estimate": estimate}))
"""


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for label, shape in (("", generate.of_bytes(60_000_000)), ("-warm", generate.SIZES["tiny"])):
        generate.write(folder / f"base{label}", shape)
        generate.write(folder / f"ft{label}", shape, tune=True)
    return folder


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("linear", {}), ("ties", {"density": 0.3}), ("della", {"density": 0.5}), ("arcee_fusion", {})],
)
def test_memory_stays_within_the_plan(name, parameters, generated, tmp_path):
    models = [str(generated / "base"), str(generated / "ft")]
    if find(name).models[1] is None:
        models.append(models[1])
    arguments = [sys.executable, "-c", PROBE, name, json.dumps(parameters), str(tmp_path / "out"), *models]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] <= found["estimate"] < 400_000_000, found
