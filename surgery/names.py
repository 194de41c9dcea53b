"""Names of tensors: how two spellings of the same weight are brought together, and how patterns select them.

One rule table serves files, state dicts in memory and PEFT keys alike:

1. *wrappers*: a mapping of tensors may lie one level down, under one of :data:`CONTAINERS`;
2. *decorations*: :data:`DECORATIONS` are prefixes that training tools put before every name;
3. *a leading prefix* that one side has and the other lacks (``bert.``, ``model.``) is found by matching, reported,
   and never guessed: one prefix must explain every name, and no two names may collapse into one;
4. ``--rename OLD=NEW`` does the rest.

Patterns: a bare word matches a module name or a dotted suffix of it, as in PEFT (``q_proj``); ``*`` and ``?`` make a
glob over the whole name; ``re:`` a regular expression that must match the whole name; ``role:`` what a tensor is in
its model (``role:q``), as :mod:`surgery.roles` tells it.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import MismatchError, UsageError, printable

CONTAINERS = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which training tools nest a state dict."""

INNER_DECORATIONS = ("_orig_mod.", "_fsdp_wrapped_module.")
DECORATIONS = ("module.", *INNER_DECORATIONS)
"""Prefixes of DataParallel, torch.compile and FSDP, in any order and number; the last two also stand inside names."""

LEGACY = {"gamma": "weight", "beta": "bias"}
"""What the first BERT checkpoints called the parameters of ``LayerNorm``."""


def unwrap(tree: Mapping[str, Any], is_tensor: Callable[[Any], bool]) -> tuple[dict[str, Any], list[str]]:
    """Find the tensors of a saved mapping: its own, or those one level down in a container.

    Returns:
        The tensors by name, and notes about everything that was left out.

    >>> unwrap({"epoch": 3, "state_dict": {"w": "T"}}, lambda value: value == "T")
    ({'w': 'T'}, ["tensors taken from 'state_dict'", "left out, not a tensor: 'epoch'"])
    """
    notes: list[str] = []
    inside = {key: value for key, value in tree.items() if is_tensor(value)}
    if not inside:
        for container in CONTAINERS:
            nested = tree.get(container)
            if isinstance(nested, Mapping) and any(map(is_tensor, nested.values())):
                notes.append(f"tensors taken from {container!r}")
                notes += [f"left out, not a tensor: {key!r}" for key in tree if key != container]
                inside = {str(key): value for key, value in nested.items() if is_tensor(value)}
                tree = nested
                break
    elif len(inside) < len(tree):
        nested_keys = [key for key, value in tree.items() if isinstance(value, Mapping) and value]
        if any(is_tensor(item) for key in nested_keys for item in tree[key].values()):
            raise MismatchError(
                f"holds tensors at the top and also below {nested_keys[0]!r}", mend="pass the inner mapping alone"
            )
    notes += [f"left out, not a tensor: {key!r}" for key, value in tree.items() if not is_tensor(value)]
    return inside, list(dict.fromkeys(notes))


def undecorated(name: str) -> str:
    """Strip every decoration of a training tool from a name, and spell legacy parameters as today.

    >>> undecorated("module.encoder._orig_mod.layer.0.weight")
    'encoder.layer.0.weight'
    >>> undecorated("embeddings.LayerNorm.gamma")
    'embeddings.LayerNorm.weight'
    """
    while (bare := _without_first(name)) != name:
        name = bare
    for decoration in INNER_DECORATIONS:
        name = name.replace(f".{decoration}", ".")
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: f"LayerNorm.{LEGACY[old[1]]}", name)


def _without_first(name: str) -> str:
    return next((name.removeprefix(mark) for mark in DECORATIONS if name.startswith(mark)), name)


@dataclass(frozen=True, slots=True)
class Alignment:
    """How another mapping's names read in the reference's spelling."""

    names: dict[str, str]
    """The other's name → its name in the reference's spelling (also for names that the reference lacks)."""
    notes: tuple[str, ...] = ()


def align(reference: Collection[str], other: Collection[str], renames: Mapping[str, str] | None = None) -> Alignment:
    """Spell ``other``'s names as ``reference`` does.

    Args:
        reference: the names that decide.
        other: the names to translate.
        renames: ``--rename`` rules applied to ``other`` first: a whole name, or a prefix that ends in a dot.

    Raises:
        MismatchError: two of ``other``'s names collapse into one, or no name meets.

    >>> align(["encoder.w", "pooler.w"], ["bert.encoder.w", "bert.pooler.w"]).names
    {'bert.encoder.w': 'encoder.w', 'bert.pooler.w': 'pooler.w'}
    """
    notes: list[str] = []
    current = {name: rename(name, renames or {}) for name in other}
    known = set(reference)
    if not known or not current:
        return Alignment(current)
    if not known.issuperset(current.values()):
        bare = {name: undecorated(spelled) if spelled not in known else spelled for name, spelled in current.items()}
        if bare != current:
            notes.append("wrapper prefixes (module., _orig_mod.) were stripped")
            current = bare
        bare_known = {undecorated(name): name for name in known}
        current = {name: bare_known.get(spelled, spelled) for name, spelled in current.items()}
    met = sum(spelled in known for spelled in current.values())
    shift = None if met == len(current) else _shift(known, list(current.values()), met)
    if shift is not None:
        old, new = shift
        notes.append(f"names without {new!r} were matched to names with it" if new else f"prefix {old!r} was stripped")
        current = {
            name: spelled if spelled in known else _shifted(spelled, old, new) for name, spelled in current.items()
        }
    _refuse_collisions(current)
    return Alignment(current, tuple(notes))


def _shift(known: Collection[str], names: Sequence[str], met: int) -> tuple[str, str] | None:
    """Find the one leading prefix whose removal or addition makes more names meet than do without it."""
    candidates: dict[tuple[str, str], int] = {}
    for name in names:
        parts = name.split(".")
        for depth in range(1, min(4, len(parts))):
            prefix = ".".join(parts[:depth]) + "."
            candidates.setdefault((prefix, ""), 0)
    for name in known:
        parts = name.split(".")
        for depth in range(1, min(4, len(parts))):
            candidates.setdefault(("", ".".join(parts[:depth]) + "."), 0)
    if len(candidates) > 256:
        candidates = dict(list(candidates.items())[:256])
    for old, new in candidates:
        candidates[old, new] = sum(name not in known and _shifted(name, old, new) in known for name in names)
    best = max(candidates, key=lambda pair: candidates[pair], default=None)
    if best is None or candidates[best] == 0 or candidates[best] < met:
        return None
    return best


def _shifted(name: str, old: str, new: str) -> str:
    if old:
        return name.removeprefix(old)
    return new + name


def _refuse_collisions(current: Mapping[str, str]) -> None:
    owners: dict[str, str] = {}
    for name, spelled in current.items():
        if spelled in owners:
            raise MismatchError(
                f"both {owners[spelled]!r} and {name!r} would be called so",
                tensor=spelled,
                mend="--rename or --drop one",
            )
        owners[spelled] = name


def rename(name: str, rules: Mapping[str, str]) -> str:
    """Apply ``OLD=NEW`` rules: the whole name, or the longest prefix that ends at a dot.

    >>> rename("bert.encoder.w", {"bert.": ""}), rename("head", {"head": "lm_head"})
    ('encoder.w', 'lm_head')
    """
    if name in rules:
        return rules[name]
    for old in sorted(rules, key=len, reverse=True):
        stem = old if old.endswith(".") else old + "."
        if name.startswith(stem):
            new = rules[old]
            new = new + "." if new and not new.endswith(".") else new
            return new + name[len(stem) :]
    return name


def parse_renames(rules: Iterable[str]) -> dict[str, str]:
    """Parse ``OLD=NEW`` strings.

    Raises:
        UsageError: a rule without ``=``, or two rules for one name.
    """
    parsed: dict[str, str] = {}
    for rule in rules:
        old, equals, new = rule.partition("=")
        if not equals or not old or (not new and not old.endswith(".")):
            raise UsageError(f"--rename takes OLD=NEW, or PREFIX.= to strip a prefix, not {rule!r}")
        if parsed.setdefault(old, new) != new:
            raise UsageError(f"--rename gives {old!r} two new names, {parsed[old]!r} and {new!r}")
    return parsed


def module_of(name: str) -> str:
    """Name the module that owns a parameter.

    >>> module_of("layer.0.q_proj.weight"), module_of("weight")
    ('layer.0.q_proj', '')
    """
    return name.rpartition(".")[0]


class Pattern:
    """One selection pattern, matched against a tensor's name or its module's, or against its role."""

    def __init__(self, text: str) -> None:
        """Compile ``text``.

        Raises:
            UsageError: an empty pattern, or a bad regular expression.
        """
        self.text = text
        self.role = text.removeprefix("role:") if text.startswith("role:") else None
        if text.startswith("re:"):
            try:
                self._regex = re.compile(text[3:])
            except re.error as error:
                raise UsageError(f"pattern {text!r} is not a regular expression: {error}") from None
        elif not text or self.role == "":
            raise UsageError(
                f"pattern {text!r} is not known",
                mend="use a module name (q_proj), a glob (*.attn.*), role:ROLE or re:REGEX",
            )
        elif any(sign in text for sign in "*?"):
            self._regex = re.compile(fnmatch.translate(text.replace("[", "[[]")))
        else:
            self._regex = re.compile(rf"(.*\.)?{re.escape(text)}")

    def matches(self, name: str, role: str = "") -> bool:
        """Say whether the pattern selects the tensor called ``name``, whose role is ``role``."""
        if self.role is not None:
            return role == self.role
        return self._regex.fullmatch(name) is not None or self._regex.fullmatch(module_of(name)) is not None


def parse_patterns(texts: Iterable[str]) -> list[Pattern]:
    """Split at commas (not inside ``re:``) and compile."""
    patterns = []
    for text in texts:
        pieces = [text] if text.startswith("re:") else [piece.strip() for piece in text.split(",")]
        patterns += [Pattern(piece) for piece in pieces]
    return patterns


def select(names: Mapping[str, str], patterns: Sequence[Pattern], option: str) -> set[str]:
    """Collect the names that any pattern selects.

    Args:
        names: the names to choose from, and the role of each.
        patterns: the patterns; each must select something.
        option: the option they came from, for the message.

    Raises:
        MismatchError: a pattern selects nothing; the message lists near matches, or the roles that there are.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name, role in names.items() if pattern.matches(name, role)}
        if not found:
            mend = _near(pattern.text, names) if pattern.role is None else _roles(names)
            raise MismatchError(f"{option} {pattern.text!r} matches no tensor", mend=mend)
        chosen |= found
    return chosen


def _roles(names: Mapping[str, str]) -> str:
    return f"its tensors are taken for: {', '.join(sorted(set(names.values())))}; name the modules by a pattern"


def _near(text: str, names: Collection[str]) -> str:
    words = {word for name in names for word in (name, module_of(name), module_of(name).rpartition(".")[2]) if word}
    close = difflib.get_close_matches(text.strip("*"), sorted(words, key=len)[:20_000], n=3, cutoff=0.5)
    if close:
        return "did you mean " + ", ".join(map(printable, close)) + "?"
    leaves = sorted({module_of(name).rpartition(".")[2] for name in names} - {""})
    return "there are " + ", ".join(map(printable, leaves[:8])) + ("…" if len(leaves) > 8 else "")
