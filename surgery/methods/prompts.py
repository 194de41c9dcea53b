"""Prompt tuning, P-tuning and prefix tuning: virtual tokens before the real ones. PEFT's ``prompt_embeddings``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.errors import MismatchError, UsageError
from surgery.formats import peft
from surgery.methods.addition import Addition, New
from surgery.methods.model import Model
from surgery.methods.starts import ZEROS, Normal, Rows, Start, Uniform

KEY = "prompt_embeddings"
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""PEFT's tasks, each of which puts prompts before the input in a way of its own."""
_PREFIX = "base_model."
"""Of the task's head: PEFT puts no ``model.`` there for prompts."""


def prompt_tuning(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Put ``length`` trained embeddings before the input's own: ``[P; E(x)]``, ``P (length, d)``.

    ``length · d`` parameters (twice that for an encoder with a decoder, as PEFT prompts both). P is uniform within ±0.5,
    or the embeddings of given tokens, repeated. The model's function changes at once: there is no neutral prompt. With
    ``labels`` a new classification head stands beside it, for a model that is to be loaded with one.

    Args:
        model: the model's header.
        target: must be empty.
        settings: ``length``, ``task``, ``tokens`` (those of ``text``, where that is given), ``labels``, ``head``.

    Raises:
        UsageError: a length below 1, or a task that PEFT has no prompts for.
        MismatchError: a token that the embedding lacks.

    Reference: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, sections
    2.1 and 3.2.
    """
    start: Start = Uniform(0.5)
    tokens = tuple(settings["tokens"] or ())
    if tokens:
        rows = model.specs[model.embedding].shape[0]
        outside = [token for token in tokens if not 0 <= token < rows]
        if outside:
            raise MismatchError(f"has {rows:,} rows, so no token {outside[0]}", tensor=model.embedding)
        start = Rows(model.embedding, tokens)
    width = model.specs[model.embedding].shape[1]
    config = {"prompt_tuning_init": "RANDOM", "tokenizer_name_or_path": None, "prompt_tuning_init_text": None}
    return _prompt(model, target, settings, "PROMPT_TUNING", width, width, start, config)


def p_tuning(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Put ``length`` virtual tokens before the input that a small encoder makes: ``[MLP(P); E(x)]``, ``P (length, d)``.

    The file holds the encoder's *output*, ``length · d`` parameters, which is what PEFT stores and serves. While it
    trains, PEFT puts an MLP of ``hidden`` units before them, starts it itself and drops it afterwards.

    Args:
        model: the model's header.
        target: must be empty.
        settings: ``length``, ``task``, ``hidden``, ``labels``, ``head``.

    Reference: Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385, section 3.2.
    Departs from the paper: an MLP where the paper has an LSTM; P starts normal, as ``torch.nn.Embedding`` does.
    """
    width = model.specs[model.embedding].shape[1]
    config = {
        "encoder_reparameterization_type": "MLP", "encoder_hidden_size": (hidden := settings["hidden"] or width),
        "encoder_num_layers": 2, "encoder_dropout": 0.0,
    }  # fmt: skip
    added = _prompt(model, target, settings, "P_TUNING", width, width, Normal(1.0), config)
    network = 2 * width * hidden + hidden * hidden + 2 * hidden + width
    note = f"while it trains, PEFT puts an MLP of {network:,} parameters before it, which the file does not hold"
    return replace(added, notes=(*added.notes, note))


def prefix_tuning(model: Model, target: Sequence[str], settings: Mapping[str, Any]) -> Addition:
    """Put ``length`` trained keys and values before every layer's own: ``[P_K; K]``, ``[P_V; V]``.

    ``2 · length · layers · d_kv`` parameters, where ``d_kv`` is the heads that keys have (fewer than queries have, with
    grouped queries) times their size. The function changes at once, since the prefixes are attended to.

    Args:
        model: the model's header.
        target: must be empty.
        settings: ``length``, ``task``, ``std``, ``labels``, ``head``.

    Raises:
        MismatchError: the number of heads is not in ``config.json``.

    Reference: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190,
    section 4.2.
    Departs from the paper: no network makes the prefixes; they start normal with ``std``.
    """
    heads = model.setting("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads")
    if heads is None:
        raise MismatchError("config.json does not say how many heads the attention has", mend="open the model's folder")
    kv_heads = model.setting("num_key_value_heads") or heads
    width = (model.setting("head_dim", "d_kv") or model.hidden // heads) * kv_heads
    layers = len(max(model.blocks.values(), key=len))
    config = {"prefix_projection": False, "encoder_hidden_size": width}
    start = Normal(settings["std"])
    return _prompt(model, target, settings, "PREFIX_TUNING", width, 2 * layers * width, start, config, heads=kv_heads)


def _prompt(
    model: Model, target: Sequence[str], settings: Mapping[str, Any], kind: str, token_dim: int, width: int, start: Start,
    config: Mapping[str, Any], heads: int | None = None,
) -> Addition:  # fmt: skip
    if target:
        raise UsageError("prompts go before all tokens: there is nothing to choose", mend="drop --target")
    length = settings["length"]
    if length < 1:
        raise UsageError(f"length must be at least 1, not {length}")
    new_head = _new_head(model, settings)
    asked = settings["task"] or ("SEQ_CLS" if new_head else model.task)
    task = asked or "FEATURE_EXTRACTION"
    if task not in TASKS:
        raise UsageError(f"PEFT has no prompts for task {task}", mend=f"there are {', '.join(TASKS)}")
    notes: tuple[str, ...] = ()
    if asked is None:
        notes = (f"config.json tells no task of PEFT's, so it is written for {task}; -p task=CAUSAL_LM says another",)
    sides = 2 if task == "SEQ_2_SEQ_LM" and kind != "PREFIX_TUNING" else 1
    modules, head = ([settings["head"]], new_head) if new_head else model.task_head(_PREFIX)
    document = {
        "peft_type": kind, "task_type": task, "auto_mapping": None, "base_model_name_or_path": None,
        "revision": None, "inference_mode": False, "num_virtual_tokens": length, "token_dim": token_dim,
        "num_transformer_submodules": sides,
        "num_attention_heads": heads or model.setting("num_attention_heads", "n_head", "num_heads") or 1,
        "num_layers": len(max(model.blocks.values(), key=len)), "modules_to_save": modules or None, **config,
    }  # fmt: skip
    new = New(KEY, (sides * length, width), start)
    return Addition((new,), "peft", document, head=head, unchanged=False, notes=notes)


def _new_head(model: Model, settings: Mapping[str, Any]) -> tuple[New, ...]:
    """Make a classification head of a given size, in the place where PEFT looks for one.

    Raises:
        UsageError: PEFT looks for no module of that name.
        MismatchError: the model has a head of its own.
    """
    labels, name = settings["labels"], settings["head"]
    if labels is None:
        return ()
    places = peft.TASK_HEADS["SEQ_CLS"]
    if labels < 1 or name not in places:
        raise UsageError(f"a head has 1 label or more, and is called {' or '.join(places)}")
    taken = peft.task_heads("SEQ_CLS", model.modules)
    if taken:
        raise MismatchError("the model has a head already, which is trained along", tensor=taken[0], mend="drop labels")
    weight = New(f"{_PREFIX}{name}.weight", (labels, model.hidden), Normal(0.02))
    return (weight,) if name == "score" else (weight, New(f"{_PREFIX}{name}.bias", (labels,), ZEROS))
