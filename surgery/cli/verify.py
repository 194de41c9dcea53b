"""``surgery verify``."""

from __future__ import annotations

import click

from surgery.cli import options, terminal
from surgery.formats.servers import SERVERS
from surgery.operations.verify import verify


@click.command("verify", short_help="Check a checkpoint, adapter or delta against its own record, or a server.")
@click.argument("path", type=click.Path())
@click.option("--for", "servers", multiple=True, type=click.Choice([*SERVERS, "all"]),
              help="Say whether an adapter loads in a server, why not, and how to mend it; repeatable.")  # fmt: skip
@click.option("--base", type=click.Path(), help="With --for: the adapter's base, to hold names and shapes against.")
@click.option("--max-lora-rank", type=click.IntRange(min=1), metavar="N",
              help="With --for: the rank that vLLM or SGLang is started with.")  # fmt: skip
@options.jobs
@options.progress
@options.no_cache
@options.common
def command(
    path: str,
    servers: tuple[str, ...],
    base: str | None,
    max_lora_rank: int | None,
    jobs: int | None,
    as_json: bool,
    quiet: bool,
    progress: str,
) -> None:
    """Check PATH, a checkpoint, an adapter or an exact delta: headers, index, configuration, and every tensor's fingerprint.

    \b
      surgery verify merged                        every byte is what was recorded
      surgery verify adapter --for vllm            it loads in vLLM, or why not and how to mend it
      surgery verify adapter --for all --base base names and shapes, too

    Exits with 10 and names the tensor if a byte is not what was recorded, or what keeps an adapter from loading.
    With --for, headers are read and nothing else, and PATH may be anybody's PEFT adapter.
    """
    if servers:
        served = verify(path, server=servers, base=base, max_rank=max_lora_rank)
        if as_json:
            terminal.document(served.document())
        elif not quiet:
            terminal.table(served.table())
        served.require()
        if quiet and not as_json:
            click.echo("loads")
        return
    if base or max_lora_rank:
        raise click.UsageError("--base and --max-lora-rank belong to --for")
    found = verify(path, jobs=jobs, progress=terminal.watcher(progress, quiet=quiet, what="verify"))
    if as_json:
        terminal.document(found.document())
    elif quiet:
        click.echo("verified")
    else:
        terminal.table(found.table())
        terminal.notes(found.notes)
