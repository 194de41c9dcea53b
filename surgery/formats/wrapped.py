"""State dicts that have a method's tensors inside: which names are the base's, and which the method's.

PEFT wraps modules: the base's weight moves to ``<module>.base_layer.weight``, and the method's tensors lie beside it as
``<module>.lora_A.<adapter>.weight`` and the like. Modules that it trains whole have the base's own at
``<module>.original_module`` and the trained copy at ``<module>.modules_to_save.<adapter>``. The whole model stands below
``base_model.model.``, below ``base_model.`` with prompts. AdapterHub's ``adapters`` leaves the base's names alone and
puts its own below ``<place>.adapters.<adapter>`` and a few more such containers. Only names are known here.

Names were read from, and are tested against, the state dicts of PEFT 0.21; AdapterHub's from those of adapters 1.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from surgery.errors import MismatchError, UnsupportedError
from surgery.formats import peft
from surgery.names import DECORATIONS, INNER_DECORATIONS

# Part of a module → the method that has it. What PEFT's other methods have is told by standing beside a base_layer.
_PARTS = {
    "lora_A": "lora", "lora_B": "lora", "lora_embedding_A": "lora", "lora_embedding_B": "lora",
    "lora_magnitude_vector": "lora", "trainable_tokens_delta": "token rows", "ia3_l": "ia3",
    "ln_tuning_layers": "ln-tuning",
}  # fmt: skip
_PART = re.compile(rf"(?:(?P<module>.+)\.)?(?P<part>{'|'.join(_PARTS)})(?:\.(?P<rest>.+))?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?:(?P<adapter>[^.]+)\.)?(?P<rest>.+)")
_BOTTLENECK = re.compile(
    r".+\.adapters\.(?P<adapter>[^.]+)\.(?:adapter_(?:down|up|norm_before|norm_after)\.|scaling$|gate\.)"
)
_HUB = re.compile(
    r"(?:.+\.)?(?:(?:prefix_tunings|prefix_gates|prompt_tunings|invertible_adapters|refts|adapter_fusion_layer|shared_parameters)"
    r"\.(?P<adapter>[^.]+)\.|loras\.(?P<lora>[^.]+)\.(?:lora_[AB]|m|gate)\b)"
)
_HUB_HEAD = re.compile(r"heads\.(?P<adapter>[^.]+)\.")
_HUB_COPY = re.compile(r"(?:.+\.)?prompt_tuning\.base_model_embeddings\.weight")
_PRELAYER = re.compile(r".+\.\d+\.prelayer\.(?:prefix|infix)")
_PROMPT = re.compile(r"prompt_encoder\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
_WRAPPERS = re.compile(r"\.(?:token_adapter|base_layer|original_module)(?=\.)")
_SUSPECT = re.compile(
    r"(?:^|[._])(?:(?:re)?loras?|dora|ia3|adapters?|lokr|loha|hada|vera|boft|prefix_tuning|prompt_(?:encoder|tuning|embeddings))(?:[._]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Taken:
    """One tensor that belongs to a method."""

    name: str
    """In the state dict."""
    method: str
    """A row of ``surgery methods``; ``prompts``, ``bottleneck``, ``saved`` or ``token rows``; else what it is, in words."""
    adapter: str = ""
    """The adapter's name, where it has one."""
    key: str = ""
    """By which a folder of its own has it; empty where no such folder is known."""
    replaces: str = ""
    """The base's parameter of which it is a trained copy."""


@dataclass
class Parted:
    """A state dict's names, sorted."""

    base: dict[str, str] = field(default_factory=dict)
    """Name in the state dict → the base's own."""
    taken: dict[str, Taken] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    """Second references to the base's input embedding."""


def part(names: Collection[str], spared: Callable[[str], bool] = lambda _: False) -> Parted:
    """Tell the base's names from a method's.

    Args:
        names: of a state dict.
        spared: says of the base's own name whether it stays, whatever it looks like.

    Raises:
        MismatchError: nothing is a method's, or everything; the base's own value is not there; two names would be one.
        UnsupportedError: a name looks like a method's, and no rule knows it.

    >>> parted = part(["base_model.model.q.base_layer.weight", "base_model.model.q.lora_A.default.weight"])
    >>> parted.base, [taken.key for taken in parted.taken.values()]
    ({'base_model.model.q.base_layer.weight': 'q.weight'}, ['base_model.model.q.lora_A.weight'])
    """
    inner = _undecorated(names)
    prompts = any(name.startswith("prompt_encoder.") for name in inner.values())
    rooted = any(name.startswith("base_model.") for name in inner.values())
    root = "" if not rooted else "base_model." if prompts else peft.PREFIX
    below = {name: bare.removeprefix(root) for name, bare in inner.items() if bare.startswith(root)}
    rules = _Rules(below.values(), spared, root if prompts else peft.PREFIX)
    parted = Parted()
    for name, bare in inner.items():
        if name not in below:
            _outside(parted, name, bare, prompts=prompts)
        elif rules.is_copy(below[name]):
            parted.copies.append(name)
        elif taken := rules.taken(name, below[name]):
            parted.taken[name] = taken
        else:
            parted.base[name] = rules.own_name(below[name])
    _check(parted)
    return parted


def _undecorated(names: Collection[str]) -> dict[str, str]:
    """Strip what training tools put inside of names, and before every name, and only what stands before every one."""
    inner = {name: name for name in names}
    for mark in INNER_DECORATIONS:
        inner = {name: bare.replace(f".{mark}", ".") for name, bare in inner.items()}
    while mark := next((d for d in DECORATIONS if inner and all(bare.startswith(d) for bare in inner.values())), ""):
        inner = {name: bare.removeprefix(mark) for name, bare in inner.items()}
    return inner


def _outside(parted: Parted, name: str, bare: str, *, prompts: bool) -> None:
    """Sort what lies beside the wrapped model."""
    if found := _PROMPT.fullmatch(bare):
        key = "prompt_embeddings" if found["rest"] == "embedding.weight" else ""
        parted.taken[name] = Taken(name, "prompts", found["adapter"], key)
    elif prompts and bare == "word_embeddings.weight":
        parted.copies.append(name)
    elif bare.startswith("base_model."):
        parted.taken[name] = Taken(name, "tensors that modules share")
    else:
        raise MismatchError("lies outside of base_model, where PEFT has nothing", tensor=name, mend="convert --drop it")


class _Rules:
    """What tells a name's owner, once all names are known."""

    def __init__(self, names: Collection[str], spared: Callable[[str], bool], prefix: str) -> None:
        self._spared = spared
        self._prefix = prefix
        self._wrapped = {name[: mark.start()] for name in names for mark in re.finditer(r"\.base_layer(?=\.)", name)}
        # An adaption prompt's wrapper holds the attention that it wraps as ``.model``.
        self._prompted = {name.removesuffix(".adaption_gate") for name in names if name.endswith(".adaption_gate")}
        self._hub = any(_BOTTLENECK.match(name) or _HUB.match(name) or _HUB_COPY.fullmatch(name) for name in names)

    def is_copy(self, name: str) -> bool:
        """Say whether a name is AdapterHub's second reference to the input embedding."""
        return _HUB_COPY.fullmatch(name) is not None and not self._spared(name)

    def taken(self, name: str, bare: str) -> Taken | None:
        """Say what a method has there; nothing where the base has."""
        if self._spared(self._plain(bare)):
            return None
        if found := _SAVED.fullmatch(bare):
            own = f"{found['module']}.{found['rest']}"
            return Taken(name, "saved", found["adapter"] or "", f"{self._prefix}{own}", own)
        if found := _BOTTLENECK.match(bare):
            return Taken(name, "bottleneck", found["adapter"], bare)
        if found := _HUB.match(bare):
            return Taken(name, "AdapterHub's other methods", found["adapter"] or found["lora"])
        if found := _PART.fullmatch(bare):
            return _peft_part(name, found)
        if self._hub and (found := _HUB_HEAD.match(bare)):
            return Taken(name, "AdapterHub's heads", found["adapter"])
        if bare == "prompt_embeddings":
            return Taken(name, "prompts", "", bare)
        if _PRELAYER.fullmatch(bare):
            return Taken(name, "prelayer")
        if self._beside_base_layer(bare) or bare.endswith((".adaption_prompt", ".adaption_gate")):
            return Taken(name, "PEFT's other methods")
        return None

    def _beside_base_layer(self, bare: str) -> bool:
        parts = bare.split(".")
        owners = ((".".join(parts[:depth]), parts[depth]) for depth in range(1, len(parts)))
        # A weight right beside a wrapped one is nobody's: two would claim one name, which is refused.
        return any(
            owner in self._wrapped and beside not in ("base_layer", "weight", "bias") for owner, beside in owners
        )

    def _plain(self, bare: str) -> str:
        for owner in self._prompted:
            bare = bare.replace(f"{owner}.model.", f"{owner}.", 1) if bare.startswith(f"{owner}.model.") else bare
        return _WRAPPERS.sub("", bare)

    def own_name(self, bare: str) -> str:
        """Spell a name as the base does.

        Raises:
            UnsupportedError: it looks like a method's.
        """
        plain = self._plain(bare)
        if _SUSPECT.search(plain) and not self._spared(plain):
            raise UnsupportedError(
                "is called like a method's tensor, and no rule knows it",
                tensor=plain,
                mend="--spare it if the base has it, or take it out by convert --drop",
            )
        return plain


def _peft_part(name: str, found: re.Match[str]) -> Taken:
    rest, part_name = found["rest"] or "", found["part"]
    adapter, _, parameter = ("", "", rest) if rest in ("", "weight", "bias") else rest.partition(".")
    module = f"{found['module']}." if found["module"] else ""
    ending = "" if part_name == "lora_magnitude_vector" or not parameter else f".{parameter}"
    # Bare factors, without .weight, are loralib's; PEFT's file names the same factors with it.
    if part_name in ("lora_A", "lora_B") and not parameter:
        ending = ".weight"
    key = f"{module}{part_name}{ending}"
    replaced = f"{module}{parameter}" if part_name == "ln_tuning_layers" else ""
    return Taken(name, _PARTS[part_name], adapter, f"{peft.PREFIX}{key}", replaced)


def _check(parted: Parted) -> None:
    if not parted.taken:
        raise MismatchError(
            "has no tensor that a method known here is told by",
            mend="convert --drop PATTERN takes out what a pattern names",
        )
    if not parted.base:
        raise MismatchError("has a method's tensors and no others: it is an adapter, not a checkpoint")
    owners: dict[str, str] = {}
    for name, own in parted.base.items():
        if owners.setdefault(own, name) != name:
            raise MismatchError(f"would be the name of {owners[own]!r} and of {name!r}", tensor=own, mend="drop one")
    for taken in parted.taken.values():
        if taken.replaces and taken.replaces not in owners:
            raise MismatchError("is trained, and the base's own is not in the file", tensor=taken.name)
