"""The table of PEFT methods: one row each, with its parameters, its cost and its source."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from surgery.errors import UsageError
from surgery.methods import bitfit, bottleneck, head, ia3, ln_tuning, lora, prelayer, prompts, top_blocks
from surgery.methods.addition import Addition
from surgery.methods.model import Model

Planner = Callable[[Model, Sequence[str], Mapping[str, Any]], Addition]
Kind = Literal["whole", "number", "flag", "wholes", "word", "text"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A setting of a method."""

    name: str
    kind: Kind
    default: Any
    meaning: str

    def parse(self, text: Any) -> Any:
        """Read a value as the command line gives it; values of the right type pass.

        Raises:
            UsageError: it does not read as one.

        >>> Parameter("tokens", "wholes", None, "").parse("3,5")
        (3, 5)
        """
        if text is None:
            return self.default
        try:
            return _READERS[self.kind](text)
        except (ValueError, TypeError, KeyError):
            raise UsageError(f"{self.name} takes {_WANTED[self.kind]}, not {text!r}") from None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(value)
    return int(value)


def _wholes(value: Any) -> tuple[int, ...]:
    items = value.split(",") if isinstance(value, str) else value
    return tuple(map(_whole, items))


def _number(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(value)
    return number


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value or "/" in value:
        raise ValueError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(value)
    return value


_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_READERS: dict[Kind, Callable[[Any], Any]] = {
    "whole": _whole, "number": _number, "flag": lambda value: _FLAGS[str(value).lower()], "wholes": _wholes,
    "word": _word, "text": _text,
}  # fmt: skip
_WANTED: dict[Kind, str] = {
    "whole": "a whole number", "number": "a positive number", "flag": "true or false",
    "wholes": "whole numbers with commas between", "word": "a name", "text": "words",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table."""

    name: str
    title: str
    plan: Planner
    formula: str
    """Of the number of parameters."""
    mergeable: bool
    cost: str
    """What it costs when the model is used."""
    citation: str
    parameters: tuple[Parameter, ...] = ()

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in defaults, and check what is given.

        Raises:
            UsageError: an unknown parameter, or a value of the wrong kind.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                raise UsageError(
                    f"{self.name} has no parameter {name!r}",
                    mend=f"it has {', '.join(known)}" if known else "it has none",
                )
        return {name: parameter.parse(given.get(name)) for name, parameter in known.items()}


_PROMPT = (
    Parameter("length", "whole", 20, "virtual tokens"),
    Parameter("task", "word", None, "PEFT's task_type; told by config.json by default"),
    Parameter("labels", "whole", None, "classes of a new classification head beside it"),
    Parameter("head", "word", "classifier", "the new head's module: classifier, or score, which has no bias"),
)
_BOTTLENECK = (
    Parameter("size", "whole", 64, "width of the bottleneck"),
    Parameter("leave_out", "wholes", None, "blocks without one, counted from 0 (AdapterDrop)"),
    Parameter("name", "word", "adapter", "the adapter's name in its keys"),
)

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            "lora", "low-rank ΔW = s·BA beside chosen weights", lora.plan, "Σ r(in + out)", True, "none once merged",
            "Hu et al. 2021, arXiv:2106.09685",
            (
                Parameter("r", "whole", 8, "rank"),
                Parameter("alpha", "number", None, "s = alpha/r; alpha is r by default"),
                Parameter("rslora", "flag", False, "s = alpha/√r"),
                Parameter("dora", "flag", False, "a trained magnitude an output"),
            ),
        ),
        Method(
            "ia3", "scales of keys, values and feed-forward inputs", ia3.plan, "Σ outputs of k, v + inputs of down", True,
            "none once merged", "Liu et al. 2022, arXiv:2205.05638",
        ),
        Method(
            "bitfit", "the biases", bitfit.plan, "all biases", True, "none", "Ben Zaken et al. 2021, arXiv:2106.10199",
            (
                Parameter("norms", "flag", False, "the norms' scales too, as the published count has it"),
                Parameter("create", "flag", False, "add zero biases where there are none"),
            ),
        ),
        Method(
            "ln-tuning", "the norms' scales and biases", ln_tuning.plan, "all norms", True, "none",
            "Zhao et al. 2023, arXiv:2312.11420",
        ),
        Method(
            "prompt-tuning", "virtual tokens before the input", prompts.prompt_tuning, "length·d", False,
            "length more tokens", "Lester et al. 2021, arXiv:2104.08691",
            (
                *_PROMPT,
                Parameter("tokens", "wholes", None, "start from these tokens' embeddings"),
                Parameter("text", "text", None, "start from the embeddings of its tokens, as tokenizer.json has them"),
            ),
        ),
        Method(
            "p-tuning", "virtual tokens made by an MLP", prompts.p_tuning, "length·d", False, "length more tokens",
            "Liu et al. 2021, arXiv:2103.10385",
            (*_PROMPT, Parameter("hidden", "whole", None, "width of the MLP while training; d by default")),
        ),
        Method(
            "prefix-tuning", "keys and values before every layer's own", prompts.prefix_tuning, "2·length·layers·d_kv",
            False, "length more keys", "Li and Liang 2021, arXiv:2101.00190",
            (*_PROMPT, Parameter("std", "number", 0.02, "standard deviation at the start")),
        ),
        Method(
            "houlsby", "bottlenecks after attention and feed-forward", bottleneck.houlsby, "2L(2dr + r + d)", False,
            "two small layers a block, twice", "Houlsby et al. 2019, arXiv:1902.00751", _BOTTLENECK,
        ),
        Method(
            "pfeiffer", "bottlenecks after feed-forward", bottleneck.pfeiffer, "L(2dr + r + d)", False,
            "two small layers a block", "Pfeiffer et al. 2020, arXiv:2005.00247", _BOTTLENECK,
        ),
        Method(
            "parallel", "bottlenecks beside feed-forward", bottleneck.parallel, "L(2dr + r + d)", False,
            "two small layers a block", "He et al. 2021, arXiv:2110.04366", _BOTTLENECK,
        ),
        Method(
            "lin", "bottlenecks with a LayerNorm after feed-forward", bottleneck.lin, "L(2dr + r + d) + 2Ld", False,
            "a norm and two small layers a block", "Lin et al. 2020, arXiv:2004.03829", _BOTTLENECK,
        ),
        Method(
            "prelayer", "activations of special tokens after every block", prelayer.plan, "L·d·(prefix + infix)", False,
            "prefix + infix more tokens", "Hu et al. 2021, arXiv:2106.09685",
            (Parameter("prefix", "whole", 14, "tokens before the prompt"),
             Parameter("infix", "whole", 0, "tokens after the prompt")),
        ),
        Method(
            "ft-topk", "the last k blocks in full", top_blocks.plan, "the blocks' own", True, "none",
            "Hu et al. 2021, arXiv:2106.09685", (Parameter("k", "whole", 2, "blocks"),),
        ),
        Method(
            "head", "a classification head", head.plan, "labels(d + 1)", False, "one small layer",
            "Devlin et al. 2018, arXiv:1810.04805",
            (Parameter("labels", "whole", 2, "classes"), Parameter("name", "word", "classifier", "its module")),
        ),
    )
}  # fmt: skip
"""Every method, by name, in the order that tables show."""


def find(name: str) -> Method:
    """Find a method by name.

    Raises:
        UsageError: there is none; near ones are named.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(METHODS)}"
    raise UsageError(f"no method {name!r}", mend=hint)
