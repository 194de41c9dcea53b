"""The command line: help, JSON, plans, quiet and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery.cli.main import COMMANDS, main


@pytest.fixture
def models(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    base = {
        f"layers.{layer}.{name}_proj.weight": generator.standard_normal((24, 16), dtype=np.float32)
        for layer in range(2)
        for name in ("q", "v")
    }
    tuned = {
        name: value + np.float32(0.01) * generator.standard_normal(value.shape, dtype=np.float32)
        for name, value in base.items()
    }
    for folder, tensors in (("base", base), ("ft", tuned)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_one_short_line(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage: surgery" in out
    assert (
        f"surgery {command}" in out.split("Options:")[0].replace("Usage: surgery " + command, "", 1)
        or command == "verify"
    )
    import importlib

    module = importlib.import_module(f"surgery.cli.{command.replace('-', '_')}")
    assert module.command.short_help == COMMANDS[command]
    for parameter in module.command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name


def test_every_command_of_the_api_has_the_same_name():
    # surgery.algorithms, surgery.methods and surgery.plan are rooms: their registries are what the commands print, and
    # what plan and run do are methods of the checkpoint that merge_recipe returns. So is surgery.delta a room; its commands
    # are squash_deltas and switch_delta.
    others = {"algorithms", "delta", "methods", "plan", "run"}
    assert {command.replace("-", "_") for command in COMMANDS} - others <= set(surgery.__all__)


def test_the_main_job_in_json(models, run):
    for arguments, schema in (
        (("info", "base"), "surgery.info/1"),
        (("diff", "base", "ft"), "surgery.diff/1"),
        (("extract-lora", "base", "ft", "--rank", "2", "-o", "adapter"), "surgery.extract-lora/1"),
        (("merge", "base", "adapter", "-o", "merged"), "surgery.merge/1"),
        (("unmerge", "merged", "adapter", "-o", "back"), "surgery.unmerge/1"),
        (("convert", "base", "--dtype", "bf16", "-o", "half"), "surgery.convert/1"),
        (("verify", "merged"), "surgery.verify/1"),
        (("merge", "base", "adapter", "-o", "x", "--dry-run"), "surgery.plan/1"),
        (("diff", "base", "ft", "--dry-run"), "surgery.plan/1"),
        (("extract-lora", "base", "ft", "--dry-run"), "surgery.plan/1"),
    ):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert json.loads(out)["schema"] == schema


def test_dry_runs_write_nothing(models, run):
    run("extract-lora", "base", "ft", "-o", "adapter", "-q")
    before = sorted(models.rglob("*"))
    for arguments in (
        ("merge", "base", "adapter", "-o", "merged"),
        ("unmerge", "base", "adapter", "-o", "out", "--base", "base"),
        ("convert", "base", "-o", "out"),
        ("extract-lora", "base", "ft"),
    ):
        code, out, err = run(*arguments, "--dry-run")
        assert code == 0, err
        assert "memory" in out
    assert sorted(models.rglob("*")) == before


def test_a_plan_counts_every_byte_that_is_read_and_written(models, run):
    (models / "base" / "config.json").write_text("{}")
    run("extract-lora", "base", "ft", "-o", "adapter", "-q")
    for folder in ("base", "ft"):
        (models / folder / "tokenizer.json").write_text("{" + 999 * " " + "}")
    plan = json.loads(run("merge", "base", "adapter", "-o", "merged", "--dry-run", "--json")[1])
    run("merge", "base", "adapter", "-o", "merged", "-q")
    written = sum(path.stat().st_size for path in (models / "merged").rglob("*") if path.is_file())
    later = sum((models / "merged" / name).stat().st_size for name in ("surgery.json", ".surgery/undo"))
    assert plan["bytes_written"] == written - later  # how long an undo record is shows when all is merged
    stored = {name: sum(value.nbytes for value in load_file(f"{name}.safetensors").values())
              for name in ("base/model", "adapter/adapter_model")}  # fmt: skip
    assert plan["bytes_read"] == sum(stored.values())


def test_one_file_is_planned_and_reported_as_one(models, run):
    run("convert", "base", "--max-shard-size", "2KB", "-o", "shards", "-q")
    code, out, _ = run("convert", "shards", "-o", "one.safetensors", "--dry-run", "--json")
    assert (code, list(json.loads(out)["files"])) == (0, ["model.safetensors"])
    assert " in 1 file;" in run("convert", "shards", "-o", "one.safetensors")[1]
    code, _, err = run("convert", "shards", "-o", "two.safetensors", "--max-shard-size", "1GB", "--dry-run")
    assert (code, "no shards" in err) == (2, True)


def test_a_name_that_ends_in_a_slash_is_a_folder_whatever_its_suffix(models, run):
    assert run("convert", "base", "-o", "out.safetensors/")[0] == 0
    assert {path.name for path in (models / "out.safetensors").iterdir()} == {"model.safetensors", "surgery.json"}
    assert run("verify", "out.safetensors")[0] == 0


def test_quiet_prints_one_line(models, run):
    assert run("extract-lora", "base", "ft", "-q") == (0, "./ft-lora-r8\n", "")
    assert run("merge", "base", "ft-lora-r8", "-o", "merged", "-q") == (0, "merged\n", "")
    assert run("verify", "merged", "-q") == (0, "verified\n", "")
    code, out, err = run("diff", "base", "ft", "-q")
    assert (code, out.count("\n"), err) == (0, 1, "")


def test_exit_code_tells_whether_anything_differs(models, run):
    assert run("diff", "base", "ft", "--exit-code", "-q")[0] == 1
    assert run("diff", "base", "base", "--exit-code", "-q")[0] == 0
    assert run("diff", "base", "ft", "-q")[0] == 0


def test_what_was_merged_by_a_map_of_names_is_unmerged_by_it(models, run):
    base = load_file("base/model.safetensors")
    (models / "disk").mkdir()
    save_file({name.replace("q_proj", "query"): value for name, value in base.items()}, "disk/model.safetensors")
    run("extract-lora", "base", "ft", "-o", "adapter", "-q")
    names = {f"layers.{layer}.q_proj": f"layers.{layer}.query" for layer in range(2)}
    (models / "map.json").write_text(json.dumps(names))
    for command in (
        ("merge", "disk", "adapter", "-o", "merged", "--name-map", "map.json", "-q"),
        ("unmerge", "merged", "adapter", "-o", "restored", "--name-map", "map.json", "-q"),
    ):
        code, _, err = run(*command)
        assert code == 0, err
    for name, value in load_file("restored/model.safetensors").items():
        assert np.allclose(value, base[name.replace("query", "q_proj")], atol=1e-6)


def test_negative_and_several_coefficients(models, run):
    run("extract-lora", "base", "ft", "--rank", "full", "-o", "adapter", "-q")
    assert run("merge", "base", "adapter", "--coeff", "-1", "-o", "negated", "-q")[0] == 0
    base, tuned = load_file("base/model.safetensors"), load_file("ft/model.safetensors")
    for name, value in load_file("negated/model.safetensors").items():
        assert np.allclose(value, 2 * base[name] - tuned[name], atol=1e-5)


def test_headers_alone_can_be_compared(models, run):
    code, out, _ = run("diff", "base", "ft", "--headers")
    assert code == 0
    assert "same layout" in out


def test_every_way_of_grouping_a_diff(models, run):
    for by in ("kind", "layer", "group", "tensor"):
        code, out, _ = run("diff", "base", "ft", "--by", by)
        assert code == 0
        assert f"Changes by {by}" in out


def test_a_mistyped_command_or_option_gets_one_line_with_a_hint(models, run):
    for arguments, hint in ((("mrge",), "merge"), (("merge", "--cof"), "--coeff"), (("merge",), "--help")):
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("surgery: error: ")
        assert hint in err


def test_debug_adds_a_traceback(models, run):
    code, _, err = run("info", "nowhere", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("surgery: error: ")


def test_an_internal_error_exits_70_and_asks_for_a_report(models, run, monkeypatch):
    def fail(*_arguments, **_options):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("surgery.cli.info.info", fail)
    code, out, err = run("info", "base")
    assert (code, out) == (70, "")
    assert "please report" in err
    assert "Traceback" not in err


def test_an_interrupt_that_a_library_turns_into_another_error_is_still_one(models, run, monkeypatch):
    def fail(*_arguments, **_options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise AttributeError("module 'numpy' has no attribute 'nonzero'") from None

    monkeypatch.setattr("surgery.cli.info.info", fail)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        code, out, err = run("info", "base")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out) == (130, "")
    assert err.strip() == "surgery: error: interrupted: nothing was published; the same command starts again"


def with_closed(stream, *arguments):
    """Run a command whose stdout, or stderr, nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
        return subprocess.run([sys.executable, "-m", "surgery", *arguments], text=True, **streams)
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "arguments",
    ["--help", "merge --help", "--version", "info base --tensors", "info base --json", "algorithms", "diff base ft",
     "merge ft ft --algorithm linear -o out"],
)  # fmt: skip
def test_a_reader_that_goes_away_is_no_error(models, arguments):
    done = with_closed("stdout", *arguments.split())
    assert (done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("merge: ")]) == (0, [])


def test_work_goes_on_when_nobody_listens_to_its_progress(models):
    done = with_closed("stderr", *["merge", "base", "ft", "--algorithm", "linear", "--progress", "plain", "-o", "out"])
    assert done.returncode == 0
    assert done.stdout.startswith("wrote out")
    assert (models / "out" / "model.safetensors").exists()
    assert with_closed("stderr", "info", "nothing").returncode == 2


def test_completion_scripts_are_offered():
    done = subprocess.run(
        [sys.executable, "-m", "surgery"],
        capture_output=True,
        text=True,
        env={**os.environ, "_SURGERY_COMPLETE": "bash_source"},
    )
    assert "complete" in done.stdout


def test_a_long_table_is_drawn_as_a_short_one(models, run, monkeypatch):
    save_file({"模型.weight": np.ones((2, 3)), "b\n": np.ones(100)}, models / "wide.safetensors")
    for arguments in (("info", "wide.safetensors", "--tensors"), ("diff", "base", "ft", "--by", "tensor")):
        short = run(*arguments)
        monkeypatch.setattr("surgery.cli.terminal.LONG_TABLE", 0)
        assert run(*arguments) == short
        monkeypatch.undo()
        monkeypatch.chdir(models)


def test_no_colour_codes_reach_a_pipe(models):
    done = subprocess.run([sys.executable, "-m", "surgery", "diff", "base", "ft"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
