"""The command group, and the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from surgery import __version__
from surgery.errors import SurgeryError, printable

COMMANDS = {
    "info": "Show what a checkpoint holds, from its headers alone.",
    "diff": "Compare two checkpoints, and say how to ship the change.",
    "extract-lora": "Extract a LoRA adapter from a fine-tune and its base.",
    "extract-delta": "Keep a fine-tune as what differs from its base, exactly.",
    "delta": "Squash a chain of exact deltas, or switch between the fine-tunes of two.",
    "spectrum": "Show the singular values of a fine-tune's changes.",
    "merge": "Merge adapters into a base, or models by an algorithm.",
    "algorithms": "List what models can be merged by.",
    "add": "Give a model the new parameters of a PEFT method.",
    "remove": "Take a PEFT method's parameters out of a checkpoint.",
    "methods": "Show what each PEFT method would cost on a model.",
    "plan": "Show what a merge or a recipe would do.",
    "run": "Run a saved plan, or one part of it.",
    "unmerge": "Take an adapter out of a merged checkpoint again.",
    "convert": "Cast, reshard, rename, drop; turn pickles into safetensors.",
    "push": "Put a model, adapter or delta on the Hugging Face Hub.",
    "verify": "Check a checkpoint, adapter or delta against its own record, or a server.",
}
"""Every command and its one line of help, in the order of ``--help``; the modules are imported when they are run."""

RECIPES = (".yml", ".yaml")
"""What a recipe's name ends in."""
TAKE_RECIPES = ("merge", "plan")
"""Commands that take a recipe in place of models; a module of its own handles it, ``NAME_recipe``."""

INTERNAL_ERROR, INTERRUPTED, TERMINATED = 70, 130, 143


class _ReaderGone(Exception):
    """Whoever read our output has gone, as ``head`` does. click would make exit code 1 of the ``OSError``."""


@contextlib.contextmanager
def _telling_a_reader_gone() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _ReaderGone from None


class LazyGroup(click.Group):
    """A group that imports a command only when it is asked for."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse; ``--help`` prints here."""
        with _telling_a_reader_gone():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _telling_a_reader_gone():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order people meet them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"surgery.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which ones are near."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0].replace("_", "-"), COMMANDS, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        name, *rest = args or [""]
        if name in TAKE_RECIPES and any(word.endswith(RECIPES) for word in rest if not word.startswith("-")):
            return name, importlib.import_module(f"surgery.cli.{name}_recipe").command, rest
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="surgery")
def surgery() -> None:
    """Operate directly on model checkpoints.

    Diff fine-tuned against base checkpoints, extract LoRA adapters, merge and unmerge them: on files of any size, with
    bounded memory, on any architecture.

    \b
      surgery diff base ft                      what changed, and how to ship it
      surgery extract-lora base ft --rank 8     a LoRA adapter that PEFT loads
      surgery merge base ft-lora-r8 -o merged   the adapter in the weights
      surgery unmerge merged ft-lora-r8 -o base2

    A checkpoint is a folder, a .safetensors, .bin or .pt file, or hf://org/name@revision on the Hub. Results go to stdout,
    talk to stderr.

    Exit codes: 0 done, 1 differs (diff --exit-code), 2 usage, 3 malformed file, 4 inputs that do not belong together,
    5 unsafe file, 6 NaN, Inf or overflow, 7 output, 8 reading or writing failed, 9 the Hub refused or did not answer,
    10 verification failed, 70 a bug, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    # Importing torch makes half a million objects that stay: looking them through for cycles again and again, as
    # collections of 700 would, is a tenth of that time.
    gc.set_threshold(100_000, 50, 50)
    signal.signal(signal.SIGTERM, _terminate)
    _interrupts.clear()
    _give_up_waiting(now=False)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has us ignore it
        signal.signal(signal.SIGINT, _interrupt)
    try:
        code = surgery.main(list(arguments), prog_name="surgery", standalone_mode=False)
        sys.stdout.flush()
    except (_ReaderGone, BrokenPipeError):
        # Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the one place where every error ends
        if debug and not isinstance(error, click.exceptions.Exit):
            traceback.print_exc()
        code = _report(error)
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException) -> int:
    """Print one line about an error and return its exit code."""
    if _interrupts and not isinstance(error, SurgeryError | KeyboardInterrupt | click.Abort):
        error = KeyboardInterrupt()  # a library that was being imported made another error of it
    if isinstance(error, SurgeryError):
        return _say(str(error), error.exit_code)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "surgery"
        message = error.format_message().rstrip(".").replace("\n", " ")
        return _say(f"{printable(message)} (see {command} --help)", 2)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        interrupt = error.__cause__ if isinstance(error, click.Abort) else error
        told = getattr(interrupt, "__notes__", None) or ["nothing was published; the same command starts again"]
        return _say(f"interrupted: {told[0]}", INTERRUPTED)
    if isinstance(error, MemoryError):
        return _say("the system has no more memory; try fewer --jobs", 8)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror or error}", 8)
    kind = type(error).__name__
    return _say(
        f"internal error: {kind}: {error}; this is a bug: please report it with what --debug prints", INTERNAL_ERROR
    )


def _say(line: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        click.echo(f"surgery: error: {printable(line)}", err=True)
    return code


_interrupts: list[int] = []
"""The interrupts that this run has had."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupts.append(number)
    _give_up_waiting(now=True)
    signal.default_int_handler(number, frame)


def _give_up_waiting(*, now: bool) -> None:
    """Tell threads that wait for the Hub, if there can be any: without the Hub its room is never imported."""
    room = sys.modules.get("surgery.sources.remote")
    if room is not None:
        room.give_up(now=now)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    _give_up_waiting(now=True)
    sys.exit(TERMINATED)  # unwinds, so that the staging folder is cleared away
