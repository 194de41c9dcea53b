"""What a command must not pay for: torch, when only headers are read."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "peft", "huggingface_hub", "rich")


@pytest.fixture
def checkpoints(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"layer.0.q_proj.weight": np.ones((4, 4), np.float32)}, tmp_path / name / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.layer.0.q_proj.lora_{side}.weight": np.ones((4, 4), np.float32) for side in "AB"}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "whole").mkdir()
    whole = {"layer.0.q_proj.base_layer.weight": np.ones((4, 4), np.float32), **factors}
    save_file(
        {name.removeprefix("base_model.model."): value for name, value in whole.items()},
        tmp_path / "whole" / "model.safetensors",
    )
    return tmp_path


def loaded(arguments, cwd):
    code = f"""
import sys
from surgery.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code, stop.code
print("LOADED", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["info", "a", "-q"], *([command, "--help"] for command in COMMANDS)],
    ids=" ".join,
)
def test_help_and_info_import_nothing_heavy(arguments, checkpoints):
    assert not loaded(arguments, checkpoints)


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "a"],
        ["info", "a", "--json"],
        ["diff", "a", "b", "--headers"],
        ["diff", "a", "b", "--dry-run"],
        ["convert", "a", "-o", "c", "--dry-run"],
        ["convert", "a", "-o", "c"],
        ["verify", "a"],
        ["methods", "a"],
        ["add", "lora", "a", "--target", "q", "-p", "r=2", "--dry-run"],
        ["remove", "whole", "-o", "c", "--keep-to", "d", "-p", "alpha=4"],
        ["verify", "adapter", "--for", "vllm", "--for", "peft", "--base", "a"],
    ],
    ids=" ".join,
)
def test_commands_that_read_headers_or_copy_bytes_import_no_torch(arguments, checkpoints):
    assert set(loaded(arguments, checkpoints)) <= {"rich"}


def test_importing_surgery_imports_no_torch():
    code = "import sys, surgery; dir(surgery); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
