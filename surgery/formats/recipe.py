"""Recipes: the YAML that says which models are merged, how, and into what. Read strictly into frozen data.

The language is mergekit's (its configuration of one merge, of several with ``name:``, and of raw state dicts), with
one difference: what is not understood is an error that names the line, never ignored. A recipe of ``models:`` or
``slices:`` is one unnamed module; ``modules:`` names several.

This room knows neither algorithms nor files: what a recipe names is looked up by :mod:`surgery.operations.recipe`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from surgery.errors import FormatError
from surgery.formats.settings import Settings, parse_settings
from surgery.formats.yaml_strict import Node, did_you_mean, read_documents

DTYPES: Mapping[str, str] = {
    "bfloat16": "BF16", "bf16": "BF16", "float16": "F16", "fp16": "F16", "half": "F16",
    "float32": "F32", "fp32": "F32", "float": "F32", "float64": "F64", "fp64": "F64", "double": "F64",
}  # fmt: skip
TOP_KEYS = (
    "models", "slices", "modules", "merge_method", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name", "out_path",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reference:
    """A model as a recipe names it: ``path[@revision][+adapter[@revision]]``."""

    path: str
    revision: str | None = None
    adapter: Reference | None = None
    line: int = field(default=0, compare=False)

    def __str__(self) -> str:
        """Write it as in a recipe."""
        own = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return own if self.adapter is None else f"{own}+{self.adapter}"


@dataclass(frozen=True, slots=True)
class Part:
    """One model's share of a slice: some of its layers, or all of them where ``layers`` is ``None``."""

    model: Reference
    layers: tuple[int, int] | None = None
    settings: Settings = field(default_factory=dict)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of output layers, merged from equally long runs of its parts."""

    parts: tuple[Part, ...]
    base: Reference | None = None
    settings: Settings = field(default_factory=dict)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Module:
    """A stack of layers with what stands before and after it: the whole model where it has no name."""

    name: str
    slices: tuple[Slice, ...]
    settings: Settings = field(default_factory=dict)
    whole: bool = False
    """Whether all layers of all models are merged (``models:``)."""
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Where a token's row comes from: a model's row of some token, or zeros."""

    model: Reference | None = None
    token: str | None = None
    token_id: int | None = None
    zero: bool = False
    force: bool = False
    """Use it for every model, even those that have the token."""
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """Which tokenizer the output has: ``union``, ``base``, or a model's."""

    source: str | Reference
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One merge."""

    algorithm: str
    modules: tuple[Module, ...]
    base: Reference | None = None
    settings: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    name: str | None = None
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)
    """The line of every top-level key."""

    def references(self) -> Iterator[Reference]:
        """Name every model that goes into the merge, the base first, in the order of the recipe."""
        if self.base:
            yield self.base
        for module in self.modules:
            for piece in module.slices:
                if piece.base:
                    yield piece.base
                yield from (part.model for part in piece.parts)


def parse(data: bytes) -> tuple[Recipe, ...]:
    """Read all recipes of a file.

    Raises:
        FormatError: malformed, or not understood; the line is named.

    >>> [recipe] = parse(b"{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 0.5}}")
    >>> recipe.algorithm, [str(reference) for reference in recipe.references()]
    ('linear', ['a', 'b'])
    """
    documents = read_documents(data)
    if not documents:
        raise FormatError("holds no recipe")
    recipes = tuple(map(_recipe, documents))
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            what = f"two recipes are called {name!r}" if name else "two recipes have no name"
            raise FormatError(what, mend="give each stage a name of its own, and none to the last")
    return recipes


def _recipe(node: Node) -> Recipe:
    top = node.mapping("the recipe", TOP_KEYS)
    if "merge_method" not in top:
        raise node.error("the recipe has no merge_method")
    if "tokenizer" in top and "tokenizer_source" in top:
        raise top["tokenizer"].error("tokenizer and tokenizer_source are both given", "keep one")
    name = top.get("name") or top.get("out_path")
    return Recipe(
        algorithm=top["merge_method"].text("merge_method"),
        modules=_modules(node, top),
        base=_optional_reference(top.get("base_model")),
        settings=parse_settings(top.get("parameters")),
        dtype=_dtype(top.get("dtype"), "dtype"),
        out_dtype=_dtype(top.get("out_dtype"), "out_dtype"),
        tokenizer=_tokenizer(top),
        chat_template=_optional_text(top.get("chat_template"), "chat_template"),
        name=_optional_text(name, "name"),
        lines={key: item.line for key, item in top.items()},
    )


def _modules(node: Node, top: Mapping[str, Node]) -> tuple[Module, ...]:
    given = [key for key in ("models", "slices", "modules") if key in top]
    if len(given) != 1:
        what = f"{' and '.join(given)} are both given" if given else "there are no models, slices or modules"
        raise (top[given[1]] if given else node).error(what, "give exactly one of them")
    if given == ["models"]:
        return (_whole("", top["models"], {}),)
    if given == ["slices"]:
        return (Module("", _slices(top["slices"]), line=top["slices"].line),)
    modules = top["modules"].mapping("modules")
    if not modules:
        raise top["modules"].error("modules is empty")
    return tuple(_module(name, item) for name, item in modules.items())


def _module(name: str, node: Node) -> Module:
    fields = node.mapping(f"module {name!r}", ("models", "slices", "parameters"))
    settings = parse_settings(fields.get("parameters"))
    if ("models" in fields) == ("slices" in fields):
        raise node.error(f"module {name!r} needs either models or slices")
    if "models" in fields:
        return _whole(name, fields["models"], settings)
    return Module(name, _slices(fields["slices"]), settings, line=node.line)


def _whole(name: str, node: Node, settings: Settings) -> Module:
    parts = tuple(_model(item) for item in node.items("models"))
    return Module(name, (Slice(parts, line=node.line),), settings, whole=True, line=node.line)


def _model(node: Node) -> Part:
    fields = node.mapping("a model", ("model", "parameters"))
    if "model" not in fields:
        raise node.error("an entry of models has no model")
    return Part(_reference(fields["model"]), None, parse_settings(fields.get("parameters")), node.line)


def _slices(node: Node) -> tuple[Slice, ...]:
    return tuple(_slice(item) for item in node.items("slices"))


def _slice(node: Node) -> Slice:
    fields = node.mapping("a slice", ("sources", "base_model", "parameters"))
    if "sources" not in fields:
        raise node.error("a slice has no sources")
    parts = tuple(_source(item) for item in fields["sources"].items("sources"))
    lengths = {stop - start for start, stop in (part.layers or (0, 0) for part in parts)}
    if len(lengths) > 1:
        ranges = ", ".join(str(list(part.layers or ())) for part in parts)
        raise node.error(f"the layer ranges of a slice differ in length: {ranges}")
    base = _optional_reference(fields.get("base_model"))
    return Slice(parts, base, parse_settings(fields.get("parameters")), node.line)


def _source(node: Node) -> Part:
    fields = node.mapping("a source", ("model", "layer_range", "parameters"))
    for key in ("model", "layer_range"):
        if key not in fields:
            raise node.error(f"a source has no {key}")
    ends = [item.whole("an end of layer_range") for item in fields["layer_range"].items("layer_range")]
    if len(ends) != 2 or not 0 <= ends[0] < ends[1]:
        raise fields["layer_range"].error(
            f"layer_range {ends} is none", "give [first, end]: layers from first on, up to but without end"
        )
    return Part(_reference(fields["model"]), (ends[0], ends[1]), parse_settings(fields.get("parameters")), node.line)


def parse_reference(text: str, line: int = 0) -> Reference:
    """Read ``path[@revision][+adapter[@revision]]``.

    Raises:
        FormatError: more than one adapter, or an empty part.

    >>> parse_reference("org/model@main+org/lora")
    Reference(path='org/model', revision='main', adapter=Reference(path='org/lora', revision=None, adapter=None, line=0), line=0)
    """
    pieces = [piece.strip() for piece in text.split("+")]
    parted = [piece.partition("@") for piece in pieces]
    if len(pieces) > 2 or not all(path and (revision or not at) for path, at, revision in parted):
        raise FormatError(f"line {line}: {text!r} is no model", mend="write path, path@revision or path+adapter")
    adapter = Reference(parted[1][0], parted[1][2] or None, None, line) if len(pieces) == 2 else None
    return Reference(parted[0][0], parted[0][2] or None, adapter, line)


def _reference(node: Node) -> Reference:
    if isinstance(node.value, dict):
        return _long_reference(node)
    return parse_reference(node.text("a model"), node.line)


def _long_reference(node: Node) -> Reference:
    """Read the form that mergekit writes: ``{model: {path, revision}, lora: {path, revision}}``."""
    fields = node.mapping("a model", ("model", "lora", "path", "revision"))
    if "path" in fields:
        return Reference(
            fields["path"].text("path"), _optional_text(fields.get("revision"), "revision"), None, node.line
        )
    if "model" not in fields:
        raise node.error("a model has no path")
    model, lora = _reference(fields["model"]), fields.get("lora")
    adapter = _reference(lora) if lora is not None and lora.value is not None else None
    return Reference(model.path, model.revision, adapter, node.line)


def _optional_reference(node: Node | None) -> Reference | None:
    return None if node is None or node.value is None else _reference(node)


def _optional_text(node: Node | None, what: str) -> str | None:
    return None if node is None or node.value is None else node.text(what)


def _dtype(node: Node | None, what: str) -> str | None:
    text = _optional_text(node, what)
    if node is None or text is None:
        return None
    name = text.removeprefix("torch.")
    if name not in DTYPES:
        raise node.error(f"{what} {text!r} is not known", did_you_mean(name, DTYPES))
    return DTYPES[name]


def _tokenizer(top: Mapping[str, Node]) -> TokenizerChoice | None:
    plain = top.get("tokenizer_source")
    if plain is not None and plain.value is not None:
        return TokenizerChoice(_tokenizer_source(plain), line=plain.line)
    node = top.get("tokenizer")
    if node is None or node.value is None:
        return None
    fields = node.mapping("tokenizer", ("source", "tokens", "pad_to_multiple_of"))
    source = fields.get("source")
    pad = fields.get("pad_to_multiple_of")
    multiple = None if pad is None or pad.value is None else pad.whole("pad_to_multiple_of")
    if pad is not None and multiple is not None and multiple < 1:
        raise pad.error("pad_to_multiple_of must be at least 1")
    tokens = fields.get("tokens")
    given = {} if tokens is None or tokens.value is None else tokens.mapping("tokens")
    rules = {token: _token_rule(token, item) for token, item in given.items()}
    return TokenizerChoice("union" if source is None else _tokenizer_source(source), rules, multiple, node.line)


def _tokenizer_source(node: Node) -> str | Reference:
    if node.value in ("union", "base"):
        return str(node.value)
    if isinstance(node.value, str):
        return parse_reference(node.value.removeprefix("model:"), node.line)
    return _reference(node)


def _token_rule(token: str, node: Node) -> TokenRule:
    fields = node.mapping(f"the rule for token {token!r}", ("source", "force"))
    force = fields["force"].flag("force") if "force" in fields else False
    source = fields.get("source")
    if source is None or source.value is None:
        return TokenRule(force=force, line=node.line)
    if not isinstance(source.value, dict) or "kind" not in source.value:
        return TokenRule(_reference(source), token, force=force, line=node.line)
    inner = source.mapping("source", ("kind", "model", "token", "token_id"))
    kind = inner["kind"].text("kind")
    if kind == "zero":
        return TokenRule(zero=True, force=force, line=node.line)
    if kind != "model_token":
        raise inner["kind"].error(f"kind {kind!r} is not known", did_you_mean(kind, ("zero", "model_token")))
    if "model" not in inner or ("token" in inner) == ("token_id" in inner):
        raise source.error("a model_token needs a model, and either a token or a token_id")
    word = inner["token"].text("token") if "token" in inner else None
    number = inner["token_id"].whole("token_id") if "token_id" in inner else None
    return TokenRule(_reference(inner["model"]), word, number, force=force, line=node.line)
