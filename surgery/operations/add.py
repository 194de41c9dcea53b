"""``add``: give a model the new parameters of a PEFT method, chosen by name patterns, without a model class."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery import execute, provenance
from surgery.checkpoint import Checkpoint, Source, default_jobs, open_checkpoint, refuse_quantised
from surgery.errors import SurgeryError, UnsupportedError, UsageError
from surgery.formats import peft
from surgery.methods.addition import Addition
from surgery.methods.model import Model
from surgery.methods.registry import Method, find
from surgery.methods.starts import Initial
from surgery.operations.convert import convert
from surgery.operations.remove import remove
from surgery.plan import NO_LIMIT
from surgery.report import Table
from surgery.roles import numberless
from surgery.sources import module_names, tokens
from surgery.tensor import LazyTensor, TensorSpec, human_bytes, human_count
from surgery.writer import Publication

if TYPE_CHECKING:
    import torch

TRAINABLE = "trainable.json"
"""The list of names that train, beside plain tensors or alone."""
_STEMS = {"peft": peft.STEM, "adapterhub": "adapter", "tensors": "added"}


class Added:
    """The parameters of one method for one model, drawn when they are looked at or saved.

    Args:
        method: the row of the table.
        addition: its plan.
        base: the model.
        settings: the method's, all of them.
        dtype: of the new tensors.
        seed: of the draws, each of which depends on it and the tensor's name alone.
        base_name: what the file calls the base.
    """

    def __init__(
        self,
        method: Method,
        addition: Addition,
        base: Checkpoint,
        *,
        settings: Mapping[str, Any],
        dtype: str = "F32",
        seed: int = 0,
        base_name: str | None = None,
    ) -> None:
        self.method = method
        self.addition = addition
        self.base = base
        self.tensors: dict[str, LazyTensor] = {
            one.key: Initial(TensorSpec(one.key, dtype, one.shape), one.start, base.tensors, seed)
            for one in addition.tensors
        }
        self.document = dict(addition.config)
        if addition.file == "peft":
            self.document["base_model_name_or_path"] = base_name
        elif addition.file == "adapterhub":
            self.document["model_name"] = base_name
        self._said = {"method": method.name, **settings, "dtype": dtype, "seed": seed}

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names that train: keys of the new tensors, and parameters of the base."""
        return self.addition.trainable

    @property
    def parameters(self) -> int:
        """Elements that train, without the task's head, which PEFT trains beside any method."""
        return self.addition.parameters

    @property
    def chosen(self) -> tuple[str, ...]:
        """The tensors of the base that the method was applied to."""
        return self.addition.chosen

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know."""
        return self.addition.notes

    @property
    def nbytes(self) -> int:
        """Bytes of the new tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def __repr__(self) -> str:
        """Name it and say how large it is."""
        size = f"{human_count(self.parameters)} parameters, {len(self.tensors)} tensors, {human_bytes(self.nbytes)}"
        return f"<Added {self.method.name}: {size}>"

    def __getitem__(self, key: str) -> torch.Tensor:
        """Draw one tensor."""
        from surgery import numerics

        return numerics.load(self.tensors[key])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Draw all tensors, by the key that the file has."""
        return {key: self[key] for key in self.tensors}

    def merge(self) -> Checkpoint:
        """Merge the method into the model, as :func:`surgery.merge` does with a trained one.

        Raises:
            UnsupportedError: the method is none that merges, or has no PEFT file.
        """
        if self.addition.file != "peft" or not self.method.mergeable:
            raise UnsupportedError(f"{self.method.name} cannot be merged")
        from surgery.adapter import Adapter
        from surgery.operations.merge import merge

        merged = merge(self.base, Adapter(self.tensors, self.document, label=self.method.name))
        assert isinstance(merged, Checkpoint)
        return merged

    def remove(self, source: Source) -> Checkpoint:
        """Take the method's parameters out of a state dict that has them inside, trained or not, and leave the base.

        Plain tensors are told by their names, all others as :func:`surgery.remove` tells them.

        Args:
            source: a folder, a file, or a state dict.

        Raises:
            UnsupportedError: the method trains the base's own parameters, which are in the base alone as they were.
            MismatchError: its tensors are not in there.
        """
        if self.addition.existing or (self.method.name == "bitfit" and self.addition.file == "peft"):
            raise UnsupportedError(
                f"{self.method.name} trains the base's own parameters: they are not in the file as they were",
                mend="the base has them",
            )
        if self.addition.file != "tensors":
            return remove(source)
        return convert(source, drop=[f"re:{re.escape(key)}" for key in self.tensors])

    def save(
        self, out: str | os.PathLike[str], *, overwrite: bool = False, progress: execute.Progress | None = None
    ) -> dict[str, Any]:
        """Write the folder that PEFT or AdapterHub loads, plain tensors, or the list of names.

        Args:
            out: a folder.
            overwrite: replace one that is there.
            progress: somebody who watches.

        Returns:
            The record.

        Raises:
            UsageError: ``out`` is one file.
            OutputError: it exists.
        """
        if os.fspath(out).endswith(".safetensors"):
            raise UsageError("what a method adds is a folder: its settings stand in a file of their own", file=out)
        files = {peft.CONFIG: peft.encode_config(self.document)} if self.document else {}
        if self.addition.file in ("tensors", "names"):
            files[TRAINABLE] = (json.dumps(list(self.trainable), indent=1) + "\n").encode()
        if not self.tensors:
            return self._save_names(out, files, overwrite=overwrite)
        return execute.publish(
            self.tensors, out, record=self._record, stem=_STEMS[self.addition.file], max_shard_size=NO_LIMIT,
            workers=default_jobs(), overwrite=overwrite, sources=self.base.stored, files=files, progress=progress,
        )  # fmt: skip

    def _save_names(
        self, out: str | os.PathLike[str], files: Mapping[str, bytes], *, overwrite: bool
    ) -> dict[str, Any]:
        record = self._record({})
        inputs = [stored.path for stored in self.base.stored]
        with Publication(out, overwrite=overwrite, inputs=inputs) as publication:
            for name, data in files.items():
                publication.write(name, data)
            publication.write(provenance.RECORD, provenance.encode(record))
            publication.commit()
        return record

    def _record(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        return provenance.record(
            "add",
            parameters={name: list(value) if isinstance(value, tuple) else value for name, value in self._said.items()},
            inputs=[{"role": "base", "name": self.base.label, **self.base.pinned}],
            tensors=fingerprints,
            trainable_parameters=self.parameters,
            applied_to=list(self.chosen),
        )

    def table(self) -> Table:
        """Show which tensors were chosen, one line for all blocks that have one alike."""
        groups: dict[tuple[str, str], int] = {}
        for name in self.chosen:
            shape = "×".join(map(str, self.base.tensors[name].spec.shape))
            key = (numberless(name), shape)
            groups[key] = groups.get(key, 0) + 1
        rows = tuple((name, str(count), shape) for (name, shape), count in groups.items())
        return Table(f"{self.method.name}: chosen", ("name", "tensors", "shape"), rows)

    def document_of(self) -> dict[str, Any]:
        """Return what was added, for ``--json``."""
        return {
            "schema": "surgery.add/1", "method": self.method.name, "parameters": self.parameters, "bytes": self.nbytes,
            "file": self.addition.file, "chosen": list(self.chosen), "trainable": list(self.trainable),
            "unchanged_at_start": self.addition.unchanged, "notes": list(self.notes),
            "tensors": {key: list(tensor.spec.shape) for key, tensor in self.tensors.items()},
        }  # fmt: skip


def add(
    source: Source,
    method: str,
    *,
    target: Sequence[str] | str = (),
    dtype: str = "F32",
    seed: int = 0,
    base_name: str | None = None,
    names_in_memory: bool = False,
    **settings: Any,
) -> Added:
    """Plan the parameters that a PEFT method adds to a model; nothing is drawn before it is looked at or saved.

    Args:
        source: the model: a folder, a file, or a state dict.
        method: a row of ``surgery methods``: ``lora``, ``bitfit``, ``prompt-tuning`` …
        target: patterns that choose tensors, roles among them (``role:q``, or ``q`` where no module is called so); the
            method's own choice by default.
        dtype: of the new tensors: F32, BF16 or F16.
        seed: every draw depends on it and the tensor's name alone.
        base_name: the base's name or path for the file.
        names_in_memory: name modules as transformers calls them once loaded, where that differs from the names on disk.
        settings: the method's own: ``r=8``.

    Raises:
        UsageError: an unknown method or setting.
        MismatchError: a pattern that matches nothing, a rank that does not fit, a method that does not.

    >>> import torch
    >>> model = {f"h.0.{name}.weight": torch.ones(8, 8) for name in ("q_proj", "k_proj", "v_proj")}
    >>> added = add(model, "lora", target=("q", "v"), r=2)
    >>> added.parameters, added.chosen
    (64, ('h.0.q_proj.weight', 'h.0.v_proj.weight'))
    """
    if dtype not in ("F32", "BF16", "F16"):
        raise UsageError(f"--dtype can be F32, BF16 or F16, not {dtype!r}")
    row = find(method)
    resolved = row.settings(settings)
    base = open_checkpoint(source)
    if resolved.get("text"):
        if resolved["tokens"]:
            raise UsageError("text and tokens both say how the prompt starts", mend="drop one")
        resolved["tokens"] = tokens.of_text(resolved["text"], base.side_files.get(tokens.FILE), base.label)
    patterns = (target,) if isinstance(target, str) else tuple(target)
    try:
        addition = row.plan(model_of(base, names_in_memory=names_in_memory), patterns, resolved)
        refuse_quantised(base, addition.chosen)
    except SurgeryError as error:
        raise error.at(file=base.label) from None
    return Added(row, addition, base, settings=resolved, dtype=dtype, seed=seed, base_name=base_name)


def model_of(base: Checkpoint, *, names_in_memory: bool = False) -> Model:
    """Say what methods may know of a checkpoint."""
    names = module_names.module_names(base.config or {}, base.tensors) if names_in_memory else None
    return Model(base.specs, base.config or {}, names)
