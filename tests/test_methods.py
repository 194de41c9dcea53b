"""What ``surgery add`` writes, with PEFT as judge: it loads, changes nothing at first, and trains what it declares."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

import surgery
from surgery.cli.main import main
from surgery.errors import MismatchError, UnsupportedError, UsageError
from tests.families import build, saved

warnings.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models"))


def batch(model):
    tokens = torch.tensor([[3, 9, 27, 17, 51, 11]])
    if model.config.model_type == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), "labels": torch.tensor([1])}
    if model.config.model_type == "whisper":
        return {"input_features": torch.linspace(-1, 1, 256).reshape(1, 8, 32), "labels": tokens}
    labels = torch.tensor([1]) if "SequenceClassification" in type(model).__name__ else tokens
    return {"input_ids": tokens, "labels": labels}


def judged(family, folder, tmp_path, method, target=(), source=None, **settings):
    """Write an addition, load it with PEFT, and hold the names it saves against the file's."""
    added = surgery.add(
        source or saved(family, folder), method, target=target, names_in_memory=family == "vit", base_name="tiny",
        **settings,
    )  # fmt: skip
    added.save(tmp_path / "out")
    model = build(family)
    before = model(**batch(model)).logits.detach()
    file = load_file(tmp_path / "out" / "adapter_model.safetensors")
    if added.document["peft_type"] in PROMPT_TYPES:  # PEFT refuses to go on with those from a folder: as a new method
        config = PeftConfig.from_pretrained(tmp_path / "out", inference_mode=False)
        loaded = get_peft_model(model, config).eval()
        result = set_peft_model_state_dict(loaded, file)
        assert set(result.unexpected_keys) <= {"prompt_embeddings"}  # which PEFT takes to the prompt encoder afterwards
    else:
        loaded = PeftModel.from_pretrained(model, tmp_path / "out", is_trainable=True).eval()
    kept = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    # With bias="all" PEFT saves the biases of modules that it saves whole once more, under its wrappers' names.
    assert {key for key in kept if not re.search(r"\.(modules_to_save|original_module)\.bias$", key)} == file.keys()
    for key, value in file.items():
        assert torch.equal(kept[key].to(value.dtype), value), key
    return added, loaded, before


PROMPT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING")


def train(loaded, steps=2):
    """Take optimiser steps, and return the parameters that changed, as the file calls them.

    A first step moves of two factors only the one whose partner is not zero; the second moves both.
    """
    before = {name: value.detach().clone() for name, value in loaded.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in loaded.parameters() if p.requires_grad], lr=0.01, eps=1e-30)
    for _ in range(steps):
        optimiser.zero_grad()
        loaded(**batch(loaded.get_base_model())).loss.backward()
        optimiser.step()
    changed = set()
    for name, value in loaded.state_dict().items():
        if not torch.equal(before[name], value):
            key = name.replace(".modules_to_save.default", "").replace(".default", "")
            key = key.removesuffix(".weight") if "lora_magnitude_vector" in key else key
            changed.add("prompt_embeddings" if key.startswith("prompt_encoder") else key)
    return changed


UNCHANGED = [
    ("llama", "lora", {}),
    ("llama", "lora", {"r": 2, "alpha": 4, "rslora": True}),
    ("llama", "lora", {"dora": True}),
    ("llama", "lora", {"target": ("role:embedding", "role:up"), "r": 4}),
    ("gpt2", "lora", {"r": 4}),
    ("gpt2", "lora", {"target": ("role:qkv",), "dora": True}),
    ("bert", "lora", {}),
    ("t5", "lora", {}),
    ("phi3", "lora", {}),
    ("vit", "lora", {"target": ("role:q", "*projection"), "r": 4}),
    ("llama", "ia3", {}),
    ("gpt2", "ia3", {}),
    ("bert", "ia3", {}),
    ("qwen3", "ln-tuning", {}),
    ("bert", "ln-tuning", {}),
    ("bert", "bitfit", {}),
    ("bert", "bitfit", {"norms": True}),
    ("gpt2", "bitfit", {}),
    ("qwen2", "bitfit", {}),
]


@pytest.mark.parametrize(("family", "method", "settings"), UNCHANGED, ids=str)
def test_peft_loads_it_nothing_changes_and_training_moves_what_is_declared(family, method, settings, folder, tmp_path):
    added, loaded, before = judged(family, folder, tmp_path, method, **settings)
    assert added.addition.unchanged
    after = loaded(**batch(loaded.get_base_model())).logits
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    declared = set(added.trainable)
    assert train(loaded) >= declared - _without_gradient(family, declared)
    assert train(loaded) <= declared


def _without_gradient(family, declared):
    """Name what can get no gradient whatever is trained: biases of keys, which softmax does not see."""
    return {name for name in declared if name.endswith(("key.bias", "k_proj.bias")) and family in ("bert", "qwen2")}


PROMPTS = [
    ("llama", "prompt-tuning", {"length": 3}),
    ("llama", "prompt-tuning", {"length": 3, "tokens": (5, 7)}),
    ("bert", "prompt-tuning", {"length": 3}),
    ("t5", "prompt-tuning", {"length": 3}),
    ("llama", "prefix-tuning", {"length": 3}),
    ("gpt2", "prefix-tuning", {"length": 3}),
    ("qwen3", "prefix-tuning", {"length": 3}),
]


@pytest.mark.parametrize(("family", "method", "settings"), PROMPTS, ids=str)
def test_peft_loads_prompts_and_one_step_trains_them_alone(family, method, settings, folder, tmp_path):
    added, loaded, before = judged(family, folder, tmp_path, method, **settings)
    assert not added.addition.unchanged
    assert loaded(**batch(loaded.get_base_model())).logits.shape[-1] == before.shape[-1]
    assert train(loaded, steps=1) == set(added.trainable)


def test_a_model_without_a_task_gets_prompts_for_features_and_is_told(folder, tmp_path):
    added = surgery.add(saved("bert-mlm", folder), "prompt-tuning", length=3)
    assert "-p task=" in added.notes[0]
    added.save(tmp_path / "out")
    loaded = PeftModel.from_pretrained(build("bert-mlm"), tmp_path / "out").eval()
    assert torch.equal(loaded.get_prompt(1)[0], added["prompt_embeddings"])
    with pytest.raises(UsageError, match="no prompts for task MASKED_LM"):
        surgery.add(saved("bert-mlm", folder), "prompt-tuning", task="MASKED_LM")


def test_the_command_says_what_it_wrote_and_refuses_to_write_it_twice(folder, tmp_path, capsys):
    arguments = ["add", "lora", saved("llama", folder), "-p", "r=2", "-o", str(tmp_path / "out")]
    for code, said in ((0, "224 parameters; 8 new tensors"), (7, "exists")):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert (stop.value.code or 0) == code
        assert said in "".join(capsys.readouterr())


def test_the_command_says_which_tensors_it_chose(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["add", "lora", saved("llama", folder), "-p", "r=2", "--target", "re:.*1.*q_proj,v", "--dry-run"])
    assert "matches no tensor" in capsys.readouterr().err  # a comma in a regular expression is its own
    with pytest.raises(SystemExit):
        main(["add", "lora", saved("llama", folder), "-p", "r=2", "--target", "v,*.1.*q_proj", "--dry-run"])
    said = capsys.readouterr().out
    assert re.search(r"model\.layers\.\*\.self_attn\.v_proj\.weight +2 +8×16", said)
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj\.weight +1 +16×16", said)


def test_p_tuning_serves_the_virtual_tokens_of_the_file(folder, tmp_path):
    added = surgery.add(saved("llama", folder), "p-tuning", length=3)
    added.save(tmp_path / "out")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "out").eval()
    assert torch.equal(loaded.get_prompt(1)[0], added["prompt_embeddings"])


def test_prompts_of_given_tokens_are_their_embeddings_repeated(folder):
    added = surgery.add(saved("llama", folder), "prompt-tuning", length=5, tokens="5,7")
    rows = build("llama").get_input_embeddings().weight.detach()
    assert torch.equal(added["prompt_embeddings"], rows[[5, 7, 5, 7, 5]])


def test_grouped_queries_make_prefixes_narrower(folder):
    assert surgery.add(saved("llama", folder), "prefix-tuning", length=3).parameters == 3 * 2 * 2 * 8
    assert surgery.add(saved("gpt2", folder), "prefix-tuning", length=3).parameters == 3 * 2 * 2 * 16


def test_doras_magnitude_is_the_norm_of_the_rows(folder):
    added = surgery.add(saved("llama", folder), "lora", dora=True)
    name = "model.layers.1.self_attn.v_proj"
    weight = build("llama").state_dict()[f"{name}.weight"].double()
    expected = weight.square().sum(1).sqrt().float()
    torch.testing.assert_close(added[f"base_model.model.{name}.lora_magnitude_vector"], expected)


def test_lora_starts_kaiming_uniform_and_zero_keyed_by_name(folder):
    first, again = (surgery.add(saved("llama", folder), "lora", r=8) for _ in range(2))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    a = first[key]
    assert torch.equal(a, again[key])
    assert a.abs().max() <= 16**-0.5 < 1.1 * a.abs().max()
    assert not torch.equal(a, first[key.replace("layers.0", "layers.1")])
    assert not torch.equal(a, surgery.add(saved("llama", folder), "lora", r=8, seed=1)[key])
    assert not first[key.replace("lora_A", "lora_B")].any()


def test_the_same_addition_is_the_same_bytes(folder, tmp_path):
    for name in "ab":
        surgery.add(saved("bert", folder), "houlsby", size=4).save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["adapter.safetensors", "adapter_config.json", "surgery.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_merging_what_was_just_added_gives_the_base(folder):
    added = surgery.add(saved("llama", folder), "lora")
    base = surgery.open(saved("llama", folder))
    assert all(torch.equal(value, base[name]) for name, value in added.merge().items())
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        surgery.add(base, "houlsby", size=4).merge()


# The names of AdapterHub's adapters 1.3. The library itself needs another transformers, so that this is a check of the
# layout: `make adapterhub` asks its loader.
@pytest.mark.parametrize(
    ("family", "method", "places"),
    [
        ("bert", "houlsby", ("bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output")),
        ("bert", "pfeiffer", ("bert.encoder.layer.{}.output",)),
        ("roberta", "parallel", ("roberta.encoder.layer.{}.output",)),
        ("gpt2", "houlsby", ("transformer.h.{}.attention_adapters", "transformer.h.{}.output_adapters")),
        ("llama", "pfeiffer", ("model.layers.{}.output_adapters",)),
        ("llama", "lin", ("model.layers.{}.output_adapters",)),
    ],
)
def test_bottlenecks_have_adapterhubs_keys_and_configuration(family, method, places, folder, tmp_path):
    added = surgery.add(saved(family, folder), method, size=4, name="task")
    added.save(tmp_path / "out")
    file = load_file(tmp_path / "out" / "adapter.safetensors")
    down = "adapter_down.1" if method == "lin" else "adapter_down.0"
    shapes = {f"{down}.weight": (4, 16), f"{down}.bias": (4,), "adapter_up.weight": (16, 4), "adapter_up.bias": (16,)}
    if method == "lin":
        norms = ("adapter_norm_before", "adapter_down.0")  # two names of one norm in adapters
        shapes |= {f"{norm}.{part}": (16,) for norm in norms for part in ("weight", "bias")}
    expected = {
        f"{place.format(layer)}.adapters.task.{part}": shape
        for layer in range(2)
        for place in places
        for part, shape in shapes.items()
    }
    assert {key: tuple(value.shape) for key, value in file.items()} == expected
    assert not any(value.any() for key, value in file.items() if "adapter_up" in key)
    document = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert document["name"] == "task"
    assert document["version"].startswith("adapters.")
    assert document["hidden_size"] == 16
    config = document["config"]
    assert (config["mh_adapter"], config["output_adapter"]) == (method == "houlsby", True)
    assert config["is_parallel"] is (method == "parallel")
    assert config["ln_before"] is (method == "lin")
    assert int(document["hidden_size"] // config["reduction_factor"]) == 4


@pytest.mark.parametrize("size", range(1, 17))
def test_adapterhub_finds_the_size_of_any_bottleneck(size, folder):
    document = surgery.add(saved("bert", folder), "pfeiffer", size=size).document
    assert int(16 // document["config"]["reduction_factor"]) == size


def test_adapterdrop_leaves_blocks_out(folder):
    added = surgery.add(saved("bert", folder), "houlsby", size=4, leave_out="0")
    assert all(key.startswith("bert.encoder.layer.1.") for key in added.tensors)
    assert added.document["config"]["leave_out"] == [0]


def test_plain_methods_write_tensors_and_names(folder, tmp_path):
    top = surgery.add(saved("llama", folder), "ft-topk", k=1)
    top.save(tmp_path / "top")
    names = json.loads((tmp_path / "top" / "trainable.json").read_text())
    assert set(names) == {name for name in build("llama").state_dict() if name.startswith("model.layers.1.")}
    assert top.parameters == sum(build("llama").state_dict()[name].numel() for name in names)
    surgery.add(saved("llama", folder), "head", labels=5).save(tmp_path / "head")
    head = load_file(tmp_path / "head" / "added.safetensors")
    assert {key: tuple(value.shape) for key, value in head.items()} == {
        "classifier.weight": (5, 16), "classifier.bias": (5,),
    }  # fmt: skip
    surgery.add(saved("gpt2", folder), "prelayer", prefix=3, infix=2).save(tmp_path / "pre")
    pre = load_file(tmp_path / "pre" / "added.safetensors")
    assert {key: tuple(value.shape) for key, value in pre.items()} == {
        f"transformer.h.{block}.prelayer.{place}": (length, 16)
        for block in range(2)
        for place, length in (("prefix", 3), ("infix", 2))
    }


def test_biases_that_are_not_there_can_be_created(folder):
    added = surgery.add(saved("llama", folder), "bitfit", create=True)
    assert added["model.layers.0.self_attn.k_proj.bias"].shape == (8,)
    assert not any(value.any() for value in added.state_dict().values())
    assert len(added.tensors) == 2 * 7


REFUSED = [
    ("llama", "lora", {"target": "role:wobble"}, MismatchError, r"role:wobble.* matches no tensor"),
    ("llama", "lora", {"target": "q_prj"}, MismatchError, r"did you mean q_proj"),
    ("llama", "lora", {"r": 17}, MismatchError, r"rank 17 is larger than the matrix, 16×16; -p r=8 at most"),
    ("llama", "lora", {"target": "role:norm"}, MismatchError, r"is 1-D: LoRA factors matrices"),
    ("llama", "bitfit", {}, MismatchError, r"no biases to train; -p create=true"),
    ("llama", "lora", {"r": 0}, UsageError, r"r must be at least 1"),
    ("llama", "lora", {"rank": 4}, UsageError, r"no parameter 'rank'"),
    ("llama", "lora", {"r": "four"}, UsageError, r"r takes a whole number, not 'four'"),
    ("llama", "lorra", {}, UsageError, r"did you mean lora"),
    ("llama", "ln-tuning", {"target": "role:q"}, MismatchError, r"is taken for q, not a norm"),
    ("llama", "houlsby", {"size": 17}, MismatchError, r"bottleneck of 17 does not fit"),
    ("llama", "houlsby", {"size": 4, "leave_out": "2"}, MismatchError, r"block 2 of 2"),
    ("llama", "head", {"name": "lm_head"}, MismatchError, r"has a module lm_head already"),
    ("llama", "ft-topk", {"k": 3}, MismatchError, r"2 blocks, fewer than k=3"),
    ("t5", "ft-topk", {}, MismatchError, r"2 stacks of blocks.*--target"),
    ("llama", "prompt-tuning", {"tokens": "64"}, MismatchError, r"no token 64"),
    ("llama", "prompt-tuning", {"target": "role:q"}, UsageError, r"nothing to choose"),
    ("mixtral", "ia3", {"target": "w2"}, UnsupportedError, r"is an expert"),
    ("mixtral", "lora", {"target": "w1"}, MismatchError, r"w3.*must be adapted with .*experts.0.w1.*role:gate,role:up"),
    ("mixtral", "lora", {"target": "re:.*experts.0.*", "r": 2}, MismatchError, r"experts.1.*must be adapted with"),
    ("llama", "prompt-tuning", {"text": "hello"}, MismatchError, r"no tokenizer.json.*-p tokens"),
    ("llama", "prompt-tuning", {"text": "hello", "tokens": "1"}, UsageError, r"drop one"),
    ("llama", "prompt-tuning", {"labels": 3, "head": "wobble"}, UsageError, r"called classifier or score"),
    ("bert", "prompt-tuning", {"labels": 3}, MismatchError, r"has a head already"),
]


@pytest.mark.parametrize(("family", "method", "settings", "error", "said"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_does_not_fit_is_refused_in_one_line(family, method, settings, error, said, folder):
    with pytest.raises(error, match=said) as refusal:
        surgery.add(saved(family, folder), method, **settings)
    assert "\n" not in str(refusal.value)


def test_unknown_layouts_are_not_guessed():
    model = {"h.0.wobble.weight": torch.ones(4, 4)}
    with pytest.raises(MismatchError, match=r"no rule finds q or v.*--target"):
        surgery.add(model, "lora", r=2)
    assert surgery.add(model, "lora", target="wobble", r=2).parameters == 16
