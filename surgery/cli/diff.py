"""``surgery diff``."""

from __future__ import annotations

import click

from surgery.cli import options, terminal
from surgery.errors import printable
from surgery.exact import is_delta
from surgery.operations.delta_compare import Pair, compare_deltas
from surgery.operations.diff import plan_diff
from surgery.report import percent
from surgery.tensor import human_bytes


@click.command("diff", short_help="Compare two checkpoints, and say how to ship the change.")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--by", type=click.Choice(["kind", "layer", "group", "tensor"]), default="kind", show_default=True,
              help="What a line of the table is; a group is a layer's kind of weight.")  # fmt: skip
@click.option("--headers", is_flag=True, help="Compare names, dtypes and shapes only; read no values.")
@click.option(
    "--no-spectrum", is_flag=True, help="Skip effective ranks and the LoRA lines, which need a sketch of each matrix."
)
@click.option("--target", multiple=True, metavar="PATTERN", help="Compare only what matches; repeatable.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if anything differs, as git does.")
@click.option("--base", type=click.Path(), help="Of two exact deltas: compare the values that they restore from it.")
@options.rename
@options.jobs
@options.dry_run
@options.progress
@options.no_cache
@options.common
@click.pass_context
def command(
    ctx: click.Context, a: str, b: str, by: str, headers: bool, no_spectrum: bool, target: tuple[str, ...], exit_code: bool,
    base: str | None, rename: tuple[str, ...], jobs: int | None, dry_run: bool, as_json: bool, quiet: bool, progress: str,
) -> None:  # fmt: skip
    """Compare checkpoint B with checkpoint A, tensor by tensor.

    Says what is identical, how far the rest moved, what kind of change it is (only biases, low-rank, dense, unrelated
    …), and what each form of shipping it would cost in bytes and error.

    \b
      surgery diff base ft
      surgery diff base ft --by tensor --target '*.layer.3.*'
      surgery diff base merged --exit-code -q
      surgery diff one.delta two.delta            which tensors each of two exact deltas changes
      surgery diff one.delta two.delta --base base
    """
    both = is_delta(a) and is_delta(b)
    if both and base is None:
        _compare_deltas(ctx, a, b, by_tensor=by == "tensor", as_json=as_json, quiet=quiet, exit_code=exit_code)
        return
    if base is not None and not both:
        raise click.UsageError("--base is that of two exact deltas")
    restored = Pair(base, a, b) if both and base is not None else None
    sides = restored.sides() if restored else (a, b)
    comparison = plan_diff(*sides, rename=rename, target=target, spectrum=not no_spectrum, jobs=jobs)
    if dry_run:
        facts = [
            ("would compare", f"{len(comparison.pairs):,} tensors"), ("read", human_bytes(comparison.bytes_read)),
            ("memory", f"at most {human_bytes(comparison.peak_memory)}"),
        ]  # fmt: skip
        plan = {"schema": "surgery.plan/1", "operation": "diff", "tensors": {"compared": len(comparison.pairs)},
                "bytes_read": comparison.bytes_read, "bytes_written": 0, "peak_memory": comparison.peak_memory}  # fmt: skip
        terminal.document(plan) if as_json else terminal.facts(facts)
        return
    report = (
        comparison.headers_only() if headers else comparison.run(terminal.watcher(progress, quiet=quiet, what="diff"))
    )
    if restored and not headers:
        restored.prove()
    if as_json:
        terminal.document(report.document())
    elif quiet:
        click.echo(report.verdict())
    else:
        click.echo(f"{printable(a)} → {printable(b)}: {report.verdict()}")
        if report.values_compared and not report.identical:
            click.echo(f"‖Δ‖/‖W‖ {percent(report.relative_norm)}, cosine {report.cosine:.6f}")
        if not report.identical or by == "tensor":
            click.echo()
            terminal.table(report.table(by))
        if report.values_compared and not report.identical and report.energy:
            click.echo()
            terminal.table(report.ship_it_as())
        for status in ("added", "removed", "reshaped", "recast"):
            names = [row.name for row in report.rows if row.status == status]
            if names and by != "tensor":
                terminal.say(f"note: {status}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
        terminal.notes(report.notes)
    if exit_code and not report.identical:
        ctx.exit(1)


def _compare_deltas(
    ctx: click.Context, a: str, b: str, *, by_tensor: bool, as_json: bool, quiet: bool, exit_code: bool
) -> None:
    found = compare_deltas(a, b)
    if as_json:
        terminal.document(found.document())
    elif quiet:
        click.echo(found.verdict())
    else:
        click.echo(f"{printable(a)} → {printable(b)}: {found.verdict()}")
        click.echo()
        terminal.table(found.table(by_tensor=by_tensor))
    if exit_code and not found.identical:
        ctx.exit(1)
