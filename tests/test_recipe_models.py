"""Recipes on models that transformers made: every tensor against NumPy, and the result loaded by transformers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli import main
from surgery.errors import SurgeryError
from surgery.operations.recipe import merge_recipe

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def make(folder, family, seed, *, layers=4, dtype=torch.bfloat16, **more):
    """Write a tiny model of a family."""
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"num_key_value_heads": 2}),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"num_key_value_heads": 2}),
        "qwen": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"num_key_value_heads": 2}),
        "neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, {}),
    }
    config, model, extra = kinds[family]
    torch.manual_seed(seed)
    made = model(config(**{**SIZES, **extra, "num_hidden_layers": layers, **more})).to(dtype)
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        make(root / "org" / name, "llama", seed)
    make(root / "org" / "deep", "llama", 3, layers=6)
    for seed, name in enumerate(("q1", "q2")):
        make(root / "org" / name, "qwen", seed, tie_word_embeddings=True)
        make(root / "org" / f"m{seed + 1}", "mistral", seed)
        make(root / "org" / f"n{seed + 1}", "neox", seed, dtype=torch.float16)
    return root


@pytest.fixture(autouse=True)
def _there(models, monkeypatch):
    monkeypatch.chdir(models)


def weights(models, name):
    return load_file(models / "org" / name / "model.safetensors")


def merged(text):
    return merge_recipe(text.encode())


def loads(checkpoint, folder):
    """Save, load with transformers, and run one step; every weight must have found its place."""
    checkpoint.save(folder)
    kind = transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    return model


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


def rounded(wide, dtype):
    return torch.from_numpy(np.asarray(wide)).to(dtype)


@pytest.mark.parametrize("pair", [("a", "b"), ("q1", "q2"), ("m1", "m2"), ("n1", "n2")], ids=" ".join)
def test_a_weighted_average_of_whole_models(models, tmp_path, pair):
    result = merged(
        f"""
        models:
          - {{model: org/{pair[0]}, parameters: {{weight: 1.0}}}}
          - {{model: org/{pair[1]}, parameters: {{weight: 0.3}}}}
        merge_method: linear
        dtype: float16
        """
    )
    one, other = weights(models, pair[0]), weights(models, pair[1])
    assert set(result) == set(one)
    for name in one:
        wide = (one[name].double() + 0.3 * other[name].double()) / 1.3
        assert torch.allclose(result[name].double(), wide, rtol=2**-11, atol=1e-7)
        assert result[name].dtype == torch.float16
    model = loads(result, tmp_path / "out")
    assert model.config.dtype == torch.float16


def test_gradients_run_over_the_layers_and_stand_at_zero_outside(models):
    result = merged(
        """
        models:
          - {model: org/a, parameters: {weight: [1, 0]}}
          - {model: org/b, parameters: {weight: [0, 1]}}
        merge_method: linear
        """
    )
    one, other = weights(models, "a"), weights(models, "b")
    for layer in range(4):
        name, t = f"model.layers.{layer}.self_attn.q_proj.weight", layer / 3
        wide = (1 - t) * one[name].double() + t * other[name].double()
        assert torch.allclose(result[name].double(), wide, rtol=2**-8)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert same(result[name], one[name])  # mergekit's t = 0, even for the head
    paper = merge_recipe(
        b"{models: [{model: org/a, parameters: {weight: [1, 0]}}, {model: org/b, parameters: {weight: [0, 1]}}], "
        b"merge_method: linear}",
        compat="paper",
    )
    assert same(paper["lm_head.weight"], other["lm_head.weight"])


def test_filters_choose_by_name_and_by_level(models):
    result = merged(
        """
        models:
          - model: org/a
            parameters:
              weight:
                - {filter: mlp, value: 1}
                - {filter: layers.1., value: 0}
          - {model: org/b, parameters: {weight: 1}}
        parameters: {weight: 3}
        merge_method: linear
        """
    )
    one, other = weights(models, "a"), weights(models, "b")
    shares = {"layers.1.mlp.up_proj": 0.5, "layers.1.self_attn.q_proj": 0.0, "layers.0.self_attn.q_proj": 0.75}
    for part, share in shares.items():
        name = f"model.{part}.weight"
        wide = share * one[name].double() + (1 - share) * other[name].double()
        assert torch.allclose(result[name].double(), wide, rtol=2**-8)


def test_task_vectors_take_their_base_from_the_recipe(models, tmp_path):
    result = merged(
        """
        models:
          - {model: org/base}
          - {model: org/a, parameters: {weight: 0.5}}
          - {model: org/b, parameters: {weight: -0.25}}
        base_model: org/base
        merge_method: task_arithmetic
        parameters: {lambda: 0.5, int8_mask: true, density: 0.3}
        dtype: float32
        """
    )
    base, one, other = (weights(models, name) for name in ("base", "a", "b"))
    for name, tensor in base.items():
        b = tensor.double()
        wide = b + 0.5 * (0.5 * (one[name].double() - b) - 0.25 * (other[name].double() - b))
        assert torch.allclose(result[name].double(), wide, rtol=1e-6, atol=1e-9)
    assert [note.partition(":")[2].split()[0] for note in result.notes] == ["int8_mask", "task_arithmetic"]
    loads(result, tmp_path / "out")


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("q1", "q2"), ("m1", "m2"), ("n1", "n2")])
def test_layers_are_stacked_and_the_configuration_follows(models, tmp_path, one, other):
    result = merged(
        f"""
        slices:
          - sources: [{{model: org/{one}, layer_range: [0, 3]}}]
          - sources: [{{model: org/{other}, layer_range: [1, 4]}}]
        merge_method: passthrough
        """
    )
    prefix = "gpt_neox" if one.startswith("n") else "model"
    first, last = weights(models, one), weights(models, other)
    for layer, (source, number) in enumerate([(first, 0), (first, 1), (first, 2), (last, 1), (last, 2), (last, 3)]):
        own = {name: tensor for name, tensor in source.items() if name.startswith(f"{prefix}.layers.{number}.")}
        assert own
        for name, tensor in own.items():
            assert same(result[name.replace(f".{number}.", f".{layer}.", 1)], tensor)
    outside = [name for name in first if ".layers." not in name]
    for name in outside:
        assert same(result[name], (first if "embed_tokens" in name or "embed_in" in name else last)[name])
    assert len(result) == len(outside) + 6 * (len(first) - len(outside)) // 4
    model = loads(result, tmp_path / "out")
    assert model.config.num_hidden_layers == 6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("layer_types") is None or len(config["layer_types"]) == 6


def test_layers_are_pruned_reordered_and_merged_within_slices(models, tmp_path):
    result = merged(
        """
        slices:
          - sources:
              - {model: org/a, layer_range: [2, 4], parameters: {weight: [1, 0]}}
              - {model: org/deep, layer_range: [0, 2], parameters: {weight: [0, 1]}}
          - sources:
              - {model: org/a, layer_range: [0, 1]}
              - {model: org/b, layer_range: [3, 4]}
        parameters: {weight: 1}
        merge_method: linear
        """
    )
    a, b, deep = (weights(models, name) for name in ("a", "b", "deep"))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert same(result[name.format(0)], a[name.format(2)])
    assert same(result[name.format(1)], deep[name.format(1)])
    wide = (a[name.format(0)].double() + b[name.format(3)].double()) / 2
    assert torch.allclose(result[name.format(2)].double(), wide, rtol=2**-8)
    assert loads(result, tmp_path / "out").config.num_hidden_layers == 3


def test_lists_with_one_entry_a_layer_are_spliced_from_their_own_models(models, tmp_path):
    kinds = {"x": ["full_attention", "sliding_attention"] * 2, "y": ["sliding_attention"] * 4}
    for seed, (name, layer_types) in enumerate(kinds.items()):
        make(tmp_path / name, "qwen", seed, layer_types=layer_types, use_sliding_window=True)
    result = merged(
        f"""
        slices:
          - sources: [{{model: {tmp_path}/x, layer_range: [0, 2]}}]
          - sources: [{{model: {tmp_path}/y, layer_range: [0, 1]}}]
          - sources: [{{model: {tmp_path}/x, layer_range: [2, 3]}}]
        merge_method: passthrough
        """
    )
    wanted = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert result.config["layer_types"] == wanted
    loads(result, tmp_path / "out")


def test_a_source_may_be_scaled_by_filter(models):
    result = merged(
        """
        slices:
          - sources: [{model: org/a, layer_range: [0, 2]}]
          - sources:
              - model: org/a
                layer_range: [1, 3]
                parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0.5}, {value: 1}]}
        merge_method: passthrough
        """
    )
    a = weights(models, "a")
    assert not result["model.layers.2.self_attn.o_proj.weight"].any()
    assert torch.equal(result["model.layers.3.mlp.down_proj.weight"], a["model.layers.2.mlp.down_proj.weight"] / 2)
    assert same(result["model.layers.3.mlp.up_proj.weight"], a["model.layers.2.mlp.up_proj.weight"])
    assert result.origin.counts == {"merged": 4, "copied": 35}


def test_stages_feed_each_other_without_being_written(models, tmp_path):
    text = """
name: average
models: [{model: org/a}, {model: org/b}]
merge_method: linear
parameters: {weight: 0.5}
dtype: float32
---
models: [{model: average, parameters: {weight: 2}}]
base_model: org/base
merge_method: task_arithmetic
dtype: float32
"""
    result = merged(text)
    base, a, b = (weights(models, name) for name in ("base", "a", "b"))
    for name, tensor in base.items():
        wide = tensor.double() + 2 * ((a[name].double() + b[name].double()) / 2 - tensor.double())
        assert torch.allclose(result[name].double(), wide, rtol=1e-6, atol=1e-8)
    record = result.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    stage = next(entry for entry in record["inputs"] if entry["name"] == "average")
    assert [leaf["name"] for leaf in stage["inputs"]] == ["a", "b"]
    assert stage["inputs"][0]["fingerprint"] == surgery.merge("org/base", "org/a", algorithm="linear").save(
        tmp_path / "check"
    )["inputs"][1]["fingerprint"]  # fmt: skip


def test_an_adapter_after_a_plus_is_merged_into_its_model(models, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained("org/a", dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    result = merged(
        f"""
        models: [{{model: org/a+{tmp_path}/adapter}}, {{model: org/b}}]
        merge_method: linear
        parameters: {{weight: 1}}
        dtype: float32
        """
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained("org/a", dtype=torch.float32)
    whole = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    other = weights(models, "b")
    for name in result:
        wide = (whole[name].double() + other[name].double()) / 2
        assert torch.allclose(result[name].double(), wide, rtol=1e-5, atol=1e-7)
    native = merged(f"{{models: [{{model: org/a+{tmp_path}/adapter}}], merge_method: passthrough}}")
    assert {spec.dtype for spec in native.specs.values()} == {"BF16"}
    stacked = merged(
        f"{{slices: [{{sources: [{{model: org/a+{tmp_path}/adapter, layer_range: [3, 4]}}]}}], merge_method: passthrough}}"
    )
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(stacked[name.format(0)], whole[name.format(3)].to(torch.bfloat16))


def test_a_head_that_one_model_ties_is_merged_from_its_embedding(models, tmp_path):
    make(tmp_path / "untied", "qwen", 5, tie_word_embeddings=False)
    text = "{models: [{model: %s}, {model: %s}], merge_method: linear, parameters: {weight: 1}, dtype: float32}"
    tied, untied = weights(models, "q1"), load_file(tmp_path / "untied" / "model.safetensors")
    wide = (tied["model.embed_tokens.weight"].double() + untied["lm_head.weight"].double()) / 2
    for number, order in enumerate([("org/q1", tmp_path / "untied"), (tmp_path / "untied", "org/q1")]):
        result = merged(text % order)
        assert torch.allclose(result["lm_head.weight"].double(), wide, rtol=1e-6)
        assert loads(result, tmp_path / f"out{number}").config.tie_word_embeddings is False


def test_modules_are_parts_of_names_each_with_its_own_settings(models):
    result = merged(
        """
        modules:
          model: {models: [{model: org/a}, {model: org/b}], parameters: {weight: [{filter: mlp, value: 0.25}]}}
          lm_head: {models: [{model: org/b, parameters: {weight: 1}}]}
        parameters: {weight: 1}
        merge_method: linear
        """
    )
    a, b = weights(models, "a"), weights(models, "b")
    assert same(result["lm_head.weight"], b["lm_head.weight"])
    wide = (a["model.norm.weight"].double() + b["model.norm.weight"].double()) / 2
    assert torch.allclose(result["model.norm.weight"].double(), wide, rtol=2**-8)


def test_state_dicts_in_files_are_merged_as_raw_recipes_ask(tmp_path):
    torch.manual_seed(0)
    files = {name: {"w": torch.randn(3, 4), "steps": torch.tensor(7)} for name in ("one", "two")}
    torch.save(files["one"], tmp_path / "one.pt")
    save_file(files["two"], tmp_path / "two.safetensors")
    result = merged(
        f"""
        merge_method: linear
        models:
          - {{model: {tmp_path}/one.pt, parameters: {{weight: 1}}}}
          - {{model: {tmp_path}/two.safetensors, parameters: {{weight: 3}}}}
        """
    )
    assert torch.allclose(result["w"], files["one"]["w"] / 4 + files["two"]["w"] * 3 / 4)
    assert result["steps"] == 7


def test_a_model_is_found_in_the_hugging_face_cache(models, tmp_path, monkeypatch):
    home = tmp_path / "hub" / "models--some--model"
    snapshot = home / "snapshots" / ("0123456789" * 4)
    shutil.copytree("org/a", snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123456789" * 4)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    a = weights(models, "a")
    for reference in ("some/model", "some/model@main", "some/model@0123456"):
        result = merged(f"{{models: [{{model: {reference}}}], merge_method: passthrough}}")
        assert same(result["lm_head.weight"], a["lm_head.weight"])
    with pytest.raises(
        SurgeryError, match=r"some/model@other is no folder here; HF_HUB_OFFLINE is set, and it is not in the"
    ):
        merged("{models: [{model: some/model@other}], merge_method: passthrough}")


# --- what is refused: before any data is read, in one line, with the right code, and with nothing written


def hostile_models(root):
    """Write the models that hostile recipes name."""
    a = load_file("org/a/model.safetensors")

    def variant(name, tensors):
        shutil.copytree("org/a", root / name)
        save_file(tensors, root / name / "model.safetensors", {"format": "pt"})

    norm, up = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    variant("lacks", {name: tensor for name, tensor in a.items() if name != up})
    variant("more", {**a, "model.layers.1.mlp.extra.weight": a[norm].clone()})
    variant("broadcasts", {**a, norm: a[norm][:1].clone()})
    variant("vocabulary", {**a, "lm_head.weight": a["lm_head.weight"][:60].clone()})
    fp8 = {up: a[up].to(torch.float8_e4m3fn), f"{up}_scale_inv": torch.ones(1, 1)}
    variant("fp8", {**a, **fp8})
    poisoned = a[up].clone()
    poisoned[3, 5] = float("nan")
    variant("nan", {**a, up: poisoned})
    (root / "empty").mkdir()


LINEAR = "{models: [{model: org/b}, {model: %s}], merge_method: linear}"
SLICE = "{slices: [{sources: [{model: org/a, layer_range: [0, 2]}]}, {sources: [{model: %s, layer_range: %s}]}], merge_method: passthrough}"
CIRCLE = (
    "{name: x, models: [{model: y}], merge_method: linear}\n---\n{name: y, models: [{model: x}], merge_method: linear}"
)
HOSTILE = {
    "a typo in a key": ("{models: [{model: org/a}], merge_metod: linear}", 3, ["'merge_metod'", "'merge_method'"]),
    "an algorithm nobody knows": ("{models: [{model: org/a}], merge_method: lineer}", 2, ["'lineer'", "linear"]),
    "a parameter with a typo": (
        "{models: [{model: org/a}], merge_method: linear, parameters: {wieght: 1}}",
        3,
        ["'wieght'", "'weight'", "line 1"],
    ),
    "a parameter of another algorithm": (
        "{models: [{model: org/a}], merge_method: linear, parameters: {t: 1}}",
        3,
        ["linear has no parameter 't'"],
    ),
    "a parameter that is a word": (
        "{models: [{model: org/a}], merge_method: linear, parameters: {weight: heavy}}",
        3,
        ["weight", "'heavy'"],
    ),
    "a merge's parameter given to a model": (
        "{models: [{model: org/a, parameters: {normalize: false}}, {model: org/b}], merge_method: linear}",
        3,
        ["normalize belongs to the merge"],
    ),
    "layers outside of the model": (SLICE % ("org/b", "[2, 5]"), 4, ["[2, 5]", "b", "4 layers"]),
    "a tensor that one input lacks": (LINEAR % "H/lacks", 4, ["lacks", "model.layers.1.mlp.up_proj.weight", "in b"]),
    "a tensor that one input has more": (LINEAR % "H/more", 4, ["model.layers.1.mlp.extra.weight", "more"]),
    "shapes that only broadcast": (LINEAR % "H/broadcasts", 4, ["model.norm.weight", "[1]", "[32]"]),
    "vocabularies of different sizes": (LINEAR % "H/vocabulary", 4, ["lm_head.weight", "[60, 32]", "[64, 32]"]),
    "fp8 with scales": (LINEAR % "H/fp8", 4, ["up_proj.weight", "quantised"]),
    "a NaN inside": (LINEAR % "H/nan", 6, ["nan", "model.layers.1.mlp.up_proj.weight", "NaN"]),
    "no base": ("{models: [{model: org/a}], merge_method: task_arithmetic}", 2, ["task_arithmetic", "base"]),
    "a base that is not there": (
        "{models: [{model: org/a}], base_model: org/nowhere, merge_method: task_arithmetic}",
        9,
        ["org/nowhere", "Hugging Face cache", "HF_HUB_OFFLINE is set"],
    ),
    "a base outside of its slice": (
        "{slices: [{sources: [{model: org/a, layer_range: [0, 2]}]}], base_model: org/b, merge_method: task_arithmetic}",
        3,
        ["line 1", "org/b is not among the sources"],
    ),
    "a folder that is not there": (LINEAR % "./nowhere/at/all", 3, ["./nowhere/at/all", "no folder"]),
    "a folder that is empty": (LINEAR % "H/empty", 3, ["empty"]),
    "two models where one is taken": ("{models: [{model: org/a}, {model: org/b}], merge_method: passthrough}", 2, ["1"]),
    "models of different depths": (LINEAR % "org/deep", 4, ["model.layers.4.", "deep"]),
    "stages in a circle": (
        CIRCLE + "\n---\n{models: [{model: x}], merge_method: linear}",
        3,
        ["x → y → x"],
    ),
    "stages in a closed circle": (
        CIRCLE,
        3,
        ["none is the last"],
    ),
    "a stage that nothing uses": (
        "{name: x, models: [{model: org/a}], merge_method: linear}\n---\n{models: [{model: org/b}], merge_method: linear}",
        3,
        ["nothing uses the stage 'x'"],
    ),
    "an adapter in a model's place": (LINEAR % "H/adapter", 4, ["is an adapter"]),
    "a module that is not there": (
        "{modules: {vision_tower: {models: [{model: org/a}]}}, merge_method: linear}",
        4,
        ["'vision_tower'", "lm_head, model"],
    ),
    "a module that leaves tensors out": (
        "{modules: {layers: {models: [{model: org/a}]}}, merge_method: linear}",
        4,
        ["3 tensors belong to none"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        hostile_models(root)
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return root


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_recipe_ends_in_one_line_and_leaves_nothing(case, hostile, tmp_path, capsys, monkeypatch):
    text, code, words = HOSTILE[case]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-cache"))
    (tmp_path / "recipe.yml").write_text(text.replace("H/", f"{hostile}/"))
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "out"), "-q"])
    said = capsys.readouterr().err
    assert stop.value.code == code, said
    assert said.startswith("surgery: error: ")
    assert said.count("\n") == 1
    for word in words:
        assert word in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]
    if case != "a NaN inside":
        with pytest.raises(SurgeryError):  # without a look at any value
            merge_recipe(tmp_path / "recipe.yml")


# --- the command line


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    found = capsys.readouterr()
    assert stop.value.code == 0, found.err
    return found


def test_mergekits_command_line_runs_and_says_what_means_nothing(models, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("{models: [{model: org/a}, {model: org/b}], merge_method: linear}")
    flags = ["--cuda", "--lazy-unpickle", "--allow-crimes", "--copy-tokenizer", "--out-shard-size", "5B", "-v"]
    found = run(capsys, "merge", tmp_path / "r.yaml", tmp_path / "out", *flags)
    assert len([line for line in found.err.splitlines() if line.startswith("note: --")]) == 3
    assert (tmp_path / "out" / "model.safetensors").exists()
    run(capsys, "merge", tmp_path / "r.yaml", "-o", tmp_path / "again", "--num-threads", "1", "-q")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == other


def test_the_bytes_depend_on_neither_the_threads_nor_the_inputs_shards(models, tmp_path, capsys):
    (tmp_path / "sharded").mkdir()
    run(capsys, "convert", "org/a", "-o", tmp_path / "sharded" / "a", "--max-shard-size", "20kB", "-q")
    text = "{models: [{model: %s}, {model: org/b}], merge_method: linear, dtype: float32}"
    outputs = []
    for number, (model, jobs) in enumerate([("org/a", 1), ("org/a", 2), ("org/a", 4), (tmp_path / "sharded" / "a", 2)]):
        checkpoint = merged(text % model)
        checkpoint.save(tmp_path / f"out{number}", jobs=jobs, max_shard_size=30_000)
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / f"out{number}").glob("*.safetensors")})
    assert len(outputs[0]) > 3
    assert all(output == outputs[0] for output in outputs)
