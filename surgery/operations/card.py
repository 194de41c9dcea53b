"""What a model card says about an output: metadata for the Hub, what was done, from what, how well, how to load it.

Everything comes from the output's own record (``surgery.json``) and configuration. Names of people's folders are given as
their last part alone, and only ids of the Hub become ``base_model``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.formats.model_card import ModelCard
from surgery.operations.extraction_report import ExtractionReport, bound, left_out_line
from surgery.report import Table, percent

PROJECT = "[surgery](https://pypi.org/project/checkpoint-surgery/)"
_ID = re.compile(r"(?:hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Subject:
    """The output that a card is about.

    Args:
        kind: ``adapter``, ``model`` or ``delta``.
        record: its provenance record.
        config: its ``adapter_config.json`` or ``config.json``.
        base_ids: Hub ids of what it was made from, where the record's names are not.
        repo: the repository that it goes to; ``None`` for a folder on disk.
        file: a delta's file name.
        licence: as the Hub spells it.
    """

    kind: str
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    base_ids: tuple[str, ...] = ()
    repo: str | None = None
    file: str = ""
    licence: str | None = None

    @property
    def operation(self) -> str:
        """The verb that made it."""
        return str(self.record.get("operation", ""))

    @property
    def inputs(self) -> list[Mapping[str, Any]]:
        """What it was made from, as recorded."""
        return [item for item in self.record.get("inputs", ()) if isinstance(item, Mapping)]

    @property
    def bases(self) -> tuple[str, ...]:
        """Hub ids of its bases: those given, else those recorded."""
        if self.base_ids:
            return self.base_ids
        wanted = ("base",) if self.kind in ("adapter", "delta") else ("base", "model")
        names = [str(item.get("name")) for item in self.inputs if item.get("role") in wanted]
        if self.kind == "adapter":
            names.insert(0, str(self.config.get("base_model_name_or_path")))
        found = [name for name in map(hub_id, names) if name]
        return tuple(dict.fromkeys(found[:1] if self.kind == "adapter" else found))


def hub_id(name: str) -> str | None:
    """Return the repository that a recorded name stands for; ``None`` where it is a folder's.

    >>> hub_id("hf://org/name@main"), hub_id("org/name"), hub_id("name"), hub_id("/home/me/name")
    ('org/name', 'org/name', None, None)
    """
    found = _ID.fullmatch(name)
    return found[1] if found else None


def model_card(subject: Subject) -> ModelCard:
    """Compose the card of an output."""
    write = {"adapter": _adapter, "delta": _delta, "model": _model}[subject.kind]
    return ModelCard(_metadata(subject), write(subject))


def _metadata(subject: Subject) -> dict[str, Any]:
    bases = list(subject.bases)
    low_rank = subject.config.get("peft_type") == "LORA"
    peft_made = "peft_type" in subject.config
    relation, library, tags = {
        "adapter": ("adapter", "peft" if peft_made else "adapter-transformers", ["lora"] if low_rank else []),
        "delta": ("finetune", None, ["delta"]),
        "model": (
            "merge" if _merges_models(subject) else "finetune",
            "transformers" if "architectures" in subject.config else None,
            ["merge"] if _merges_models(subject) else [],
        ),
    }[subject.kind]
    if subject.kind == "adapter":
        tags += [*(["peft"] if peft_made else []), *(f"base_model:adapter:{base}" for base in bases)]
    return {
        "license": subject.licence,
        "library_name": library,
        "base_model": bases[0] if len(bases) == 1 else bases or None,
        "base_model_relation": relation if bases else None,
        "pipeline_tag": _pipeline(subject.config),
        "tags": [*tags, "surgery"],
    }


def _merges_models(subject: Subject) -> bool:
    return subject.operation == "merge" and "algorithm" in subject.record.get("parameters", {})


def _pipeline(config: Mapping[str, Any]) -> str | None:
    causal = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())
    return "text-generation" if causal or config.get("task_type") == "CAUSAL_LM" else None


def _adapter(subject: Subject) -> str:
    names = {str(item.get("role")): _shown(item) for item in subject.inputs}
    base = (subject.bases or (names.get("base", "its base"),))[0]
    document = subject.record.get("report")
    if subject.operation != "extract-lora" or not isinstance(document, Mapping):
        parts = [
            f"# {_title(subject, 'An adapter')} of {base}",
            _how(subject),
            _sources(subject),
            _load_adapter(subject, base),
        ]
        return "\n\n".join(part for part in parts if part)
    report = ExtractionReport.from_document(document)
    kept, following = report.kept_by_lora
    more = "" if percent(following) == percent(kept) else f"; twice the rank would keep {percent(following)} or more"
    proof = (
        f"Each error is\nwithin {bound(report.excess)} of the best possible at its rank. "
        "Errors are of the values as stored, read back from the file."
    )
    parts = [
        f"# {_title(subject, names.get('fine-tune', 'A fine-tune'))} as a LoRA adapter of {base}",
        _how(subject, f" from the fine-tune `{names.get('fine-tune')}`"),
        report.table().markdown(),
        f"The factored weights keep {percent(kept)} of their ‖Δ‖²{more}. {proof}",
        left_out_line(report),
        _sources(subject),
        _load_adapter(subject, base),
    ]
    return "\n\n".join(part for part in parts if part)


def _model(subject: Subject) -> str:
    verbs = {"merge": "Merged", "unmerge": "Unmerged", "convert": "Converted"}
    parts = [
        f"# {_title(subject, 'A model')}",
        _how(subject, verb=verbs.get(subject.operation, "Made")),
        _sources(subject),
        _load_model(subject),
    ]
    return "\n\n".join(part for part in parts if part)


def _delta(subject: Subject) -> str:
    names = {str(item.get("role")): _shown(item) for item in subject.inputs}
    base = (subject.bases or (names.get("base", "BASE"),))[0]
    ref = f"hf://{base}" if subject.bases else base
    where = f"hf://{subject.repo}" if subject.repo else subject.file
    parts = [
        f"# {names.get('fine-tune', 'A fine-tune')} as an exact delta of {base}",
        f"Made with {PROJECT}. Together with its base it gives the fine-tune back, bit for bit:",
        f"```sh\nsurgery merge {ref} {where} -o fine-tune\n```",
        _sources(subject),
    ]
    return "\n\n".join(part for part in parts if part)


def _title(subject: Subject, otherwise: str) -> str:
    return subject.repo.rpartition("/")[2] if subject.repo else otherwise


def _how(subject: Subject, from_what: str = "", verb: str | None = None) -> str:
    verb = verb or {"extract-lora": "Extracted"}.get(subject.operation, "Made")
    recipe = subject.record.get("parameters", {}).get("recipe")
    lines = [f"{verb} with {PROJECT}{from_what}:"]
    command = command_of(subject.record)
    if isinstance(recipe, str):
        return "\n".join([*lines, "", "```yaml", recipe.strip(), "```"])
    return "\n".join([*lines, "", "```sh", command, "```"]) if command else lines[0].rstrip(":") + "."


def command_of(record: Mapping[str, Any]) -> str:
    """Write the command that made an output, from its record; empty where the record does not say enough.

    >>> command_of({"operation": "merge", "parameters": {"coeff": [0.5]},
    ...     "inputs": [{"role": "base", "name": "base"}, {"role": "adapter", "name": "style"}]})
    'surgery merge base style --coeff 0.5'
    """
    given = record.get("parameters")
    operation = record.get("operation")
    inputs = [str(_reference(item)) for item in record.get("inputs", ()) if isinstance(item, Mapping)]
    if not isinstance(given, Mapping) or not inputs:
        return ""
    options: list[str] = []
    if operation == "extract-lora":
        report = record.get("report")
        options = ExtractionReport.from_document(report).option.split() if isinstance(report, Mapping) else []
        options += ["--for", str(given["for"])] if given.get("for", "peft") != "peft" else []
    elif operation == "merge":
        options = _merge_options(given)
    elif operation != "extract-delta":
        return ""
    return shlex.join(["surgery", str(operation), *inputs, *options])


def _merge_options(given: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    if "algorithm" in given:
        words += ["--algorithm", str(given["algorithm"])]
    coefficients = given.get("coeff")
    if isinstance(coefficients, Sequence) and not isinstance(coefficients, str):
        if any(value != 1 for value in coefficients):
            words += [word for value in coefficients for word in ("--coeff", f"{value:g}")]
    elif isinstance(coefficients, int | float):
        words += ["--coeff", f"{coefficients:g}"]
    known = ("algorithm", "coeff", "compat", "seed", "recipe", "dtype")
    for name, value in given.items():
        if name not in known and value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += ["-p", f"{name}={text}"]
    if given.get("dtype"):
        words += ["--dtype", str(given["dtype"])]
    if given.get("seed"):
        words += ["--seed", str(given["seed"])]
    if given.get("compat", "paper") != "paper":
        words += ["--compat", str(given["compat"])]
    return words


def _sources(subject: Subject) -> str:
    rows = tuple(
        (
            str(item.get("role", "")), f"`{_shown(item)}`", str(item.get("revision") or ""),
            str(item.get("fingerprint") or ""),
        )
        for item in subject.inputs
    )  # fmt: skip
    return Table("", ("input", "name", "revision", "fingerprint"), rows).markdown() if rows else ""


def _shown(item: Mapping[str, Any]) -> str:
    name = str(item.get("name", ""))
    return hub_id(name) or name.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _reference(item: Mapping[str, Any]) -> str:
    name, revision = _shown(item), item.get("revision")
    if "/" not in name:
        return name
    return f"hf://{name}@{revision}" if revision else f"hf://{name}"


def _load_adapter(subject: Subject, base: str) -> str:
    if "peft_type" not in subject.config:
        return ""
    model = "AutoModelForCausalLM" if subject.config.get("task_type") == "CAUSAL_LM" else "AutoModel"
    where = subject.repo or "path/to/this/folder"
    return (
        "```python\nfrom peft import PeftModel\n"
        f"from transformers import {model}\n\n"
        f'model = {model}.from_pretrained("{base if "/" in base else "path/to/" + base}")\n'
        f'model = PeftModel.from_pretrained(model, "{where}")\n```'
    )


def _load_model(subject: Subject) -> str:
    if "architectures" not in subject.config:
        return ""
    model = "AutoModelForCausalLM" if _pipeline(subject.config) else "AutoModel"
    where = subject.repo or "path/to/this/folder"
    return f'```python\nfrom transformers import {model}\n\nmodel = {model}.from_pretrained("{where}")\n```'
