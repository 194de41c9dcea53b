"""``verify --for``: say whether anybody's adapter loads in a server, and if not why, and how to mend it.

Headers and configuration are enough; the rules are in :mod:`surgery.formats.serving`. Here are files and folders.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import Source, open_checkpoint
from surgery.errors import FormatError, MismatchError, SurgeryError, VerificationError
from surgery.formats import peft, serving
from surgery.formats.servers import Problem, Server
from surgery.names import align, module_of
from surgery.report import Table
from surgery.sources import folders, local
from surgery.tensor import TensorSpec


@dataclass(frozen=True)
class Verdict:
    """What one server makes of an adapter."""

    server: Server
    problems: tuple[Problem, ...]

    @property
    def loads(self) -> bool:
        """It loads and does what it says; notes may say on which condition."""
        return all(problem.level == "note" for problem in self.problems)


@dataclass(frozen=True)
class Serving:
    """What servers make of an adapter."""

    label: str
    verdicts: tuple[Verdict, ...]

    @property
    def loads(self) -> bool:
        """It loads in all of them."""
        return all(verdict.loads for verdict in self.verdicts)

    def require(self) -> None:
        """Go on only where it loads in all of them.

        Raises:
            VerificationError: it does not; the worst problem of the first server is named.
        """
        failed = [verdict for verdict in self.verdicts if not verdict.loads]
        if not failed:
            return
        count = sum(problem.level != "note" for verdict in failed for problem in verdict.problems)
        worst = failed[0].problems[0]
        verb = "does not load" if worst.level == "refused" else "loads, and does not do what it says,"
        more = f" ({count} problems in all)" if count > 1 else ""
        raise VerificationError(
            f"{verb} in {failed[0].server.title}: {worst.what}: {worst.why}{more}", file=self.label, mend=worst.mend
        )

    def table(self) -> Table:
        """Show every problem."""
        rows = []
        for verdict in self.verdicts:
            title = f"{verdict.server.title} {verdict.server.version}"
            if not verdict.problems:
                rows.append((title, "loads", "", "", ""))
            for problem in verdict.problems:
                rows.append((title, problem.level, problem.what, problem.why, problem.mend or ""))
                title = ""
        return Table(f"{self.label}, served", ("server", "verdict", "what", "why", "how to mend it"), tuple(rows))

    def document(self) -> dict[str, Any]:
        """Return everything, for ``--json``."""
        return {
            "schema": "surgery.serving/1",
            "adapter": self.label,
            "loads": self.loads,
            "servers": {
                verdict.server.name: {
                    "title": verdict.server.title,
                    "version": verdict.server.version,
                    "loads": verdict.loads,
                    "problems": [asdict(problem) for problem in verdict.problems],
                }
                for verdict in self.verdicts
            },
        }

    def _repr_html_(self) -> str:
        return self.table().html()


def verify_serving(
    path: str | os.PathLike[str],
    servers: Sequence[str],
    *,
    base: Source | None = None,
    max_rank: int | None = None,
) -> Serving:
    """Hold an adapter against what servers load. Headers are read, data is not.

    Args:
        path: an adapter's folder, of any origin, or a file in it.
        servers: names from :data:`surgery.formats.servers.SERVERS`, or ``all``.
        base: its base, to hold names and shapes against.
        max_rank: the ``--max-lora-rank`` that vLLM or SGLang is started with.

    Raises:
        FormatError: a file is missing or malformed.
        UsageError: no server is called so.
    """
    real = local.resolve(path)
    folder = real if folders.is_folder(real) else real.parent
    wanted = list(serving.SERVERS) if "all" in servers else list(dict.fromkeys(servers))
    found = [serving.server_named(name) for name in wanted]
    document = local.read_config(folder, peft.CONFIG)
    if document is None:
        raise FormatError(f"has no {peft.CONFIG}", file=folder, mend="verify --for takes a PEFT adapter's folder")
    stored = local.open_weights(folder, adapter=True)
    specs = {key: tensor.spec for key, tensor in stored.tensors.items()}
    base_specs = None if base is None else _as_the_adapter_spells(open_checkpoint(base).specs, specs)
    stored.close()
    try:
        verdicts = [
            Verdict(
                server,
                (
                    *serving.problems(server.name, document, specs, base_specs=base_specs, max_rank=max_rank),
                    *_files(server, folder),
                ),
            )
            for server in found
        ]
    except SurgeryError as error:
        raise error.at(file=folder / peft.CONFIG) from None
    return Serving(stored.label, tuple(verdicts))


def _files(server: Server, folder: Path) -> Iterable[Problem]:
    """Look for the weights under the names that the server looks for."""
    members = [name for name, is_folder in folders.members(folder) if not is_folder]
    if not any(fnmatch.fnmatchcase(name, pattern) for name in members for pattern in server.files):
        yield Problem("refused", "files", f"{server.title} looks for {' or '.join(server.files)}", "rename the file")
    if server.name == "sglang" and "added_tokens.json" in members:
        yield Problem(
            "note", "added_tokens.json", "SGLang refuses adapters that add tokens to the vocabulary",
            "remove the file if all of them are in the base's vocabulary",
        )  # fmt: skip


def _as_the_adapter_spells(base: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Give the base's tensors the names that the adapter uses for them: a leading ``bert.`` may be on one side only.

    A prefix that the base has already is not put before it again: such an adapter was misnamed.
    """
    named = set()
    for key in specs:
        try:
            part = peft.parse_key(key)
        except SurgeryError:
            continue
        named.add(f"{part.module}.{part.parameter}" if part.kind == "full" else f"{part.module}.weight")
    met = {module_of(name) for name in named} & {module_of(name) for name in base}
    if not named or met:
        return dict(base)
    try:
        spelled = align(sorted(base), sorted(named)).names
    except MismatchError:
        return dict(base)
    ours, theirs = next(((mine, theirs) for mine, theirs in spelled.items() if theirs in base), ("", ""))
    prefix = ours.removesuffix(theirs)
    if theirs and ours.endswith(theirs) and not any(name.startswith(prefix) for name in base):
        return {prefix + name: spec for name, spec in base.items()}
    prefix = theirs.removesuffix(ours)
    if theirs and theirs.endswith(ours):
        return {name.removeprefix(prefix): spec for name, spec in base.items()}
    return dict(base)
