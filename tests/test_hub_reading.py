"""Reading from the Hub: what travels, what is recorded, where it is kept, and what is refused."""

from __future__ import annotations

import concurrent.futures
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from safetensors.numpy import load_file, save_file

import surgery
from fixtures import real_pair
from surgery.cli.main import main
from surgery.errors import FormatError, HubError, UnsafeError, UsageError
from surgery.sources import hub as reading
from surgery.sources.ranges import difference, requests, union

LAYERS = 6


def model(folder: Path, seed: int, *, shards: int = 1, size: int = 96) -> Path:
    """Write a model whose attention makes up a third of it, in several runs of neighbouring tensors."""
    generator, tensors = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for name in ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"] = (size, size)
        for name in ("mlp.down_proj", "mlp.up_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"] = (size, 3 * size)
    tensors["model.embed_tokens.weight"] = (200, size)
    made = {
        name: (np.random.default_rng(7).standard_normal(shape) + 0.01 * generator.standard_normal(shape)).astype("f4")
        for name, shape in tensors.items()
    }
    folder.mkdir(parents=True)
    names = sorted(made)
    if shards == 1:
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {
            name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(names)
        }
        for shard in set(weight_map.values()):
            save_file({n: made[n] for n in names if weight_map[n] == shard}, folder / shard, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    (folder / "tokenizer.json").write_text(json.dumps({"filler": "x" * 50_000}))
    return folder


@pytest.fixture
def pair(loopback, tmp_path):
    """Put a base and a fine-tune on the Hub, both private."""
    for name, seed in (("base", 0), ("ft", 1)):
        loopback.add(f"t/{name}", model(tmp_path / name, seed), private=True)
    return loopback


def run(*arguments: object) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code or 0


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


def spans(path: Path, pattern: str) -> list[tuple[int, int]]:
    """Return where the tensors lie whose names match, from the header itself."""
    start = header_bytes(path)
    header = json.loads(path.read_bytes()[8:start])
    return union(
        (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__" and re.search(pattern, name)
    )


def weights_on(seen):
    return [request for request in seen if request.port == "cdn"]


def test_a_diff_of_headers_moves_little_more_than_the_headers(loopback, tmp_path):
    for name in ("base", "ft"):
        loopback.add(f"t/{name}", model(tmp_path / name, 0, shards=3))
    with loopback.watch() as seen:
        assert run("diff", "hf://t/base", "hf://t/ft", "--headers") == 0
    headers = sum(header_bytes(path) for name in ("base", "ft") for path in (tmp_path / name).glob("*.safetensors"))
    assert sum(request.sent for request in weights_on(seen)) == headers
    assert [request.range for request in weights_on(seen)].count("bytes=0-7") == 6
    assert not [request for request in seen if "tokenizer" in request.path]


def test_all_that_a_diff_of_headers_moves_is_near_the_headers_where_they_are_large(loopback, tmp_path):
    for name in ("base", "ft"):
        (tmp_path / name).mkdir()
        tensors = {f"model.layers.{layer}.self_attn.q_proj.weight": np.zeros(1, "f4") for layer in range(400)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
        loopback.add(f"t/{name}", tmp_path / name)
    headers = sum(header_bytes(tmp_path / name / "model.safetensors") for name in ("base", "ft"))
    with loopback.watch() as seen:
        assert run("diff", "hf://t/base", "hf://t/ft", "--headers") == 0
    assert sum(request.sent for request in seen) <= 1.2 * headers
    assert sum(request.wire for request in seen) <= 1.2 * headers  # status lines and headers of HTTP and all


@pytest.mark.parametrize("option", [[], ["--no-cache"]], ids=["cache", "no cache"])
def test_a_targeted_extraction_fetches_only_the_tensors_it_needs(pair, tmp_path, option):
    with pair.watch() as seen:
        arguments = ["--rank", 4, "--target", "*self_attn*", "-o", tmp_path / "remote", "--jobs", 2, *option]
        assert run("extract-lora", "hf://t/base", "hf://t/ft", *arguments) == 0
    wanted = [spans(tmp_path / name / "model.safetensors", "self_attn") for name in ("base", "ft")]
    needed = sum(stop - start for runs in wanted for start, stop in runs)
    assert sum(request.sent for request in seen) <= 1.2 * needed
    disjoint, files = sum(map(len, wanted)), 4  # with config.json of both
    assert len(wanted[0]) == LAYERS
    assert len(seen) <= disjoint + 3 * files
    local = tmp_path / "local"
    assert (
        run("extract-lora", tmp_path / "base", tmp_path / "ft", "--rank", 4, "--target", "*self_attn*", "-o", local)
        == 0
    )
    remote_factors, local_factors = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("remote", "local")
    )
    assert remote_factors.keys() == local_factors.keys()
    for name, factor in local_factors.items():
        np.testing.assert_array_equal(remote_factors[name], factor)


def test_a_real_pair_needs_few_requests_and_few_bytes(loopback, tmp_path):
    sides = {"base": real_pair.base(), "ft": real_pair.tuned()}
    for name, folder in sides.items():
        loopback.add(f"t/{name}", {file: (folder / file).read_bytes() for file in ("model.safetensors", "config.json")})
    with loopback.watch() as seen:
        assert (
            run("extract-lora", "hf://t/base", "hf://t/ft", "-r", 8, "--target", "*attention*", "-o", tmp_path / "a")
            == 0
        )
    wanted = [spans(folder / "model.safetensors", "attention") for folder in sides.values()]
    needed = sum(stop - start for runs in wanted for start, stop in runs)
    assert sum(request.wire for request in seen) <= 1.2 * needed
    assert len(seen) <= sum(map(len, wanted)) + 3 * 4
    assert needed < 0.3 * sum((folder / "model.safetensors").stat().st_size for folder in sides.values())


def test_a_large_file_comes_by_xet_where_the_client_can(loopback_xet, tmp_path):
    folder, api = model(tmp_path / "base", 0), HfApi()
    api.create_repo("t/base")
    made = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    api.create_commit("t/base", made, commit_message="by Xet")
    checkpoint = surgery.open("hf://t/base")
    name = "model.layers.3.mlp.up_proj.weight"
    np.testing.assert_array_equal(checkpoint[name].numpy(), load_file(folder / "model.safetensors")[name])
    with loopback_xet.watch() as seen:
        assert run("convert", "hf://t/base", "-o", tmp_path / "copy", "--dtype", "F32") == 0
    assert any("xet-read-token" in request.path for request in seen)
    copied, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "copy", folder))
    assert all(np.array_equal(copied[name], wanted[name]) for name in wanted)


def test_the_record_names_the_commits_that_were_read(pair, tmp_path):
    commits = {name: pair.repos[f"t/{name}"].refs["main"] for name in ("base", "ft")}
    pair.fault("moved", "t/ft/resolve")
    out = tmp_path / "adapter"
    assert run("extract-lora", "hf://t/base@main", "hf://t/ft", "--rank", 2, "-o", out) == 0
    record = json.loads((out / "surgery.json").read_text())
    assert [(entry["name"], entry["revision"]) for entry in record["inputs"]] == [
        ("t/base", commits["base"]), ("t/ft", commits["ft"]),
    ]  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("t/base", commits["base"])
    assert str(tmp_path) not in (out / "surgery.json").read_text()
    asked = {request.path.split("/resolve/")[1].split("/")[0] for request in pair.seen if "/resolve/" in request.path}
    assert asked == set(commits.values())


def test_a_whole_read_fills_the_cache_as_the_client_would(pair, tmp_path):
    commit = pair.repos["t/base"].refs["main"]
    assert run("convert", "hf://t/base", "-o", tmp_path / "copy", "--dtype", "F16") == 0
    home = pair.cache / "models--t--base"
    assert (home / "refs" / "main").read_text() == commit
    snapshot = home / "snapshots" / commit
    assert (snapshot / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    assert all(path.is_symlink() for path in snapshot.iterdir())
    blobs = {path.name for path in (home / "blobs").iterdir()}
    assert blobs == {pair.repos["t/base"].history()[0].files[path.name].etag for path in snapshot.iterdir()}
    with pair.watch() as seen:
        found = Path(snapshot_download("t/base", allow_patterns=["*.safetensors", "*.json"]))
    assert found.samefile(snapshot)
    assert not weights_on(seen)


def test_what_is_in_the_cache_is_read_from_there(pair, tmp_path):
    snapshot_download("t/base")
    with pair.watch() as seen:
        checkpoint = surgery.open("hf://t/base")
        name = "model.layers.0.mlp.up_proj.weight"
        np.testing.assert_array_equal(
            checkpoint[name].numpy(), load_file(tmp_path / "base" / "model.safetensors")[name]
        )
    assert [request.path.split("?")[0] for request in seen] == ["/api/models/t/base/revision/main"]


def test_no_cache_leaves_the_cache_alone(pair, tmp_path):
    assert run("convert", "hf://t/base", "-o", tmp_path / "copy", "--dtype", "F16", "--no-cache") == 0
    assert not pair.cache.exists()
    assert (tmp_path / "copy" / "tokenizer.json").stat().st_size > 50_000


def test_the_cache_is_enough_offline(pair, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot_download("t/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pair.watch() as seen:
        assert len(surgery.open("hf://t/base")) == 5 * LAYERS + 1
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and it is not in the Hugging Face cache"):
            surgery.open("hf://t/ft")
    assert not seen


def test_one_tensor_is_one_request(pair, tmp_path):
    checkpoint = surgery.open("hf://t/base")
    name = "model.layers.3.mlp.up_proj.weight"
    with pair.watch() as seen:
        found = checkpoint[name]
        checkpoint[name]
    np.testing.assert_array_equal(found.numpy(), load_file(tmp_path / "base" / "model.safetensors")[name])
    assert [request.sent for request in seen] == [found.numel() * 4]


@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_merged_from_the_hub_is_what_is_merged_from_disk(loopback, tmp_path, shards):
    loopback.add("t/base", model(tmp_path / "base", 0, shards=shards))
    loopback.add("t/ft", model(tmp_path / "ft", 1, shards=shards))
    assert run("extract-lora", tmp_path / "base", tmp_path / "ft", "--rank", 4, "-o", tmp_path / "adapter") == 0
    loopback.add("t/adapter", tmp_path / "adapter")
    assert run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "local") == 0
    assert run("merge", "hf://t/base", "hf://t/adapter", "-o", tmp_path / "remote") == 0
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "remote" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "remote" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_an_exact_delta_on_the_hub_restores_the_fine_tune(pair, tmp_path):
    assert run("extract-delta", "hf://t/base", "hf://t/ft", "-o", tmp_path / "task.delta") == 0
    pair.add("t/task", {"task.delta": (tmp_path / "task.delta").read_bytes()})
    assert run("info", "hf://t/task/task.delta") == 0
    assert run("merge", "hf://t/base", "hf://t/task/task.delta", "-o", tmp_path / "restored") == 0
    restored, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("restored", "ft"))
    assert all(np.array_equal(restored[name], tuned[name]) for name in tuned)


def test_recipes_find_models_on_the_hub(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "base")
    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\nmodels:\n"
        "  - {model: t/base, parameters: {weight: 0.5}}\n  - {model: 'hf://t/ft@main', parameters: {weight: 0.5}}\n"
    )
    assert run("merge", tmp_path / "recipe.yml", "-o", tmp_path / "mean") == 0
    mean, base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("mean", "base", "ft"))
    for name in base:
        np.testing.assert_allclose(mean[name], (base[name].astype("f8") + tuned[name]) / 2, rtol=1e-6)
    record = json.loads((tmp_path / "mean" / "surgery.json").read_text())
    assert all(len(entry["revision"]) == 40 for entry in record["inputs"])


def test_a_folder_in_a_repository_is_a_checkpoint_of_its_own(pair, tmp_path):
    files = {f"unet/{path.name}": path.read_bytes() for path in (tmp_path / "base").iterdir()}
    commit = pair.add("t/many", files).oid
    assert len(surgery.open("hf://t/many@main/unet")) == 5 * LAYERS + 1
    assert run("convert", "hf://t/many/unet", "-o", tmp_path / "copy", "--dtype", "F16") == 0
    assert json.loads((tmp_path / "copy" / "surgery.json").read_text())["inputs"] == [
        {"role": "source", "name": "t/many", "revision": commit}
    ]
    reading.forget()
    assert len(surgery.open("hf://t/many/unet")) == 5 * LAYERS + 1  # from the cache


def test_pickled_weights_are_read_by_ranges_too(loopback, tmp_path):
    tensors = {name: torch.randn(300, 300) for name in "abc"}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    loopback.add("t/old", {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    with loopback.watch() as seen:
        found = surgery.open("hf://t/old")["b"]
    assert torch.equal(found, tensors["b"])
    assert sum(request.sent for request in seen) < 1.1 * found.numel() * 4


def test_a_mirror_that_lists_no_sizes_is_asked_for_the_tree(pair, tmp_path):
    pair._api.describes_files = False
    name = "model.layers.0.mlp.up_proj.weight"
    with pair.watch() as seen:
        found = surgery.open("hf://t/base")[name]
    np.testing.assert_array_equal(found.numpy(), load_file(tmp_path / "base" / "model.safetensors")[name])
    commit = pair.repos["t/base"].refs["main"]
    assert any(f"/tree/{commit}" in request.path for request in seen)
    reading.forget()
    pair.fault(503, "tree", times=None)
    with pytest.raises(HubError, match="answered 503, 5 times in a row"):
        surgery.open("hf://t/ft")


def test_verify_reads_the_hub(pair, tmp_path):
    assert run("convert", tmp_path / "base", "-o", tmp_path / "copy", "--dtype", "F16") == 0
    pair.add("t/copy", tmp_path / "copy")
    assert run("verify", "hf://t/copy") == 0
    wrong = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    wrong[-1] ^= 1
    pair.add("t/copy", {"model.safetensors": bytes(wrong)})
    reading.forget()
    assert run("verify", "hf://t/copy") == 10
    pair.add("t/copy", tmp_path / "copy")
    pair.add("t/copy", {"tokenizer.json": b"{}"})
    reading.forget()
    assert run("verify", "hf://t/copy") == 10  # a small file is fetched to be looked at, too


def test_the_token_goes_to_the_hub_alone(pair, tmp_path):
    assert run("extract-lora", "hf://t/base", "hf://t/ft", "--rank", 2, "-o", tmp_path / "adapter") == 0
    assert {request.authorization for request in pair.seen if request.port == "hub"} == {f"Bearer {pair.token}"}
    assert {request.authorization for request in weights_on(pair.seen)} == {None}


def test_a_token_file_opens_a_private_repository(pair, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no such repository, or it is private"):
        surgery.open("hf://t/base")
    pair.home.mkdir(exist_ok=True)
    (pair.home / "token").write_text(pair.token)
    assert len(surgery.open("hf://t/base")) == 5 * LAYERS + 1


REFUSED = [
    ("hf://t/none", 9, "no such repository"),
    ("hf://t/base@none", 9, "no such revision"),
    ("hf://u/gated", 9, "its owner grants access on request"),
    ("hf://t/base/none.safetensors", 2, "no such file or folder"),
    ("hf://t/notes", 3, "no model weights"),
    ("hf://", 2, "is not the name of a repository"),
    ("hf://a b/c", 2, "is not the name of a repository"),
    ("hf://org/na--me", 2, "is not the name of a repository"),
    ("hf://org/name@", 2, "is not a revision"),
    ("hf://org/name@../x", 2, "is not a revision"),
    ("hf://org/name/../other", 2, "leads out of its repository"),
]


@pytest.mark.parametrize(("reference", "code", "words"), REFUSED, ids=[reference for reference, _, _ in REFUSED])
def test_refusals_are_one_line_with_the_right_code(pair, capsys, reference, code, words):
    pair.add("u/gated", {"model.safetensors": b"x" * 20}, gated=True)
    pair.add("t/notes", {"notes.md": b"x"})
    assert run("info", reference) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert reference.split("@")[0].split("/none.")[0].split("/..")[0] in lines[0]


def test_a_repository_cannot_name_files_outside_of_itself(loopback):
    loopback.add("t/evil", {"model.safetensors": b"x", "../../outside.json": b"{}"})
    with pytest.raises(UnsafeError, match="outside the repository"):
        surgery.open("hf://t/evil")


def test_a_small_file_that_is_not_what_the_hub_lists_is_refused(pair):
    pair.fault("short", "config.json", times=None)
    with pytest.raises(HubError, match="arrived otherwise than the Hub lists it, 5 times"):
        surgery.open("hf://t/base")
    pair.heal()
    surgery.open("hf://t/base")


def test_a_header_that_lies_is_refused(loopback):
    loopback.add("t/cut", {"model.safetensors": struct.pack("<Q", 1 << 40) + b"{}"})
    with pytest.raises(FormatError, match="header length"):
        surgery.open("hf://t/cut")


def test_a_token_does_not_travel_in_the_clear(pair, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example.com")
    with pytest.raises(UnsafeError, match="in the clear"):
        surgery.open("hf://t/base")


def test_other_schemes_are_refused():
    with pytest.raises(UsageError, match=r"s3:// references are not read"):
        surgery.open("s3://bucket/model")


def test_headers_of_the_hub_cost_no_torch(pair, tmp_path):
    code = """
import sys
from surgery.cli.main import main
try:
    main(["diff", "hf://t/base", "hf://t/ft", "--headers", "-q"])
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], env=pair.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", range(20))
def test_requests_cover_what_is_wanted_and_little_else(seed):
    generator = np.random.default_rng(seed)
    size = 3000
    starts = generator.integers(0, size, 30)
    wanted = [(int(start), int(min(start + generator.integers(0, 90), size))) for start in starts]
    mask = np.zeros(size, bool)
    for start, stop in wanted:
        mask[start:stop] = True
    got = np.zeros(size, int)
    found = requests(wanted, bridge=40, waste=0.1)
    for start, stop in found:
        got[start:stop] += 1
    assert got.max() <= 1
    assert (got[mask] == 1).all()
    assert got.sum() <= 1.1 * mask.sum()
    assert len(found) <= len(union(wanted))
    had = [(100, 700), (650, 900), (2000, 2001)]
    left = np.zeros(size, int)
    for start, stop in difference(wanted, had):
        left[start:stop] += 1
    for start, stop in had:
        mask[start:stop] = False
    assert (left == mask).all()


def test_many_threads_may_note_a_revision_at_once(pair, tmp_path):
    from surgery.sources import folders, hub

    home = hub.locate(hub.HubReference("t/base"))
    snapshot = folders._DECLARED[home]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: snapshot.note_revision(), range(400)))
    assert list((home.parents[1] / "refs").iterdir()) == [home.parents[1] / "refs" / "main"]
