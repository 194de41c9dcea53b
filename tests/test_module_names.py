"""Names in memory: what surgery says is what transformers does when it loads the same checkpoint, told by values."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import MismatchError
from surgery.sources.module_names import available, module_names

transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 11,
    "max_position_embeddings": 12,
}  # fmt: skip
GQA = {**TEXT, "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": None}
IMAGE = {
    "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16, "image_size": 4,
    "patch_size": 2,
}  # fmt: skip
EXPERTS = {**GQA, "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}

MODELS = {
    "BertForMaskedLM": TEXT,
    "BertModel": TEXT,
    "LlamaForCausalLM": GQA,
    "Qwen2ForCausalLM": GQA,
    "GPT2LMHeadModel": {"n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 12, "vocab_size": 11},
    "ViTForImageClassification": IMAGE,
    "ViTModel": IMAGE,
    "Dinov2Model": {**IMAGE, "use_swiglu_ffn": True},
    "DINOv3ViTModel": IMAGE,
    "CLIPModel": {"projection_dim": 4, "text_config": TEXT, "vision_config": IMAGE},
    "LlavaForConditionalGeneration": {
        "text_config": {**GQA, "model_type": "llama"},
        "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
        "image_token_index": 10,
    },
    "MixtralForCausalLM": EXPERTS,
    "Qwen3MoeForCausalLM": EXPERTS,
}
SAME_NAMES = ("BertForMaskedLM", "BertModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel")
VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **IMAGE}
QUERY = "vit.encoder.layer.1.attention.attention.query.weight"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        pytest.fail("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def build(name):
    model_class = getattr(transformers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(model_class.config_class(**MODELS[name]))
    torch.manual_seed(0)
    with torch.no_grad():  # no two tensors alike, so that values tell which is which
        for tensor in model.parameters():
            tensor.normal_()
    return model


def save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return read(folder)


def read(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def load(name, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, name).from_pretrained(folder)


def rewrite(folder, rename):
    disk = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in disk.items()}, folder / "model.safetensors", {"format": "pt"})
    return read(folder)


def by_value(disk, model):
    """Pair names by nothing but equal values."""
    memory = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    pairs = {}
    for name, tensor in disk.items():
        same = [other for other, value in memory.items() if torch.equal(tensor, value)]
        if same:
            (pairs[name],) = same
    return pairs


# --- what the loader does


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_that_loading_only_renames_is_mapped_to_where_its_values_go(tmp_path, name):
    config, disk = save(build(name), tmp_path)
    found = module_names(config, disk.keys())
    assert found == by_value(disk, load(name, tmp_path))
    if name in SAME_NAMES:
        assert found == {tensor: tensor for tensor in disk}


@pytest.mark.parametrize(
    ("name", "on_disk", "in_memory"),
    [
        ("ViTForImageClassification", QUERY, "vit.layers.1.attention.q_proj.weight"),
        (
            "ViTForImageClassification",
            "vit.encoder.layer.0.attention.output.dense.bias",
            "vit.layers.0.attention.o_proj.bias",
        ),
        (
            "MixtralForCausalLM",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
        ),
        ("MixtralForCausalLM", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("LlavaForConditionalGeneration", "language_model.lm_head.weight", "lm_head.weight"),
    ],
)
def test_known_renamings_come_out(tmp_path, name, on_disk, in_memory):
    config, disk = save(build(name), tmp_path)
    assert module_names(config, disk.keys())[on_disk] == in_memory


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "Dinov2Model"])
def test_tensors_that_loading_fuses_or_splits_are_left_out(tmp_path, name):
    config, disk = save(build(name), tmp_path)
    left_out = disk.keys() - module_names(config, disk.keys()).keys()
    pattern = r"\.weights_in\." if name == "Dinov2Model" else r"\.experts\.\d+\."
    assert left_out == {tensor for tensor in disk if re.search(pattern, tensor)}
    assert left_out


def test_the_names_gamma_and_beta_of_old_are_mapped(tmp_path):
    save(build("BertModel"), tmp_path)
    config, disk = rewrite(
        tmp_path,
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    )
    found = module_names(config, disk.keys())
    assert found == by_value(disk, load("BertModel", tmp_path))
    assert found["embeddings.LayerNorm.gamma"] == "embeddings.LayerNorm.weight"
    assert len(found) == len(disk)


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("GPT2LMHeadModel", lambda name: name.removeprefix("transformer.")),
        ("BertModel", "bert.{}".format),
        ("ViTModel", "vit.{}".format),
        ("ViTForImageClassification", lambda name: name.removeprefix("vit.")),
    ],
)
def test_a_base_prefix_that_disk_or_memory_lacks_is_bridged(tmp_path, name, rename):
    save(build(name), tmp_path)
    config, disk = rewrite(tmp_path, rename)
    found = module_names(config, disk.keys())
    assert found == by_value(disk, load(name, tmp_path))
    assert len(found) == len(disk)
    assert all(old != new for old, new in found.items() if not old.startswith(("classifier", "lm_head")))


def test_two_names_on_disk_for_one_in_memory_are_both_left_out():
    found = module_names(VIT, [QUERY, QUERY.removeprefix("vit."), "classifier.weight"])
    assert found == {"classifier.weight": "classifier.weight"}


@pytest.mark.parametrize("name", MODELS)
def test_names_that_are_in_memory_form_already_stay(tmp_path, name):
    model = build(name)
    config, _ = save(model, tmp_path)
    memory = model.state_dict().keys()
    assert module_names(config, memory) == {tensor: tensor for tensor in memory}


@pytest.mark.parametrize("order", [1, -1])
def test_renamings_that_depend_on_what_came_before_do_not_depend_on_the_order_of_names(order):
    # Each number moves up by one, but only if there is a norm0: norm1 alone would already be the name in memory.
    config = {
        "model_type": "kimi_k25", "architectures": ["Kimi_K25ForConditionalGeneration"],
        "text_config": {**GQA, "model_type": "llama"}, "vision_config": IMAGE,
    }  # fmt: skip
    pairs = {
        f"vision_tower.encoder.blocks.0.norm{i}.weight": f"model.vision_tower.layers.0.norm{i + 1}.weight"
        for i in (0, 1)
    }
    assert module_names(config, list(pairs)[::order]) == pairs


def test_names_that_the_model_does_not_have_are_left_out():
    assert module_names(VIT, [QUERY, "vit.encoder.layer.9.attention.attention.query.weight", "ema.step"]).keys() == {
        QUERY
    }
    assert module_names(VIT, []) == {}


def test_without_architectures_the_plain_model_is_meant():
    config = {key: value for key, value in VIT.items() if key != "architectures"}
    assert module_names(config, [QUERY]) == {QUERY: "layers.1.attention.q_proj.weight"}


# --- what it is for


def test_a_peft_adapter_finds_the_weights_on_disk_that_peft_changes(tmp_path):
    peft = pytest.importorskip("peft")
    save(build("ViTForImageClassification"), tmp_path / "base")
    config, base = read(tmp_path / "base")
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "o_proj", "fc1"], init_lora_weights=False)
    model = peft.get_peft_model(load("ViTForImageClassification", tmp_path / "base"), settings)
    model.save_pretrained(tmp_path / "adapter")
    save(model.merge_and_unload(), tmp_path / "merged")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = read(tmp_path / "merged")[1]

    on_disk = {memory: disk for disk, memory in module_names(config, base.keys()).items()}
    changed = {}
    for key, a in adapter.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            name = on_disk[f"{module}.weight"]
            b = adapter[key.replace("lora_A", "lora_B")]
            changed[name] = (base[name].double() + 6 / 2 * b.double() @ a.double()).float()
    assert len(changed) == 6
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        if name in changed:
            torch.testing.assert_close(tensor, changed[name], rtol=0, atol=1e-5)
            assert not torch.equal(tensor, base[name])
        else:
            assert torch.equal(tensor, base[name])


# --- what is refused


@pytest.mark.parametrize("config", [{}, {"architectures": ["ViTModel"]}, {"model_type": None}, {"model_type": 7}])
def test_a_configuration_without_model_type_is_refused(config):
    with pytest.raises(MismatchError, match="no model_type"):
        module_names(config, ["w"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "nobody-knows-this"}, "does not know model_type 'nobody-knows-this'"),
        ({"model_type": "../evil"}, "does not know model_type"),
        ({"architectures": ["MyOwnViT"]}, "has no architecture 'MyOwnViT'"),
        ({"architectures": ["AutoModel"]}, "has no architecture"),
        ({"architectures": ["ViTConfig"]}, "has no architecture"),
        ({"architectures": ["pipeline"]}, "has no architecture"),
        ({"architectures": ["__class__"]}, "has no architecture"),
        ({"architectures": [7]}, "has no architecture"),
        ({"architectures": {"a": 1}}, "has no architecture"),
        ({"hidden_size": "large"}, "cannot build this vit"),
        ({"num_attention_heads": 0}, "cannot build this vit"),
        ({"patch_size": None}, "cannot build this vit"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"text_config": {"num_layers": 1e9}}, "num_layers is"),
    ],
)
def test_a_configuration_that_transformers_cannot_make_a_model_of_is_refused(change, message):
    with pytest.raises(MismatchError, match=message) as caught:
        module_names({**VIT, **change}, [QUERY])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["transformers", "transformers.conversion_mapping"])
def test_without_transformers_5_the_extra_is_named(monkeypatch, module):
    assert available()
    monkeypatch.setitem(sys.modules, module, None)
    assert available() == (module != "transformers")
    with pytest.raises(MismatchError, match=r"pip install 'checkpoint-surgery\[hf\]'"):
        module_names(VIT, [QUERY])


def test_code_that_a_configuration_points_to_is_never_imported(tmp_path, monkeypatch):
    (tmp_path / "modeling_evil.py").write_text("open('ran', 'w').write('')\nclass Evil: ...\nclass EvilConfig: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    dynamic = sys.modules.get("transformers.dynamic_module_utils")
    if dynamic is None:
        import transformers.dynamic_module_utils as dynamic
    for name in ("get_class_from_dynamic_module", "get_cached_module_file"):
        monkeypatch.setattr(dynamic, name, lambda *args, **kwargs: pytest.fail("remote code was looked for"))
    code = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoModelForImageClassification"), "evil/evil--modeling_evil.Evil"
    )
    hostile = {
        "auto_map": code, "trust_remote_code": True, "_attn_implementation": "evil/kernel",
        "attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/kernel",
        "experts_implementation": "evil/kernel", "quantization_config": {"quant_method": "evil"},
        "name_or_path": "evil/evil", "_name_or_path": "evil/evil", "fusion_config": {"evil": True},
        "gradient_checkpointing": True,
    }  # fmt: skip
    assert module_names({**VIT, **hostile}, [QUERY]) == module_names(VIT, [QUERY])
    nested = {"model_type": "clip", "architectures": ["CLIPModel"], **MODELS["CLIPModel"]}
    nested = {key: {**value, **hostile} if isinstance(value, dict) else value for key, value in nested.items()}
    assert module_names(nested, ["logit_scale"]) == {"logit_scale": "logit_scale"}
    with pytest.raises(MismatchError, match="has no architecture 'Evil'"):
        module_names({**VIT, **hostile, "architectures": ["Evil"]}, [QUERY])
    with pytest.raises(MismatchError, match="does not know model_type"):
        module_names({**VIT, **hostile, "model_type": "evil"}, [QUERY])
    assert [path.name for path in tmp_path.iterdir()] == ["modeling_evil.py"]


def test_a_backbone_that_stands_on_the_hub_is_not_fetched():
    config = {"model_type": "vitmatte", "backbone": "evil/backbone", "use_timm_backbone": False}
    with pytest.raises(MismatchError, match="cannot build this vitmatte"):
        module_names({**config, "architectures": ["VitMatteForImageMatting"]}, ["w"])


# --- what it leaves behind


LOUD = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], **GQA, "rope_scaling": {"rope_type": "linear", "factor": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("config", [VIT, {**VIT, "hidden_size": "large"}, LOUD])
def test_the_process_is_left_as_it_was_and_nothing_is_said(config):
    from huggingface_hub import constants

    def state():
        settings = (constants.HF_HUB_OFFLINE, transformers.logging.get_verbosity(), list(warnings.filters))
        return (*settings, torch.get_default_dtype(), torch.get_default_device(), torch.linspace, torch.empty(1).device)

    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logger = transformers.logging.get_logger("transformers")
    logger.addHandler(handler)
    before, document, random = state(), json.dumps(config), torch.get_rng_state()
    try:
        module_names(config, [QUERY])
    except MismatchError:
        assert config["hidden_size"] == "large"
    finally:
        logger.removeHandler(handler)
    assert said == []
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert json.dumps(config) == document


def test_importing_it_imports_neither_transformers_nor_torch():
    code = "import sys, surgery.sources.module_names as m; m.available(); print(*({'transformers', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_a_vit_adapter_is_extracted_merged_and_loaded_under_names_in_memory(tmp_path):
    import surgery
    from peft import PeftModel

    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = transformers.ViTModel(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "ft")
    surgery.extract_lora(tmp_path / "base", tmp_path / "ft", rank=3, names_in_memory=True).save(tmp_path / "adapter")
    merged = surgery.merge(tmp_path / "base", tmp_path / "adapter")
    assert any("transformers" in note for note in merged.notes)
    merged.save(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(
            transformers.ViTModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        there = adapted.merge_and_unload().state_dict()
        here = transformers.ViTModel.from_pretrained(tmp_path / "merged").state_dict()
    moved = transformers.ViTModel.from_pretrained(tmp_path / "base").state_dict()
    assert sum(not torch.equal(here[name], moved[name]) for name in here) >= 12
    assert all((here[name] - there[name]).abs().max() <= 2**-21 * there[name].abs().max() + 2**-30 for name in there)
