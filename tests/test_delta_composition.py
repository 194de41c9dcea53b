"""Exact deltas together: chains, squashing, switching, going back, comparing, and exact deltas taken as numbers.

The oracle is plain: the bytes that went in, and for numbers float64 NumPy.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

import surgery
from surgery import provenance
from surgery.cli.main import main
from surgery.errors import MismatchError, NumericError, UnsupportedError, UsageError
from surgery.operations.delta_compare import compare_deltas
from surgery.operations.delta_squash import squash_deltas
from surgery.operations.delta_switch import switch_delta
from surgery.tensor import BITS, BytesTensor, TensorSpec, read_bytes

DTYPES = sorted(BITS)
SHAPES = [(8,), (), (0,), (4, 8), (3, 0), (2, 3, 8)]
FATES = ["same", "bit", "nudged", "other", "resized", "recast", "removed"]


def contents(checkpoint):
    """Every tensor's dtype, shape and bytes."""
    return {
        name: (tensor.spec.dtype, tensor.spec.shape, bytes(read_bytes(tensor)))
        for name, tensor in checkpoint.tensors.items()
    }


def checkpoint_of(tensors):
    return surgery.open({
        name: BytesTensor(TensorSpec(name, dtype, shape), data) for name, (dtype, shape, data) in tensors.items()
    })  # fmt: skip


def size_of(dtype, shape):
    return TensorSpec("w", dtype, shape).nbytes


@st.composite
def chains(draw, length):
    """State dicts of random bits, each made from the one before: unchanged, nudged, resized, recast, added, removed."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))

    def random_bytes(count):
        return generator.integers(0, 256, count, np.uint8).tobytes()

    def new():
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
        shape = (8,) if BITS[dtype] < 8 and shape == () else shape
        return dtype, shape, random_bytes(size_of(dtype, shape))

    def change(tensor, fate):
        dtype, shape, data = tensor
        if fate == "other":
            return dtype, shape, random_bytes(len(data))
        if fate == "nudged":
            noise = np.frombuffer(random_bytes(len(data)), np.uint8) & 1
            return dtype, shape, (np.frombuffer(data, np.uint8) ^ noise).tobytes()
        if fate == "bit" and data:
            return dtype, shape, bytes([data[0] ^ 1]) + data[1:]
        if fate == "resized" and shape:
            rows = int(generator.choice([8, 16, 24]))
            wanted = size_of(dtype, (rows, *shape[1:]))
            return dtype, (rows, *shape[1:]), (data + random_bytes(wanted))[:wanted]
        if fate == "recast":
            return "F32", (2, 2), random_bytes(16)
        return tensor

    state = {f"layer.{number}.weight": new() for number in range(draw(st.integers(1, 5)))}
    found = [state]
    for step in range(1, length):
        fates = {name: draw(st.sampled_from(FATES)) for name in state}
        state = {name: change(tensor, fates[name]) for name, tensor in state.items() if fates[name] != "removed"}
        if draw(st.booleans()) or not state:
            state[f"step.{step}.weight"] = new()
        found.append(state)
    return found


def deltas_of(states, reversible):
    steps = [checkpoint_of(state) for state in states]
    return steps, [surgery.extract_delta(old, new, reversible=reversible) for old, new in itertools.pairwise(steps)]


@settings(max_examples=60, deadline=None)
@given(chains(4), st.booleans())
def test_a_chain_of_deltas_restores_its_end_and_the_way_back_its_beginning(states, reversible):
    steps, deltas = deltas_of(states, reversible)
    assert contents(surgery.merge(steps[0], *deltas)) == states[-1]
    if reversible or all(delta.manifest.goes_back for delta in deltas):
        assert contents(surgery.merge(steps[-1], *reversed(deltas), reverse=True)) == states[0]


@settings(max_examples=60, deadline=None)
@given(chains(4), st.booleans())
def test_a_squashed_chain_does_what_the_chain_does(states, reversible):
    steps, deltas = deltas_of(states, reversible)
    squashed = squash_deltas(*deltas, base=steps[0])
    assert contents(surgery.merge(steps[0], squashed)) == states[-1]
    assert squashed.manifest == surgery.extract_delta(steps[0], steps[-1], reversible=reversible).manifest
    if reversible:
        assert contents(surgery.merge(steps[-1], squashed, reverse=True)) == states[0]
    try:
        without = squash_deltas(*deltas)
    except UsageError as error:
        assert "--base" in str(error)  # noqa: PT017  either is right; what matters is that neither is wrong
        return
    assert contents(surgery.merge(steps[0], without)) == states[-1]
    assert without.manifest.reversible == reversible
    if reversible:
        assert contents(surgery.merge(steps[-1], without, reverse=True)) == states[0]


@settings(max_examples=60, deadline=None)
@given(chains(2), chains(2), st.booleans())
def test_one_fine_tune_becomes_another_without_the_base(first, second, reversible):
    base, one = first
    two = {**second[1], **{name: one[name] for name in list(one)[:1]}}  # something that both have alike
    steps = [checkpoint_of(state) for state in (base, one, two)]
    old, new = (surgery.extract_delta(steps[0], tuned, reversible=reversible) for tuned in steps[1:])
    assert contents(switch_delta(steps[1], old, new, base=steps[0])) == two
    if old.manifest.goes_back:
        assert contents(switch_delta(steps[1], old, new)) == two
    else:
        with pytest.raises(UsageError, match="--base"):
            switch_delta(steps[1], old, new)


@settings(max_examples=40, deadline=None)
@given(chains(3))
def test_deltas_in_another_order_restore_nothing_wrong(states):
    steps, (first, second) = deltas_of(states, False)
    try:
        found = surgery.merge(steps[0], second, first)
        result = contents(found)
        found.origin.record({name: provenance.fingerprint(tensor) for name, tensor in found.tensors.items()})
    except MismatchError:
        return
    assert result == states[1]  # the second changes nothing that the first takes


# --- files, and what is refused


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A base, two fine-tunes of it, a second step from the first, and their deltas."""
    folder = tmp_path_factory.mktemp("store")
    torch.manual_seed(0)
    base = {
        "embed.weight": torch.randn(40, 16).bfloat16(),
        "layer.0.q_proj.weight": (torch.randn(64, 64) * 0.02).bfloat16(),
        "layer.0.q_proj.bias": torch.zeros(64).half(),
        "layer.1.q_proj.weight": (torch.randn(64, 64) * 0.02).bfloat16(),
        "steps": torch.tensor([7]),
    }
    one = {name: value.clone() for name, value in base.items()}
    one["layer.0.q_proj.weight"] += (torch.randn(64, 64) * 1e-4).bfloat16()
    one["layer.0.q_proj.bias"][3] = 1
    then = {name: value.clone() for name, value in one.items()}
    then["layer.1.q_proj.weight"] += (torch.randn(64, 64) * 1e-4).bfloat16()
    then["layer.0.q_proj.bias"][4] = 2
    two = {name: value.clone() for name, value in one.items()}
    two["layer.1.q_proj.weight"] += (torch.randn(64, 64) * 1e-3).bfloat16()
    for name, tensors in (("base", base), ("one", one), ("then", then), ("two", two)):
        (folder / name).mkdir()
        save_torch(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"step": name}))
    for name, old, new in (("one", "base", "one"), ("then", "one", "then"), ("two", "base", "two")):
        for suffix in ("", "-both"):
            delta = surgery.extract_delta(folder / old, folder / new, reversible=bool(suffix))
            delta.save(folder / f"{name}{suffix}.delta")
    return folder


def same_weights(left, right):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (left, right))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (left / "config.json").read_text() == (right / "config.json").read_text()


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code, capsys.readouterr()


def test_the_commands_chain_squash_and_switch(store, tmp_path, capsys):
    code, _ = run(capsys, "merge", store / "base", store / "one.delta", store / "then.delta", "-o", tmp_path / "chain")
    assert code == 0
    same_weights(tmp_path / "chain", store / "then")
    record = json.loads((tmp_path / "chain" / "surgery.json").read_text())
    assert [entry["role"] for entry in record["inputs"]] == ["base", "delta", "delta"]
    code, _ = run(
        capsys, "merge", store / "then", store / "then-both.delta", store / "one-both.delta", "--reverse",
        "-o", tmp_path / "back",
    )  # fmt: skip
    assert code == 0
    same_weights(tmp_path / "back", store / "base")
    squashed = tmp_path / "both.delta"
    chain = ("delta", "squash", store / "one.delta", store / "then.delta", "-o", squashed)
    code, said = run(capsys, *chain, "--dry-run", "--json")
    [entry] = json.loads(said.out)["deltas"]
    assert (code, entry["compared"], entry["whole"], squashed.exists()) == (0, 5, 0, False)
    code, said = run(capsys, *chain)
    assert (code, "bits a weight" in said.out) == (0, True)  # each changes another matrix: no base is needed
    run(capsys, "merge", store / "base", squashed, "-o", tmp_path / "once")
    same_weights(tmp_path / "once", store / "then")
    code, said = run(capsys, "verify", squashed)
    assert code == 0
    code, said = run(
        capsys, "delta", "switch", store / "one", store / "one-both.delta", store / "two.delta", "-o", tmp_path / "two",
        "--json",
    )  # fmt: skip
    assert json.loads(said.out)["tensors"] == {"restored": 1, "copied": 4}
    same_weights(tmp_path / "two", store / "two")


def test_switching_says_when_it_needs_a_way_back_or_the_base(store, tmp_path, capsys):
    words = ["delta", "switch", store / "one", store / "one.delta", store / "two.delta", "-o", tmp_path / "two"]
    code, said = run(capsys, *words)
    assert code == 2
    assert "--reversible" in said.err
    assert "--base" in said.err
    assert run(capsys, *words, "--base", store / "base")[0] == 0
    same_weights(tmp_path / "two", store / "two")
    with pytest.raises(MismatchError, match="fine-tunes of one base"):
        switch_delta(store / "then", store / "then-both.delta", store / "two.delta")


def test_switching_from_another_checkpoint_is_refused_by_tensor(store, tmp_path):
    for name in ("layer.1.q_proj.weight", "steps"):  # one that goes back and on, one that is copied
        wrong = load_file(store / "one" / "model.safetensors")
        wrong[name].view(torch.uint8).reshape(-1)[0] ^= 1
        save_torch(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(MismatchError, match=rf"{name}: is not the fine-tune's"):
            switch_delta(tmp_path / "wrong.safetensors", store / "one-both.delta", store / "two.delta").save(
                tmp_path / "out"
            )
        assert not (tmp_path / "out").exists()


def test_deltas_at_positions_go_back_without_having_been_made_reversible(tmp_path):
    base = {"q.bias": torch.zeros(300), "q.weight": torch.randn(8, 8)}
    tuned = {**base, "q.bias": torch.zeros(300).index_fill(0, torch.tensor([5]), 1.0)}
    delta = surgery.extract_delta(base, tuned)
    assert delta.manifest.goes_back
    assert torch.equal(surgery.merge(tuned, delta, reverse=True)["q.bias"], base["q.bias"])


def test_a_chain_out_of_order_is_refused_with_the_order_to_use(store):
    with pytest.raises(MismatchError, match=r"layer\..*name them in this order: one\.delta then\.delta"):
        surgery.merge(store / "base", store / "then.delta", store / "one.delta")
    with pytest.raises(MismatchError, match="of one base they are switched, not chained"):
        surgery.merge(store / "base", store / "one.delta", store / "two.delta")
    with pytest.raises(MismatchError, match=r"name them in this order: then-both\.delta one-both\.delta"):
        surgery.merge(store / "then", store / "one-both.delta", store / "then-both.delta", reverse=True)


def test_a_wrong_base_of_a_chain_is_named_and_nothing_is_published(store, tmp_path):
    wrong = load_file(store / "base" / "model.safetensors")
    wrong["layer.0.q_proj.weight"].view(torch.int16)[1, 1] ^= 1
    save_torch(wrong, tmp_path / "wrong.safetensors")
    deltas = store / "one.delta", store / "then.delta"
    with pytest.raises(MismatchError, match=r"wrong\.safetensors: layer\.0\.q_proj\.weight: is not the base's"):
        surgery.merge(tmp_path / "wrong.safetensors", *deltas).save(tmp_path / "out")
    with pytest.raises(MismatchError, match=r"wrong\.safetensors: layer\.0\.q_proj\.weight: is not the base's"):
        squash_deltas(*deltas, base=tmp_path / "wrong.safetensors")
    assert not (tmp_path / "out").exists()


def test_squashing_says_when_it_takes_the_base(store, tmp_path, capsys):
    dense = surgery.extract_delta(store / "one", store / "two")
    again = load_file(store / "two" / "model.safetensors")
    again["layer.1.q_proj.weight"] += (torch.randn(64, 64) * 1e-3).bfloat16()
    more = surgery.extract_delta(store / "two", again)
    with pytest.raises(UsageError, match=r"layer\.1\.q_proj\.weight: has dense differences in both.*--base"):
        squash_deltas(dense, more)
    assert torch.equal(
        surgery.merge(store / "one", squash_deltas(dense, more, base=store / "one"))["layer.1.q_proj.weight"],
        again["layer.1.q_proj.weight"],
    )
    code, said = run(capsys, "delta", "squash", store / "one.delta", "-o", tmp_path / "x.delta")
    assert (code, "at least two" in said.err) == (2, True)
    code, said = run(capsys, "delta", "squash", store / "one.delta", store / "then.delta", "-o", store / "one.delta")
    assert code == 7


# --- many, and two beside each other


def test_one_fine_tune_that_fails_does_not_stop_the_others(store, tmp_path, capsys):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((store / "one" / "model.safetensors").read_bytes()[:-9])
    out = tmp_path / "deltas"
    code, said = run(capsys, "extract-delta", store / "base", store / "one", torn, store / "two", "-o", out)
    assert code == 3
    assert said.err.count("\n") == 1
    assert "torn.safetensors" in said.err
    assert "2 of 3 deltas written" in said.out
    assert sorted(path.name for path in out.iterdir()) == ["one.delta", "two.delta"]
    assert (out / "two.delta").read_bytes() == (store / "two.delta").read_bytes()
    code, said = run(capsys, "extract-delta", store / "base", store / "one", store / "then", "-o", out, "--json")
    found = json.loads(said.out)
    assert code == 7
    assert [entry["task"] for entry in found["deltas"]] == ["then"]
    assert found["failed"][0]["exit_code"] == 7


def test_info_lists_a_store(store, tmp_path, capsys):
    code, said = run(capsys, "info", store / "one.delta", store / "two-both.delta", store / "base")
    assert code == 0
    assert "base → one: 3 unchanged" in said.out
    assert "base → two (and back)" in said.out
    (tmp_path / "bad.delta").write_bytes((store / "one.delta").read_bytes()[:-1])
    code, said = run(capsys, "info", store / "one.delta", tmp_path / "bad.delta", "--json")
    found = json.loads(said.out)
    assert code == 3
    assert [entry["base"] for entry in found["found"]] == ["base"]
    assert found["failed"][0]["exit_code"] == 3


def test_two_deltas_of_one_base_are_compared_from_their_manifests(store, capsys):
    found = compare_deltas(store / "one.delta", store / "two.delta")
    statuses = {row.name: row.status for row in found.rows}
    assert statuses["layer.0.q_proj.weight"] == "changed alike"
    assert statuses["layer.1.q_proj.weight"] == "changed by B"
    assert statuses["steps"] == "unchanged"
    code, said = run(capsys, "diff", store / "one.delta", store / "two.delta", "--exit-code")
    assert (code, "1 changed by B" in said.out) == (1, True)
    code, said = run(capsys, "diff", store / "one.delta", store / "one-both.delta", "--exit-code", "-q")
    assert (code, said.out) == (0, "the same fine-tune\n")
    with pytest.raises(MismatchError, match="only deltas of one base"):
        compare_deltas(store / "one.delta", store / "then.delta")


def test_two_deltas_are_compared_by_their_values_with_the_base(store, tmp_path, capsys):
    words = ["--json", "--no-spectrum"]
    code, ours = run(capsys, "diff", store / "one.delta", store / "two.delta", "--base", store / "base", *words)
    code, theirs = run(capsys, "diff", store / "one", store / "two", *words)
    ours, theirs = json.loads(ours.out), json.loads(theirs.out)
    assert code == 0
    assert ours["relative_norm"] == theirs["relative_norm"] > 0
    code, said = run(capsys, "diff", store / "one.delta", store / "two.delta", "--base", store / "then", *words)
    assert (code, "is not the base's" in said.err) == (4, True)
    assert run(capsys, "diff", store / "one", store / "two", "--base", store / "base")[0] == 2


# --- exact deltas as numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_with_its_base_named_a_delta_is_added_as_numbers(dtype):
    generator = torch.Generator().manual_seed(0)
    base, tuned, other = (
        {"w": torch.randn(70, 33, generator=generator).to(dtype), "s": torch.ones(3)} for _ in range(3)
    )
    delta = surgery.extract_delta(base, tuned)
    w, b, t = (state["w"].double().numpy() for state in (other, base, tuned))
    for coeff in (0.5, -1, 1):
        merged = surgery.merge(other, delta, delta_base=base, coeff=coeff)
        ideal = torch.from_numpy(w + coeff * (t - b))
        assert torch.equal(merged["w"], _rounded(ideal, dtype))
        assert torch.equal(merged["s"], other["s"])
    assert torch.equal(surgery.merge(base, delta, delta_base=base, coeff=1)["w"], tuned["w"])


def _rounded(values, dtype):
    """Round float64 once: by way of float32 rounded to odd, where torch would round twice."""
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    single = values.float()
    inexact = single.double() != values
    toward = torch.where(
        single.double().abs() > values.abs(), torch.nextafter(single, torch.zeros_like(single)), single
    )
    odd = torch.where(inexact, (toward.view(torch.int32) | 1).view(torch.float32), single)
    return odd.to(dtype)


def test_two_deltas_are_added_as_numbers_and_the_record_says_so(store, tmp_path):
    merged = surgery.merge(
        store / "base", store / "one.delta", store / "two.delta", delta_base=store / "base", coeff=[0.5, 0.25]
    )
    record = merged.save(tmp_path / "out")
    assert [entry.get("coeff") for entry in record["inputs"]] == [None, 0.5, 0.25]
    base, one, two = (load_file(store / name / "model.safetensors") for name in ("base", "one", "two"))
    name = "layer.1.q_proj.weight"
    ideal = base[name].double() + 0.25 * (two[name].double() - base[name].double())
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], _rounded(ideal, torch.bfloat16))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["steps"], one["steps"])


def test_numbers_from_another_base_than_the_named_one_are_refused(store, tmp_path):
    with pytest.raises(MismatchError, match=r"layer\.0\.q_proj\.\w+: is not the base's"):
        surgery.merge(store / "two", store / "one.delta", delta_base=store / "one", coeff=0.5).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_no_number_says_is_refused_by_name(store):
    base = {"w": torch.ones(4), "i": torch.arange(3), "r": torch.ones(2, 2), "gone": torch.ones(1)}
    for tuned, why in (
        ({**base, "i": torch.arange(3) + 1}, "i: is I64"),
        ({**base, "r": torch.ones(3, 2)}, "r: is resized"),
        ({**base, "new": torch.ones(2)}, "new: is new"),
        ({name: value for name, value in base.items() if name != "gone"}, "takes tensors away"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            surgery.merge(base, surgery.extract_delta(base, tuned), delta_base=base, coeff=0.5)
    moved = surgery.extract_delta(base, {**base, "w": torch.zeros(4)})
    with pytest.raises(MismatchError, match="w: is not there"):
        surgery.merge({"v": torch.ones(4)}, moved, delta_base=base, coeff=0.5)
    nan = surgery.extract_delta(base, {**base, "w": torch.full((4,), torch.nan)})
    with pytest.raises(NumericError):
        surgery.merge(base, nan, delta_base=base, coeff=0.5)["w"]
    with pytest.raises(UsageError, match="one of exact deltas"):
        surgery.merge(base, store / "nothing", delta_base=base)
    with pytest.raises(UsageError, match="--delta-base BASE decodes"):
        surgery.merge(store / "base", store / "one.delta", coeff=2)


# --- resized tensors


def test_a_resized_vocabulary_costs_its_new_rows_and_what_changed():
    generator = np.random.default_rng(0)
    old = generator.normal(size=(5000, 64)).astype(np.float32)
    new = np.concatenate([old, generator.normal(size=(8, 64)).astype(np.float32)])
    for before, after in ((old, new), (new, old)):
        delta = surgery.extract_delta({"embed.weight": before}, {"embed.weight": after})
        assert delta.nbytes < 8 * 64 * 4 + 1500
        assert surgery.merge({"embed.weight": before}, delta)["embed.weight"].numpy().tobytes() == after.tobytes()
        both = surgery.extract_delta({"embed.weight": before}, {"embed.weight": after}, reversible=True)
        back = surgery.merge({"embed.weight": after}, both, reverse=True)
        assert back["embed.weight"].numpy().tobytes() == before.tobytes()


def test_a_resized_tensor_of_several_blocks_comes_back_both_ways():
    old = np.arange(1_500_000, dtype=np.int16).reshape(-1, 10)
    new = np.concatenate([old + (np.arange(10) == 3).astype(np.int16), old[:90_000]])
    delta = surgery.extract_delta({"w": old}, {"w": new}, reversible=True)
    assert surgery.merge({"w": old}, delta)["w"].numpy().tobytes() == new.tobytes()
    assert surgery.merge({"w": new}, delta, reverse=True)["w"].numpy().tobytes() == old.tobytes()
