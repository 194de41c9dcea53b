"""Exact deltas: the fine-tune comes back bit for bit, a wrong base and a damaged file never pass.

The oracle is plain: the bytes that went in, compared with those that come out through NumPy and the official safetensors.
"""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

import surgery
from fixtures import real_pair
from surgery.cli.main import main
from surgery.errors import FormatError, MismatchError, OutputError, SurgeryError, UsageError
from surgery.exact import open_delta
from surgery.formats import delta_manifest
from surgery.formats.delta_codec import CODINGS, RAW, Block, decode, decode_raw, encode
from surgery.operations.extract_delta import extract_deltas
from surgery.tensor import BITS, BytesTensor, TensorSpec, read_bytes

DTYPES = sorted(BITS)


def contents(checkpoint):
    """Every tensor's dtype, shape and bytes."""
    return {
        name: (tensor.spec.dtype, tensor.spec.shape, bytes(read_bytes(tensor)))
        for name, tensor in checkpoint.tensors.items()
    }


def tensor_of(name, dtype, shape, data):
    return BytesTensor(TensorSpec(name, dtype, shape), data)


def checkpoint_of(tensors):
    return surgery.open({name: tensor_of(name, *rest) for name, rest in tensors.items()})


# --- the codec


@st.composite
def blocks(draw):
    """A dtype and two blocks of random bits, alike in a random share of their elements."""
    dtype = draw(st.sampled_from(DTYPES))
    count = draw(st.integers(1, 300))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = 24 * count * BITS[dtype] // 8
    old = generator.integers(0, 256, size, np.uint8)
    near = old + generator.integers(-1, 2, size).astype(np.uint8)
    new = np.where(generator.random(size) < draw(st.sampled_from([0, 0.01, 0.3, 1])), near, old)
    if draw(st.booleans()):
        new = generator.integers(0, 256, size, np.uint8)
    return dtype, old.tobytes(), new.tobytes()


@settings(max_examples=150, deadline=None)
@given(blocks(), st.booleans())
def test_any_block_of_any_dtype_comes_back_from_any_other(pair, reversible):
    dtype, old, new = pair
    coding, data = encode(Block(dtype, new), Block(dtype, old), reversible=reversible)
    assert coding in CODINGS
    if coding == RAW:
        assert not reversible
        assert decode_raw(data, dtype, len(new)) == new
        return
    assert decode(coding, data, Block(dtype, old)) == new
    if reversible:
        assert decode(coding, data, Block(dtype, new), reverse=True) == old


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_special_values_come_back_with_their_payloads(dtype):
    bits = BITS[dtype]
    number = np.dtype(f"<u{bits // 8}")
    top = 1 << (bits - 1)
    infinity = {
        "F64": 0x7FF << 52,
        "F32": 0xFF << 23,
        "BF16": 0xFF << 7,
        "F16": 0x1F << 10,
        "F8_E4M3": 0x7F,
        "F8_E5M2": 0x7C,
    }
    special = [0, top, 1, top | 1, infinity[dtype], infinity[dtype] | top, infinity[dtype] | 1, 2 * top - 1, top - 1]
    old = np.array([a for a in special for _ in special], number).tobytes()
    new = np.array([b for _ in special for b in special], number).tobytes()
    coding, data = encode(Block(dtype, new), Block(dtype, old), reversible=True)
    assert decode(coding, data, Block(dtype, old)) == new
    assert decode(coding, data, Block(dtype, new), reverse=True) == old


def test_the_order_of_the_codes_is_that_of_the_values():
    values = np.float32([-np.inf, -2, -1, -1e-45, -0.0, 0.0, 1e-45, 1, 2, np.inf])
    ordered = Block("F32", values.tobytes()).values.view("<i4")
    assert (np.diff(ordered.astype(np.int64)) > 0).all()
    assert ordered[5] - ordered[4] == 1  # −0 and +0 are neighbours


# --- whole state dicts


@st.composite
def state_dicts(draw):
    """Two state dicts of random bits that share some tensors: unchanged, nudged, resized, recast, added, removed."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    base, tuned = {}, {}

    def random_bytes(count):
        return generator.integers(0, 256, count, np.uint8)

    for number in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.sampled_from([(8,), (), (0,), (4, 8), (3, 0), (2, 3, 8)]))
        if BITS[dtype] < 8 and shape == ():
            shape = (8,)
        spec = TensorSpec("w", dtype, shape)
        old = random_bytes(spec.nbytes)
        fate = draw(st.sampled_from(["same", "nudged", "other", "resized", "recast", "added", "removed"]))
        name = f"layer.{number}.weight"
        if fate != "added":
            base[name] = (dtype, shape, old.tobytes())
        if fate == "same":
            tuned[name] = base[name]
        elif fate == "nudged":
            tuned[name] = (dtype, shape, (old ^ (random_bytes(old.size) & 1)).tobytes())
        elif fate in ("other", "added"):
            tuned[name] = (dtype, shape, random_bytes(old.size).tobytes())
        elif fate == "resized":
            tuned[name] = (
                dtype,
                (16, *shape[1:]),
                random_bytes(TensorSpec("w", dtype, (16, *shape[1:])).nbytes).tobytes(),
            )
        elif fate == "recast":
            tuned[name] = ("F32", (2, 2), random_bytes(16).tobytes())
    return base or {"a": ("U8", (1,), b"x")}, tuned or {"a": ("U8", (1,), b"y")}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state_dicts(), st.booleans())
def test_any_state_dict_comes_back_from_any_base_by_way_of_a_file(pair, reversible):
    base, tuned = map(checkpoint_of, pair)
    delta = surgery.extract_delta(base, tuned, reversible=reversible)
    assert contents(surgery.merge(base, delta)) == contents(tuned)
    if reversible:
        assert contents(surgery.merge(tuned, delta, reverse=True)) == contents(base)


def test_tensors_of_several_blocks_come_back_whole_and_in_ranges():
    generator = np.random.default_rng(0)
    old = generator.normal(0, 0.02, 2_500_000).astype(np.float32)
    new = old.copy()
    new[:1_100_000] += np.float32(1e-6)
    new[2_200_000] = 7
    base, tuned = {"w": old, "h": old[:9].astype(np.float16)}, {"w": new, "h": old[:9].astype(np.float16)}
    delta = surgery.extract_delta(base, tuned)
    assert [block.coding for block in delta.manifest.changes["w"].blocks] == ["sorted", "sorted", "sparse"]
    lazy = surgery.merge(base, delta).lazy("w")
    assert bytes(read_bytes(lazy)) == new.tobytes()
    assert bytes(read_bytes(lazy, lazy.unit, 2 * lazy.unit)) == new[lazy.unit : 2 * lazy.unit].tobytes()


# --- files


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A small model of many dtypes and its fine-tune, with one tensor added, one removed, one resized and one renamed."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    base = {
        "embed.weight": torch.randn(50, 16).bfloat16(),
        "layer.0.q_proj.weight": torch.randn(64, 64).bfloat16() * 0.02,
        "layer.0.q_proj.bias": torch.zeros(64).half(),
        "layer.0.mask": torch.tensor([True, False, True]),
        "layer.0.codes": torch.arange(40, dtype=torch.int8),
        "layer.0.scale": torch.randn(32).to(torch.float8_e4m3fn),
        "layer.0.double": torch.randn(20, dtype=torch.float64),
        "old.head": torch.randn(4, 4),
        "step": torch.tensor(3),
        "empty": torch.zeros(0, 3),
    }
    tuned = {name: value.clone() for name, value in base.items()}
    tuned["embed.weight"] = torch.cat([base["embed.weight"], torch.randn(2, 16).bfloat16()])
    tuned["layer.0.q_proj.weight"] += (torch.randn(64, 64) * 1e-4).bfloat16()
    tuned["layer.0.q_proj.bias"][5] = -0.0
    tuned["layer.0.codes"][3] = -128
    tuned["layer.0.double"][0] = float("nan")
    tuned["new.head"] = tuned.pop("old.head") + 1
    tuned["step"] = torch.tensor(1003)
    for name, tensors in (("base", base), ("ft", tuned)):
        (folder / name).mkdir()
        save_torch(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"vocab_size": len(tensors["embed.weight"])}))
    surgery.extract_delta(folder / "base", folder / "ft", reversible=True).save(folder / "task.delta")
    return folder


def assert_same_files(left, right):
    ours, theirs = load_file(left), load_file(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].shape == theirs[name].shape
        assert bytes(ours[name].reshape(-1).view(torch.uint8).numpy()) == bytes(
            theirs[name].reshape(-1).view(torch.uint8).numpy()
        ), name


def test_merge_writes_the_fine_tune_with_its_configuration(pair, tmp_path):
    surgery.merge(pair / "base", pair / "task.delta").save(tmp_path / "out")
    assert_same_files(tmp_path / "out" / "model.safetensors", pair / "ft" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"vocab_size": 52}
    assert surgery.verify(tmp_path / "out").label == "out"


def test_the_way_back_writes_the_base(pair, tmp_path):
    surgery.merge(pair / "ft", pair / "task.delta", reverse=True).save(tmp_path / "out")
    assert_same_files(tmp_path / "out" / "model.safetensors", pair / "base" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"vocab_size": 50}


def test_one_output_file_is_restored_too(pair, tmp_path):
    surgery.merge(pair / "base", pair / "task.delta").save(tmp_path / "out.safetensors")
    assert_same_files(tmp_path / "out.safetensors", pair / "ft" / "model.safetensors")


def test_a_delta_without_a_way_back_says_so(pair):
    delta = surgery.extract_delta(pair / "base", pair / "ft")
    assert delta.nbytes < open_delta(pair / "task.delta").nbytes
    with pytest.raises(UsageError, match="--reversible"):
        surgery.merge(pair / "ft", delta, reverse=True)


def test_renamed_tensors_are_coded_against_their_twins(tmp_path):
    weights = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    base, tuned = (
        {"bert.q.weight": weights, "bert.k.weight": weights + 1},
        {"enc.q.weight": weights, "enc.k.weight": weights},
    )
    delta = surgery.extract_delta(base, tuned, rename=["enc=bert"])
    assert delta.manifest.changes["enc.q.weight"].blocks == ()
    assert contents(surgery.merge(base, delta)) == contents(surgery.open(tuned))
    wrapped = surgery.extract_delta({"q.weight": weights}, {"module.q.weight": weights})
    assert wrapped.nbytes < 1000


def test_the_bytes_do_not_depend_on_the_number_of_threads(pair, tmp_path):
    for jobs in (1, 3):
        surgery.extract_delta(pair / "base", pair / "ft", reversible=True, jobs=jobs).save(tmp_path / f"{jobs}.delta")
    assert (tmp_path / "1.delta").read_bytes() == (tmp_path / "3.delta").read_bytes()
    assert (tmp_path / "1.delta").read_bytes() == (pair / "task.delta").read_bytes()


def test_the_file_is_what_its_document_says(pair):
    tensors = load_file(pair / "task.delta")
    assert set(tensors) == {"surgery.delta.manifest", "surgery.delta.data"}
    manifest = json.loads(zstandard.decompress(tensors["surgery.delta.manifest"].numpy().tobytes()))
    assert manifest["schema"] == "surgery-delta/2"
    sizes = [size for entry in manifest["task_tensors"].values() for _, size, _ in entry.get("blocks", [])]
    sizes += [size for blocks in manifest["back"].values() for _, size, _ in blocks]
    assert sum(sizes) == tensors["surgery.delta.data"].numel()


# --- the real pair


@pytest.mark.parametrize("dtype", [None, "BF16", "F16"])
def test_the_real_fine_tune_comes_back_bit_for_bit(dtype, tmp_path):
    base, tuned = real_pair.base(), real_pair.tuned()
    if dtype:
        for name, source in (("base", base), ("ft", tuned)):
            surgery.convert(source, dtype=dtype).save(tmp_path / name)
        base, tuned = tmp_path / "base", tmp_path / "ft"
    delta = surgery.extract_delta(base, tuned)
    assert contents(surgery.merge(base, delta)) == contents(surgery.open(tuned))


def test_two_identical_checkpoints_cost_next_to_nothing():
    assert surgery.extract_delta(real_pair.base(), real_pair.base()).nbytes < 64_000


def test_a_bitfit_fine_tune_costs_its_biases():
    base = surgery.open(real_pair.base())
    tuned = {name: base[name].clone() for name in base}
    changed = 0
    for name, value in tuned.items():
        if name.endswith("bias"):
            value.add_(torch.randn_like(value) * 0.01)
            changed += value.numel() * value.element_size()
    assert surgery.extract_delta(base, tuned).nbytes <= 1.01 * changed + 64 * len(tuned) + 64


# --- refusals


def test_a_wrong_base_is_refused_by_tensor_before_anything_is_published(pair, tmp_path):
    wrong = load_file(pair / "base" / "model.safetensors")
    wrong["layer.0.q_proj.weight"].view(torch.int16)[7, 7] ^= 1
    save_torch(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(MismatchError, match=r"layer\.0\.q_proj\.weight: is not the base's"):
        surgery.merge(tmp_path / "wrong.safetensors", pair / "task.delta").save(tmp_path / "out")
    with pytest.raises(MismatchError, match=r"layer\.0\.q_proj\.weight"):
        surgery.merge(tmp_path / "wrong.safetensors", pair / "task.delta")["layer.0.q_proj.weight"]
    assert not (tmp_path / "out").exists()


def test_a_wrong_base_of_many_blocks_is_refused_while_streaming(tmp_path):
    old = np.random.default_rng(0).normal(size=9_000_000).astype(np.float16)
    new = old + np.float16(1)
    save_file({"w": old}, tmp_path / "base.safetensors")
    surgery.extract_delta(tmp_path / "base.safetensors", {"w": new}).save(tmp_path / "task.delta")
    old[8_999_999] += 1
    save_file({"w": old}, tmp_path / "moved.safetensors")
    with pytest.raises(MismatchError, match="w: is not the base's"):
        surgery.merge(tmp_path / "moved.safetensors", tmp_path / "task.delta").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_twice_is_refused(pair, tmp_path):
    surgery.merge(pair / "base", pair / "task.delta").save(tmp_path / "once")
    with pytest.raises(MismatchError):
        surgery.merge(tmp_path / "once", pair / "task.delta").save(tmp_path / "twice")


def test_a_base_that_lacks_a_tensor_or_has_another_shape_is_refused_from_headers(pair):
    lacking = {"layer.0.q_proj.bias": torch.zeros(64).half()}
    with pytest.raises(MismatchError, match="is not there; the delta was made with a base"):
        surgery.merge(lacking, pair / "task.delta")
    other = surgery.convert(pair / "base", drop=["old.head"]).state_dict() | {
        "layer.0.codes": torch.zeros(41, dtype=torch.int8)
    }
    with pytest.raises(MismatchError, match=r"is I8\[41\]"):
        surgery.merge(other, pair / "task.delta")


def test_a_dry_run_says_what_would_be_done_from_headers_and_writes_nothing(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = []
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["extract-delta", str(pair / "base"), str(pair / "ft"), "--dry-run", *more])
        assert not stopped.value.code
        shown.append(capsys.readouterr().out)
    [entry] = json.loads(shown[1])["deltas"]
    changes = open_delta(pair / "task.delta").manifest.changes.values()
    assert entry["whole"] == sum(change.base is None for change in changes)
    assert entry["compared"] + entry["whole"] == len(changes)
    assert (pair / "task.delta").stat().st_size < entry["bytes_written"] + 100_000
    assert "writes at most" in shown[0]
    assert not list(tmp_path.iterdir())


def test_resharded_and_pickled_copies_of_the_base_are_accepted(pair, tmp_path):
    surgery.convert(pair / "base").save(tmp_path / "shards", max_shard_size=10_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    state = surgery.open(pair / "base").state_dict()
    state["layer.0.q_proj.weight"] = state["layer.0.q_proj.weight"].t().contiguous().t()  # strided in its storage
    torch.save(state, tmp_path / "pytorch_model.bin")
    for copy in ("shards", "pytorch_model.bin"):
        restored = surgery.merge(tmp_path / copy, pair / "task.delta")
        assert contents(restored) == contents(surgery.open(pair / "ft"))
        restored.save(tmp_path / f"{copy}-out")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"coeff": 0.5}, "coefficient is 1"),
        ({"allow_base_mismatch": True}, "another base"),
        ({"name_map": {"a": "b"}}, "name map"),
    ],
)
def test_what_means_nothing_for_an_exact_delta_is_refused(pair, options, why):
    with pytest.raises(UsageError, match=why):
        surgery.merge(pair / "base", pair / "task.delta", **options)


def test_a_delta_is_not_merged_beside_others_and_is_no_checkpoint(pair):
    with pytest.raises(UsageError, match="not merged beside adapters"):
        surgery.merge(pair / "base", pair / "task.delta", {"w": np.zeros(2)})
    with pytest.raises(UsageError, match="is an exact delta, not a checkpoint"):
        surgery.open(pair / "task.delta")


def test_many_fine_tunes_are_stored_beside_each_other(pair, tmp_path):
    extract_deltas(pair / "base", [pair / "ft", pair / "base"], tmp_path / "store")
    assert sorted(os.listdir(tmp_path / "store")) == ["base.delta", "ft.delta"]
    single = surgery.extract_delta(pair / "base", pair / "ft")
    single.save(tmp_path / "single.delta")
    assert (tmp_path / "single.delta").read_bytes() == (tmp_path / "store" / "ft.delta").read_bytes()
    (again,) = extract_deltas(pair / "base", [pair / "ft"], tmp_path / "store")
    assert isinstance(again.error, OutputError)
    with pytest.raises(UsageError, match="ends in"):
        single.save(tmp_path / "task.safetensors")


# --- the command line


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code, capsys.readouterr()


def test_the_commands_extract_describe_verify_and_restore(pair, tmp_path, capsys):
    delta, out = tmp_path / "task.delta", tmp_path / "out"
    code, said = run(capsys, "extract-delta", pair / "base", pair / "ft", "-o", delta, "--reversible")
    assert code == 0
    assert "bits a weight" in said.out
    assert delta.read_bytes() == (pair / "task.delta").read_bytes()
    code, said = run(capsys, "info", delta, "--json")
    facts = json.loads(said.out)
    assert (facts["base"], facts["task"], facts["reversible"]) == ("base", "ft", True)
    assert facts["kinds"]["q"]["tensors"] == {"sorted": 1}
    assert facts["bytes"] == delta.stat().st_size
    code, said = run(capsys, "info", delta)
    assert "base → ft" in said.out
    assert "old.head" in said.err
    code, said = run(capsys, "verify", delta)
    assert (code, "coded blocks" in said.out) == (0, True)
    code, said = run(capsys, "merge", pair / "base", delta, "-o", out)
    assert (code, "restored" in said.out) == (0, True)
    assert_same_files(out / "model.safetensors", pair / "ft" / "model.safetensors")
    code, said = run(capsys, "merge", pair / "ft", delta, "--reverse", "-o", out, "--overwrite")
    assert_same_files(out / "model.safetensors", pair / "base" / "model.safetensors")


def test_the_commands_refuse_in_one_line(pair, tmp_path, capsys):
    code, said = run(capsys, "extract-delta", pair / "base", pair / "ft", "-o", pair / "task.delta")
    assert (code, said.err.count("\n")) == (7, 1)
    code, said = run(capsys, "merge", pair / "ft", pair / "task.delta", "-o", tmp_path / "out")
    assert (code, said.err.count("\n")) == (4, 1)
    code, said = run(capsys, "merge", pair / "base", pair / "task.delta", "--coeff", "0.5", "-o", tmp_path / "out")
    assert (code, said.err.count("\n")) == (2, 1)
    code, said = run(capsys, "extract-delta", pair / "base", pair / "ft", pair / "ft")
    assert (code, "a folder for their deltas" in said.err) == (2, True)
    assert not (tmp_path / "out").exists()


# --- damage


def test_every_one_of_a_thousand_flipped_bits_is_found_by_verify_and_by_merge(pair, tmp_path):
    whole = (pair / "task.delta").read_bytes()
    damaged = tmp_path / "damaged.delta"
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    for number in range(1000):
        place = draw.randrange(header * 8) if number % 4 == 0 else draw.randrange(len(whole) * 8)
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        damaged.write_bytes(data)
        with pytest.raises(SurgeryError):
            surgery.verify(damaged)
        with pytest.raises(SurgeryError):
            restore_both(pair, damaged)


def restore_both(pair, delta):
    contents(surgery.merge(pair / "base", delta))
    contents(surgery.merge(pair / "ft", delta, reverse=True))  # the way back has blocks of its own


def test_a_truncated_delta_is_refused(pair, tmp_path):
    (tmp_path / "short.delta").write_bytes((pair / "task.delta").read_bytes()[:-1])
    with pytest.raises(FormatError):
        open_delta(tmp_path / "short.delta")


def test_malformed_manifests_end_in_our_errors(pair, tmp_path):
    tensors = load_file(pair / "task.delta")
    manifest = json.loads(zstandard.decompress(tensors["surgery.delta.manifest"].numpy().tobytes()))
    data = tensors["surgery.delta.data"].numpy().tobytes()
    draw = random.Random(0)
    wrong = [None, True, -1, 0, 1 << 70, 1.5, "", "x", "\ud800", "raw", "sorted", "F64", [], [1], {}, {"a": 1}]
    refused = 0
    for number in range(600):
        changed = json.loads(json.dumps(manifest))
        place = changed
        while isinstance(place, dict | list) and place:
            parent, key = place, draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            place = place[key]
            if draw.random() < 0.3:
                break
        parent[key] = draw.choice(wrong)
        if number % 5 == 0:
            del parent[key]
        packed = delta_manifest.compress(json.dumps(changed).encode())
        (tmp_path / "bad.delta").write_bytes(delta_manifest.container(packed, len(data)) + packed + data)
        try:
            delta = open_delta(tmp_path / "bad.delta")
            surgery.info(delta)
            restore_both(pair, delta)
        except SurgeryError:
            refused += 1
    assert refused > 400  # a name or a configuration may be anything
