"""Recipes as text: what is read, which setting decides, and what is refused on which line."""

from __future__ import annotations

import pytest

from surgery.errors import FormatError
from surgery.formats.recipe import Reference, parse
from surgery.formats.settings import first_value

TIES = b"""\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""


def one(text):
    [recipe] = parse(text if isinstance(text, bytes) else text.encode())
    return recipe


def test_a_recipe_of_models_is_one_slice_of_all_layers():
    recipe = one(TIES)
    [module] = recipe.modules
    [piece] = module.slices
    assert (recipe.algorithm, recipe.dtype, module.whole) == ("ties", "F16", True)
    assert [str(part.model) for part in piece.parts] == ["psmathur/orca_mini_v3_13b", "WizardLM/WizardMath-13B-V1.0"]
    assert [part.layers for part in piece.parts] == [None, None]
    assert next(str(reference) for reference in recipe.references()) == "TheBloke/Llama-2-13B-fp16"


def test_a_gradient_is_linear_between_its_points():
    density = one(TIES).modules[0].slices[0].parts[0].settings["density"]
    found = [density.value("any", t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([1, 0.85, 0.7, 0.4, 0.1])


def test_the_first_filter_that_is_part_of_the_name_decides():
    weight = one(TIES).modules[0].slices[0].parts[1].settings["weight"]
    assert weight.value("model.layers.0.mlp.up_proj.weight", 0.0) == 0.5
    assert weight.value("model.layers.0.self_attn.q_proj.weight", 0.0) == 0.0


def test_a_filter_is_a_substring_and_no_pattern():
    text = "{merge_method: linear, models: [{model: a}], parameters: {weight: [{filter: 'layers.[12]', value: 3}]}}"
    weight = one(text).settings["weight"]
    assert weight.value("layers.1.w", 0.0) is None
    assert weight.value("an odd layers.[12] name", 0.0) == 3.0


def test_a_level_without_a_fitting_filter_gives_way_to_the_next():
    recipe = one(
        """
        slices:
          - sources:
              - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 1}]}}
            parameters: {weight: [{filter: attn, value: 2}]}
        parameters: {weight: 3}
        merge_method: linear
        """
    )
    [piece] = recipe.modules[0].slices
    levels = [piece.parts[0].settings, piece.settings, recipe.modules[0].settings, recipe.settings]
    found = [first_value(levels, "weight", name, 0.0) for name in ("0.mlp.w", "0.attn.w", "norm.w")]
    assert found == [1.0, 2.0, 3.0]
    assert first_value(levels, "density", "norm.w", 0.0) is None


def test_switches_and_numbers_in_scientific_notation_are_what_they_look_like():
    recipe = one("{merge_method: x, models: [{model: a}], parameters: {normalize: true, epsilon: 1e-5, f: [on, off]}}")
    assert recipe.settings["normalize"].value("w", 0.0) is True
    assert recipe.settings["epsilon"].value("w", 0.0) == 1e-5
    assert [recipe.settings["f"].value("w", t) for t in (0.0, 0.9, 1.0)] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "path", "revision", "adapter"),
    [
        ("org/name", "org/name", None, None),
        ("org/name@v1.0", "org/name", "v1.0", None),
        ("./folder+adapters/one", "./folder", None, Reference("adapters/one")),
        ("a@x+b@y", "a", "x", Reference("b", "y")),
        ("{model: {path: a, revision: x}, lora: {path: b}}", "a", "x", Reference("b")),
        ("{path: a}", "a", None, None),
    ],
)
def test_a_model_is_a_path_with_a_revision_and_an_adapter(text, path, revision, adapter):
    recipe = one(f"{{merge_method: linear, models: [{{model: {text}}}]}}")
    assert recipe.modules[0].slices[0].parts[0].model == Reference(path, revision, adapter)


def test_stages_are_documents_with_names_and_anchors_are_understood():
    first, last = parse(
        b"""
name: first
merge_method: linear
models:
  - {model: a, parameters: &half {weight: 0.5}}
  - {model: b, parameters: {<<: *half, density: 1}}
---
merge_method: slerp
models: [{model: first}]
"""
    )
    assert (first.name, last.name, last.algorithm) == ("first", None, "slerp")
    one, other = first.modules[0].slices[0].parts
    assert other.settings["weight"] == one.settings["weight"]
    assert set(other.settings) == {"weight", "density"}


def test_the_tokenizer_forms_are_read():
    recipe = one(
        """
        models: [{model: a}]
        merge_method: linear
        tokenizer:
          source: union
          pad_to_multiple_of: 64
          tokens:
            "<|im_start|>": {source: a, force: true}
            "<s>": {source: {kind: zero}}
            "[INST]": {source: {kind: model_token, model: b, token_id: 7}}
        """
    )
    choice = recipe.tokenizer
    assert (choice.source, choice.pad_to_multiple_of) == ("union", 64)
    start, zero, other = choice.tokens.values()
    assert (start.model, start.token, start.force) == (Reference("a"), "<|im_start|>", True)
    assert zero.zero
    assert (other.model, other.token_id, other.force) == (Reference("b"), 7, False)
    short = one("{models: [{model: a}], merge_method: linear, tokenizer_source: 'model:org/x'}")
    assert short.tokenizer.source == Reference("org/x")


# What is refused: (the recipe, the line, words of the message)
HOSTILE = {
    "a key with a typo": (
        "models:\n- model: a\nmerge_method: linear\nparamters:\n  weight: 1\n",
        4,
        ["'paramters'", "did you mean 'parameters'?"],
    ),
    "a key of a source with a typo": (
        "slices:\n- sources:\n  - model: a\n    layer_rage: [0, 2]\nmerge_method: linear\n",
        4,
        ["'layer_rage'", "'layer_range'"],
    ),
    "a key of a condition with a typo": (
        "models: [{model: a}]\nmerge_method: linear\nparameters:\n  t:\n  - pattern: mlp\n    value: 1\n",
        5,
        ["'pattern'", "filter"],
    ),
    "a key given twice": (
        "models: [{model: a}]\nmerge_method: linear\ndtype: float16\ndtype: float32\n",
        4,
        ["'dtype' is given twice", "line 3"],
    ),
    "two kinds of inputs": (
        "models: [{model: a}]\nslices: []\nmerge_method: linear\n",
        2,
        ["models and slices", "exactly one"],
    ),
    "no inputs": ("merge_method: linear\n", 1, ["no models, slices or modules"]),
    "no algorithm": ("models: [{model: a}]\n", 1, ["no merge_method"]),
    "a list where a mapping belongs": ("- a\n- b\n", 1, ["must be a mapping, not a list"]),
    "a model without a name": ("models:\n- parameters: {}\nmerge_method: linear\n", 2, ["has no model"]),
    "a model that is a number": ("models:\n- model: 7\nmerge_method: linear\n", 2, ["must be text, not a number"]),
    "two adapters": ("models:\n- model: a+b+c\nmerge_method: linear\n", 2, ["'a+b+c'"]),
    "an empty revision": ("models:\n- model: a@\nmerge_method: linear\n", 2, ["'a@'"]),
    "a range that ends before it starts": (
        "slices:\n- sources:\n  - {model: a, layer_range: [4, 2]}\nmerge_method: x\n",
        3,
        ["[4, 2]"],
    ),
    "a range of three": (
        "slices:\n- sources:\n  - {model: a, layer_range: [0, 2, 4]}\nmerge_method: x\n",
        3,
        ["[0, 2, 4]"],
    ),
    "ranges of different lengths": (
        "slices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n  - {model: b, layer_range: [0, 3]}\nmerge_method: x\n",
        1 + 1,
        ["differ in length", "[0, 2], [0, 3]"],
    ),
    "a dtype nobody knows": ("models: [{model: a}]\nmerge_method: x\ndtype: bfloat6\n", 3, ["'bfloat16'"]),
    "a parameter that is nothing to compute with": (
        "models: [{model: a}]\nmerge_method: x\nparameters:\n  weight: .nan\n",
        4,
        [".nan"],
    ),
    "a gradient of lists": (
        "models: [{model: a}]\nmerge_method: x\nparameters:\n  weight: [[1, 2], 3]\n",
        4,
        ["'weight'", "not a list"],
    ),
    "an empty gradient": ("models: [{model: a}]\nmerge_method: x\nparameters:\n  weight: []\n", 4, ["is empty"]),
    "an alias that holds itself": ("models: &m [*m]\nmerge_method: x\n", 1, ["holds itself"]),
    "a tag that would construct": ("models: !!python/object:os.system x\nmerge_method: x\n", 1, ["tag"]),
    "broken indentation": ("models:\n  - model: a\n parameters: x\n", 3, ["is not YAML"]),
    "tokenizer twice": (
        "models: [{model: a}]\nmerge_method: x\ntokenizer_source: base\ntokenizer: {source: base}\n",
        4,
        ["both given"],
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_understood_is_refused_with_its_line(case):
    text, line, words = HOSTILE[case]
    with pytest.raises(FormatError) as caught:
        parse(text.encode())
    message = str(caught.value)
    assert f"line {line}:" in message, message
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("data", [b"", b"\n---\n", b"\xff\xfe\x00x", b"\0", b"[" * 4000], ids=repr)
def test_bytes_that_hold_no_recipe_are_refused(data):
    with pytest.raises(FormatError):
        parse(data)


def test_stages_of_one_name_are_refused():
    stage = b"{merge_method: linear, models: [{model: a}]%s}"
    with pytest.raises(FormatError, match="two recipes have no name"):
        parse(stage % b"" + b"\n---\n" + stage % b"")
    with pytest.raises(FormatError, match="'x'"):
        parse(stage % b", name: x" + b"\n---\n" + stage % b", name: x")


def test_an_alias_bomb_costs_nothing():
    lines = ["a0: &a0 {weight: 1}"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(FormatError, match="unknown key 'a0'"):
        parse("\n".join(lines).encode())
