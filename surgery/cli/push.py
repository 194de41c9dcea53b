"""``surgery push``."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options, terminal
from surgery.errors import printable
from surgery.tensor import human_bytes

if TYPE_CHECKING:
    from surgery.operations.push import Push


@click.command("push", short_help="Put a model, adapter or delta on the Hugging Face Hub.")
@click.argument("path", metavar="FOLDER|DELTA", type=click.Path())
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private/--public", default=True, show_default=True, help="What the repository is, or will be.")
@click.option("--revision", metavar="BRANCH", help="Commit to this branch; made if there is none.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request.")
@click.option("-m", "--commit-message", "message", metavar="TEXT", help="The commit's title.")
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Take files along that checkpoints do not need; repeatable."
)
@click.option("--include-undo", is_flag=True, help="Take along what an unmerge needs.")
@click.option(
    "--base-id", multiple=True, metavar="ORG/NAME", help="Hub id of the base, where it was a folder; repeatable."
)
@click.option("--license", "licence", metavar="ID", help="As the Hub spells it; that of the bases by default.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help="For all of it; ten minutes and a second a megabyte by default.")  # fmt: skip
@options.dry_run
@options.progress
@options.common
def command(path: str, repo: str, dry_run: bool, as_json: bool, quiet: bool, progress: str, **options: Any) -> None:
    """Push a folder with a model or an adapter, or an exact delta, in one commit.

    The folder is verified first, and only files that belong to a checkpoint travel. The repository is private unless
    --public is given. Weights of an earlier model that the new one does not replace are deleted in the same commit; words
    and metadata that people wrote into the card are kept. If somebody pushes meanwhile, nothing is committed.

    The token is the one of hf auth login, or HF_TOKEN.

    \b
      surgery push adapter me/adapter --base-id org/base
      surgery push merged me/merged --public -m "TIES of math and code"
      surgery push task.delta me/task-delta --dry-run
    """
    if os.path.exists(repo) and not os.path.exists(path) and path.count("/") == 1:
        corrected = shlex.join(["surgery", "push", repo, path])
        raise click.UsageError(f"the folder comes first, then the repository: {corrected}")
    # This brings huggingface_hub, which --help must not pay for.
    from surgery.operations.push import plan_push

    push = plan_push(path, repo, **options)
    if dry_run:
        _show_plan(push, as_json=as_json)
        return
    if not (as_json or quiet):
        _show_commit(push)
    made = push.run(terminal.watcher(progress, quiet=quiet, what="push"))
    where = made.pull_request or made.url
    if as_json:
        terminal.document({**push.document(), "commit": made.commit, "url": where, "changed": made.changed})
    elif quiet:
        click.echo(printable(where))
    else:
        done = f"pushed {human_bytes(push.commit.nbytes)} to" if made.changed else "nothing has changed since"
        click.echo(f"{done} {printable(where)}")
        terminal.notes(push.commit.notes)


def _show_plan(push: Push, *, as_json: bool) -> None:
    if as_json:
        terminal.document(push.document())
        return
    _show_commit(push)
    terminal.notes(push.commit.notes)


def _show_commit(push: Push) -> None:
    click.echo(printable(push.heading))
    terminal.table(push.table())
