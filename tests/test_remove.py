"""``surgery remove``: whole models that PEFT wrapped and saved, and AdapterHub's names, come apart again bit for bit."""

from __future__ import annotations

import json
import shutil
import warnings

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import MismatchError, UnsupportedError, UsageError
from tests.families import build, saved

warnings.filterwarnings("ignore")


def wrapped(family, config, *more):
    """Wrap a tiny model by PEFT, and give the method's tensors values that are not those at the start."""
    model = get_peft_model(build(family), config)
    for name, adapter in more:
        model.add_adapter(name, adapter)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if value.requires_grad and "base_layer" not in name and value.dtype.is_floating_point:
            value.data += 0.1 * torch.randn(value.shape, generator=generator)
    return model.eval()


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


LORA = {"r": 2, "lora_alpha": 6}
INSIDE = {
    "lora": ("llama", peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
    "lora-embedding": ("llama", peft.LoraConfig(**LORA, target_modules=["embed_tokens", "up_proj"])),
    "lora-conv1d": ("gpt2", peft.LoraConfig(**LORA, target_modules=["c_attn"], fan_in_fan_out=True)),
    "dora": ("llama", peft.LoraConfig(**LORA, target_modules=["q_proj"], use_dora=True)),
    "lora-saved": (
        "bert",
        peft.LoraConfig(
            **LORA, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["bert.embeddings.LayerNorm"]
        ),
    ),
    "lora-tokens": ("llama", peft.LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[1, 5])),
    "lora-experts": (
        "mixtral",
        peft.LoraConfig(
            **LORA, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
    ),
    "ia3": ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ln-tuning": ("qwen3", peft.LNTuningConfig(target_modules=["input_layernorm", "q_norm"], task_type="CAUSAL_LM")),
    "prompt": ("llama", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prompt-head": ("bert", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")),
    "p-tuning": (
        "llama", peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
    ),
    "prefix": ("llama", peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "adaption": ("llama", peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")),
    "vera": ("llama", peft.VeraConfig(r=2, target_modules=["q_proj"])),
    "loha": ("llama", peft.LoHaConfig(r=2, target_modules=["q_proj"])),
    "oft": ("llama", peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"])),
}  # fmt: skip


@pytest.mark.parametrize("case", INSIDE)
def test_what_peft_wrapped_comes_apart_again_bit_for_bit(case):
    family, config = INSIDE[case]
    whole = wrapped(family, config).state_dict()
    removed = surgery.remove(whole)
    assert equal(removed, build(family).state_dict())
    assert len(removed.taken) + len(removed) + ("word_embeddings.weight" in whole) == len(whole)


@pytest.mark.parametrize("mark", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_a_training_tool_puts_before_every_name_is_no_hindrance(mark):
    family, config = INSIDE["lora"]
    whole = {mark + name: value for name, value in wrapped(family, config).state_dict().items()}
    assert equal(surgery.remove(whole), build(family).state_dict())
    inside = {name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): value for name, value in whole.items()}
    assert equal(surgery.remove(inside), build(family).state_dict())


def test_loralibs_bare_factors_beside_their_weights_are_taken_out():
    base = build("llama").state_dict()
    extra = {
        "model.layers.0.self_attn.q_proj.lora_A": torch.ones(2, 16),
        "model.layers.0.self_attn.q_proj.lora_B": torch.ones(16, 2),
    }
    removed = surgery.remove({**base, **extra})
    assert equal(removed, base)
    assert {taken.key for taken in removed.taken} == {f"base_model.model.{name}.weight" for name in extra}


# As adapters 1.3 names them in the state dict of a model (its own library wants another transformers than PEFT's).
HUB = {
    "bert.encoder.layer.0.output.adapters.task.adapter_down.0.weight": (4, 16),
    "bert.encoder.layer.0.output.adapters.task.scaling": (1,),
    "bert.encoder.layer.0.attention.self.query.loras.task.lora_A": (8, 16),
    "bert.encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.task.self_prefix.wte.weight": (3, 16),
    "bert.encoder.layer.0.attention.self.prefix_tuning.prefix_gates.task.weight": (1, 16),
    "bert.encoder.layer.0.reft_layer.refts.task.units.0.learned_source.weight": (1, 16),
    "bert.encoder.layer.0.output.adapter_fusion_layer.a,b.query.weight": (16, 16),
    "bert.invertible_adapters.task.F.0.weight": (4, 8),
    "bert.prompt_tuning.prompt_tunings.task.prompt_embedding.weight": (3, 16),
    "heads.task.1.weight": (16, 16),
}


def test_what_adapterhub_puts_into_a_model_is_taken_out():
    base = build("bert").state_dict()
    extra = {name: torch.ones(shape) for name, shape in HUB.items()}
    copy = {"bert.prompt_tuning.base_model_embeddings.weight": base["bert.embeddings.word_embeddings.weight"].clone()}
    removed = surgery.remove({**base, **extra, **copy})
    assert equal(removed, base)
    assert set(removed.methods) == {"bottleneck", "AdapterHub's other methods", "AdapterHub's heads"}
    copy["bert.prompt_tuning.base_model_embeddings.weight"][3, 3] += 1
    with pytest.raises(MismatchError, match="is no copy of an embedding"):
        surgery.remove({**base, **extra, **copy})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("family", "method", "settings", "given"),
    [
        ("bert", "houlsby", {"size": 4, "leave_out": (1,)}, {"method": "houlsby"}),
        ("gpt2", "pfeiffer", {"size": 4}, {"method": "pfeiffer"}),
        ("llama", "lin", {"size": 4, "name": "task"}, {"method": "lin"}),
    ],
)
def test_bottlenecks_saved_within_a_model_are_kept_as_the_folder_they_came_from(
    family, method, settings, given, folder, tmp_path
):
    added = surgery.add(saved(family, folder), method, **settings)
    whole = {**build(family).state_dict(), **added.state_dict()}
    removed = surgery.remove(whole)
    assert equal(removed, build(family).state_dict())
    removed.config = surgery.open(saved(family, folder)).config
    added.save(tmp_path / "added")
    removed.keep(**given).save(tmp_path / "kept")
    assert equal(
        load_file(tmp_path / "kept" / "adapter.safetensors"), load_file(tmp_path / "added" / "adapter.safetensors")
    )
    documents = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("kept", "added")]
    assert documents[0] == documents[1]


KEPT = {
    "lora": {"alpha": 6}, "lora-embedding": {"alpha": 6}, "lora-conv1d": {"alpha": 6}, "dora": {"alpha": 6},
    "lora-saved": {"alpha": 6}, "ia3": {}, "ln-tuning": {}, "prompt": {}, "prompt-head": {}, "prefix": {},
}  # fmt: skip


def whole_folder(case, folder, path):
    """Save a wrapped model whole, beside its configuration, as training scripts do."""
    family, config = INSIDE[case]
    model = wrapped(family, config)
    path.mkdir()
    save_file(
        {name: value.contiguous().clone() for name, value in model.state_dict().items()}, path / "model.safetensors"
    )
    shutil.copy(f"{saved(family, folder)}/config.json", path)
    return family, model


def inputs(family):
    return {"input_ids": torch.tensor([[3, 9, 27, 17, 51, 11]])}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept_loads_in_peft_and_computes_what_the_whole_did(case, folder, tmp_path, capsys):
    family, model = whole_folder(case, folder, tmp_path / "whole")
    arguments = ["remove", str(tmp_path / "whole"), "-o", str(tmp_path / "base"), "--keep-to", str(tmp_path / "kept")]
    for key, value in KEPT[case].items():
        arguments += ["-p", f"{key}={value}"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code, capsys.readouterr().err
    assert equal(load_file(tmp_path / "base" / "model.safetensors"), build(family).state_dict())
    loaded = PeftModel.from_pretrained(build(family), tmp_path / "kept").eval()
    torch.testing.assert_close(loaded(**inputs(family)).logits, model(**inputs(family)).logits, rtol=0, atol=0)


def test_a_configuration_beside_the_weights_tells_what_tensors_do_not(folder, tmp_path):
    family, model = whole_folder("lora-tokens", folder, tmp_path / "whole")
    with pytest.raises(UsageError, match="do not tell their configuration; --adapter-config"):
        surgery.remove(tmp_path / "whole").keep(alpha=6)
    model.peft_config["default"].save_pretrained(tmp_path / "whole")
    surgery.remove(tmp_path / "whole").keep().save(tmp_path / "kept")
    loaded = PeftModel.from_pretrained(build(family), tmp_path / "kept").eval()
    assert torch.equal(loaded(**inputs(family)).logits, model(**inputs(family)).logits)
    with pytest.raises(MismatchError, match=r"rank 2, adapter_config\.json says 4"):
        surgery.remove(tmp_path / "whole").keep(document={"peft_type": "LORA", "r": 4, "lora_alpha": 4})


def test_one_of_several_adapters_is_kept(tmp_path):
    family, config = INSIDE["lora"]
    other = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["o_proj"], task_type="CAUSAL_LM")
    model = wrapped(family, config, ("other", other))
    removed = surgery.remove(model.state_dict())
    assert equal(removed, build(family).state_dict())
    with pytest.raises(UsageError, match="adapters default, other; --adapter NAME"):
        removed.keep(alpha=6)
    with pytest.raises(UsageError, match="no adapter 'third'; there are default, other"):
        removed.keep(adapter="third")
    removed.keep(adapter="other", alpha=4).save(tmp_path / "kept")
    loaded = PeftModel.from_pretrained(build(family), tmp_path / "kept").eval()
    model.set_adapter("other")
    assert torch.equal(loaded(**inputs(family)).logits, model(**inputs(family)).logits)


BASE = {"h.0.q.weight": torch.ones(2, 2), "h.0.v.weight": torch.zeros(2, 2)}
REFUSED = [
    (BASE, MismatchError, "no tensor that a method known here is told by; convert --drop"),
    ({"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}, MismatchError, "it is an adapter, not"),
    ({**BASE, "h.0.q.ia3_l": torch.ones(2, 1), "h.0.q.hada_w1_a": torch.ones(2, 1)}, UnsupportedError, "hada_w1_a: is called like a method's"),
    ({**BASE, "h.0.v.modules_to_save.default.bias": torch.ones(2)}, MismatchError, "base's own is not in the file"),
    ({**BASE, "h.0.q.base_layer.weight": torch.ones(2, 2), "h.0.q.ia3_l": torch.ones(2, 1)}, MismatchError, "would be the name of"),
    ({"base_model.model.q.base_layer.weight": torch.ones(2, 2), "optimiser": torch.ones(2)}, MismatchError, "lies outside of base_model"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "error", "said"), REFUSED, ids=lambda value: str(value)[-25:])
def test_what_cannot_be_told_is_refused_in_one_line(state, error, said):
    with pytest.raises(error, match=said) as refusal:
        surgery.remove(state)
    assert "\n" not in str(refusal.value)


def test_a_base_whose_own_names_look_like_a_methods_is_spared():
    state = {**BASE, "adapter.layers.0.conv.weight": torch.ones(2, 2), "h.0.q.ia3_l": torch.ones(2, 1)}
    with pytest.raises(UnsupportedError, match="--spare it"):
        surgery.remove(state)
    assert surgery.remove(state, spare=["adapter.*"]).keys() == {*BASE, "adapter.layers.0.conv.weight"}
    with pytest.raises(MismatchError, match="--spare 'wobble' matches no tensor"):
        surgery.remove(state, spare=["adapter.*", "wobble"])


@pytest.mark.parametrize(
    ("field", "said"),
    [({"bias": "all"}, "biases were trained in place"), ({"init_lora_weights": "pissa"}, "changed the base")],
)
def test_a_configuration_that_says_that_the_base_was_changed_is_believed(field, said, folder, tmp_path):
    whole_folder("lora", folder, tmp_path / "whole")
    (tmp_path / "whole" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **LORA, **field}))
    with pytest.raises(MismatchError, match=said):
        surgery.remove(tmp_path / "whole")


KEPT_WRONG = [
    ("lora", {}, UsageError, "scale alpha/r is not in its tensors; -p alpha=N"),
    ("lora", {"alpha": 6, "r": 4}, MismatchError, r"is 2×16 here, and 4×16 in what add lora gives"),
    ("lora", {"alpha": 6, "method": "ia3"}, UsageError, "tensors of lora, not of ia3"),
    ("lora-experts", {"alpha": 6}, UsageError, "ranks of its modules differ"),
    ("p-tuning", {}, UnsupportedError, "no file is known for"),
    ("vera", {}, UnsupportedError, "no file is known for PEFT's other methods"),
]


@pytest.mark.parametrize(("case", "settings", "error", "said"), KEPT_WRONG)
def test_what_cannot_be_kept_is_refused_in_one_line(case, settings, error, said):
    family, config = INSIDE[case]
    with pytest.raises(error, match=said):
        surgery.remove(wrapped(family, config).state_dict()).keep(**settings)


def test_bottlenecks_do_not_tell_their_activation_so_the_method_is_asked_for(folder):
    added = surgery.add(saved("bert", folder), "houlsby", size=4)
    removed = surgery.remove({**build("bert").state_dict(), **added.state_dict()})
    with pytest.raises(UsageError, match="could be houlsby or pfeiffer or parallel or lin; say which"):
        removed.keep()
    with pytest.raises(MismatchError, match="nothing in what add pfeiffer gives"):
        removed.keep(method="pfeiffer")


def test_a_refusal_leaves_nothing_behind(folder, tmp_path, capsys):
    whole_folder("lora", folder, tmp_path / "whole")
    for arguments in (
        ["--keep-to", str(tmp_path / "kept")], ["-p", "alpha=6"], ["--keep-to", str(tmp_path / "base"), "-p", "alpha=6"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(["remove", str(tmp_path / "whole"), "-o", str(tmp_path / "base"), *arguments])
        assert stop.value.code == UsageError.exit_code
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_dry_run_shows_what_would_be_taken_out(folder, tmp_path, capsys):
    whole_folder("lora", folder, tmp_path / "whole")
    with pytest.raises(SystemExit) as stop:
        main(["remove", str(tmp_path / "whole"), "-o", str(tmp_path / "base"), "--dry-run"])
    assert not stop.value.code
    assert "Taken out" in (said := capsys.readouterr().out)
    assert "lora    default        8" in said
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("method", "settings"), [("prelayer", {}), ("head", {}), ("bitfit", {"create": True}), ("houlsby", {"size": 4})]
)
def test_what_add_gave_is_taken_out_again(method, settings, folder):
    base = surgery.open(saved("llama", folder))
    added = surgery.add(base, method, **settings)
    whole = {**base.state_dict(), **{key: value + 1 for key, value in added.state_dict().items()}}
    assert equal(added.remove(whole), base.state_dict())
    with pytest.raises(MismatchError, match=r"matches no tensor|no tensor that a method"):
        added.remove(base)


@pytest.mark.parametrize(("family", "method"), [("llama", "ft-topk"), ("bert", "bitfit")])
def test_what_trains_the_base_itself_cannot_be_taken_out(family, method, folder):
    with pytest.raises(UnsupportedError, match="trains the base's own parameters"):
        surgery.add(saved(family, folder), method).remove({})
