"""Interrupted merges go on from their finished files, and end in the same bytes; shares of a plan make one output.

Run as a script, this file is the driver of the kills: it imports surgery once and forks a child for every attempt, which
a SIGKILL stops at one of the system calls that make or finish a file.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery.cli import main
from surgery.journal import NAME, Journal
from surgery.writer import Publication

RECIPE = """
models: [{model: a, parameters: {weight: [0, 1]}}, {model: b, parameters: {weight: [1, 0.5]}}]
merge_method: linear
dtype: float16
"""
SHARDS = ("--max-shard-size", "20kB")
CALLS = ("pwrite", "fsync", "replace", "rename", "unlink")


def model(folder, seed, layers=12):
    draw = np.random.default_rng(seed)
    tensors = {f"layers.{k}.w": draw.normal(size=(64, 128)).astype("f4") for k in range(layers)}
    tensors["embed.weight"] = draw.normal(size=(40, 64)).astype("f4")
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with two models and a recipe, to work in."""
    for seed, name in enumerate("ab"):
        model(tmp_path / name, seed)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(capsys):
    """Call the command line here."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments, code=0):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        assert stop.value.code == code, found.err
        return found.out + found.err

    yield call
    signal.signal(signal.SIGTERM, handler)


# --- the driver


class Killed:
    """Counts the calls that make files, and kills the process at the ``at``-th; counts what is written to weights."""

    def __init__(self, at):
        self.at = at
        self.calls = self.written = 0
        for name in CALLS:
            setattr(os, name, self._tapped(name, getattr(os, name)))

    def _tapped(self, name, real):
        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.written += name == "pwrite" and len(arguments[1])
            return real(*arguments, **options)

        return call


def attempt(argv, at):
    """Run the command line in a forked child; return how it ended, and what it did."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        tell = os.write
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        killed = Killed(at)
        code = 99
        try:
            main(argv)
        except SystemExit as stop:
            code = stop.code
        finally:
            tell(write, json.dumps({"calls": killed.calls, "written": killed.written}).encode())
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(child, 0)
    told = os.read(read, 1 << 16)
    os.close(read)
    return {"code": os.waitstatus_to_exitcode(status), **json.loads(told or b"{}")}


def explore(moments):
    """Kill a merge at random moments, twice each, and let the third attempt finish."""
    argv = ["merge", "recipe.yml", "-o", "out", *SHARDS, "--jobs", "1", "-q"]
    whole = attempt(argv, 0)
    assert whole["code"] == 0
    wanted = contents(Path("out"))
    draw = random.Random(7)
    found = []
    for _ in range(moments):
        subprocess.run(["rm", "-rf", "out"], check=True)
        codes = [attempt(argv, draw.randrange(1, whole["calls"] + 1))["code"]]
        if codes == [-9] and not Path("out").exists():
            codes.append(attempt(argv, draw.randrange(1, whole["calls"] + 1))["code"])
        staging = Path(".out.surgery-tmp")
        ready = len(list((staging / NAME).glob("*.json"))) if staging.exists() else 0
        last = {"code": 0, "written": None} if Path("out").exists() else attempt(argv, 0)
        found.append({"codes": codes, "ready": ready, "last": last["code"], "written": last["written"],
                      "same": contents(Path("out")) == wanted, "left": sorted(os.listdir())})  # fmt: skip
    return {"whole": whole, "files": len(wanted), "moments": found}


def test_kills_at_twenty_random_moments_end_in_the_same_bytes(work):
    done = subprocess.run([sys.executable, __file__, "20"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["moments"]) == 20
    for moment in found["moments"]:
        assert set(moment["codes"]) <= {-9, 0}, moment
        assert (moment["last"], moment["same"]) == (0, True), moment
        # A run killed between the rename and the end leaves its lock, which the next run on that output takes over.
        assert [name for name in moment["left"] if name != ".out.surgery-lock"] == ["a", "b", "out", "recipe.yml"]
    late = [moment for moment in found["moments"] if moment["ready"] >= 8 and moment["written"]]
    assert late, found["moments"]
    for moment in late:
        assert moment["written"] < 0.5 * found["whole"]["written"], "finished files were made again"


# --- one interruption after another, in this process


def interrupted(monkeypatch, after):
    """Press Ctrl-C once ``after`` files are entered in the journal."""
    finish = Journal.finish

    def stop(journal, *details):
        finish(journal, *details)
        if len(journal.finished()) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "finish", stop)


@pytest.mark.parametrize("inputs", ["recipe.yml", "a b --algorithm task_arithmetic --coeff 0.5 --dtype F16"])
def test_an_interrupted_merge_says_so_and_goes_on(work, run, monkeypatch, inputs):
    inputs = inputs.split()
    run("merge", *inputs, "-o", "whole", *SHARDS, "-q")
    with monkeypatch.context() as patch:
        interrupted(patch, 4)
        said = run("merge", *inputs, "-o", "out", *SHARDS, "--jobs", "1", "-q", code=130)
    assert said.strip() == (
        "surgery: error: interrupted: finished files are kept; the same command continues, --restart begins anew"
    )
    assert not (work / "out").exists()
    kept = {path.name: path.stat().st_ino for path in (work / ".out.surgery-tmp").glob("*.safetensors")}
    assert 4 <= len(kept) < 13
    said = run("merge", *inputs, "-o", "out", *SHARDS)
    assert "(1 of " in said
    for name, number in kept.items():
        assert (work / "out" / name).stat().st_ino == number, "it was made again"
    assert contents(work / "out") == contents(work / "whole")
    assert not list(work.glob(".*"))


@pytest.mark.parametrize("change", ["recipe", "input", "shards", "seed", "restart", "size", "journal"])
def test_what_was_finished_for_another_plan_is_made_again(work, run, monkeypatch, change):
    with monkeypatch.context() as patch:
        interrupted(patch, 3)
        run("merge", "recipe.yml", "-o", "out", *SHARDS, "--jobs", "1", "-q", code=130)
    staging = work / ".out.surgery-tmp"
    before = {path.stat().st_ino: path.name for path in staging.glob("*.safetensors")}
    (work / "hold").mkdir()
    for path in staging.glob("*.safetensors"):  # so that no number is given out again
        os.link(path, work / "hold" / path.name)
    command = ["merge", "recipe.yml", "-o", "out", *SHARDS, "-q"]
    if change == "recipe":
        (work / "recipe.yml").write_text(RECIPE.replace("0.5", "0.25"))
    elif change == "input":
        time.sleep(0.02)
        os.utime(work / "a" / "model.safetensors")
    elif change == "shards":
        command[command.index("20kB")] = "50kB"
    elif change == "seed":
        command += ["--seed", "1"]
    elif change == "restart":
        command.append("--restart")
    elif change == "size":
        for path in staging.glob("*.safetensors"):
            os.truncate(path, path.stat().st_size - 1)
    else:
        for path in (staging / NAME).glob("*.json"):
            path.write_bytes(path.read_bytes()[:-5])
    run(*command)
    assert not before.keys() & {path.stat().st_ino for path in (work / "out").glob("*.safetensors")}
    run(*[word if word != "out" else "again" for word in command])
    assert contents(work / "out") == contents(work / "again")


def test_an_error_clears_everything_away(work, run):
    tensors = {"layers.0.w": np.ones((64, 128), "f4"), "layers.9.w": np.full((64, 128), np.nan, "f4")}
    for name in "ab":
        save_file(tensors, work / name / "model.safetensors")
    assert "NaN" in run("merge", "recipe.yml", "-o", "out", *SHARDS, "--jobs", "1", "-q", code=6)
    assert sorted(os.listdir(work)) == ["a", "b", "recipe.yml"]


def test_what_is_not_made_of_files_alone_begins_anew(work):
    stored = surgery.merge("a", "b", algorithm="linear")
    assert stored.origin.work == surgery.merge("a", "b", algorithm="linear").origin.work
    assert stored.origin.work != surgery.merge("a", "b", algorithm="linear", coeff=[1, 2]).origin.work
    held = surgery.open("a").state_dict()
    assert surgery.merge("a", held, algorithm="linear").origin.work is None
    assert surgery.merge("a", "b", algorithm="linear", coeff=lambda _: 1.0).origin.work is None
    assert surgery.merge("a", surgery.merge("a", held, algorithm="linear"), algorithm="linear").origin.work is None
    assert surgery.merge("a", stored, algorithm="linear").origin.work is not None


# --- shares


def test_parts_in_any_order_and_split_make_the_same_output_as_one_run(work, run):
    run("merge", "recipe.yml", "-o", "whole", *SHARDS, "-q")
    run("plan", "recipe.yml", "-o", "out", "--plan-out", "plan.json", *SHARDS, "-q")
    run("run", "plan.json", "--job", "3/4", "-q")
    refused = run("run", "plan.json", "--finish", code=7)
    assert "files are not finished" in refused
    run("run", "plan.json", "--job", "1/2", "-q")
    run("run", "plan.json", "--job", "1/2", "-q")
    run("run", "plan.json", "--job", "2/2", "-q")
    run("run", "plan.json", "--finish", "-q")
    assert contents(work / "out") == contents(work / "whole")
    assert not list(work.glob(".*"))


def test_a_merge_takes_over_what_jobs_made(work, run):
    run("plan", "recipe.yml", "-o", "out", "--plan-out", "plan.json", *SHARDS, "-q")
    run("run", "plan.json", "--job", "1/3", "-q")
    run("merge", "recipe.yml", "-o", "out", *SHARDS, "-q")
    run("merge", "recipe.yml", "-o", "whole", *SHARDS, "-q")
    assert contents(work / "out") == contents(work / "whole")


def test_jobs_exclude_whole_runs_and_each_other_file_by_file(work, run):
    run("plan", "recipe.yml", "-o", "out", "--plan-out", "plan.json", *SHARDS, "-q")
    run("run", "plan.json", "--job", "1/4", "-q")
    journal = Journal(work / ".out.surgery-tmp", json.loads((work / "plan.json").read_text())["digest"])
    let_go = journal.claim("model-00002-of-00013.safetensors")
    assert "another run is writing it" in run("run", "plan.json", "--job", "2/4", "-q", code=7)
    let_go()
    run("run", "plan.json", "--job", "2/4", "-q")
    with Publication(work / "out"):
        assert "another run is writing it" in run("run", "plan.json", "--job", "3/4", "-q", code=7)


def test_models_named_on_the_command_line_are_planned_and_shared_too(work, run):
    models = ("a", "b", "--algorithm", "slerp", "-p", "t=0.25", "--max-shard-size", "40kB")
    run("merge", *models, "-o", "whole", "-q")
    shown = run("plan", *models)
    assert " ".join(next(line for line in shown.splitlines() if line.startswith("layers.*.w")).split()) == (
        "layers.*.w slerp of a, b t 0.25 12 393 kB"
    )
    document = json.loads(run("plan", *models, "--json"))
    assert document["files"] == {
        path.name: path.stat().st_size for path in sorted((work / "whole").glob("*.safetensors"))
    }
    run("plan", *models, "-o", "out", "--plan-out", "plan.json", "-q")
    for job in ("2/2", "1/2"):
        run("run", "plan.json", "--job", job, "-q")
    run("run", "plan.json", "--finish", "-q")
    assert contents(work / "out") == contents(work / "whole")


def test_a_dry_run_of_a_plan_shows_the_whole_or_a_part_and_writes_nothing(work, run):
    run("plan", "recipe.yml", "-o", "out", "--plan-out", "plan.json", *SHARDS, "-q")
    before = sorted(os.listdir(work))
    whole = json.loads(run("run", "plan.json", "--dry-run", "--json"))
    parts = [json.loads(run("run", "plan.json", "--job", f"{k}/3", "--dry-run", "--json")) for k in (1, 2, 3)]
    assert {name: size for part in parts for name, size in part["files"].items()} == whole["files"]
    assert sum(part["tensors"]["made"] for part in parts) == 13
    assert "made 5 tensors" in run("run", "plan.json", "--job", "1/3", "--dry-run")
    assert sorted(os.listdir(work)) == before


def test_a_plan_whose_inputs_changed_is_refused(work, run):
    run("plan", "recipe.yml", "-o", "out", "--plan-out", "plan.json", "-q")
    os.utime(work / "b" / "model.safetensors")
    assert "is not as it was planned" in run("run", "plan.json", "-q", code=4)
    plan = json.loads((work / "plan.json").read_text())
    for wrong in ({"merge": 7}, {"merge": {"recipe": 7}}, {"merge": {"inputs": [7]}}, {"schema": "x"}, {"more": 1}):
        (work / "plan.json").write_text(json.dumps({**plan, **wrong}))
        assert "is no plan" in run("run", "plan.json", code=3)


def test_a_plan_is_shown_from_headers_and_says_what_becomes_of_every_tensor(work, run):
    said = run("plan", "recipe.yml", *SHARDS)
    assert "13: model-00001-of-00013.safetensors" in said
    row = next(line for line in said.splitlines() if line.startswith("layers.*.w"))
    assert " ".join(row.split()) == "layers.*.w linear of a, b coeff 0, 1 … coeff 1, 0.5 12 197 kB"
    document = json.loads(run("plan", "recipe.yml", "--json"))
    assert document["schema"] == "surgery.plan/1"
    assert [row["tensors"] for row in document["what_would_be_written"]] == ["embed.weight", "layers.*.w"]
    assert sorted(os.listdir(work)) == ["a", "b", "recipe.yml"]


if __name__ == "__main__":
    importlib.import_module("surgery.cli.merge_recipe")
    importlib.import_module("surgery.operations.recipe")
    importlib.import_module("torch").set_num_threads(1)
    gc.freeze()
    gc.disable()
    print(json.dumps(explore(int(sys.argv[1]))))
