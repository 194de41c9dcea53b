"""The loopback Hub, as the unmodified client sees it: what the tests of pushing and reading rest on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = os.urandom(100_000)


@pytest.fixture
def api(loopback):
    return HfApi()


def push(api, content=WEIGHTS, **more):
    operations = [
        CommitOperationAdd("model.safetensors", content),
        CommitOperationAdd("config.json", b"{}"),
        CommitOperationAdd("README.md", b"---\nlicense: mit\n---\nA model.\n"),
    ]
    return api.create_commit("t/model", operations, commit_message="first", **more)


@pytest.mark.parametrize("chunk_size", [None, 30_000], ids=["basic", "multipart"])
def test_a_commit_of_the_real_client_arrives(api, loopback, chunk_size):
    loopback.store.chunk_size = chunk_size
    assert api.create_repo("t/model", private=True).repo_id == "t/model"
    with loopback.watch() as seen:
        made = push(api)
    assert made.oid == loopback.repos["t/model"].refs["main"]
    assert loopback.read("t/model", "model.safetensors") == WEIGHTS
    uploads = [request for request in seen if request.port == "cdn" and request.method == "PUT"]
    assert sum(request.received for request in uploads) == len(WEIGHTS)
    assert len(uploads) == (1 if chunk_size is None else 4)
    assert loopback.repos["t/model"].private


def test_creating_what_exists_is_a_conflict_unless_that_is_fine(api, loopback):
    api.create_repo("t/model")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("t/model")
    assert api.create_repo("t/model", exist_ok=True).repo_id == "t/model"


def test_a_stale_parent_is_refused_with_412(api, loopback):
    parent = loopback.add("t/model", {"config.json": b"{}"}).oid
    loopback.move()
    with pytest.raises(HfHubHTTPError) as refused:
        push(api, parent_commit=parent)
    assert refused.value.response.status_code == 412
    assert "model.safetensors" not in loopback.repos["t/model"].history()[0].files
    push(api, parent_commit=loopback.repos["t/model"].refs["main"])


def test_a_pull_request_leaves_main_alone(api, loopback):
    api.create_repo("t/model")
    head = loopback.repos["t/model"].refs["main"]
    made = push(api, create_pr=True)
    assert made.pr_num == 1
    assert loopback.repos["t/model"].refs["main"] == head
    assert "model.safetensors" in loopback.repos["t/model"].commit_of("refs/pr/1").files


def test_files_are_deleted_in_a_commit(api, loopback):
    loopback.add("t/model", {"old.safetensors": b"old", "kept.json": b"{}", "sub/x.txt": b"x"})
    api.create_commit(
        "t/model", [CommitOperationDelete("old.safetensors"), CommitOperationDelete("sub/")], commit_message="less"
    )
    assert set(loopback.repos["t/model"].history()[0].files) == {".gitattributes", "kept.json"}


def test_trees_and_revisions_are_listed(api, loopback):
    first = loopback.add("t/model", {"model.safetensors": WEIGHTS, "sub/deep/x.json": b"{}"}).oid
    second = loopback.add("t/model", {"config.json": b"{}"}).oid
    assert api.repo_info("t/model").sha == second
    assert api.repo_info("t/model", revision=first[:8]).sha == first
    tree = {item.path: item for item in api.list_repo_tree("t/model", recursive=True)}
    assert tree["model.safetensors"].lfs.size == tree["model.safetensors"].size == len(WEIGHTS)
    assert {"sub", "sub/deep", "sub/deep/x.json", "config.json"} <= tree.keys()
    assert "sub/deep" not in {item.path for item in api.list_repo_tree("t/model")}
    assert [commit.commit_id for commit in api.list_repo_commits("t/model")][:2] == [second, first]


def test_downloads_follow_the_redirect_and_show_the_cdn_no_token(api, loopback):
    loopback.add("t/model", {"model.safetensors": WEIGHTS, "config.json": b"{}"}, private=True)
    with loopback.watch() as seen:
        folder = snapshot_download("t/model")
        with open(os.path.join(folder, "model.safetensors"), "rb") as file:
            assert file.read() == WEIGHTS
    assert {request.port for request in seen if request.authorization} == {"hub"}
    assert sum(request.sent for request in seen if request.port == "cdn") == len(WEIGHTS)


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_ranges_are_served_exactly(api, loopback, name):
    loopback.add("t/model", {name: WEIGHTS})
    url = f"{loopback.endpoint}/t/model/resolve/main/{name}"
    found = get_session().get(url, headers={"Range": "bytes=10-19"}, follow_redirects=True)
    assert (found.status_code, found.content) == (206, WEIGHTS[10:20])
    assert found.headers["Content-Range"] == f"bytes 10-19/{len(WEIGHTS)}"
    found = get_session().get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"}, follow_redirects=True)
    assert found.status_code == 416


def test_refusals_are_the_clients_own_exceptions(api, loopback, monkeypatch):
    loopback.add("t/model", {"config.json": b"{}"})
    loopback.add("t/secret", {"config.json": b"{}"}, private=True)
    loopback.add("u/gated", {"config.json": b"{}"}, gated=True)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("t/none")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info("t/model", revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("t/model", "none.json")
    with pytest.raises(GatedRepoError):
        hf_hub_download("u/gated", "config.json")
    monkeypatch.setenv("HF_TOKEN", loopback.reader_token)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("t/secret")
    with pytest.raises(HfHubHTTPError, match="403"):
        push(HfApi())


def test_a_card_with_a_path_for_a_base_is_refused(api, loopback):
    api.create_repo("t/model")
    card = CommitOperationAdd("README.md", b"---\nbase_model: /home/me/base\n---\n")
    with pytest.raises(ValueError, match="not valid"):
        api.create_commit("t/model", [card], commit_message="x")


@pytest.mark.parametrize("kind", ["drop", "cut"])
def test_faults_meet_the_requests_they_are_set_for(api, loopback, kind):
    loopback.add("t/model", {"model.safetensors": WEIGHTS})
    fault = loopback.fault(kind, r"^GET /[0-9a-f]{64}", at=0)
    with open(hf_hub_download("t/model", "model.safetensors"), "rb") as file:  # the client tries again
        assert file.read() == WEIGHTS
    assert fault.met == 1
    assert [request.fault for request in loopback.seen].count(kind) == 1


def test_large_files_travel_by_xet_and_are_stored_once(loopback_xet, tmp_path):
    hub, api = loopback_xet, HfApi()
    weights = os.urandom(8_000_000)
    (tmp_path / "model.safetensors").write_bytes(weights)
    api.create_repo("t/model")
    with hub.watch() as seen:
        api.create_commit(
            "t/model", [CommitOperationAdd("model.safetensors", tmp_path / "model.safetensors")], commit_message="a"
        )
    assert not [request for request in seen if "lfs" in request.path or request.port == "cdn"]
    file = hub.repos["t/model"].history()[0].files["model.safetensors"]
    assert file.xet_hash is not None
    assert hub.read("t/model", "model.safetensors") == weights
    before = hub.xet.nbytes()
    assert before >= len(weights)
    (tmp_path / "changed.safetensors").write_bytes(weights[:4_000_000] + os.urandom(100_000) + weights[4_100_000:])
    api.create_commit(
        "t/model", [CommitOperationAdd("model.safetensors", tmp_path / "changed.safetensors")], commit_message="b"
    )
    assert hub.xet.nbytes() - before < 0.05 * len(weights)
    with open(hf_hub_download("t/model", "model.safetensors"), "rb") as got:
        assert got.read() == (tmp_path / "changed.safetensors").read_bytes()


def test_what_came_by_xet_is_served_in_ranges_too(loopback_xet, tmp_path):
    hub, api = loopback_xet, HfApi()
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    api.create_repo("t/model")
    api.create_commit(
        "t/model", [CommitOperationAdd("model.safetensors", tmp_path / "model.safetensors")], commit_message="a"
    )
    url = f"{hub.endpoint}/t/model/resolve/main/model.safetensors"
    found = get_session().get(url, headers={"Range": "bytes=10-19"}, follow_redirects=True)
    assert (found.status_code, found.content) == (206, WEIGHTS[10:20])


def test_other_processes_push_and_pull_by_xet_in_turn(loopback_xet):
    hub, api = loopback_xet, HfApi()
    api.create_repo("t/model")
    for number in range(2):
        code = f"""
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
made = CommitOperationAdd("model.safetensors", {bytes([number])!r} * 70_000)
HfApi().create_commit("t/model", [made], commit_message="{number}")
print(open(hf_hub_download("t/model", "model.safetensors"), "rb").read(1))
"""
        done = subprocess.run([sys.executable, "-c", code], env=hub.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == repr(bytes([number]))
        assert hub.read("t/model", "model.safetensors") == bytes([number]) * 70_000
    assert hub.xet.files()
