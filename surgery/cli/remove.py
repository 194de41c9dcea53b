"""``surgery remove``."""

from __future__ import annotations

import os

import click

from surgery.cli import options, pushing, terminal
from surgery.cli.writing import write
from surgery.errors import UsageError, printable
from surgery.formats.safetensors import strict_object
from surgery.operations.remove import remove
from surgery.sources import local
from surgery.writer import Publication


@click.command("remove", short_help="Take a PEFT method's parameters out of a checkpoint.")
@click.argument("checkpoint", type=click.Path())
@click.option(
    "--spare", multiple=True, metavar="PATTERN", help="The base's own, though called like a method's; repeatable."
)
@click.option("--keep-to", type=click.Path(), help="Write what is taken out there, as PEFT or AdapterHub loads it.")
@click.option("--adapter", metavar="NAME", help="Which one to keep, where there are several.")
@click.option("--adapter-config", type=click.Path(), metavar="FILE",
              help="The settings of what is kept; those beside CHECKPOINT by default.")  # fmt: skip
@click.option("--method", help="What is kept, where the tensors do not tell: houlsby, pfeiffer …")
@options.settings
@options.writing
@options.sharding
@options.resources
@options.progress
@options.common
def command(
    checkpoint: str, spare: tuple[str, ...], keep_to: str | None, adapter: str | None, adapter_config: str | None,
    method: str | None, settings: tuple[str, ...], out: str, overwrite: bool, dry_run: bool, max_shard_size: int | None,
    jobs: int | None, max_memory: int | None, as_json: bool, quiet: bool, progress: str,
) -> None:  # fmt: skip
    """Take a method's parameters out of CHECKPOINT, and leave the base: its own names, its own bytes.

    For state dicts of models that PEFT or AdapterHub had wrapped, with LoRA, IA³, LayerNorm tuning, prompts, saved modules
    or bottlenecks inside. A LoRA that was merged into its weights is surgery unmerge's.

    \b
      surgery remove trained -o base
      surgery remove trained -o base --keep-to lora -p alpha=16
      surgery remove trained -o base --keep-to adapter --method houlsby
    """
    removed = remove(checkpoint, spare=spare)
    if keep_to is None and (adapter or adapter_config or method or settings):
        raise UsageError("--adapter, --adapter-config, --method and -p are for what is kept", mend="--keep-to FOLDER")
    if keep_to is not None:
        if not pushing.streams() and os.path.abspath(keep_to) == os.path.abspath(out):
            raise UsageError("--keep-to and -o are one place", file=out)
        document = strict_object(local.read_small(local.resolve(adapter_config))) if adapter_config else None
        kept = removed.keep(adapter=adapter, method=method, document=document, **options.parsed_settings(settings))
        if not dry_run:
            if not pushing.streams():  # refused before anything is written, as the other output is
                Publication(out, overwrite=overwrite, inputs=[stored.path for stored in removed.stored])
            kept.save(keep_to, overwrite=overwrite)
    if not as_json and not quiet:
        for table in removed.origin.tables if removed.origin else ():
            terminal.table(table)
    write(removed, out, "remove", overwrite=overwrite, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs,
          max_memory=max_memory, as_json=as_json, quiet=quiet, progress=progress)  # fmt: skip
    if keep_to is not None and not dry_run and not as_json and not quiet:
        click.echo(f"kept {len(kept.tensors):,} tensors in {printable(keep_to)}")
