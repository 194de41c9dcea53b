"""``surgery extract-lora``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import many, options, pushing, terminal
from surgery.errors import printable
from surgery.formats.servers import SERVERS
from surgery.report import join_shown, percent
from surgery.tensor import human_bytes

if TYPE_CHECKING:
    from surgery.adapter import Adapter
    from surgery.execute import Progress
    from surgery.operations.extraction_plan import Extraction


class Rank(click.ParamType[int | str]):
    """A rank: a whole number from 1, or ``full``."""

    name = "rank"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Parse a rank."""
        text = str(value)
        if text == "full":
            return text
        if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < 1:
            self.fail(f"{text!r} is not a rank: a whole number from 1, or 'full'", param, ctx)
        return int(text)


@click.command("extract-lora", short_help="Extract a LoRA adapter from a fine-tune and its base.")
@click.argument("base", type=click.Path())
@click.argument("tuned", metavar="FT...", type=click.Path(), nargs=-1, required=True)
@click.option(
    "-r", "--rank", type=Rank(), metavar="N|full", help="Of every matrix, clamped to what it has.  [default: 8]"
)
@click.option("--energy", type=float, metavar="SHARE", help="Instead: keep this share of each delta's energy, as 0.9.")
@click.option(
    "--error",
    type=float,
    metavar="SHARE",
    help="Instead: reach this total relative error, as 0.3, in the fewest bytes.",
)
@click.option("--budget", metavar="SIZE|%", help="Instead: the least error in so many bytes, 50MB or 1% of the model.")
@click.option("--noise-floor", is_flag=True, help="Drop what the fine-tune's own rounding cannot tell from zero.")
@click.option("--max-rank", type=click.IntRange(min=1), metavar="N", help="Largest rank.")
@click.option("--rank-multiple", type=click.IntRange(min=1), default=1, metavar="N", help="Make ranks multiples of N.")
@click.option("--layout", type=click.Choice(["compact", "portable"]), default="compact", show_default=True,
              help="Each matrix its own rank, or all padded with zeros to one.")  # fmt: skip
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(),
    help="The adapter's folder, ./<ft>-lora-r8 by default; of several FT, the folder for theirs.",
)
@click.option(
    "--target",
    multiple=True,
    metavar="PATTERN",
    help="Factor only what matches: q_proj, '*.attn.*', re:REGEX; repeatable.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out what matches; repeatable.")
@click.option(
    "--dtype",
    type=click.Choice(["F32", "BF16", "F16"], case_sensitive=False),
    help="Of the factors; the fine-tune's own by default.",
)
@click.option("--embeddings", type=click.Choice(["auto", "full", "none"]), default="auto", show_default=True,
              help="Trained rows, or low rank where all moved; whole; or not at all.")  # fmt: skip
@click.option("--for", "server", type=click.Choice(list(SERVERS)), default="peft", show_default=True,
              help="Write what this one loads, and say what had to be left out.")  # fmt: skip
@click.option("--dora", is_flag=True, help="Fit DoRA: magnitudes and directions.")
@click.option("--tol", "tolerance", type=float, default=1e-3, show_default=True,
              help="Certified relative excess of each error over the best possible.")  # fmt: skip
@click.option("--exact", is_flag=True, help="Factor with LAPACK's SVD.")
@click.option("--device", default="cpu", show_default=True, help="Where to factor, as torch names it.")
@click.option("--base-id", metavar="ORG/NAME", help="The base's Hub id, for the adapter's configuration.")
@click.option(
    "--names-in-memory",
    is_flag=True,
    help="Name modules as transformers does once loaded, where that differs; needs the extra hf.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For random starts.")
@options.rename
@options.resources
@options.overwrite
@options.dry_run
@options.push_to
@options.progress
@options.no_cache
@options.common
def command(
    base: str, tuned: tuple[str, ...], out: str | None, overwrite: bool, dry_run: bool, as_json: bool, quiet: bool,
    progress: str, **options: Any,
) -> None:  # fmt: skip
    """Extract from FT, a fine-tune of BASE, a LoRA adapter that PEFT loads.

    Every linear weight's difference is factored to the given rank; biases, norms and trained embedding rows are stored
    exactly; whatever an adapter cannot hold is listed with its share of the change. Of several FT the base is read once,
    and one that fails does not stop the rest.

    \b
      surgery extract-lora base ft --rank 16
      surgery extract-lora base ft --budget 50MB --for vllm
      surgery extract-lora base ft --rank 64 --target q_proj,v_proj -o adapter
      surgery extract-lora base ft1 ft2 ft3 -o adapters
    """
    options["dtype"] = options["dtype"].upper() if options["dtype"] else None
    watcher = terminal.watcher(progress, quiet=quiet, what="extract")
    if len(tuned) > 1:
        pushing.refuse("takes one adapter; push them one by one")
        if out is None or dry_run:
            what = "a folder for their adapters" if out is None else "no --dry-run, which is for one at a time"
            raise click.UsageError(f"several fine-tunes need {what}: -o DIR")
        _extract_many(base, tuned, out, overwrite, as_json, quiet, watcher, options)
        return
    # These bring torch, which --help must not pay for.
    from surgery.operations.extract_lora import default_output, plan_extraction

    extraction = plan_extraction(base, tuned[0], **options)
    out = out or default_output(tuned[0], extraction.rule)
    if dry_run:
        _print_plan(extraction, out, as_json)
        return
    extraction.check_output(out, overwrite=overwrite)
    to = pushing.look()
    began = time.monotonic()
    adapter = extraction.run(watcher)
    adapter.save(out, overwrite=overwrite)
    seconds = time.monotonic() - began
    pushed = pushing.push(out, to, quiet=quiet or as_json, progress=progress)
    if as_json:
        more = {"pushed": pushed} if pushed else {}
        terminal.document({**_document(adapter, out), "seconds": round(seconds, 3), **more})
    elif quiet:
        click.echo(printable(pushed or out))
    else:
        _show(adapter, out, seconds)
        if pushed:
            click.echo(f"pushed to {printable(pushed)}")


def _document(adapter: Adapter, out: str) -> dict[str, Any]:
    report = adapter.report
    return {"schema": "surgery.extract-lora/1", "out": out, "bytes": adapter.nbytes, **report.document(),
            "notes": list(report.notes)}  # fmt: skip


def _show(adapter: Adapter, out: str, seconds: float) -> None:
    from surgery.operations.extraction_report import summary

    report = adapter.report
    terminal.table(report.table())
    click.echo()
    click.echo(summary(report))
    click.echo(f"wrote {printable(out)} ({human_bytes(adapter.nbytes)}) in {seconds:.1f} s")
    left = [row for row in report.rows if row.how == "left out"]
    if left:
        share = sum(row.energy for row in left) / report.energy
        terminal.say(f"note: left out, {percent(share)} of ‖Δ‖²: {join_shown([f'{r.name} ({r.why})' for r in left])}")
    terminal.notes(report.notes)


def _extract_many(
    base: str, tuned: tuple[str, ...], out: str, overwrite: bool, as_json: bool, quiet: bool, watcher: Progress,
    options: dict[str, Any],
) -> None:  # fmt: skip
    from surgery.operations.extract_many import extract_many

    many.report(
        lambda tell: extract_many(base, tuned, out, overwrite=overwrite, progress=watcher, done=tell, **options),
        "extract-lora", "adapters", line=_line, document=_document, as_json=as_json, quiet=quiet,
    )  # fmt: skip


def _line(adapter: Adapter) -> str:
    report = adapter.report
    return f"{human_bytes(adapter.nbytes)}  keeps {percent(report.kept)}, relative error {report.error:.4f}"


def _print_plan(extraction: Extraction, out: str, as_json: bool) -> None:
    counts = {"factor": len(extraction.units), "compare in full": len(extraction.full) + len(extraction.resized),
              "examine row by row": len(extraction.embeddings), "leave out": len(extraction.left_out)}  # fmt: skip
    if as_json:
        terminal.document({"schema": "surgery.plan/1", "operation": "extract-lora", "out": out, "tensors": counts,
                           "bytes_read": extraction.bytes_read, "bytes_written": extraction.bytes_written,
                           "peak_memory": extraction.peak_memory, "notes": extraction.notes})  # fmt: skip
        return
    terminal.facts([
        ("would", ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count) + " tensors"),
        ("read", human_bytes(extraction.bytes_read)), ("write", f"{human_bytes(extraction.bytes_written)} of factors to {out}"),
        ("memory", f"at most {human_bytes(extraction.peak_memory)}"),
    ])  # fmt: skip
    terminal.notes(extraction.notes)
