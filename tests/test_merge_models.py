"""``merge --algorithm``, from Python and the shell: what counts as an input, how parameters are given, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from fixtures import generate
from surgery.algorithms.registry import ALGORITHMS
from surgery.errors import MismatchError, UnsupportedError, UsageError


def model(seed, **more):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.0.q_proj.weight": (8, 8), "layer.1.q_proj.weight": (8, 8), "norm.weight": (8,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | more


def test_dicts_are_merged_in_memory_and_lazily():
    base, a, b = model(0), model(1), model(2)
    merged = surgery.merge(base, a, b, algorithm="task_arithmetic", coeff=[0.5, -0.25])
    for name in base:
        wanted = base[name].double() + 0.5 * (a[name].double() - base[name]) - 0.25 * (b[name].double() - base[name])
        assert torch.equal(merged[name], wanted.float()), name
    assert set(surgery.merge(a, b, algorithm="linear")) == set(a)
    plan = merged.plan()
    assert (plan.bytes_read, plan.counts) == (3 * surgery.open(base).nbytes, {"merged": 3, "copied": 0})


def test_a_model_merged_lazily_is_an_input_like_any_other():
    base, a, b = model(0), model(1), model(2)
    inner = surgery.merge(base, a, algorithm="task_arithmetic", coeff=0.5)
    outer = surgery.merge(inner, b, algorithm="linear")
    assert torch.allclose(outer["norm.weight"], ((base["norm.weight"] + a["norm.weight"]) / 2 + b["norm.weight"]) / 2)


@pytest.mark.parametrize(
    "coeff",
    [
        {"layer.0.q_proj": 0.0, "*": 1.0},
        {"layer.0.*": [0.0, 0.0], "re:.*": [1.0, 1.0]},
        lambda name: 0.0 if name.startswith("layer.0.") else 1.0,
        lambda name: [0.0, 0.0] if "layer.0" in name else [1.0, 1.0],
    ],
    ids=["pattern", "pattern of lists", "function", "function of lists"],
)
def test_a_parameter_can_depend_on_the_tensor(coeff):
    base, a, b = model(0), model(1), model(2)
    merged = surgery.merge(base, a, b, algorithm="task_arithmetic", coeff=coeff)
    plain = surgery.merge(base, a, b, algorithm="task_arithmetic")
    assert torch.equal(merged["layer.0.q_proj.weight"], base["layer.0.q_proj.weight"])
    assert torch.equal(merged["layer.1.q_proj.weight"], plain["layer.1.q_proj.weight"])


def test_patterns_leave_the_default_where_none_matches_and_are_refused_where_they_match_nothing():
    base, a = model(0), model(1)
    merged = surgery.merge(base, a, algorithm="task_arithmetic", coeff={"norm": 0.0})
    assert torch.equal(merged["norm.weight"], base["norm.weight"])
    assert torch.allclose(merged["layer.0.q_proj.weight"], a["layer.0.q_proj.weight"])
    with pytest.raises(MismatchError, match="coeff 'nrm' matches no tensor"):
        surgery.merge(base, a, algorithm="task_arithmetic", coeff={"nrm": 0.0})


def test_an_adapter_stands_for_the_base_with_it_and_is_not_rounded_in_between(tmp_path):
    shape = generate.SIZES["tiny"]
    base, tuned = generate.write(tmp_path / "base", shape), generate.write(tmp_path / "ft", shape, tune=True)
    adapter = generate.adapter(tmp_path / "adapter", shape)
    merged = surgery.merge(base, tuned, adapter, algorithm="task_arithmetic", coeff=[0.0, 1.0])
    direct = surgery.merge(base, adapter)
    for name in direct:
        assert torch.allclose(merged[name].float(), direct[name].float(), rtol=2**-8), name
    # Half of an adapter's change is kept where rounding the adapter's model first would lose some of it.
    name = "model.layers.0.self_attn.q_proj.weight"
    halved = surgery.merge(base, adapter, coeff=0.5)
    assert torch.equal(surgery.merge(base, adapter, algorithm="task_arithmetic", coeff=0.5)[name], halved[name])
    record = surgery.merge(base, adapter, algorithm="ties", density=0.5).save(tmp_path / "out")
    assert [entry["role"] for entry in record["inputs"]] == ["base", "adapter"]
    assert record["inputs"][1]["fingerprint"] == surgery.adapter.open_adapter(adapter).fingerprint()
    assert record["parameters"] == {"algorithm": "ties", "compat": "paper", "density": 0.5}
    with pytest.raises(UsageError, match="a model only together with its base"):
        surgery.merge(tuned, adapter, algorithm="linear")


def test_the_output_keeps_files_configuration_and_side_files_of_the_base(tmp_path):
    shape = generate.SIZES["tiny"]
    base = generate.write(tmp_path / "base", shape, shard_bytes=100_000)
    tuned = generate.write(tmp_path / "ft", shape, tune=True)
    (base / "tokenizer.json").write_text("{}")
    surgery.merge(base, tuned, algorithm="ties", density=0.5, dtype="F32").save(tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in base.iterdir()} | {"surgery.json"} == files
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert all(
        t.dtype == torch.float32 for p in (tmp_path / "out").glob("*.safetensors") for t in load_file(p).values()
    )
    surgery.verify(tmp_path / "out")


def test_every_tensor_is_accounted_for():
    base, more = model(0), model(1, head=torch.ones(3))
    for pair in ((base, more), (more, base)):
        with pytest.raises(MismatchError, match="head: is not there, but in"):
            surgery.merge(*pair, algorithm="linear")
        kept = surgery.merge(*pair, algorithm="linear", missing="copy")
        assert torch.equal(kept["head"], more["head"])
    with pytest.raises(MismatchError, match="shapes must agree"):
        surgery.merge(base, {**base, "norm.weight": torch.ones(1)}, algorithm="linear")


def test_quantised_weights_are_refused_by_name():
    codes = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1)}
    with pytest.raises(UnsupportedError, match=r"a\.weight: is quantised"):
        surgery.merge(codes, dict(codes), algorithm="linear")


def test_names_under_wrappers_meet():
    base = model(0)
    wrapped = {f"module.{name}": value for name, value in model(1).items()}
    merged = surgery.merge(base, wrapped, algorithm="linear")
    assert set(merged) == set(base)
    assert any("stripped" in note for note in merged.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "tise"}, "did you mean ties"),
        ({"algorithm": lambda models, base, coeffs: base}, "a function that declares its scope"),
        ({"algorithm": "ties", "densty": 0.5}, "did you mean density"),
        ({"algorithm": "ties", "density": 1.5}, "density lies in"),
        ({"algorithm": "ties", "coeff": [1, 2]}, "2 values of coeff for 1 models"),
        ({"algorithm": "ties", "dtype": "I8"}, "--dtype can be"),
        ({"algorithm": "ties", "with_base": False}, "needs a base"),
        ({"density": 0.5}, "belongs to an algorithm"),
        ({"dtype": "F32"}, "belongs to an algorithm"),
    ],
)
def test_wrong_calls_say_what_is_wrong(given, message):
    with pytest.raises(UsageError, match=message):
        surgery.merge(model(0), model(1), **given)


def run(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "surgery", *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_command_line_does_what_python_does(tmp_path):
    models = {name: model(seed) for seed, name in enumerate(("base", "a", "b"))}
    for name, tensors in models.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    command = ["merge", "base", "a", "b", "--method", "ties", "-p", "density=0.5,0.25", "-p", "normalize=false"]
    done = run(*command, "--coeff", "0.6", "--coeff", "0.4", "-o", "out", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = surgery.merge(*models.values(), algorithm="ties", density=[0.5, 0.25], normalize=False, coeff=[0.6, 0.4])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    done = run("merge", "base", "a", "--algorithm", "dare_ties", "-p", "dens=0.5", "-o", "x", cwd=tmp_path)
    assert (done.returncode, "did you mean density" in done.stderr) == (2, True)
    assert not (tmp_path / "x").exists()
    done = run("merge", "base", "a", "-o", "x", cwd=tmp_path)
    assert (done.returncode, "add --algorithm" in done.stderr) == (2, True)


def test_the_list_of_algorithms_is_printed_whole(tmp_path):
    done = run("algorithms", "--json", cwd=tmp_path)
    assert {row["name"] for row in json.loads(done.stdout)["algorithms"]} == set(ALGORITHMS)
    shown = run("algorithms", cwd=tmp_path).stdout
    assert all(name in shown for name in ALGORITHMS)
    assert "the fraction of the task vector that is kept" in run("algorithms", "ties", cwd=tmp_path).stdout
    assert run("algorithms", "tis", cwd=tmp_path).returncode == 2
