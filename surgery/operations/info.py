"""``info``: what a checkpoint holds, from headers and configuration alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint, Source, open_checkpoint
from surgery.exact import Delta, is_delta, open_delta
from surgery.operations.delta_report import DeltaInfo, describe
from surgery.report import Table, join_shown
from surgery.roles import layer_of, numberless, role_of
from surgery.tensor import TensorSpec, human_bytes, human_count

_CONFIG_FACTS = (
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_experts", "num_local_experts", "vocab_size", "max_position_embeddings",
    "tie_word_embeddings", "torch_dtype", "dtype", "quantization_config",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Info:
    """Facts about a checkpoint."""

    label: str
    specs: tuple[TensorSpec, ...]
    files: Mapping[str, int]
    """Weight file → number of tensors in it."""
    config: Mapping[str, Any] | None
    notes: Sequence[str]
    blocks: frozenset[str] = frozenset()
    """The paths of the numbered blocks."""

    def __repr__(self) -> str:
        """Name it and say how large it is: the tensors may be thousands."""
        size = f"{len(self.specs)} tensors, {human_count(self.parameters)} parameters, {human_bytes(self.nbytes)}"
        return f"<Info {self.label!r}: {size}>"

    @property
    def rows(self) -> tuple[TensorSpec, ...]:
        """Every tensor's spec, in the order of the files."""
        return self.specs

    @property
    def parameters(self) -> int:
        """Floating-point elements."""
        return sum(count * one.numel for one, count in _alike(self.specs) if one.dtype.startswith(("F", "BF")))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(count * one.nbytes for one, count in _alike(self.specs))

    def by_role(self) -> Table:
        """Count tensors by role."""
        groups: dict[str, list[TensorSpec]] = {}
        for spec in self.specs:
            groups.setdefault(role_of(spec), []).append(spec)
        alike = {role: _alike(specs) for role, specs in groups.items()}
        sizes = {role: sum(count * one.numel for one, count in found) for role, found in alike.items()}
        nbytes = {role: sum(count * one.nbytes for one, count in found) for role, found in alike.items()}
        rows = tuple(
            (role, str(len(groups[role])), human_count(sizes[role]), human_bytes(nbytes[role]), _shapes(groups[role]))
            for role in sorted(groups, key=lambda role: -sizes[role])
        )
        return Table("Tensors by kind", ("kind", "tensors", "elements", "bytes", "shapes"), rows)

    def by_layout(self) -> Table:
        """Show what each tensor is taken for, one line for all blocks that have it alike."""
        groups: dict[tuple[str, str, str], int] = {}
        for spec in self.specs:
            key = (numberless(spec.name), role_of(spec), "×".join(map(str, spec.shape)) or "scalar")
            groups[key] = groups.get(key, 0) + 1
        rows = tuple((name, role, str(count), shape) for (name, role, shape), count in groups.items())
        return Table("Roles", ("name", "role", "tensors", "shape"), rows)

    def unknown(self) -> list[str]:
        """Say which tensors no rule knows: patterns must name those."""
        names = [spec.name for spec in self.specs if role_of(spec) == "other"]
        if not names:
            return []
        shown = join_shown(list(dict.fromkeys(map(numberless, names))))
        return [f"no rule knows what {len(names)} tensors are ({shown}): choose them by a pattern, not by role:"]

    def all_tensors(self) -> Table:
        """List every tensor."""
        rows = tuple(
            (s.name, role_of(s), s.dtype, "×".join(map(str, s.shape)) or "scalar", human_bytes(s.nbytes))
            for s in self.specs
        )
        return Table("All tensors", ("name", "kind", "dtype", "shape", "bytes"), rows)

    def facts(self) -> list[tuple[str, str]]:
        """List what people ask first."""
        dtypes = Counter(spec.dtype for spec in self.specs)
        parameters = self.parameters
        found = [
            ("tensors", f"{len(self.specs):,} in {len(self.files) or 1} file{'s' if len(self.files) > 1 else ''}"),
            ("parameters", f"{human_count(parameters)} ({parameters:,})"),
            ("bytes", f"{human_bytes(self.nbytes)}"),
            ("dtypes", ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(dtypes.items()))),
            ("blocks", str(len(self.blocks))),
        ]
        for key in _CONFIG_FACTS:
            if self.config and self.config.get(key) is not None:
                value = self.config[key]
                found.append((key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
        return found

    def document(self, *, tensors: bool = False) -> dict[str, Any]:
        """Return the facts for ``--json``."""
        return {
            "schema": "surgery.info/1",
            "checkpoint": self.label,
            "tensors": len(self.specs),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "files": dict(self.files),
            "config": {key: self.config[key] for key in _CONFIG_FACTS if self.config and key in self.config},
            "notes": list(self.notes),
            **({"list": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "bytes": s.nbytes, "kind": role_of(s)}
                         for s in self.specs]} if tensors else {}),
        }  # fmt: skip

    def _repr_html_(self) -> str:
        facts = Table(self.label, ("fact", "value"), tuple(self.facts()))
        return facts.html() + self.by_role().html()


def _shapes(specs: Sequence[TensorSpec]) -> str:
    shapes = ["×".join(map(str, shape)) or "scalar" for shape in dict.fromkeys(spec.shape for spec in specs)]
    return ", ".join(shapes[:3]) + (" …" if len(shapes) > 3 else "")


def info(source: Source | Delta) -> Info | DeltaInfo:
    """Describe a checkpoint from its headers and configuration, or an exact delta from its manifest; no tensor is read.

    Args:
        source: a folder, a file, or a state dict.

    >>> import numpy
    >>> info({"q_proj.weight": numpy.zeros((4, 4), "float32")}).parameters
    16
    """
    if is_delta(source):
        return describe(open_delta(source))
    assert not isinstance(source, Delta)  # all of them went the other way
    checkpoint = open_checkpoint(source)
    files: dict[str, int] = {}
    for shard in checkpoint.shards.values():
        files[shard] = files.get(shard, 0) + 1
    specs = tuple(checkpoint.specs.values())
    blocks = frozenset(filter(None, (layer_of(spec.name) for spec in specs)))
    notes = [*checkpoint.notes, *_observations(checkpoint, blocks)]
    return Info(checkpoint.label, specs, files, checkpoint.config, notes, blocks)


def overview(found: Sequence[tuple[str, Info | DeltaInfo]]) -> Table:
    """List many, a line each: what it is, and its bytes; of exact deltas the base, the task, and the kinds of coding."""
    rows = []
    for path, each in found:
        if isinstance(each, Info):
            what, cost = "checkpoint", ""
        else:
            kinds = Counter(row.how for row in each.rows)
            held = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
            both = " (and back)" if each.reversible else ""
            what, cost = f"{each.base} → {each.task}{both}: {held}", f"{each.bits:.3f}"
        rows.append((path, what, human_count(each.parameters), human_bytes(each.nbytes), cost))
    return Table("What there is", ("path", "what", "elements", "bytes", "bits/weight"), tuple(rows))


def _alike(specs: Iterable[TensorSpec]) -> list[tuple[TensorSpec, int]]:
    """Count tensors of one dtype and shape: models have many tensors of few kinds, and sizes are computed once a kind."""
    counts = Counter((spec.dtype, spec.shape) for spec in specs)
    return [(TensorSpec("", dtype, shape), count) for (dtype, shape), count in counts.items()]


def _observations(checkpoint: Checkpoint, blocks: frozenset[str]) -> list[str]:
    """Say what is tied or missing."""
    config, specs = checkpoint.config or {}, checkpoint.specs
    notes = []
    heads = [name for name in specs if name.endswith("lm_head.weight")]
    if config.get("tie_word_embeddings") and not heads:
        notes.append("the output head is tied to the input embedding, which is stored once")
    if config.get("tie_word_embeddings") and heads:
        notes.append(f"{heads[0]} is stored although the configuration ties it to the input embedding")
    stems: dict[str, set[int]] = {}
    for block in blocks:
        stem, _, number = block.rpartition(".")
        if len(number) < 10:
            stems.setdefault(stem, set()).add(int(number))
    for stem, numbers in sorted(stems.items()):
        missing = max(numbers) + 1 - len(numbers)
        if missing and len(numbers) > 1:
            first = next(number for number in itertools.count() if number not in numbers)
            notes.append(f"{stem} lacks {missing:,} blocks, the first of them {first}")
    declared = config.get("num_hidden_layers")
    largest = max((len(numbers) for numbers in stems.values()), default=0)
    if isinstance(declared, int) and largest and largest < declared:
        notes.append(f"config.json declares {declared} layers, the file holds {largest}")
    return notes
