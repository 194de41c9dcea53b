"""Adapters and exact deltas as inputs of merges: each stands for its base with it, never on disk, and proves its base."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from fixtures import generate
from surgery.cli.main import main
from surgery.errors import MismatchError, SurgeryError, UnsupportedError, UsageError
from surgery.lossy import open_lossy
from surgery.operations.extract_lossy import extract_lossy
from surgery.operations.recipe import merge_recipe

SHAPE = generate.SIZES["tiny"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a fine-tune of it, and the fine-tune as an exact delta, a LoRA, and somebody's adapter of the base."""
    root = tmp_path_factory.mktemp("world")
    generate.write(root / "base", SHAPE)
    generate.write(root / "ft", SHAPE, tune=True)
    generate.write(root / "other", SHAPE, seed=5)
    generate.adapter(root / "style", SHAPE)
    surgery.extract_delta(root / "base", root / "ft").save(root / "task.delta")
    surgery.extract_lora(root / "base", root / "ft", rank=4).save(root / "ft-lora")
    return root


@pytest.fixture(autouse=True)
def _there(world, monkeypatch):
    monkeypatch.chdir(world)


def recipe(text):
    return merge_recipe(text.encode())


def contents(checkpoint):
    return {
        name: (tensor.dtype, tensor.flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in checkpoint.items()
    }


@pytest.mark.parametrize("spelling", ["task.delta", "base+task.delta"])
def test_in_a_recipe_a_delta_is_the_fine_tune_that_it_was_made_from(world, tmp_path, spelling):
    text = """
        models:
          - {{model: {0}, parameters: {{density: 0.5, weight: 1.0}}}}
          - {{model: style, parameters: {{density: 0.7, weight: 0.5}}}}
        merge_method: ties
        base_model: base
        """
    before = sorted(world.iterdir())
    merged, wanted = recipe(text.format(spelling)), recipe(text.format("ft"))
    assert contents(merged) == contents(wanted)
    record = merged.save(tmp_path / "out")
    assert sorted(world.iterdir()) == before
    delta = next(entry for entry in record["inputs"] if entry["name"] == "base+task.delta")
    assert [leaf["role"] for leaf in delta["inputs"]] == ["base", "delta"]
    assert contents(surgery.open(tmp_path / "out")) == contents(wanted)
    surgery.verify(tmp_path / "out")


def test_in_a_recipe_an_adapter_alone_is_the_base_with_it():
    text = "{{models: [{{model: ft}}, {{model: {0}}}], merge_method: task_arithmetic, base_model: base}}"
    assert contents(recipe(text.format("style"))) == contents(recipe(text.format("base+style")))


def test_a_lossy_delta_is_the_adapter_that_it_codes(tmp_path):
    path = tmp_path / "task.lossy.safetensors"
    extract_lossy("base", "ft", bits="int8", rank=4).save(path)
    wanted = contents(surgery.merge("base", open_lossy(path), "ft", algorithm="task_arithmetic", coeff=0.5))
    assert contents(surgery.merge("base", path, "ft", algorithm="task_arithmetic", coeff=0.5)) == wanted
    text = "{{models: [{{model: {0}}}, {{model: ft}}], parameters: {{weight: 0.5}}, merge_method: task_arithmetic, base_model: base}}"
    for spelling in (path, f"base+{path}"):
        assert contents(recipe(text.format(spelling))) == wanted
    with pytest.raises(UsageError, match="is a lossy delta, which is a model only together with its base"):
        surgery.merge("base", path, algorithm="linear")


def test_a_slice_of_a_delta_is_proved_layer_by_layer(tmp_path):
    text = """
        slices:
          - {sources: [{model: base, layer_range: [0, 1]}]}
          - {sources: [{model: base+task.delta, layer_range: [0, 1]}]}
        merge_method: passthrough
        """
    merged = recipe(text)
    merged.save(tmp_path / "out")
    tuned = surgery.open("ft")
    for name in merged:
        if ".layers.1." in name:
            assert torch.equal(merged[name], tuned[name.replace("layers.1.", "layers.0.")])


def test_on_the_command_line_and_in_python_they_are_models_too(tmp_path, capsys):
    wanted = surgery.merge("base", "ft", "style", algorithm="ties", density=0.5)
    assert contents(surgery.merge("base", "task.delta", "style", algorithm="ties", density=0.5)) == contents(wanted)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["merge", "base", "task.delta", "style", "--algorithm", "ties", "-p", "density=0.5", "-o", str(out)])
    assert not stopped.value.code, capsys.readouterr().err
    assert contents(surgery.open(out)) == contents(wanted)
    record = json.loads((out / "surgery.json").read_text())
    assert [entry["role"] for entry in record["inputs"]] == ["base", "delta", "adapter"]
    assert record["inputs"][1]["fingerprint"] == surgery.exact.open_delta("task.delta").digest
    assert surgery.merge("base", "task.delta", "style", algorithm="ties").origin.work is not None  # it can be continued


def test_plans_count_the_bytes_of_the_files_that_they_read(world):
    stored = {name: surgery.open(name).nbytes for name in ("base", "ft")}
    delta, adapter = surgery.exact.open_delta("task.delta").nbytes, surgery.adapter.open_adapter("style").nbytes
    wanted = stored["base"] + stored["ft"] + (stored["base"] + delta) + (stored["base"] + adapter)
    assert surgery.merge("base", "ft", "task.delta", "style", algorithm="ties").plan().bytes_read == wanted
    text = "{models: [{model: ft}, {model: task.delta}, {model: style}], merge_method: ties, base_model: base}"
    assert recipe(text).plan().bytes_read == wanted


def test_objects_and_dicts_are_models_as_files_are():
    base, tuned = (surgery.open(name).state_dict() for name in ("base", "ft"))
    delta, adapter = surgery.extract_delta(base, tuned), surgery.extract_lora(base, tuned, rank=2)
    found = surgery.merge(
        base, delta, tuned, adapter, algorithm="ties", density=0.5, coeff={"norm": 0.5, "*": [1, 2, 3]}
    )
    for other in ("linear", "slerp"):
        with pytest.raises(UsageError, match="a model only together with its base"):
            surgery.merge(base, delta, algorithm=other, **({"t": 0.5} if other == "slerp" else {}))
    wanted = surgery.merge(
        base, tuned, tuned, surgery.merge(base, adapter), algorithm="ties", density=0.5,
        coeff=lambda name: 0.5 if "norm" in name.split(".")[-2] else [1, 2, 3],
    )  # fmt: skip
    for name in found:  # the adapter is rounded in between in one of them alone
        assert torch.allclose(found[name].float(), wanted[name].float(), atol=0.02), name


def test_an_adapter_that_resizes_the_vocabulary_is_a_model_of_that_size(tmp_path):
    base = surgery.open("base")
    name, rows = "model.embed_tokens.weight", base.specs["model.embed_tokens.weight"].shape[0] + 8
    grown = {
        **base.state_dict(),
        name: torch.cat([base[name], torch.ones(8, base[name].shape[1], dtype=torch.bfloat16)]),
    }
    (tmp_path / "grown").mkdir()
    save_file(grown, tmp_path / "grown" / "model.safetensors")
    (tmp_path / "grown" / "config.json").write_text(json.dumps({**base.config, "vocab_size": rows}))
    surgery.extract_lora("base", tmp_path / "grown", rank=1).save(tmp_path / "adapter")
    text = f"{{models: [{{model: base+{tmp_path}/adapter}}, {{model: {tmp_path}/grown}}], merge_method: linear}}"
    merged = recipe(text)
    assert torch.equal(merged[name], grown[name])
    merged.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    with pytest.raises(MismatchError, match="shapes must agree"):
        surgery.merge("base", tmp_path / "adapter", algorithm="ties")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A pair whose tensors are coded in several blocks, none of them a whole number of rows."""
    root = tmp_path_factory.mktemp("wide")
    generator = torch.Generator().manual_seed(0)
    base = {
        "q.weight": torch.randn(33000, 65, generator=generator).bfloat16(),
        "v": torch.randn(7, generator=generator),
    }
    tuned = {
        "q.weight": base["q.weight"] + 0.01 * torch.randn(33000, 65, generator=generator).bfloat16(),
        "v": base["v"] + 1,
    }
    for name, tensors in (("base", base), ("ft", tuned)):
        save_file(tensors, root / f"{name}.safetensors")
    surgery.extract_delta(root / "base.safetensors", root / "ft.safetensors").save(root / "task.delta")
    return root


@pytest.mark.parametrize("algorithm", ["task_arithmetic", "della", "ties"])
def test_blocks_and_passes_of_any_kind_meet_the_blocks_of_a_delta(wide, tmp_path, algorithm):
    options = {"algorithm": algorithm} | ({} if algorithm == "task_arithmetic" else {"density": 0.6})
    wanted = surgery.merge(wide / "base.safetensors", wide / "ft.safetensors", **options)["q.weight"]
    lazy = surgery.merge(wide / "base.safetensors", wide / "task.delta")
    for jobs, tuned in ((1, wide / "task.delta"), (4, wide / "task.delta"), (2, lazy)):
        merged = surgery.merge(wide / "base.safetensors", tuned, **options)
        merged.save(tmp_path / f"{jobs}.safetensors", jobs=jobs)
        assert torch.equal(load_file(tmp_path / f"{jobs}.safetensors")["q.weight"], wanted)


def spoil(wide, folder):
    """Write the base with one element changed, late in its last block."""
    tensors = load_file(wide / "base.safetensors")
    tensors["q.weight"][32500, 3] += 1
    save_file(tensors, folder / "spoiled.safetensors")
    return folder / "spoiled.safetensors"


def test_a_delta_on_another_base_is_refused_before_anything_is_published(wide, tmp_path):
    spoiled = spoil(wide, tmp_path)
    merges = [
        lambda: surgery.merge(spoiled, wide / "task.delta", algorithm="task_arithmetic"),
        lambda: surgery.merge(
            surgery.merge(spoiled, wide / "task.delta"), spoiled,
            algorithm="linear",
        ),
        lambda: recipe(
            f"{{models: [{{model: {wide}/task.delta}}], merge_method: task_arithmetic, "
            f"base_model: {spoiled}}}"
        ),
    ]  # fmt: skip
    for make in merges:
        with pytest.raises(
            MismatchError, match=r"q\.weight: is not the base's that the delta was made with: its bits differ"
        ):
            make().save(tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_adapter_that_was_taken_from_another_base_is_refused(tmp_path):
    text = "{models: [{model: ft-lora}, {model: other}], merge_method: task_arithmetic, base_model: other}"
    for make in (lambda: surgery.merge("other", "ft-lora", algorithm="ties"), lambda: recipe(text)):
        with pytest.raises(
            MismatchError, match=r"is not the tensor that ft-lora was taken from .* --allow-base-mismatch"
        ):
            make().save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    surgery.merge("other", "ft-lora", algorithm="ties", allow_base_mismatch=True).save(tmp_path / "forced")
    merge_recipe(text.encode(), allow_base_mismatch=True).save(tmp_path / "forced too")


def test_an_adapter_that_is_in_the_base_already_is_refused(tmp_path):
    surgery.merge("base", "ft-lora").save(tmp_path / "merged")
    with pytest.raises(MismatchError, match="already has the adapter ft-lora in it"):
        surgery.merge(tmp_path / "merged", "ft-lora", algorithm="ties")


def test_what_a_lazy_base_was_made_from_is_proved_when_an_adapter_is_merged_into_it(tmp_path, wide):
    spoiled = spoil(wide, tmp_path)
    key = "base_model.model.q.lora_"
    (tmp_path / "lora").mkdir()
    save_file(
        {f"{key}A.weight": torch.ones(1, 65), f"{key}B.weight": torch.ones(33000, 1)},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    inner = surgery.merge(spoiled, wide / "task.delta")
    with pytest.raises(MismatchError, match="its bits differ"):
        surgery.merge(inner, tmp_path / "lora").save(tmp_path / "out")
    inner = surgery.merge(wide / "base.safetensors", wide / "task.delta")
    both = surgery.merge(inner, tmp_path / "lora")
    tuned = surgery.open(wide / "ft.safetensors")["q.weight"]
    assert torch.equal(both["q.weight"], (tuned.double() + 1).bfloat16())
    both.save(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{models: [{model: style}, {model: ft}], merge_method: linear}", "style is an adapter, not a model; write BASE"),
        ("{models: [{model: task.delta}, {model: ft}], merge_method: linear}", "task.delta is an exact delta, not a model"),
        ("{models: [{model: ft}], merge_method: ties, base_model: task.delta}", "task.delta is an exact delta, not a model"),
        (
            "{models: [{model: task.delta}], merge_method: ties, base_model: base+style}",
            "task.delta is an exact delta, and its base_model base\\+style has one already; make a stage",
        ),
        ("{models: [{model: ft+base}], merge_method: ties, base_model: base}", "base: has no adapter_config.json"),
    ],
    ids=range(5),
)  # fmt: skip
def test_recipes_in_which_it_has_no_base_are_refused(text, message):
    with pytest.raises((UnsupportedError, SurgeryError), match=message):
        recipe(text)


def test_an_algorithm_without_a_base_takes_none():
    for change, kind in (("style", "an adapter"), ("task.delta", "an exact delta")):
        with pytest.raises(UsageError, match=f"{change} is {kind}, which is a model only together with its base"):
            surgery.merge("base", change, algorithm="linear")
    with pytest.raises(UsageError, match="no algorithm does"):
        surgery.merge("ft", "task.delta", algorithm="ties", reverse=True)


def prefixed(folder, source, prefix, **more):
    """Write a model's tensors under longer names, as AutoModelForCausalLM does AutoModel's."""
    tensors = {f"{prefix}{name}": tensor for name, tensor in surgery.open(source).items()}
    folder.mkdir()
    save_file(tensors | more, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("longer", list(itertools.product([False, True], repeat=2)), ids=str)
def test_recipes_bring_names_together_as_diff_does(tmp_path, longer):
    base = prefixed(tmp_path / "b", "base", "model." if longer[0] else "")
    tuned = prefixed(tmp_path / "t", "ft", "model." if longer[1] else "")
    merged = recipe(f"{{models: [{{model: {tuned}}}], merge_method: task_arithmetic, base_model: {base}}}")
    assert set(merged) == set(surgery.open(base))
    wanted = surgery.merge(surgery.open(base), surgery.open(tuned), algorithm="task_arithmetic")
    assert contents(merged) == contents(wanted)
    assert any("prefix" in note or "without" in note for note in merged.notes) == (longer[0] != longer[1])
    merged.save(tmp_path / "out")


def test_stacked_layers_with_and_without_a_prefix_get_the_first_models_names(tmp_path):
    longer = prefixed(tmp_path / "longer", "ft", "model.")
    merged = recipe(
        f"""
        slices:
          - {{sources: [{{model: base, layer_range: [0, 1]}}]}}
          - {{sources: [{{model: {longer}, layer_range: [1, 2]}}]}}
        merge_method: passthrough
        """
    )
    assert set(merged) == set(surgery.open("base"))
    tuned = surgery.open("ft")
    for name in (name for name in merged if ".layers.1." in name):
        assert torch.equal(merged[name], tuned[name])


def test_a_change_of_a_model_under_other_names_still_proves_its_base(tmp_path):
    base = prefixed(tmp_path / "b", "base", "model.")
    merged = recipe(f"{{models: [{{model: base+task.delta}}], merge_method: task_arithmetic, base_model: {base}}}")
    merged.save(tmp_path / "out")
    wrong = recipe(f"{{models: [{{model: other+task.delta}}], merge_method: task_arithmetic, base_model: {base}}}")
    with pytest.raises(MismatchError, match="was made with"):
        wrong.save(tmp_path / "wrong")
