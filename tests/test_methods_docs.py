"""``docs/methods.md`` is true: its blocks are run, one after the other, and what it shows is what is printed."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest

import surgery
from fixtures import real_pair
from surgery.cli.main import main
from surgery.methods.registry import METHODS

DOCUMENT = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()


def test_the_blocks_run_and_print_what_they_show(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(real_pair.base())
    scope = {}
    for language, block in re.findall(r"```(console|python)\n(.*?)```", DOCUMENT, re.DOTALL):
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(block, "methods.md", "exec"), scope)
            continue
        command, _, wanted = block.removeprefix("$ ").partition("\n")
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(shlex.split(command)[1:])
        out, err = capfd.readouterr()
        assert not stopped.value.code, err
        assert out.strip() == wanted.strip(), command
    assert all(parameter.grad is not None for parameter in scope["new"].values())
    assert {name for name, p in scope["lora"].named_parameters() if p.requires_grad} <= scope["whole"].keys()


def test_every_method_stands_in_the_table():
    rows = set(re.findall(r"^\| `([a-z0-9-]+)", DOCUMENT, re.MULTILINE))
    assert rows == METHODS.keys()


def test_the_formulas_of_the_table_count_what_is_added(tmp_path):
    """Counted here from the shapes of the real base: 6 blocks of width 384, feed-forward 1,536."""
    base = surgery.open(real_pair.base())
    d, blocks, r = 384, 6, 64
    formulas = {
        "lora": blocks * 2 * 8 * (d + d), "ia3": blocks * (d + d + 4 * d), "ln-tuning": (2 * blocks + 1) * 2 * d,
        "prompt-tuning": 20 * d, "p-tuning": 20 * d, "prefix-tuning": 2 * 20 * blocks * d,
        "houlsby": 2 * blocks * (2 * d * r + r + d), "pfeiffer": blocks * (2 * d * r + r + d),
        "parallel": blocks * (2 * d * r + r + d), "lin": blocks * (2 * d * r + r + d) + 2 * blocks * d,
        "prelayer": blocks * d * 14, "ft-topk": 2 * (12 * d * d + 13 * d), "head": 2 * (d + 1),
        "bitfit": 11 * blocks * d + d + d,  # the pooler's bias too
    }  # fmt: skip
    assert formulas == {name: surgery.add(base, name).parameters for name in METHODS}
