"""``surgery merge``."""

from __future__ import annotations

from typing import Any

import click

from surgery.algorithms.registry import COMPAT, find
from surgery.cli import options
from surgery.cli.writing import write
from surgery.errors import UsageError

accept = options.stack(
    click.argument("base", type=click.Path()),
    click.argument("others", type=click.Path(), nargs=-1, required=True),
    click.option("--algorithm", "--method", "algorithm", metavar="NAME",
                 help="Merge models: surgery algorithms lists how."),
    click.option("--coeff", type=float, multiple=True, metavar="C",
                 help="Once for all, or once for each; 1 by default, any sign."),
    click.option("-p", "--parameter", "given", multiple=True, metavar="NAME=VALUE",
                 help="A parameter of the algorithm; repeated, or NAME=V,V, one value a model."),
    click.option("--compat", type=click.Choice(COMPAT), default="paper", show_default=True,
                 help="Whose semantics, where mergekit's differ from the paper's."),
    click.option("--seed", type=int, default=0, show_default=True, help="For algorithms that draw random numbers."),
    click.option("--dtype", metavar="DTYPE",
                 help="F64, F32, BF16 or F16, of merged weights; the first input's by default."),
    click.option("--with-base", is_flag=True, help="The first input is the base, where the algorithm can do without."),
    click.option("--missing", type=click.Choice(["refuse", "copy"]), default="refuse", show_default=True,
                 help="What to do with a tensor that some input lacks."),
    options.name_map,
    options.allow_base_mismatch,
    click.option("--reverse", is_flag=True,
                 help="With an exact delta that is reversible: BASE is the fine-tune; restore the base."),
    click.option("--undo/--no-undo", default=True,
                 help="Keep what unmerge needs to give the base back to the bit; kept by default."),
    click.option("--delta-base", type=click.Path(), metavar="BASE",
                 help="With exact deltas made with this: add them as numbers, at any --coeff and to any model."),
    click.option("--allow-incomplete", is_flag=True,
                 help="Merge an adapter that lacks modules its configuration names."),
    options.allow_nonfinite,
)  # fmt: skip
"""What says which merge it is: everything but the output and the resources."""


@click.command("merge", short_help="Merge adapters into a base, or models by an algorithm.")
@accept
@options.writing
@options.restart
@options.sharding
@options.resources
@options.progress
@options.no_cache
@options.common
def command(
    out: str, overwrite: bool, dry_run: bool, restart: bool, max_shard_size: int | None, jobs: int | None,
    max_memory: int | None, as_json: bool, quiet: bool, progress: str, **merge: Any,
) -> None:  # fmt: skip
    """Merge OTHERS into BASE: adapters, or with --algorithm models.

    Adapters: each weight becomes W + Σ c·ΔW, summed in float64 and rounded once; what no adapter touches is copied as
    bytes. PEFT LoRA adapters are understood with rank and alpha patterns, rsLoRA, DoRA, biases, saved modules and token
    rows.

    An exact delta (surgery extract-delta): the fine-tune is restored bit for bit; any other base is refused. Several are
    a chain: each was made with what the one before restores.

    Models: every tensor is merged by the algorithm, rounded once. Adapters and exact deltas stand for BASE with them.
    Algorithms that need no base take BASE as their first model.

    \b
      surgery merge base adapter -o merged
      surgery merge base math code --coeff 0.6 --coeff 0.4 -o both
      surgery merge base style --coeff -1 -o negated
      surgery merge base task.delta -o ft
      surgery merge base step1.delta step2.delta -o ft
      surgery merge other task.delta --delta-base base --coeff 0.5 -o merged
      surgery merge base ft1 ft2 --algorithm ties -p density=0.5 -o merged
      surgery merge base ft1 task.delta adapter --algorithm ties -o merged
      surgery merge ft1 ft2 --algorithm linear -o average
      surgery merge recipe.yml -o merged             see surgery merge recipe.yml --help
    """
    described = describe(**merge)
    from surgery.operations.planned import planned  # brings torch, which --help must not pay for

    write(planned(described), out, "merge", overwrite=overwrite, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs,
          max_memory=max_memory, as_json=as_json, quiet=quiet, progress=progress, restart=restart)  # fmt: skip


def describe(
    *, base: str, others: tuple[str, ...], algorithm: str | None, coeff: tuple[float, ...], given: tuple[str, ...],
    with_base: bool, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Say what a command line merges, as :data:`surgery.formats.run_plan.MODELS`.

    Raises:
        UsageError: an option without its algorithm, or a parameter that the algorithm does not take.
    """
    parameters = _parameters(algorithm, given)
    if coeff:
        parameters["coeff"] = list(coeff) if len(coeff) > 1 else coeff[0]
    if not algorithm and (more["dtype"] or with_base):
        raise UsageError("--dtype and --with-base belong to an algorithm", mend="name one: --algorithm ties")
    return {
        "inputs": [base, *others], "algorithm": algorithm, "parameters": parameters, "with_base": with_base or None, **more,
    }  # fmt: skip


def _parameters(algorithm: str | None, given: tuple[str, ...]) -> dict[str, Any]:
    """Parse ``-p NAME=VALUE`` against the algorithm's row of the registry."""
    if algorithm is None:
        if given:
            raise UsageError(f"-p {given[0]} belongs to an algorithm", mend="name one: --algorithm ties")
        return {}
    row = find(algorithm)
    found: dict[str, list[float | bool]] = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not equals:
            raise UsageError(f"-p takes NAME=VALUE, not {text!r}")
        name = name.strip().replace("-", "_")
        found.setdefault(name, []).extend(row.parameter(name).check(_number(name, v)) for v in values.split(","))
    for name, numbers in found.items():
        if len(numbers) > 1 and not row.parameter(name).per_model:
            raise UsageError(f"{name} is one value for the merge, {len(numbers)} were given")
    return {name: numbers if len(numbers) > 1 else numbers[0] for name, numbers in found.items()}


_WORDS = {"true": True, "false": False, "yes": True, "no": False}


def _number(name: str, text: str) -> float | bool:
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{name} is a number, not {text!r}") from None
