"""``surgery add``."""

from __future__ import annotations

import click

from surgery.cli import options, pushing, terminal
from surgery.errors import printable
from surgery.operations.add import add
from surgery.sources.local import stem_of
from surgery.tensor import human_bytes


@click.command("add", short_help="Give a model the new parameters of a PEFT method.")
@click.argument("method")
@click.argument("checkpoint", type=click.Path())
@click.option("--target", multiple=True, metavar="PATTERN",
              help="Modules to adapt: role:q, a word, a glob or re:REGEX; repeatable. The method's own by default.")  # fmt: skip
@options.settings
@click.option("-o", "--output", "out", type=click.Path(), help="A folder; CHECKPOINT-METHOD by default.")
@click.option("--dtype", type=click.Choice(["F32", "BF16", "F16"], case_sensitive=False), default="F32",
              show_default=True, help="Of the new tensors.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws, keyed by the tensors' names.")
@click.option("--base-name", metavar="NAME", help="What the file calls the base.")
@click.option("--names-in-memory", is_flag=True, help="Name modules as transformers calls them once loaded.")
@options.overwrite
@options.dry_run
@options.push_to
@options.no_cache
@options.common
def command(
    method: str, checkpoint: str, target: tuple[str, ...], settings: tuple[str, ...], out: str | None, dtype: str, seed: int,
    base_name: str | None, names_in_memory: bool, overwrite: bool, dry_run: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write the parameters that METHOD adds to CHECKPOINT, as PEFT or AdapterHub loads them.

    surgery methods lists the methods, their settings, and what each would cost on a model.

    \b
      surgery add lora base --target role:q,role:v -p r=16 -o base-lora
      surgery add prompt-tuning base -p length=20 -p tokens=101,2023
      surgery add houlsby base -p size=64 -p leave_out=0,1
      surgery add ft-topk base -p k=2
    """
    added = add(
        checkpoint, method, target=target, dtype=dtype.upper(), seed=seed, base_name=base_name,
        names_in_memory=names_in_memory, **options.parsed_settings(settings),
    )  # fmt: skip
    out = out or f"{stem_of(checkpoint)}-{method}"
    pushed = None
    if not dry_run:
        to = pushing.look()
        added.save(out, overwrite=overwrite)
        pushed = pushing.push(out, to, quiet=quiet or as_json, progress="none")
    if as_json:
        more = {"pushed": pushed} if pushed else {}
        terminal.document({**added.document_of(), "out": None if dry_run else out, **more})
        return
    if quiet:
        click.echo(str(added.parameters) if dry_run else printable(pushed or out))
        return
    if added.chosen:
        terminal.table(added.table())
    where = f"would write {printable(out)}" if dry_run else f"wrote {printable(out)}"
    size = f"{added.parameters:,} parameters; {len(added.tensors):,} new tensors, {human_bytes(added.nbytes)}"
    click.echo(f"{where} ({size})")
    if pushed:
        click.echo(f"pushed to {printable(pushed)}")
    terminal.notes([*added.notes, *(() if added.addition.unchanged else ("the model's function changes at once",))])
