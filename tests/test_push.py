"""Pushing: what arrives on a loopback Hub, driven by the real client, and what never does."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

import surgery
from surgery.errors import FormatError, HubError, SurgeryError, UnsafeError, UsageError
from surgery.formats import model_card
from surgery.operations.push import plan_push

TITLE = "Upload adapter with surgery"


def checkpoint(folder, seed=0, layers=2, **config):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    names = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(layers) for p in "qv"]
    save_file({name: rng.normal(0, 0.02, (48, 48)).astype(np.float32) for name in names}, folder / "model.safetensors")
    document = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, **config}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def pair(tmp_path):
    return checkpoint(tmp_path / "base"), checkpoint(tmp_path / "ft", seed=1)


@pytest.fixture
def adapter(pair, tmp_path):
    surgery.extract_lora(*pair, rank=4, base_id="t/base").save(tmp_path / "adapter")
    return tmp_path / "adapter"


def names_on(hub, repo="t/adapter", revision="main"):
    return set(hub.repos[repo].commit_of(revision).files) - {".gitattributes"}


def ours(hub, repo="t/adapter"):
    return [commit for commit in hub.repos[repo].history() if commit.title == TITLE] if repo in hub.repos else []


def test_an_adapter_arrives_whole_and_private_in_one_commit(loopback, adapter):
    made = surgery.push(adapter, "t/adapter")
    assert made.changed
    assert loopback.repos["t/adapter"].private
    assert len(ours(loopback)) == 1
    assert names_on(loopback) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "surgery.json"}
    for name in names_on(loopback) - {"README.md"}:
        assert loopback.read("t/adapter", name) == (adapter / name).read_bytes()


def test_pushing_the_same_again_commits_nothing(loopback, adapter):
    surgery.push(adapter, "t/adapter")
    again = surgery.push(adapter, "t/adapter")
    assert not again.changed
    assert len(ours(loopback)) == 1


def test_the_card_validates_and_says_what_was_done(loopback, adapter):
    surgery.push(adapter, "t/adapter", licence="mit")
    card = ModelCard(loopback.read("t/adapter", "README.md").decode())
    card.validate()
    assert card.data.to_dict() == {
        "license": "mit", "library_name": "peft", "base_model": "t/base", "base_model_relation": "adapter",
        "pipeline_tag": "text-generation", "tags": ["lora", "peft", "base_model:adapter:t/base", "surgery"],
    }  # fmt: skip
    assert "surgery extract-lora base ft --rank 4" in card.text
    assert "rel. error" in card.text
    assert 'PeftModel.from_pretrained(model, "t/adapter")' in card.text


def test_words_and_metadata_that_people_wrote_into_the_card_are_kept(loopback, adapter):
    surgery.push(adapter, "t/adapter")
    theirs = loopback.read("t/adapter", "README.md").decode()
    edited = theirs.replace("library_name: peft", "library_name: peft\nlanguage: de\nlicense: apache-2.0")
    edited = edited.replace("rank 4", "RANK") + "\nMy own words.\n"
    loopback.add("t/adapter", {"README.md": edited.encode()})
    surgery.push(adapter, "t/adapter")
    card = ModelCard(loopback.read("t/adapter", "README.md").decode())
    assert card.data.to_dict()["language"] == "de"
    assert card.data.license == "apache-2.0"
    assert card.text.rstrip().endswith("My own words.")
    assert "RANK" not in card.text


def test_a_merge_names_its_bases_and_is_tagged(loopback, pair, tmp_path):
    surgery.merge(*pair, algorithm="linear").save(tmp_path / "merged")
    surgery.push(tmp_path / "merged", "t/merged", base_id=["t/base", "t/ft"], licence="mit")
    data = ModelCard(loopback.read("t/merged", "README.md").decode()).data.to_dict()
    assert data["base_model"] == ["t/base", "t/ft"]
    assert data["base_model_relation"] == "merge"
    assert data["library_name"] == "transformers"
    assert set(data["tags"]) == {"merge", "surgery"}


def test_a_licence_is_carried_over_and_never_guessed(loopback, pair, tmp_path):
    surgery.merge(*pair, algorithm="linear").save(tmp_path / "merged")
    loopback.add("t/base", {"README.md": b"---\nlicense: mit\n---\n"})
    loopback.add("t/ft", {"README.md": b"---\nlicense: llama3\n---\n"})
    with pytest.raises(UsageError, match="different licences"):
        plan_push(tmp_path / "merged", "t/merged", base_id=["t/base", "t/ft"])
    surgery.push(tmp_path / "merged", "t/merged", base_id="t/base")
    assert ModelCard(loopback.read("t/merged", "README.md").decode()).data.license == "mit"


def test_an_exact_delta_travels_alone_with_a_card(loopback, pair, tmp_path):
    surgery.extract_delta(*pair).save(tmp_path / "task.delta")
    surgery.push(tmp_path / "task.delta", "t/task", base_id="t/base")
    assert names_on(loopback, "t/task") == {"README.md", "task.delta"}
    assert loopback.read("t/task", "task.delta") == (tmp_path / "task.delta").read_bytes()
    assert "surgery merge hf://t/base hf://t/task -o" in loopback.read("t/task", "README.md").decode()


def test_stale_weights_are_deleted_in_the_same_commit(loopback, pair, tmp_path):
    surgery.convert(pair[0], dtype="BF16").save(tmp_path / "sharded", max_shard_size=12_000)
    surgery.push(tmp_path / "sharded", "t/model")
    before = names_on(loopback, "t/model")
    assert sum(name.startswith("model-0000") for name in before) > 1
    surgery.convert(pair[0], dtype="F16").save(tmp_path / "whole")
    loopback.add("t/model", {"notes.txt": b"kept"})
    surgery.push(tmp_path / "whole", "t/model")
    assert names_on(loopback, "t/model") == {
        "README.md",
        "config.json",
        "model.safetensors",
        "surgery.json",
        "notes.txt",
    }


def test_one_changed_tensor_of_twenty_stores_a_tenth_at_most_with_xet(loopback_xet, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"model.layers.{n}.mlp.up_proj.weight": rng.normal(0, 1, (256, 512)).astype(np.float32) for n in range(20)
    }
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        tensors["model.layers.7.mlp.up_proj.weight"] += np.float32(number)
        save_file(tensors, tmp_path / folder / "model.safetensors")
    xorbs = loopback_xet.xet.folder

    def stored():
        return sum(path.stat().st_size for path in xorbs.rglob("*") if path.is_file() and path.suffix != ".redb")

    surgery.push(tmp_path / "one", "t/model")
    first = stored()
    surgery.push(tmp_path / "two", "t/model")
    size = (tmp_path / "two" / "model.safetensors").stat().st_size
    assert first > 0.9 * size
    assert stored() - first <= 0.1 * size
    assert loopback_xet.read("t/model", "model.safetensors") == (tmp_path / "two" / "model.safetensors").read_bytes()


def test_no_path_of_this_machine_travels(loopback, pair, tmp_path):
    config = pair[0] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "/home/me/secret/base"}))
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n- model: {pair[0]}\n- model: {pair[1]}\nparameters: {{weight: 0.5}}\n"
    )
    surgery.merge_recipe(recipe).save(tmp_path / "merged")
    surgery.push(tmp_path / "merged", "t/merged")
    for name in names_on(loopback, "t/merged"):
        content = loopback.read("t/merged", name)
        assert b"/home/me" not in content
        assert str(tmp_path).encode() not in content, name
    assert "- model: base" in loopback.read("t/merged", "README.md").decode()
    surgery.verify("hf://t/merged")  # the shortened record is sealed anew


def test_an_adapter_whose_base_is_a_folder_needs_its_id(loopback, pair, tmp_path):
    surgery.extract_lora(*pair, rank=4).save(tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"no id on the Hub.*--base-id"):
        surgery.push(tmp_path / "adapter", "t/adapter")
    surgery.push(tmp_path / "adapter", "t/adapter", base_id="t/base")
    config = json.loads(loopback.read("t/adapter", "adapter_config.json"))
    assert config["base_model_name_or_path"] == "t/base"
    assert "t/adapter" in loopback.repos


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("notes.doc", b"words", UsageError, "no checkpoint needs: notes.doc; .*--include"),
        (".env", b"A=b", UsageError, r"\.env"),
        ("tokenizer_config.json", b'{"t": "hf_' + b"a" * 34 + b'"}', UnsafeError, "Hugging Face token"),
        ("chat_template.jinja", b"-----BEGIN RSA PRIVATE KEY-----", UnsafeError, "private key"),
    ],
)
def test_stray_files_and_secrets_stay_here(loopback, adapter, name, content, error, said):
    (adapter / name).write_bytes(content)
    with pytest.raises(error, match=said) as refused:
        surgery.push(adapter, "t/adapter")
    assert "aaaaaaaa" not in str(refused.value)
    assert loopback.repos == {}


def test_an_unknown_file_travels_when_it_is_asked_for(loopback, adapter):
    (adapter / "notes.doc").write_bytes(b"words")
    surgery.push(adapter, "t/adapter", include=["*.doc"])
    assert loopback.read("t/adapter", "notes.doc") == b"words"


def test_a_link_that_leads_outside_is_refused(loopback, adapter, tmp_path):
    (tmp_path / "passwords").write_text("x")
    (adapter / "vocab.txt").symlink_to(tmp_path / "passwords")
    with pytest.raises(UnsafeError, match=r"vocab\.txt: is a link that leads out"):
        surgery.push(adapter, "t/adapter")


def test_what_an_unmerge_needs_stays_here_unless_asked_for(loopback, pair, adapter, tmp_path):
    surgery.merge(pair[0], adapter).save(tmp_path / "merged")
    assert (tmp_path / "merged" / ".surgery" / "undo").exists()
    surgery.push(tmp_path / "merged", "t/merged", base_id="t/base")
    assert ".surgery/undo" not in names_on(loopback, "t/merged")
    surgery.push(tmp_path / "merged", "t/merged", base_id="t/base", include_undo=True)
    undo = loopback.read("t/merged", ".surgery/undo")
    assert undo == (tmp_path / "merged" / ".surgery" / "undo").read_bytes()


def test_a_damaged_folder_is_found_before_anything_travels(loopback, adapter):
    weights = adapter / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(SurgeryError, match="does not have the bytes that were recorded"):
        surgery.push(adapter, "t/adapter")
    assert loopback.seen == []


def test_a_push_by_somebody_else_in_between_is_a_clear_refusal(loopback, adapter):
    surgery.push(adapter, "t/adapter")
    (adapter / "LICENSE").write_text("mine")
    planned = plan_push(adapter, "t/adapter")
    loopback.move()
    with pytest.raises(HubError, match="somebody else pushed meanwhile"):
        planned.run()
    assert "LICENSE" not in names_on(loopback)
    surgery.push(adapter, "t/adapter")
    assert "LICENSE" in names_on(loopback)


@pytest.mark.parametrize("public", [True, False])
def test_a_repository_of_the_other_visibility_is_refused(loopback, adapter, public):
    loopback.add("t/adapter", private=not public)
    with pytest.raises(HubError, match=f"exists, and is {'public' if public else 'private'}"):
        surgery.push(adapter, "t/adapter", private=public)


def test_a_repository_of_another_kind_is_refused(loopback, pair, adapter):
    surgery.push(adapter, "t/adapter")
    with pytest.raises(HubError, match="holds an adapter; a model beside it"):
        surgery.push(pair[0], "t/adapter")


def test_a_pull_request_leaves_the_branch_alone(loopback, adapter):
    surgery.push(adapter, "t/adapter")
    (adapter / "LICENSE").write_text("mine")
    made = surgery.push(adapter, "t/adapter", create_pr=True)
    assert made.pull_request.endswith("/discussions/1")
    assert "LICENSE" not in names_on(loopback)


def test_a_branch_is_made_where_there_is_none(loopback, adapter):
    surgery.push(adapter, "t/adapter")
    (adapter / "LICENSE").write_text("mine")
    surgery.push(adapter, "t/adapter", revision="dev")
    assert "LICENSE" in names_on(loopback, revision="dev")
    assert "LICENSE" not in names_on(loopback)


@pytest.mark.parametrize("name", ["name", "a/b/c", "a//b", "a/b.git", "../x", "a/--b", "a/" + "b" * 100, "-a/b"])
def test_a_bad_repository_id_is_refused_before_the_folder_is_read(loopback, adapter, name):
    with pytest.raises(UsageError, match="no repository id"):
        surgery.push(adapter, name)
    assert loopback.seen == []


@pytest.fixture
def impatient(loopback, monkeypatch):
    """Retry soon; and let calls that were left behind end before the next test."""
    import huggingface_hub.utils._http as http

    patient = http.time
    soon = types.SimpleNamespace(sleep=lambda seconds: patient.sleep(min(seconds, 0.02)), time=patient.time)
    monkeypatch.setattr(http, "time", soon)
    yield
    loopback.heal()
    loopback.traffic.closed.set()
    for thread in threading.enumerate():
        if thread.name == "surgery-hub":
            thread.join(30)


def met(hub):
    return any(fault.met for fault in hub.traffic.faults)


REQUESTS = {
    "look": r"GET /api/models/t/adapter",
    "whoami": r"whoami",
    "create": r"POST /api/repos/create",
    "validate": r"validate-yaml",
    "preupload": r"/preupload/",
    "batch": r"objects/batch",
    "upload": r"PUT ",
    "verify": r"/verify",
    "commit": r"POST /api/models/t/adapter/commit",
}
FAULTS = ["drop", "stall", 401, 403, 404, 429, 503]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_fault_at_any_request_costs_no_more_than_a_rerun(loopback, adapter, request_, fault):
    loopback.fault(fault, REQUESTS[request_], times=None)
    refused = None
    try:
        surgery.push(adapter, "t/adapter", timeout=2)
    except HubError as error:
        refused = error
    assert refused is not None or not met(loopback), "a push cannot do without"
    if refused is not None:
        assert refused.exit_code == 9
        assert loopback.token not in str(refused)
        assert loopback.token.encode() not in pickle.dumps(refused)
        assert not ours(loopback)
    loopback.heal()
    surgery.push(adapter, "t/adapter")
    assert len(ours(loopback)) == 1
    assert "adapter_model.safetensors" in names_on(loopback)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["lost", "cut", 500, 502, 504])
def test_a_commit_whose_answer_is_lost_is_found_not_repeated(loopback, adapter, fault):
    surgery.push(adapter, "t/adapter", message="first")
    (adapter / "LICENSE").write_text("mine")
    loopback.fault(fault, REQUESTS["commit"])
    made = fault in ("lost", "cut")
    try:
        assert surgery.push(adapter, "t/adapter").changed
    except HubError:
        assert not made
    assert len(ours(loopback)) == int(made)
    surgery.push(adapter, "t/adapter")
    assert len(ours(loopback)) == 1
    assert "LICENSE" in names_on(loopback)


def run(hub, *words, **environment):
    settings = {key: value for key, value in {**hub.environment, **environment}.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-m", "surgery", *map(str, words)], env=settings, capture_output=True, text=True, timeout=120
    )
    assert hub.token not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_command_line_pushes_what_it_makes(loopback, pair, tmp_path):
    made = run(
        loopback, "extract-lora", *pair, "--rank", 4, "-o", tmp_path / "a", "--base-id", "t/base", "--push-to", "t/a"
    )
    assert made.returncode == 0, made.stderr
    assert f"pushed to {loopback.endpoint}/t/a/commit/" in made.stdout
    made = run(
        loopback, "merge", pair[0], tmp_path / "a", "-o", tmp_path / "m", "--push-to", "t/m", "--public", "--json"
    )
    assert json.loads(made.stdout)["pushed"].startswith(f"{loopback.endpoint}/t/m/commit/")
    assert not loopback.repos["t/m"].private
    leaks = [path for path in tmp_path.rglob("*") if path.is_file() and loopback.token.encode() in path.read_bytes()]
    assert leaks == []


def test_a_merge_is_pushed_file_by_file_and_leaves_nothing_here(loopback, pair, tmp_path):
    merged = surgery.merge(*pair, algorithm="linear")
    merged.save(tmp_path / "whole", max_shard_size=12_000)
    here = set(tmp_path.iterdir())
    words = ["merge", *pair, "--algorithm", "linear", "--max-shard-size", "12KB", "--push-to", "t/m", "--stream"]
    done = run(loopback, *words, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert set(tmp_path.iterdir()) == here
    for path in (tmp_path / "whole").iterdir():
        assert loopback.read("t/m", path.name) == path.read_bytes(), path.name
    assert names_on(loopback, "t/m") == {path.name for path in (tmp_path / "whole").iterdir()} | {"README.md"}


def test_a_streamed_push_that_fails_commits_nothing(loopback, pair, tmp_path):
    loopback.fault(403, REQUESTS["commit"].replace("adapter", "m"))
    done = run(loopback, "merge", *pair, "--algorithm", "linear", "--push-to", "t/m", "--stream", TMPDIR=str(tmp_path))
    assert done.returncode == 9
    assert "this token may not push to it" in done.stderr
    assert names_on(loopback, "t/m") == set()
    assert not any(path.name.startswith("surgery-") for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stream"], "--stream says nothing without --push-to"),
        (["--stream", "--push-to", "t/m", "-o", "out"], "--stream writes nothing here: drop -o"),
        (["--push-to", "t/m"], "no output is named: say -o/--output FOLDER"),
        (["-o", "out", "--public"], "--public says nothing without --push-to"),
    ],
)
def test_outputs_that_make_no_sense_are_refused(loopback, pair, words, said):
    done = run(loopback, "merge", *pair, "--algorithm", "linear", *words)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("words", "environment", "code", "said"),
    [
        (["t/x", "ADAPTER"], {}, 2, r"the folder comes first.*surgery push \S+ t/x"),
        (["ADAPTER", "t/x"], {"HF_HUB_OFFLINE": "1"}, 9, "HF_HUB_OFFLINE is set"),
        (["ADAPTER", "t/x"], {"HF_TOKEN": None}, 9, "there is no token"),
        (["ADAPTER", "t/x"], {"HF_TOKEN": "hf_wrong"}, 9, "does not accept this one"),
        (["ADAPTER", "t/x"], {"HF_ENDPOINT": "http://example.com"}, 5, "not https"),
        (["ADAPTER", "t/gated"], {"HF_TOKEN": "READER"}, 9, "exists, and is public"),
        (["ADAPTER", "t/gated", "--public"], {"HF_TOKEN": "READER"}, 9, "this token may not"),
        (["ADAPTER", "someone/x"], {}, 9, "may not create it"),
    ],
)
def test_refusals_are_one_line_with_the_right_code(loopback, adapter, words, environment, code, said):
    loopback.add("t/gated", {"config.json": b"{}"}, gated=True)
    words = [str(adapter) if word == "ADAPTER" else word for word in words]
    environment = {key: loopback.reader_token if value == "READER" else value for key, value in environment.items()}
    done = run(loopback, "push", *words, **environment)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(said, done.stderr)


def test_a_dry_run_shows_the_commit_and_sends_nothing(loopback, adapter):
    done = run(loopback, "push", adapter, "t/adapter", "--dry-run")
    assert "adapter_model.safetensors" in done.stdout
    assert "(private, new)" in done.stdout
    assert loopback.repos == {}


@pytest.mark.parametrize("front", ["---\n- a\n---\n", "---\na: [\n---\n", "---\n\ta: b\n---\n"])
def test_a_card_whose_metadata_cannot_be_read_is_refused(front):
    card = model_card.ModelCard({"library_name": "peft"}, "# A title")
    with pytest.raises(FormatError, match="metadata is not"):
        model_card.revise(front.encode(), card)


def test_a_card_without_metadata_gains_it_and_keeps_its_words():
    card = model_card.ModelCard({"library_name": "peft", "tags": ["surgery"]}, "# A title")
    once = model_card.revise("Words — mine.\n".encode(), card)
    assert model_card.metadata(once) == {"library_name": "peft", "tags": ["surgery"]}
    assert "Words — mine." in once.decode()
    assert model_card.revise(once, card) == once


def test_huggingface_hub_is_imported_only_for_the_hub():
    code = "import sys, surgery.cli.push, surgery.cli.merge, surgery.operations.card; print('huggingface_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=os.environ).strip() == "False"


def test_an_adapter_extracted_from_the_hub_is_loaded_from_the_hub_by_peft(loopback, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.add_(0.02 * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1]))
    model.save_pretrained(tmp_path / "ft")
    for name in ("base", "ft"):
        loopback.add(f"t/{name}", tmp_path / name, private=True)
    made = run(
        loopback,
        "extract-lora",
        "hf://t/base",
        "hf://t/ft",
        "--rank",
        "8",
        "-o",
        tmp_path / "a",
        "--push-to",
        "t/adapter",
    )
    assert made.returncode == 0, made.stderr
    ModelCard(loopback.read("t/adapter", "README.md").decode()).validate()
    # A process of its own: PEFT keeps the endpoint that it found when it was imported.
    code = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("t/base"), "t/adapter").merge_and_unload()
with torch.no_grad():
    torch.save(loaded(torch.arange(16)[None]).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], env=loopback.environment, check=True, capture_output=True)
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "logits.pt"), model(torch.arange(16)[None]).logits, atol=1e-4)
