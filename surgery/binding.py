"""Binding: which weight of a base each tensor of an adapter changes, and how.

Names are brought together, layouts told apart (linear, transposed, convolution, embedding, fused experts), shapes held
against each other; what comes out are updates (:mod:`surgery.delta`). A tensor that finds no weight stops the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint, refuse_quantised, tied_weights
from surgery.delta import Dense, ExpertsLowRank, LowRank, Magnitude, Replacement, Rows, Update
from surgery.errors import MismatchError, SurgeryError, UnsupportedError
from surgery.formats import peft, peft_scalings
from surgery.names import align, module_of
from surgery.roles import role_of, transposed_weights
from surgery.scaling import Scaled
from surgery.sources import module_names
from surgery.tensor import ARITHMETIC, TensorSpec, read_bytes


def expected_base(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """Map the tensors of ``base`` to the fingerprints they have if the adapter was taken from it.

    The record has the names of the base that was extracted from; another spelling of them is no way round the check.
    """
    names = align(base.tensors.keys(), adapter.taken_from.keys()).names
    return {names[name]: value for name, value in adapter.taken_from.items() if names[name] in base.tensors}


@dataclass
class Binding:
    """An adapter's effect on a base, weight by weight."""

    updates: dict[str, list[Update]] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Weights of which only these rows are replaced."""
    resized: dict[str, int] = field(default_factory=dict)
    """Weights whose number of rows changes, and the new number."""
    notes: list[str] = field(default_factory=list)

    def add(self, weight: str, update: Update) -> None:
        """Add an update of a weight."""
        self.updates.setdefault(weight, []).append(update)

    @property
    def replaced(self) -> set[str]:
        """Weights that are replaced in full."""
        return {
            name for name, updates in self.updates.items() if any(isinstance(update, Replacement) for update in updates)
        }


def bind(
    adapter: Adapter,
    base: Checkpoint,
    *,
    coeff: float = 1.0,
    name_map: Mapping[str, str] | None = None,
    allow_incomplete: bool = False,
) -> Binding:
    """Find the weight that every tensor of an adapter changes.

    Args:
        adapter: what to bind.
        base: where its weights are.
        coeff: the adapter's coefficient.
        name_map: module or parameter name in the adapter → parameter name in the base.
        allow_incomplete: accept an adapter that lacks modules its configuration names.

    Raises:
        MismatchError: a tensor finds no weight, or one of another shape; or modules are missing.
        UnsupportedError: a combination that cannot be merged.
    """
    if adapter.document.get("peft_type") in peft_scalings.KINDS:
        return _bind_scalings(adapter, base, coeff, name_map or {}, allow_incomplete=allow_incomplete)
    config = peft.parse_config(adapter.document)
    try:
        parts = peft.collect(adapter.tensors)
    except SurgeryError as error:
        raise error.at(file=adapter.label) from None
    _refuse_codes(adapter)
    # The adapter's prefixes may differ from the base's, so bare parameters are sought under both spellings.
    bare = peft.bare_parameters(config, parts.low_rank, [*base.tensors, *_respelled(base, parts)])
    weights = {module: bare.get(module, f"{module}.weight") for module in [*parts.low_rank, *parts.rows]}
    wanted = [*weights.values(), *parts.full]
    wanted += [f"{module}.bias" for module, roles in parts.low_rank.items() if "lora_bias" in roles]
    found, notes = _resolve(adapter, base, wanted, parts, name_map or {})
    binding = Binding(notes=notes)
    layout = _Layout(
        base,
        {
            found[weights[module]]: _factors(adapter, roles)
            for module, roles in parts.low_rank.items()
            if "a" in roles and module not in bare
        },
        config,
    )
    for module, roles in parts.low_rank.items():
        weight = found[weights[module]]
        if module in bare:
            binding.add(weight, _experts(adapter, config, bare[module], roles, base, weight, coeff))
            continue
        low_rank = _low_rank(adapter, config, module, roles, "a" in roles and layout.transposed(weight), coeff)
        _check_shape(low_rank, base.tensors[weight].spec, adapter)
        if config.use_dora and "magnitude" not in roles:
            raise MismatchError("its DoRA magnitude is not in the adapter", file=adapter.label, tensor=module)
        binding.add(
            weight, _magnitude(adapter, roles, low_rank, base, weight, coeff) if "magnitude" in roles else low_rank
        )
        if "lora_bias" in roles:
            binding.add(found[f"{module}.bias"], Dense(adapter.tensors[roles["lora_bias"]], coeff * low_rank.scaling))
    for name, key in parts.full.items():
        if found[name] is not None:
            _bind_full(adapter, base, binding, found[name], key, coeff)
    for module, key in parts.rows.items():
        _bind_rows(adapter, config, base, binding, found[weights[module]], module, key, coeff)
    _keep_tied(adapter, base, binding)
    if not allow_incomplete:
        _refuse_incomplete(adapter, base, {found[weights[module]] for module in parts.low_rank})
    return binding


def _bind_scalings(
    adapter: Adapter, base: Checkpoint, coeff: float, name_map: Mapping[str, str], *, allow_incomplete: bool
) -> Binding:
    """Bind IA³'s vectors to weights and biases, and the copies of LayerNorm tuning to norms."""
    try:
        found = peft_scalings.collect(adapter.tensors, adapter.document["peft_type"])
    except SurgeryError as error:
        raise error.at(file=adapter.label) from None
    wanted = [*(f"{module}.weight" for module in found.vectors), *found.copies]
    names, notes = _resolve(adapter, base, wanted, peft.AdapterParts(full=found.copies), name_map)
    binding = Binding(notes=notes)
    transposed = transposed_weights(base.specs, base.config)
    for module, key in found.vectors.items():
        weight = names[f"{module}.weight"]
        _bind_vector(adapter, base, binding, weight, key, coeff, transposed=weight in transposed)
    for name, key in found.copies.items():
        _bind_full(adapter, base, binding, names[name], key, coeff)
    _keep_tied(adapter, base, binding)
    if not allow_incomplete and found.vectors:
        _refuse_incomplete(adapter, base, {names[f"{module}.weight"] for module in found.vectors})
    return binding


def _bind_vector(
    adapter: Adapter, base: Checkpoint, binding: Binding, weight: str, key: str, coeff: float, *, transposed: bool
) -> None:
    """Bind one vector: ``(out, 1)`` scales outputs, the bias among them, ``(1, in)`` inputs."""
    vector, old = adapter.tensors[key], base.tensors[weight].spec
    if len(old.shape) != 2 or len(vector.spec.shape) != 2:
        raise UnsupportedError("IA³ is merged into linear weights only", file=adapter.label, tensor=weight)
    outputs = vector.spec.shape[1] == 1
    side = 0 if outputs != transposed else 1
    if 1 not in vector.spec.shape or vector.spec.numel != old.shape[side]:
        raise MismatchError(
            f"its vector is {vector.spec.describe()}, the weight {old.describe()}", file=adapter.label, tensor=weight,
            mend="is this its base?",
        )  # fmt: skip
    binding.add(weight, Scaled(vector, old.shape[1], columns=side == 1, coeff=coeff))
    bias = f"{module_of(weight)}.bias"
    if outputs and bias in base.tensors:
        binding.add(bias, Scaled(vector, 1, coeff=coeff))


def _keep_tied(adapter: Adapter, base: Checkpoint, binding: Binding) -> None:
    """Where the base stores a tied weight twice, change both copies alike.

    Raises:
        MismatchError: the adapter changes the two in different ways.
    """
    if not any(role_of(base.tensors[name].spec) in ("embedding", "head") for name in binding.updates):
        return
    tied = tied_weights(base)
    for name in sorted(tied.keys() & binding.updates.keys()):
        twin, updates = tied[name], binding.updates[name]
        if twin not in binding.updates:
            binding.updates[twin] = updates
            if name in binding.rows:
                binding.rows[twin] = binding.rows[name]
            return
        pairs = zip(updates, binding.updates[twin], strict=False)
        equal = len(updates) == len(binding.updates[twin]) == 1 and all(
            isinstance(one, Replacement)
            and isinstance(other, Replacement)
            and read_bytes(one.new) == read_bytes(other.new)
            for one, other in pairs
        )
        if not equal:
            raise MismatchError(
                f"is tied to {twin!r} in {base.label}, and the adapter changes both in ways that differ or add up",
                file=adapter.label,
                tensor=name,
                mend="untie the base first",
            )


def _refuse_codes(adapter: Adapter) -> None:
    """Refuse factors that are no numbers to compute with; what is stored in full may be an integer buffer."""
    for key, tensor in adapter.tensors.items():
        if tensor.spec.dtype not in ARITHMETIC and peft.parse_key(key).kind != "full":
            raise UnsupportedError(
                f"is {tensor.spec.dtype}; surgery computes with {', '.join(ARITHMETIC)}", file=adapter.label, tensor=key
            )


def _factors(adapter: Adapter, roles: Mapping[str, str]) -> tuple[TensorSpec, TensorSpec]:
    kind = "embedding_" if "embedding_a" in roles else ""
    return adapter.tensors[roles[f"{kind}a"]].spec, adapter.tensors[roles[f"{kind}b"]].spec


def _resolve(
    adapter: Adapter, base: Checkpoint, wanted: Sequence[str], parts: peft.AdapterParts, name_map: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Translate an adapter's parameter names into the base's."""
    mapped = {}
    for name in wanted:
        module, _, parameter = name.rpartition(".")
        mapped[name] = name_map.get(name) or (f"{name_map[module]}.{parameter}" if module in name_map else name)
    alignment = align(base.tensors.keys(), sorted(set(mapped.values())))
    found = {name: alignment.names[mapped[name]] for name in wanted}
    notes = list(alignment.notes)
    if any(spelled not in base.tensors for spelled in found.values()):
        on_disk = _on_disk_names(base)
        if any(mapped[name] in on_disk for name in wanted):
            found = {name: on_disk.get(mapped[name], found[name]) for name in wanted}
            notes.append("names in memory were translated to names on disk by transformers' own table")
    refuse_quantised(base, found.values())
    lost = [name for name in wanted if found[name] not in base.tensors]
    for name in list(lost):
        twin = _tied_twin(adapter, base, name, parts, found)
        if twin is not None:
            found[name] = twin
            lost.remove(name)
    if lost:
        raise MismatchError(
            f"{len(lost)} of the adapter's {len(wanted)} parameters are not in {base.label}, {lost[0]!r} among them",
            file=adapter.label,
            mend="is this its base? if module and on-disk names differ: --name-map FILE, or pip install "
            "'checkpoint-surgery[hf]'",
        )
    return found, [f"{adapter.label}: {note}" for note in notes]


def _on_disk_names(base: Checkpoint) -> dict[str, str]:
    """Map names in memory to names on disk, if transformers is there to say; asked only when names do not meet."""
    if not base.config or not module_names.available():
        return {}
    try:
        in_memory = module_names.module_names(base.config, base.tensors)
    except MismatchError:
        return {}
    return {memory: disk for disk, memory in in_memory.items()}


def _tied_twin(
    adapter: Adapter, base: Checkpoint, name: str, parts: peft.AdapterParts, found: Mapping[str, str]
) -> str | None:
    """Find the tied weight that a full copy of an output head repeats: equal updates of tied weights merge once."""
    if module_of(name) in parts.low_rank:
        return None  # PEFT would add both deltas to the one weight, and neither merged nor unmerged is that right
    if name not in parts.full or not (base.config or {}).get("tie_word_embeddings", True):
        return None
    key = parts.full[name]
    for other, twin in parts.full.items():
        same = other != name and adapter.tensors[twin].spec.shape == adapter.tensors[key].spec.shape
        if same and found[other] in base.tensors and role_of(base.tensors[found[other]].spec) == "embedding":
            if read_bytes(adapter.tensors[twin]) == read_bytes(adapter.tensors[key]):
                return found[other]
            raise MismatchError(
                f"differs from {other!r}, to which the base ties it", file=adapter.label, tensor=name,
                mend="untie the base first",
            )  # fmt: skip
    return None


class _Layout:
    """Says which weights are stored ``(in, out)``: by shape, then by the model's other weights, then by the configuration."""

    def __init__(
        self, base: Checkpoint, factors: Mapping[str, tuple[TensorSpec, TensorSpec]], config: peft.LoraConfig
    ) -> None:
        # Embeddings are no evidence: theirs are (vocab, dim) in every model, and factored the other way round.
        self._evidence = [
            verdict for weight, pair in factors.items() for verdict in [_by_shape(base.tensors[weight].spec, *pair)]
            if verdict is not None
        ]  # fmt: skip
        self._base = base
        self._factors = factors
        self._config = config
        self._stored_transposed = transposed_weights(base.specs, base.config)

    def transposed(self, weight: str) -> bool:
        """Say whether ``weight`` is stored ``(in, out)``."""
        verdict = _by_shape(self._base.tensors[weight].spec, *self._factors[weight])
        if verdict is not None:
            return verdict
        if weight in self._stored_transposed:
            return True
        return any(self._evidence) if self._evidence else self._config.fan_in_fan_out


def _by_shape(weight: TensorSpec, a: TensorSpec, b: TensorSpec) -> bool | None:
    """Read the layout off the shapes; ``None`` where the weight is square or nothing fits."""
    if len(weight.shape) != 2 or weight.shape[0] == weight.shape[1] or len(a.shape) != 2:
        return None
    if weight.shape == (a.shape[1], b.shape[0]):
        return True
    return False if weight.shape == (b.shape[0], a.shape[1]) else None


def _low_rank(
    adapter: Adapter, config: peft.LoraConfig, module: str, roles: Mapping[str, str], transposed: bool, coeff: float
) -> LowRank:
    embedding = "embedding_a" in roles
    kind = "embedding_" if embedding else ""
    a, b = adapter.tensors[roles[f"{kind}a"]], adapter.tensors[roles[f"{kind}b"]]
    if len(a.spec.shape) < 2 or len(b.spec.shape) < 2 or a.spec.shape[0] != b.spec.shape[1]:
        raise MismatchError(
            f"A is {a.spec.describe()} and B is {b.spec.describe()}: their ranks differ",
            file=adapter.label,
            tensor=module,
        )
    try:
        scaling = config.scaling(module, a.spec.shape[0])
    except SurgeryError as error:
        raise error.at(file=adapter.label) from None
    return LowRank(a, b, scaling, transposed=embedding or (transposed and len(a.spec.shape) == 2), coeff=coeff)


def _respelled(base: Checkpoint, parts: peft.AdapterParts) -> Iterator[str]:
    """Spell the base's fused experts as the adapter does, whose names may have another prefix."""
    owners = {re.sub(r"(\.base_layer)+$", "", module) for module in parts.low_rank}
    for name, spec in base.specs.items():
        if len(spec.shape) == 3:
            owner, _, leaf = name.rpartition(".")
            for other in owners:
                if other != owner and (other.endswith(f".{owner}") or owner.endswith(f".{other}")):
                    yield f"{other}.{leaf}"


def _experts(
    adapter: Adapter, config: peft.LoraConfig, parameter: str, roles: Mapping[str, str], base: Checkpoint, name: str,
    coeff: float,
) -> ExpertsLowRank:  # fmt: skip
    """Bind the factors of fused experts; which side of them is the input, A's width tells, else what the model is like."""
    weight = base.tensors[name].spec
    a, b = adapter.tensors[roles["a"]], adapter.tensors[roles["b"]]
    experts = weight.shape[0] if len(weight.shape) == 3 else 1
    rank, left = divmod(a.spec.shape[0], max(experts, 1))
    fits = {
        flipped: (b.spec.shape[0], a.spec.shape[-1]) == (weight.shape[-1:] + weight.shape[1:2] if flipped else weight.shape[1:])
        for flipped in (False, True)
    }  # fmt: skip
    if "magnitude" in roles or "lora_bias" in roles:
        raise UnsupportedError(
            "DoRA and LoRA biases of experts are not supported", file=adapter.label, tensor=parameter
        )
    if left or not rank or b.spec.shape[-1] != a.spec.shape[0] or not any(fits.values()):
        raise MismatchError(
            f"A is {a.spec.describe()} and B {b.spec.describe()}, the weight {weight.describe()}",
            file=adapter.label,
            tensor=parameter,
            mend="is this its base?",
        )
    try:
        scaling = config.scaling(parameter, rank)
    except SurgeryError as error:
        raise error.at(file=adapter.label) from None
    transposed = peft.experts_transposed(base.config) if all(fits.values()) else fits[True]
    return ExpertsLowRank(a, b, experts, scaling, transposed, coeff)


def _check_shape(low_rank: LowRank, weight: TensorSpec, adapter: Adapter) -> None:
    rows = weight.shape[0] if weight.shape else 1
    matrix = (rows, weight.numel // max(rows, 1))
    if len(weight.shape) < 2 or low_rank.shape != matrix:
        raise MismatchError(
            f"its delta is {list(low_rank.shape)}, the weight {weight.describe()}",
            file=adapter.label,
            tensor=weight.name,
            mend="is this its base?",
        )


def _magnitude(
    adapter: Adapter, roles: Mapping[str, str], low_rank: LowRank, base: Checkpoint, weight: str, coeff: float
) -> Magnitude:
    magnitude = adapter.tensors[roles["magnitude"]]
    outputs = low_rank.b.spec.shape[0]
    if "embedding_a" in roles or len(low_rank.a.spec.shape) != 2:
        raise UnsupportedError(
            "DoRA on embeddings and convolutions is not supported", file=adapter.label, tensor=weight
        )
    if magnitude.spec.numel != outputs:
        raise MismatchError(
            f"its DoRA magnitude has {magnitude.spec.numel} entries for {outputs} outputs",
            file=adapter.label,
            tensor=weight,
        )
    return Magnitude(low_rank, magnitude, base.tensors[weight], coeff)


def _bind_full(adapter: Adapter, base: Checkpoint, binding: Binding, weight: str, key: str, coeff: float) -> None:
    new, old = adapter.tensors[key], base.tensors[weight].spec
    if any(isinstance(update, Replacement) for update in binding.updates.get(weight, ())):
        return  # the twin of a tied weight, equal to the one that was bound
    if new.spec.shape != old.shape:
        resized = role_of(old) in ("embedding", "head") and new.spec.shape[1:] == old.shape[1:] and len(old.shape) == 2
        if not resized or coeff != 1.0:
            raise MismatchError(
                f"is {new.spec.describe()} in the adapter and {old.describe()} in {base.label}",
                file=adapter.label,
                tensor=weight,
                mend="a resized vocabulary merges with coefficient 1 only" if resized else "is this its base?",
            )
        binding.resized[weight] = new.spec.shape[0]
        binding.notes.append(f"{adapter.label}: resizes {weight} from {old.shape[0]:,} to {new.spec.shape[0]:,} rows")
    counts = {old.dtype, new.spec.dtype} - set(ARITHMETIC)
    if counts and (len({old.dtype, new.spec.dtype}) > 1 or coeff not in (1.0, -1.0)):
        raise UnsupportedError(
            f"is {new.spec.dtype} in the adapter and {old.dtype} in {base.label}: it can only be copied as it is",
            file=adapter.label,
            tensor=weight,
        )
    binding.add(weight, Replacement(new, coeff))


def _bind_rows(
    adapter: Adapter, config: peft.LoraConfig, base: Checkpoint, binding: Binding, weight: str, module: str, key: str,
    coeff: float,
) -> None:  # fmt: skip
    new, old = adapter.tensors[key], base.tensors[weight].spec
    named = [
        rows for name, rows in config.token_indices.items() if name and (module == name or module.endswith("." + name))
    ]
    indices = named[0] if named else config.token_indices.get("")
    if indices is None:
        raise MismatchError("the configuration does not say which rows it replaces", file=adapter.label, tensor=key)
    if len(old.shape) != 2 or new.spec.shape != (len(indices), old.shape[1]):
        raise MismatchError(
            f"{len(indices)} rows of {old.describe()} cannot be {new.spec.describe()}",
            file=adapter.label,
            tensor=weight,
        )
    if max(indices, default=0) >= old.shape[0]:
        raise MismatchError(f"row {max(indices)} is beyond its {old.shape[0]} rows", file=adapter.label, tensor=weight)
    binding.add(weight, Rows(indices, new, coeff))
    binding.rows[weight] = tuple(sorted(indices))


def _refuse_incomplete(adapter: Adapter, base: Checkpoint, adapted: set[str]) -> None:
    """Refuse an adapter that lacks modules which its configuration targets."""
    targets = adapter.document.get("target_modules")
    narrowed = any(adapter.document.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if narrowed or not targets or targets == "all-linear":
        return

    def is_target(module: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in targets)

    modules = {module_of(weight) for weight in adapted}
    saved = adapter.document.get("modules_to_save") or []
    for name, spec in base.specs.items():
        module = module_of(name)
        if not name.endswith(".weight") or len(spec.shape) < 2 or module in modules:
            continue
        if is_target(module) and not any(module.endswith(kept) for kept in saved):
            raise MismatchError(
                "the adapter's configuration names it, but no tensor is for it",
                file=adapter.label,
                tensor=name,
                mend="the adapter is incomplete; --allow-incomplete merges what is there",
            )
