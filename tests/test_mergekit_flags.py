"""mergekit's command lines run unchanged: every flag of its three commands maps, gets one note, or is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery.cli import main

NOTED = {
    "--allow-crimes": None, "--trust-remote-code": None, "--cuda": None, "--low-cpu-memory": None, "--lazy-unpickle": None,
    "--read-to-gpu": None, "--multi-gpu": None, "--gpu-rich": None, "--async-write": None, "--clone-tensors": None,
    "--write-model-card": None, "--safe-serialization": None, "--lazy": None, "--transformers-cache": "x",
    "--lora-merge-cache": "x", "--lora-merge-dtype": "float32", "--device": "cuda", "--write-threads": "2",
    "--intermediate-dir": "x", "-I": "x",
}  # fmt: skip
MAPPED = {
    "--random-seed": "7", "--num-threads": "1", "-j": "1", "--out-shard-size": "5B", "--copy-tokenizer": None,
    "--no-copy-tokenizer": None, "--no-quiet": None, "-v": None, "--no-unsafe-truncate-embeddings": None,
}  # fmt: skip
REFUSED = ("--unsafe-truncate-embeddings", "--tensor-union", "-u", "--tensor-intersection", "-i")
"""What mergekit-yaml, mergekit-multi and mergekit-pytorch of 0.1.5 list under --help, without what surgery has too."""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    for name in "ab":
        save_file({"w": np.ones((2, 3), "f4")}, tmp_path / f"{name}.safetensors")
    (tmp_path / "r.yml").write_text("{models: [{model: a.safetensors}, {model: b.safetensors}], merge_method: linear}")
    monkeypatch.chdir(tmp_path)

    def call(flag, value=None, code=0):
        with pytest.raises(SystemExit) as stop:
            main(["merge", "r.yml", "out", "--dry-run", flag, *([] if value is None else [value])])
        err = capsys.readouterr().err
        assert (stop.value.code, len(err.splitlines()) <= 1) == (code, True), err
        return err

    return call


@pytest.mark.parametrize("flag", NOTED)
def test_a_flag_that_means_nothing_here_gets_one_note(run, flag):
    assert run(flag, NOTED[flag]).startswith("note: --")
    if NOTED[flag] is None:
        assert run(flag.replace("--", "--no-")).startswith("note: --")


@pytest.mark.parametrize("flag", MAPPED)
def test_a_flag_that_means_something_is_obeyed_in_silence(run, flag):
    assert run(flag, MAPPED[flag]) == ""


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_would_change_the_result_is_refused(run, flag):
    assert "; " in run(flag, code=2)


def test_out_path_names_the_output_as_for_mergekit_multi(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["merge", "r.yml", "--out-path", "out", "--dry-run"])
    assert stop.value.code == 0, capsys.readouterr().err
