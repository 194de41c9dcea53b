"""More of what ``surgery add`` writes, loaded and trained: experts, convolutions, heads, prompts of texts, plain tensors."""

from __future__ import annotations

import json
import warnings

import pytest
import tokenizers
import torch
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import surgery
from surgery.errors import FormatError, MismatchError
from tests.families import GROUPED, build, saved
from tests.test_methods import batch, judged, train

warnings.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models"))


EXPERTS = [
    ("mixtral", "role:gate_up,role:down"),
    ("mixtral", "role:down"),
    ("qwen3-moe", "role:gate_up,role:down,role:q"),
]


@pytest.mark.parametrize(("family", "target"), EXPERTS)
def test_fused_experts_get_factors_that_peft_loads_and_trains(family, target, folder, tmp_path):
    added, loaded, before = judged(family, folder, tmp_path, "lora", target, source=build(family).state_dict(), r=2)
    assert added.parameters == sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    assert torch.equal(loaded(**batch(loaded.get_base_model())).logits, before)
    # Experts that no token is sent to get no gradient, and one matrix of factors serves all.
    assert train(loaded) == set(added.trainable)


def quietly(model, path, **settings):
    """Load without PEFT's warning of the rank pattern that its own conversion of experts makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, path, **settings).eval()


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_stored_one_by_one_are_fused_by_peft_and_compute_what_a_merge_does(family, folder, tmp_path):
    added = surgery.add(saved(family, folder), "lora", target="role:q,role:gate,role:up,role:down", r=2)
    assert "twice the rank" in added.notes[0]
    added.save(tmp_path / "start")
    model = build(family)
    before = model(**batch(model)).logits
    loaded = quietly(model, tmp_path / "start", is_trainable=True)
    assert torch.equal(loaded(**batch(model)).logits, before)
    changed = train(loaded)
    assert {name for name in changed if "experts" in name or "q_proj" in name} == changed
    # With other values in B the file must do in PEFT what merging it does: every key found its place.
    trained = {key: value + 0.1 * ("lora_B" in key) for key, value in added.state_dict().items()}
    adapter = surgery.Adapter(surgery.open(trained).tensors, added.document, label="trained")
    adapter.save(tmp_path / "trained")
    surgery.merge(saved(family, folder), adapter).save(tmp_path / "merged")
    here = quietly(build(family), tmp_path / "trained")(**batch(model)).logits
    there = type(model).from_pretrained(tmp_path / "merged").eval()(**batch(model)).logits
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(here, before, atol=1e-2)


def test_methods_other_than_lora_leave_experts_out_and_say_so(folder):
    added = surgery.add(saved("mixtral", folder), "ia3")
    assert "experts are left out" in added.notes[0]
    assert not any("experts" in name for name in added.chosen)


LAYERS = [
    ("gpt-neox", "role:qkv,role:embedding", {}),
    ("phi3", "role:qkv,role:gate_up", {}),
    ("phi", "role:q,role:head", {}),
    ("whisper", "role:v", {}),
    ("roberta", "role:q", {"dora": True}),
]


@pytest.mark.parametrize(("family", "target", "settings"), LAYERS, ids=str)
def test_lora_on_fused_weights_embeddings_and_convolutions(family, target, settings, folder, tmp_path):
    added, loaded, before = judged(family, folder, tmp_path, "lora", target, r=2, **settings)
    torch.testing.assert_close(loaded(**batch(loaded.get_base_model())).logits, before, rtol=1e-6, atol=1e-6)
    assert train(loaded) == set(added.trainable)


class Convolutions(torch.nn.Module):
    """A model without any class of transformers'."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = torch.nn.Conv1d(4, 8, 3)
        self.conv3 = torch.nn.Conv3d(2, 6, 2)
        self.depthwise = torch.nn.Conv1d(8, 8, 3, groups=8)
        self.embed = torch.nn.Embedding(5, 6)

    def forward(self, x):
        flat, deep = self.depthwise(self.conv1(x)), self.conv3(x.reshape(1, 2, 4, 3, 2))
        return flat.sum() + deep.sum() + self.embed(torch.tensor([1, 3])).sum()


def test_lora_on_convolutions_of_one_and_three_dimensions_in_a_model_of_no_library(tmp_path):
    x = torch.linspace(-1, 1, 48).reshape(1, 4, 12)
    added = surgery.add(Convolutions().state_dict(), "lora", target="conv1,conv3,embed", r=2)
    added.save(tmp_path / "out")
    loaded = PeftModel.from_pretrained(Convolutions(), tmp_path / "out", is_trainable=True)
    assert torch.equal(loaded(x), Convolutions()(x))
    names = {name.replace(".default", "") for name, value in loaded.named_parameters() if value.requires_grad}
    assert names == set(added.trainable) == added.tensors.keys()
    with pytest.raises(MismatchError, match="depthwise convolution has no low rank"):
        surgery.add(Convolutions().state_dict(), "lora", target="depthwise", r=2)


def test_lora_on_a_unet_with_its_attentions_and_convolutions(folder, tmp_path):
    added = surgery.add(saved("unet", folder), "lora", target="role:q,role:v,conv1,proj_in,conv_shortcut", r=2)
    added.save(tmp_path / "out")
    inputs = (
        torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8),
        torch.tensor([3]),
        torch.linspace(-1, 1, 40).reshape(1, 5, 8),
    )
    loaded = PeftModel.from_pretrained(build("unet"), tmp_path / "out", is_trainable=True)
    torch.testing.assert_close(loaded(*inputs).sample, build("unet")(*inputs).sample, rtol=0, atol=0)
    names = {name.replace(".default", "") for name, value in loaded.named_parameters() if value.requires_grad}
    assert names == set(added.trainable) == added.tensors.keys()


def test_p_tuning_trains_its_tokens_and_the_network_that_peft_puts_before_them(folder, tmp_path):
    added = surgery.add(saved("llama", folder), "p-tuning", length=3, hidden=8)
    added.save(tmp_path / "out")
    loaded = get_peft_model(build("llama"), PeftConfig.from_pretrained(tmp_path / "out", inference_mode=False)).eval()
    set_peft_model_state_dict(loaded, load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, added["prompt_embeddings"])
    changed = train(loaded, steps=1)
    network = {name for name, _ in loaded.named_parameters() if ".mlp_head." in name}
    assert changed == {"prompt_embeddings"}
    size = sum(parameter.numel() for name, parameter in loaded.named_parameters() if name in network)
    assert f"an MLP of {size:,} parameters" in added.notes[0]


@pytest.fixture(scope="module")
def tokenised(folder):
    """A model with a tokenizer of its own, whose post-processor adds special tokens."""
    path = saved("llama", folder)
    words = {"<s>": 1, "sort": 5, "by": 7, "mood": 9, "[UNK]": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.mark.parametrize("length", [2, 4, 6])
def test_a_prompt_of_a_text_starts_as_pefts_own_does(length, tokenised):
    added = surgery.add(tokenised, "prompt-tuning", length=length, text="sort by mood")
    config = PromptTuningConfig(
        num_virtual_tokens=length, task_type="CAUSAL_LM", prompt_tuning_init="TEXT",
        prompt_tuning_init_text="sort by mood", tokenizer_name_or_path=tokenised,
    )  # fmt: skip
    theirs = get_peft_model(build("llama"), config).get_prompt_embedding_to_save("default")
    assert torch.equal(added["prompt_embeddings"], theirs)


def test_a_broken_tokenizer_is_refused_in_one_line(folder, tmp_path):
    surgery.open(saved("llama", folder)).save(tmp_path / "model")
    for text, said in (("{}", "is no tokenizer"), ("\xff", "is no tokenizer")):
        (tmp_path / "model" / "tokenizer.json").write_bytes(text.encode("latin1"))
        with pytest.raises(FormatError, match=said) as refusal:
            surgery.add(tmp_path / "model", "prompt-tuning", text="sort")
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning", "p-tuning"])
def test_a_new_head_stands_beside_the_prompt(method, folder, tmp_path):
    added = surgery.add(saved("llama", folder), method, length=3, labels=3, head="score")
    assert added.parameters == added["prompt_embeddings"].numel()  # heads are never counted
    added.save(tmp_path / "out")
    base = LlamaForSequenceClassification(LlamaConfig(**GROUPED, num_labels=3))
    config = PeftConfig.from_pretrained(tmp_path / "out", inference_mode=False)
    loaded = get_peft_model(base, config).eval()
    set_peft_model_state_dict(loaded, load_file(tmp_path / "out" / "adapter_model.safetensors"))
    score = loaded.base_model.score.modules_to_save["default"].weight
    assert torch.equal(score, added["base_model.score.weight"])
    assert {name for name in train_head(loaded) if "mlp_head" not in name} == set(added.trainable)


def train_head(loaded):
    before = {name: value.detach().clone() for name, value in loaded.named_parameters()}
    optimiser = torch.optim.Adam([p for p in loaded.parameters() if p.requires_grad], lr=0.01, eps=1e-30)
    loaded(input_ids=torch.tensor([[3, 9, 27]]), labels=torch.tensor([1])).loss.backward()
    optimiser.step()
    names = {name for name, value in loaded.named_parameters() if not torch.equal(before[name], value)}
    return {
        "prompt_embeddings"
        if name.endswith("default.embedding.weight")
        else name.replace(".modules_to_save.default", "")
        for name in names
    }


def trained_alone(model, names):
    """Train the named parameters by plain PyTorch, and return the names of those that changed."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-30)
    model(**batch(model)).loss.backward()
    optimiser.step()
    return {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_last_blocks_train_alone_by_the_list_of_names(family, folder, tmp_path):
    surgery.add(saved(family, folder), "ft-topk", k=1).save(tmp_path / "top")
    names = set(json.loads((tmp_path / "top" / "trainable.json").read_text()))
    without = {name for name in names if name.endswith("key.bias")}  # softmax does not see a shift of all keys
    assert trained_alone(build(family), names) >= names - without
    assert trained_alone(build(family), names) <= names


def test_created_biases_load_into_the_model_that_has_them_and_change_nothing(folder, tmp_path):
    added = surgery.add(saved("llama", folder), "bitfit", create=True)
    added.save(tmp_path / "biases")
    biases = load_file(tmp_path / "biases" / "added.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)).eval()
    base = build("llama")
    model.load_state_dict({**base.state_dict(), **biases})  # strict: every name finds its place
    assert torch.equal(model(**batch(base)).logits, base(**batch(base)).logits)
    declared = set(json.loads((tmp_path / "biases" / "trainable.json").read_text()))
    assert declared == biases.keys() == set(added.trainable)
    # All keys shifted alike only turn by position, which softmax sees: rotated keys get a gradient.
    assert trained_alone(model, declared) == declared


def test_a_head_is_a_linear_layer_that_torch_loads(folder, tmp_path):
    added = surgery.add(saved("llama", folder), "head", labels=5)
    added.save(tmp_path / "head")
    file = load_file(tmp_path / "head" / "added.safetensors")
    head = torch.nn.Linear(16, 5)
    head.load_state_dict({key.removeprefix("classifier."): value for key, value in file.items()})
    assert added.parameters == 5 * 17


def test_prelayers_replace_activations_after_every_block(folder, tmp_path):
    """The formula of docs/methods.md, by hooks on the model: what the next block sees is what the file says."""
    added = surgery.add(saved("llama", folder), "prelayer", prefix=2, infix=1)
    added.save(tmp_path / "pre")
    tensors = load_file(tmp_path / "pre" / "added.safetensors")
    model = build("llama")
    seen = []

    def after(block):
        def hook(_module, _inputs, output):
            hidden = output.clone()
            hidden[:, :2] = tensors[f"model.layers.{block}.prelayer.prefix"]
            hidden[:, -1:] = tensors[f"model.layers.{block}.prelayer.infix"]
            seen.append(hidden)
            return hidden

        return hook

    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(after(number))
    before = build("llama")(**batch(model)).logits
    assert not torch.allclose(model(**batch(model)).logits, before)
    assert len(seen) == 2
    assert tensors.keys() == set(added.trainable)


def test_experts_whose_gate_is_chosen_alone_are_refused(folder):
    with pytest.raises(MismatchError, match="--target role:gate,role:up"):
        surgery.add(saved("qwen3-moe", folder), "lora", target="role:gate", r=2)
