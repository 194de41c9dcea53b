"""What commands say that take many fine-tunes of one base: a line each, then how many were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from surgery.cli import terminal
from surgery.errors import printable
from surgery.operations.outcomes import Outcome

T = TypeVar("T")


def report(
    run: Callable[[Callable[[Outcome[T]], None]], Sequence[Outcome[T]]],
    verb: str,
    noun: str,
    *,
    line: Callable[[T], str],
    document: Callable[[T, str], dict[str, Any]],
    as_json: bool,
    quiet: bool,
) -> None:
    """Run, say what becomes of each fine-tune as it is finished, and end with the first error's exit code.

    Args:
        run: does the work, and tells whom it is given of every outcome.
        verb: the command, for the document's schema.
        noun: what is made, in the plural.
        line: describes what was made, for people.
        document: describes it and where it went, for programs.
        as_json: print one document in the end.
        quiet: print paths alone.
    """

    def tell(outcome: Outcome[T]) -> None:
        if outcome.error is not None:
            terminal.say(f"surgery: error: {outcome.error}")
        elif outcome.made is not None and quiet:
            click.echo(printable(outcome.out))
        elif outcome.made is not None and not as_json:
            click.echo(f"{printable(outcome.out)}  {line(outcome.made)}")

    outcomes = run(tell)
    failed = [(outcome.tuned, outcome.error) for outcome in outcomes if outcome.error]
    if as_json:
        made = [document(outcome.made, outcome.out) for outcome in outcomes if outcome.made is not None]
        errors = [{"fine-tune": tuned, "error": str(error), "exit_code": error.exit_code} for tuned, error in failed]
        terminal.document({"schema": f"surgery.{verb}-many/1", noun: made, "failed": errors})
    elif not quiet:
        click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} {noun} written")
    if failed:
        raise click.exceptions.Exit(failed[0][1].exit_code)
