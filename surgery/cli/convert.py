"""``surgery convert``."""

from __future__ import annotations

import click

from surgery.cli import options
from surgery.cli.writing import write
from surgery.operations.convert import convert


@click.command("convert", short_help="Cast, reshard, rename, drop; turn pickles into safetensors.")
@click.argument("checkpoint", type=click.Path())
@click.option(
    "--dtype",
    type=click.Choice(["F32", "BF16", "F16", "F64"], case_sensitive=False),
    help="Cast floating-point tensors, rounding once.",
)
@click.option("--drop", multiple=True, metavar="PATTERN", help="Leave out what matches; repeatable.")
@options.rename
@options.allow_nonfinite
@options.writing
@options.sharding
@options.resources
@options.progress
@options.no_cache
@options.common
def command(
    checkpoint: str, dtype: str | None, drop: tuple[str, ...], rename: tuple[str, ...], allow_nonfinite: bool, out: str,
    overwrite: bool, dry_run: bool, max_shard_size: int | None, jobs: int | None, max_memory: int | None, as_json: bool,
    quiet: bool, progress: str,
) -> None:  # fmt: skip
    """Write CHECKPOINT in another form: dtype, shards, names, or container.

    Pickled .bin and .pt files are read without running their code, and come out as safetensors. Whatever is not asked
    to change is copied as bytes.

    \b
      surgery convert pytorch_model.bin -o model.safetensors
      surgery convert ckpt --dtype BF16 --max-shard-size 2GB -o ckpt-bf16
      surgery convert ckpt --rename bert.= --drop '*.position_ids' -o plain
    """
    converted = convert(
        checkpoint, dtype=dtype.upper() if dtype else None, rename=rename, drop=drop, allow_nonfinite=allow_nonfinite
    )
    write(converted, out, "convert", overwrite=overwrite, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs,
          max_memory=max_memory, as_json=as_json, quiet=quiet, progress=progress)  # fmt: skip
