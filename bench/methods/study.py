"""Which runs there are, each on one thread, each remembered in a file, so that a broken-off study goes on.

What is remembered is known by its name alone: after a change to the task or the training, remove the work folder.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.methods.candidates import CANDIDATES

if TYPE_CHECKING:
    from bench.methods.task import Example

SEEDS = (0, 1, 2)
"""Of the head and the new parameters, the order of the sentences, and dropout."""
RANKS = (1, 4, 16, 64)
"""Of the adapters that are extracted from the full fine-tune."""


@dataclass(frozen=True)
class Trial:
    """A method, trained once."""

    candidate: str
    seed: int
    rate: float

    @property
    def key(self) -> str:
        """Name its files."""
        return f"{self.candidate}-{self.seed}-{self.rate:g}"


@dataclass(frozen=True)
class Result:
    """What came of a trial, or of a file that was taken out of one."""

    test: float
    bytes: int
    validation: float = 0.0
    seconds: float = 0.0
    """Of the processor, for training."""
    parameters: int = 0


@dataclass(frozen=True)
class Study:
    """Where everything is.

    Args:
        work: a folder for all that is made.
        base: the model.
        data: where the source package of the sentences is.
        surgery: the command.
    """

    work: Path
    base: Path
    data: Path
    surgery: tuple[str, ...]

    def start(self, seed: int) -> Path:
        """Name the model with a head, which every method is added to."""
        return self.work / f"start-{seed}"

    def file(self, candidate: str, seed: int) -> Path:
        """Name what ``surgery add`` wrote."""
        return self.work / "added" / f"{candidate}-{seed}"

    def trained(self, trial: Trial) -> Path:
        """Name the folder of what was trained."""
        return self.work / "trained" / trial.key

    def run_surgery(self, *arguments: object) -> dict[str, Any]:
        """Run the command, and read what it says."""
        command = [*self.surgery, *map(str, arguments), "--json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        return dict(json.loads(done.stdout))

    def remembered(self, key: str) -> Result | None:
        """Find a result of an earlier run."""
        path = self.work / "results" / f"{key}.json"
        return Result(**json.loads(path.read_text())) if path.exists() else None

    def remember(self, key: str, result: Result) -> None:
        """Keep a result."""
        path = self.work / "results" / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(result)))

    def once(self, key: str, measure: Callable[[], Result]) -> Result:
        """Find a result, or measure and keep it."""
        result = self.remembered(key) or measure()
        self.remember(key, result)
        return result


def prepare(study: Study, seed: int) -> None:
    """Write what is trained from: a head for the base, the model with that head, and every method added to it."""
    for name, candidate in sorted(CANDIDATES.items(), key=lambda item: item[0] != "head"):
        out = study.file(name, seed)
        if candidate.add and not out.exists():
            method, *settings = candidate.add
            model = study.base if name == "head" else study.start(seed)
            study.run_surgery("add", method, model, *settings, "--seed", seed, "-o", out)
        if name == "head" and not study.start(seed).exists():
            _with_head(study.base, out).save_pretrained(study.start(seed))


def _with_head(base: Path, head: Path) -> Any:
    from safetensors.torch import load_file

    from bench.methods.training import model_of

    model = model_of(base)
    found = model.load_state_dict(load_file(head / "added.safetensors"), strict=False)
    assert not found.unexpected_keys
    return model


def run(study: Study, trial: Trial) -> Result:
    """Train one method from its file, and measure it."""
    from bench.methods.training import accuracy, model_of, train, trained_parameters

    tool, sentences = CANDIDATES[trial.candidate].tool, _ready(study)
    model = tool.load(model_of(study.start(trial.seed)), study.file(trial.candidate, trial.seed))
    seconds = train(model, sentences["train"], trial.rate, trial.seed)
    tool.save(model, study.trained(trial))
    return Result(
        test=accuracy(model, sentences["test"]), validation=accuracy(model, sentences["validation"]), seconds=seconds,
        parameters=trained_parameters(model), bytes=_weights_in(study.trained(trial)),
    )  # fmt: skip


@functools.cache
def _ready(study: Study) -> dict[str, list[Example]]:
    """Set this process up as every other one, once, and read the sentences."""
    import torch
    from transformers import AutoTokenizer

    from bench.methods import task

    torch.set_num_threads(1)
    return task.read(study.data, AutoTokenizer.from_pretrained(study.base))


def _weights_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix == ".safetensors")


def run_all(study: Study, trials: Iterable[Trial], jobs: int) -> dict[Trial, Result]:
    """Run what has no result yet, and return all."""
    results = {trial: study.remembered(trial.key) for trial in trials}
    missing = [trial for trial, result in results.items() if result is None]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run, study, trial): trial for trial in missing}
        for done in as_completed(running):
            trial, result = running[done], done.result()
            study.remember(trial.key, result)
            results[trial] = result
            print(f"{trial.key:24} validation {result.validation:.3f}  {result.seconds:.0f} s", flush=True)
    return {trial: result for trial, result in results.items() if result is not None}


def best_rates(results: dict[Trial, Result]) -> dict[str, float]:
    """Choose each method's learning rate by its validation sentences; the smaller one of equals."""
    best: dict[str, tuple[float, float]] = {}
    for trial, result in results.items():
        best[trial.candidate] = max(best.get(trial.candidate, (-1.0, 0.0)), (result.validation, -trial.rate))
    return {candidate: -rate for candidate, (_, rate) in best.items()}


def extractions(study: Study, rate: float) -> dict[str, list[Result]]:
    """Take the full fine-tunes out again: as LoRA adapters of some ranks, tested in PEFT, and as exact deltas."""
    rows: dict[str, list[Result]] = {}
    for seed in SEEDS:
        tuned = study.trained(Trial("full", seed, rate))
        for rank in RANKS:
            result = study.once(f"{tuned.name}-r{rank}", functools.partial(_extracted, study, seed, tuned, rank))
            rows.setdefault(f"extracted LoRA, rank {rank}", []).append(result)
        result = study.once(f"{tuned.name}-delta", functools.partial(_delta, study, seed, tuned))
        rows.setdefault("extracted exact delta", []).append(result)
    return rows


def _extracted(study: Study, seed: int, tuned: Path, rank: int) -> Result:
    import peft

    from bench.methods.training import accuracy, model_of

    out = study.work / "extracted" / f"{tuned.name}-r{rank}"
    study.run_surgery("extract-lora", study.start(seed), tuned, "--rank", rank, "-o", out, "--overwrite")
    sentences = _ready(study)
    model = peft.PeftModel.from_pretrained(model_of(study.start(seed)), out)
    return Result(test=accuracy(model, sentences["test"]), bytes=_weights_in(out))


def _delta(study: Study, seed: int, tuned: Path) -> Result:
    """Take the exact difference, and test the model that it gives back."""
    from bench.methods.training import accuracy, model_of

    out = study.work / "extracted"
    delta, restored = out / f"{tuned.name}.delta", out / f"{tuned.name}-restored"
    study.run_surgery("extract-delta", study.start(seed), tuned, "-o", delta, "--overwrite")
    study.run_surgery("merge", study.start(seed), delta, "-o", restored, "--overwrite")
    return Result(test=accuracy(model_of(restored), _ready(study)["test"]), bytes=delta.stat().st_size)
