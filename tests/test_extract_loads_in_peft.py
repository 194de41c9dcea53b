"""Adapters that surgery extracts load in PEFT: every tensor finds its place, and the model answers as the fine-tune does."""

from __future__ import annotations

import json
import shutil
import warnings
import zlib

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

import surgery
from surgery.errors import MismatchError, UsageError

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[1, 2, 3, 95, 4], [5, 7, 2, 40, 1]])


def bert(**more):
    return transformers.BertConfig(**SIZES, max_position_embeddings=32, **more)


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **more))


def gpt2(**more):
    sizes = {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more)


BUILD = {
    "bert": lambda: transformers.BertModel(bert()),
    "bert-classifier": lambda: transformers.BertForSequenceClassification(bert(num_labels=3)),
    "bert-tagger": lambda: transformers.BertForTokenClassification(bert(num_labels=3)),
    "bert-answers": lambda: transformers.BertForQuestionAnswering(bert()),
    "bert-masked": lambda: transformers.BertForMaskedLM(bert()),
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama-bare": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, num_labels=3)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(gpt2()),
    "gpt2-classifier": lambda: transformers.GPT2ForSequenceClassification(gpt2(num_labels=3)),
}
KINDS = [kind for kind in BUILD if not kind.endswith(("masked", "bare"))]


def noise(shape, *key):
    seed = zlib.crc32(repr(key).encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shake(model):
    """Move every parameter away from its initial value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * noise(parameter.shape, name, "base"))


def is_embedding(name):
    return any(word in name for word in ("embed_tokens", "_embeddings", "wte", "wpe"))


def is_norm(name):
    return any(word in name.lower() for word in ("norm", ".ln_"))


def tune(model, *what):
    """Fine-tune by noise: ``low-rank`` or ``dense`` on linear weights, ``biases``, ``norms``, ``rows`` of embeddings."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = 0.05 * noise(parameter.shape, name, "tuned")
            if is_embedding(name):
                if "rows" in what:
                    parameter[[1, parameter.shape[0] - 1]] += 10 * change[[1, parameter.shape[0] - 1]].to(parameter)
            elif is_norm(name):
                if "norms" in what:
                    parameter.add_(change.to(parameter))
            elif parameter.ndim == 1:
                if "biases" in what:
                    parameter.add_(change.to(parameter))
            elif "dense" in what:
                parameter.add_(change.to(parameter))
            elif "low-rank" in what:
                left, right = (
                    noise((parameter.shape[0], 2), name, "left"),
                    noise((2, parameter.shape[1]), name, "right"),
                )
                parameter.add_((0.05 * left @ right).to(parameter))
    return model


def load(kind, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return type(BUILD[kind]()).from_pretrained(folder, dtype="auto").eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Give folders of base models, each written once."""
    made = {}

    def folder(kind, dtype=torch.float32):
        if (kind, dtype) not in made:
            torch.manual_seed(0)
            model = BUILD[kind]()
            shake(model)
            made[kind, dtype] = tmp_path_factory.mktemp(kind) / "base"
            model.to(dtype).save_pretrained(made[kind, dtype])
        return made[kind, dtype]

    return folder


def write_tuned(kind, base, out, *what):
    tune(load(kind, base), *what).save_pretrained(out)
    return out


def tensors_of(folder, stem="model"):
    return safetensors.torch.load_file(f"{folder}/{stem}.safetensors")


def load_peft(kind, base, adapter):
    """Load an adapter; whatever PEFT has to say about its keys is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(load(kind, base), str(adapter)).eval()


def assert_all_keys_meet(model, adapter, before):
    """Check that every tensor of the file is in the loaded model, and the model's adapter has no other."""
    stored = peft.load_peft_weights(str(adapter), device="cpu")
    result = peft.set_peft_model_state_dict(model, stored)
    assert result.unexpected_keys == []
    marks = ("lora_", ".modules_to_save.", "trainable_tokens_delta")
    tied = ("lm_head.token_adapter.", "decoder.token_adapter.")  # these share the embedding's rows
    missing = [key for key in result.missing_keys if any(mark in key for mark in marks)]
    assert [key for key in missing if not any(mark in key for mark in tied)] == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for key, value in stored.items():
        assert torch.equal(inside[key], value.to(inside[key].dtype)), key
    for key in inside.keys() - stored.keys():
        # With bias="all" PEFT would also save what no fine-tune changed, and what lies inside of its own wrappers.
        assert key.endswith(".bias"), key
        inner = ".original_module." in key or ".modules_to_save." in key
        plain = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        assert inner or plain not in before or torch.equal(inside[key], before[plain]), key


def answers(model):
    with torch.no_grad():
        output = model(input_ids=IDS)
    return [value.float() for value in output.to_tuple() if isinstance(value, torch.Tensor)]


def assert_close(actual, expected, share=2**-22):
    """Check that two state dicts agree; output heads that are tied in memory are absent on disk."""
    assert actual.keys() <= expected.keys()
    for name, value in actual.items():
        wanted = expected[name]
        assert value.shape == wanted.shape
        assert (value.double() - wanted.double()).abs().max() <= share * wanted.double().abs().max() + 2**-30, name


def assert_loads(kind, base, adapter, tuned=None):
    """Check everything that a reader in PEFT relies on."""
    model = load_peft(kind, base, adapter)
    assert_all_keys_meet(model, adapter, tensors_of(base))
    apart = answers(model)
    merged = model.merge_and_unload()
    ours = surgery.merge(base, adapter)
    assert_close(ours.state_dict(), merged.state_dict())
    for one, other in zip(apart, answers(merged), strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    if tuned is not None:
        for one, other in zip(apart, answers(load(kind, tuned)), strict=True):
            assert torch.allclose(one, other, atol=1e-3, rtol=1e-3)
    return ours


# --- what every family must do


@pytest.mark.parametrize("kind", KINDS)
def test_an_extracted_adapter_loads_and_reproduces_a_low_rank_fine_tune(kind, bases, tmp_path):
    base = bases(kind)
    tuned = write_tuned(kind, base, tmp_path / "tuned", "low-rank", "biases", "norms", "rows")
    adapter = surgery.extract_lora(base, tuned, rank=4)
    adapter.save(tmp_path / "adapter")
    assert [row.name for row in adapter.report.rows if row.how == "left out"] == []
    merged = assert_loads(kind, base, tmp_path / "adapter", tuned)
    assert_close(merged.state_dict(), tensors_of(tuned), 2**-21)


@pytest.mark.parametrize("what", [["dense"], ["dense", "biases", "norms", "rows"]], ids=" ".join)
@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_reproduces_the_fine_tune(kind, what, bases, tmp_path):
    base = bases(kind)
    tuned = write_tuned(kind, base, tmp_path / "tuned", *what)
    surgery.extract_lora(base, tuned, rank="full").save(tmp_path / "adapter")
    merged = assert_loads(kind, base, tmp_path / "adapter", tuned)
    assert_close(merged.state_dict(), tensors_of(tuned), 2**-22)


@pytest.mark.parametrize("what", ["biases", "norms", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fine_tune_without_linear_changes_loads(kind, what, bases, tmp_path):
    base = bases(kind)
    tuned = write_tuned(kind, base, tmp_path / "tuned", what)
    if all(torch.equal(value, tensors_of(base)[name]) for name, value in tensors_of(tuned).items()):
        with pytest.raises(MismatchError, match="no differences"):
            surgery.extract_lora(base, tuned)
        return
    surgery.extract_lora(base, tuned).save(tmp_path / "adapter")
    merged = assert_loads(kind, base, tmp_path / "adapter", tuned)
    for name, value in tensors_of(tuned).items():
        assert torch.equal(merged[name], value), name


@pytest.mark.parametrize("what", [["dense", "biases", "norms"], ["biases"], ["norms"]], ids=" ".join)
def test_a_tied_head_with_a_bias_of_its_own_loads(what, bases, tmp_path):
    # Without trained rows: PEFT 0.21 forgets the bias of a tied head whose embedding has some.
    base = bases("bert-masked")
    tuned = write_tuned("bert-masked", base, tmp_path / "tuned", *what)
    surgery.extract_lora(base, tuned, rank="full").save(tmp_path / "adapter")
    merged = assert_loads("bert-masked", base, tmp_path / "adapter", tuned)
    assert_close(merged.state_dict(), tensors_of(tuned), 2**-22)


# --- which modules are named


def change(base, out, kind, *names, size=0.05):
    """Fine-tune some parameters alone."""
    model = load(kind, base)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            parameter += size * noise(parameter.shape, name, "changed")
    model.save_pretrained(out)
    return out


def adapted(model):
    """Name the modules that carry a LoRA in PEFT."""
    found = (name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    return sorted(name.removeprefix("base_model.model.") for name in found)


def config_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


ONE_MODULE = {
    "a Llama projection": ("llama", "model.layers.1.self_attn.q_proj"),
    "a narrow Llama projection": ("llama", "model.layers.0.self_attn.k_proj"),
    "an output head": ("llama", "lm_head"),
    "a square Conv1D": ("gpt2", "transformer.h.1.attn.c_proj"),
    "a Conv1D with a square namesake": ("gpt2", "transformer.h.0.mlp.c_proj"),
    "a BERT layer with namesakes": ("bert", "encoder.layer.0.output.dense"),
    "another BERT layer with namesakes": ("bert", "encoder.layer.1.attention.output.dense"),
    "the pooler": ("bert", "pooler.dense"),
}


@pytest.mark.parametrize(("kind", "module"), ONE_MODULE.values(), ids=ONE_MODULE)
def test_a_fine_tune_of_one_module_adapts_that_module_alone(kind, module, bases, tmp_path):
    base = bases(kind)
    tuned = change(base, tmp_path / "tuned", kind, f"{module}.weight")
    surgery.extract_lora(base, tuned, rank=3).save(tmp_path / "adapter")
    assert adapted(load_peft(kind, base, tmp_path / "adapter")) == [module]
    merged, before = assert_loads(kind, base, tmp_path / "adapter"), tensors_of(base)
    assert [name for name in before if not torch.equal(merged[name], before[name])] == [f"{module}.weight"]


@pytest.mark.parametrize(
    ("kind", "norm", "wrapped"),
    [("llama", "model.norm", 1), ("llama-bare", "norm", 5), ("bert", "encoder.layer.1.output.LayerNorm", 1)],
)
def test_a_norm_whose_name_others_end_in_takes_them_along_unchanged(kind, norm, wrapped, bases, tmp_path):
    # PEFT wraps every module whose name ends so, with no dot before it, and wants them all in the file.
    base = bases(kind)
    tuned = change(base, tmp_path / "tuned", kind, f"{norm}.weight")
    surgery.extract_lora(base, tuned).save(tmp_path / "adapter")
    model = load_peft(kind, base, tmp_path / "adapter")
    assert sum(isinstance(module, peft.utils.ModulesToSaveWrapper) for module in model.modules()) == wrapped
    merged, after = assert_loads(kind, base, tmp_path / "adapter", tuned), tensors_of(tuned)
    assert all(torch.equal(merged[name], value) for name, value in after.items())


@pytest.mark.parametrize("rank", [4, 24, "full"])
def test_ranks_that_differ_from_matrix_to_matrix_keep_the_scale(rank, bases, tmp_path):
    base = bases("llama")
    tuned = write_tuned("llama", base, tmp_path / "tuned", "dense")
    surgery.extract_lora(base, tuned, rank=rank).save(tmp_path / "adapter")
    document = config_of(tmp_path / "adapter")
    assert document["rank_pattern"] == document["alpha_pattern"]
    assert bool(document["rank_pattern"]) == (rank != 4)
    assert document["lora_alpha"] == document["r"]
    assert isinstance(document["target_modules"], list)
    assert_loads("llama", base, tmp_path / "adapter")


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_truncated_adapter_is_as_near_to_the_fine_tune_as_its_rank_allows(rank, bases, tmp_path):
    base = bases("gpt2")
    tuned = write_tuned("gpt2", base, tmp_path / "tuned", "dense")
    surgery.extract_lora(base, tuned, rank=rank).save(tmp_path / "adapter")
    merged = load_peft("gpt2", base, tmp_path / "adapter").merge_and_unload().state_dict()
    before, after = tensors_of(base), tensors_of(tuned)
    names = [name for name in before if name.endswith("weight") and not torch.equal(before[name], after[name])]
    assert len(names) == 8
    for name in names:
        sigma = np.linalg.svd((after[name].double() - before[name].double()).numpy(), compute_uv=False)
        error = (merged[name].double() - after[name].double()).norm().item()
        assert error == pytest.approx(np.linalg.norm(sigma[rank:]), rel=1e-4)


def test_target_factors_what_it_names_and_nothing_else(bases, tmp_path):
    base = bases("llama")
    tuned = write_tuned("llama", base, tmp_path / "tuned", "low-rank", "norms", "rows")
    adapter = surgery.extract_lora(base, tuned, rank=4, target=["q_proj,v_proj"])
    adapter.save(tmp_path / "adapter")
    document = config_of(tmp_path / "adapter")
    assert document["target_modules"] == ["q_proj", "v_proj"]
    assert document["modules_to_save"] is document["trainable_token_indices"] is None
    wanted = [f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "v_proj")]
    assert adapted(load_peft("llama", base, tmp_path / "adapter")) == wanted
    merged, before, after = assert_loads("llama", base, tmp_path / "adapter"), tensors_of(base), tensors_of(tuned)
    for name, value in before.items():
        if name.removesuffix(".weight") in wanted:
            assert (merged[name] - after[name]).abs().max() <= 2**-21 * after[name].abs().max()
        else:
            assert torch.equal(merged[name], value)
    left = {row.name for row in adapter.report.rows if row.how == "left out"}
    assert left == {n for n in before if not torch.equal(before[n], after[n])} - {f"{name}.weight" for name in wanted}


def test_what_is_excluded_stays_as_it_was(bases, tmp_path):
    base = bases("bert")
    tuned = write_tuned("bert", base, tmp_path / "tuned", "low-rank", "biases", "norms", "rows")
    excluded = ["*.key.*", "pooler.dense", "embeddings.LayerNorm", "word_embeddings"]
    surgery.extract_lora(base, tuned, rank=4, exclude=excluded).save(tmp_path / "adapter")
    merged, before = assert_loads("bert", base, tmp_path / "adapter"), tensors_of(base)
    untouched = [n for n in before if any(word in n for word in (".key.", "pooler", "embeddings.Layer", "word_emb"))]
    assert len(untouched) == 9
    assert all(torch.equal(merged[name], before[name]) for name in untouched)
    assert not any(torch.equal(merged[name], before[name]) for name in before.keys() - set(untouched))


def test_half_of_a_norm_excluded_leaves_that_half_alone(bases, tmp_path):
    base = bases("bert")
    tuned = write_tuned("bert", base, tmp_path / "tuned", "low-rank", "norms")
    name = "embeddings.LayerNorm"
    surgery.extract_lora(base, tuned, rank=4, exclude=[f"re:{name}.weight"]).save(tmp_path / "adapter")
    merged = assert_loads("bert", base, tmp_path / "adapter")
    assert torch.equal(merged[f"{name}.weight"], tensors_of(base)[f"{name}.weight"])
    assert torch.equal(merged[f"{name}.bias"], tensors_of(tuned)[f"{name}.bias"])


# --- output heads and embeddings


HEADS = {"bert-classifier": "classifier", "bert-tagger": "classifier", "bert-answers": "qa_outputs",
         "llama-classifier": "score", "gpt2-classifier": "score"}  # fmt: skip


@pytest.mark.parametrize(("kind", "head"), HEADS.items(), ids=HEADS)
def test_the_head_of_a_task_is_stored_whole_as_peft_wants_it(kind, head, bases, tmp_path):
    base = bases(kind)
    tuned = change(base, tmp_path / "tuned", kind, f"{head}.weight")
    surgery.extract_lora(base, tuned, rank=1).save(tmp_path / "adapter")
    merged = assert_loads(kind, base, tmp_path / "adapter", tuned)
    assert all(torch.equal(merged[name], value) for name, value in tensors_of(tuned).items())
    assert head in config_of(tmp_path / "adapter")["modules_to_save"]


@pytest.mark.parametrize(("kind", "head"), HEADS.items(), ids=HEADS)
def test_the_head_of_a_task_is_the_base_s_where_it_is_not_wanted(kind, head, bases, tmp_path):
    base = bases(kind)
    tuned = write_tuned(kind, base, tmp_path / "tuned", "dense", "biases")
    surgery.extract_lora(base, tuned, rank=2, exclude=[head]).save(tmp_path / "adapter")
    merged, before = assert_loads(kind, base, tmp_path / "adapter"), tensors_of(base)
    assert torch.equal(merged[f"{head}.weight"], before[f"{head}.weight"])


def test_a_fine_tune_with_a_new_head_loads_on_the_bare_base(bases, tmp_path):
    base = bases("bert")
    model = transformers.BertForSequenceClassification(bert(num_labels=3))
    model.bert = tune(load("bert", base), "low-rank", "norms", "biases", "rows")
    model.save_pretrained(tmp_path / "tuned")
    adapter = surgery.extract_lora(base, tmp_path / "tuned", rank=4)
    adapter.save(tmp_path / "adapter")
    assert any("classifier" in note for note in adapter.report.notes)
    merged = assert_loads("bert", base, tmp_path / "adapter")
    wanted = {name.removeprefix("bert."): value for name, value in tensors_of(tmp_path / "tuned").items()}
    assert_close(merged.state_dict(), wanted, 2**-21)


TABLES = {
    "llama": ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"),
    "llama-tied": ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"),
    "gpt2": ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"),
}
"""An embedding that will move throughout, and a linear weight beside it."""


def how(adapter, name):
    return next(row.how for row in adapter.report.rows if row.name == name)


def test_an_untied_embedding_that_moved_throughout_is_factored(bases, tmp_path):
    base, (table, linear) = bases("llama"), TABLES["llama"]
    tuned = change(base, tmp_path / "tuned", "llama", table, linear)
    adapter = surgery.extract_lora(base, tuned, rank=8)
    adapter.save(tmp_path / "adapter")
    assert how(adapter, table) == "lora"
    merged = assert_loads("llama", base, tmp_path / "adapter")
    delta = tensors_of(tuned)[table].double() - tensors_of(base)[table].double()
    best = torch.linalg.svdvals(delta)[8:].norm()
    assert (merged[table].double() - tensors_of(tuned)[table].double()).norm() <= 1.001 * best + 1e-6


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_a_tied_embedding_that_moved_throughout_is_stored_whole_where_it_is_worth_its_bytes(kind, bases, tmp_path):
    base, (table, linear) = bases(kind), TABLES[kind]
    tuned = change(base, tmp_path / "tuned", kind, table, linear, size=0.05)
    adapter = surgery.extract_lora(base, tuned, rank=32)
    adapter.save(tmp_path / "adapter")
    assert how(adapter, table) == "rows"
    merged = assert_loads(kind, base, tmp_path / "adapter", tuned)
    assert torch.equal(merged[table], tensors_of(tuned)[table])


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_a_tied_embedding_that_moved_throughout_but_little_is_left_out_and_said_so(kind, bases, tmp_path):
    base, (table, linear) = bases(kind), TABLES[kind]
    middle = change(base, tmp_path / "middle", kind, linear)
    tuned = change(middle, tmp_path / "tuned", kind, table, size=1e-4)
    adapter = surgery.extract_lora(base, tuned, rank=1)
    adapter.save(tmp_path / "adapter")
    assert how(adapter, table) == "left out"
    assert 0 < adapter.report.kept < 1
    merged = assert_loads(kind, base, tmp_path / "adapter")
    assert torch.equal(merged[table], tensors_of(base)[table])
    whole = surgery.extract_lora(base, tuned, rank=1, embeddings="full")
    assert how(whole, table) == "rows"
    assert torch.equal(surgery.merge(base, whole)[table], tensors_of(tuned)[table])


# --- narrow dtypes


@pytest.mark.parametrize("factors", [None, "F32"], ids=["factors of the same dtype", "float32 factors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_pairs_in_sixteen_bits_load_and_come_back(kind, dtype, factors, bases, tmp_path):
    base = bases(kind, dtype)
    tuned = write_tuned(kind, base, tmp_path / "tuned", "dense", "biases", "norms", "rows")
    adapter = surgery.extract_lora(base, tuned, rank="full", dtype=factors)
    adapter.save(tmp_path / "adapter")
    stored = tensors_of(tmp_path / "adapter", "adapter_model")
    assert {v.dtype for k, v in stored.items() if "lora_" in k} == {torch.float32 if factors else dtype}
    model = load_peft(kind, base, tmp_path / "adapter")
    assert_all_keys_meet(model, tmp_path / "adapter", tensors_of(base))
    theirs, ours = model.merge_and_unload().state_dict(), surgery.merge(base, tmp_path / "adapter")
    before, after = tensors_of(base), tensors_of(tuned)
    same = count = exact = size = 0
    for name, wanted in after.items():
        assert ours[name].dtype == theirs[name].dtype == dtype
        apart = (ours[name].view(torch.int16).int() - theirs[name].view(torch.int16).int()).abs()
        # Beside a midpoint PEFT's float32 sum may round to the other side; around zero the steps are of no size.
        assert (apart <= 1).logical_or((ours[name] - theirs[name]).abs() <= 2**-20).all(), name
        same, count = same + int((apart == 0).sum()), count + apart.numel()
        if not name_is_linear(name, wanted):
            assert torch.equal(ours[name], wanted), name
        elif factors:
            exact, size = exact + int((ours[name] == wanted).sum()), size + wanted.numel()
            assert (ours[name].double() - wanted.double()).abs().max() <= 2**-22 * wanted.double().abs().max(), name
        else:
            delta = wanted.double() - before[name].double()
            assert (ours[name].double() - wanted.double()).norm() < 0.05 * delta.norm(), name
    assert exact >= 0.999 * size
    assert same >= 0.999 * count


def name_is_linear(name, value):
    return value.ndim == 2 and not is_embedding(name)


def test_a_bfloat16_fine_tune_of_a_float32_base_is_reproduced(bases, tmp_path):
    base = bases("llama")
    tune(load("llama", base), "dense", "norms").to(torch.bfloat16).save_pretrained(tmp_path / "tuned")
    rounded = [name for name in tensors_of(base) if "embed" not in name]  # all rows of the embedding moved by rounding
    surgery.extract_lora(base, tmp_path / "tuned", rank="full", dtype="F32").save(tmp_path / "adapter")
    merged, wanted = assert_loads("llama", base, tmp_path / "adapter"), tensors_of(tmp_path / "tuned")
    assert_close({name: merged[name] for name in rounded}, wanted, 2**-22)


# --- state dicts in memory


def decorated(state_dict, prefix):
    return {prefix + name: value for name, value in state_dict.items()}


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("llama", "", ""), ("llama", "module.", "module."), ("llama", "", "_orig_mod."), ("bert", "_orig_mod.", ""),
        ("qwen2", "module._orig_mod.", "module."), ("gpt2", "", "module."),
    ],
)  # fmt: skip
def test_state_dicts_in_memory_give_the_adapter_that_files_give(kind, before, after, bases, tmp_path):
    base = bases(kind)
    tuned = write_tuned(kind, base, tmp_path / "tuned", "low-rank", "biases", "norms", "rows")
    adapter = surgery.extract_lora(decorated(tensors_of(base), before), decorated(tensors_of(tuned), after), rank=4)
    adapter.save(tmp_path / "adapter")
    surgery.extract_lora(base, tuned, rank=4).save(tmp_path / "wanted")
    ours, wanted = (tensors_of(tmp_path / name, "adapter_model") for name in ("adapter", "wanted"))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], wanted[key]) for key in ours)
    mine, theirs = config_of(tmp_path / "adapter"), config_of(tmp_path / "wanted")
    assert {k for k in mine if mine[k] != theirs[k]} <= {"base_model_name_or_path", "task_type"}
    assert_loads(kind, base, tmp_path / "adapter", tuned)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "bert"])
@pytest.mark.parametrize("what", [["low-rank", "biases", "norms", "rows"], ["rows"]], ids=" ".join)
def test_the_state_dicts_of_models_load_too_tied_or_not(kind, what, bases, tmp_path):
    # model.state_dict() names a tied weight twice; the adapter must not move it twice.
    base = bases(kind)
    tuned = write_tuned(kind, base, tmp_path / "tuned", *what)
    adapter = surgery.extract_lora(load(kind, base).state_dict(), load(kind, tuned).state_dict(), rank=4)
    adapter.save(tmp_path / "adapter")
    merged = assert_loads(kind, base, tmp_path / "adapter", tuned)
    assert_close(merged.state_dict(), tensors_of(tuned), 2**-21)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_files_that_hold_a_tied_weight_twice_give_the_same_adapter(kind, bases, tmp_path):
    base = bases(kind)
    tuned = write_tuned(kind, base, tmp_path / "tuned", "low-rank", "rows")
    surgery.extract_lora(base, tuned, rank=4).save(tmp_path / "wanted")
    twice = {}
    for name, folder in (("base", base), ("fine-tune", tuned)):
        tensors = tensors_of(folder)
        table = next(value for key, value in tensors.items() if key.endswith(("embed_tokens.weight", "wte.weight")))
        twice[name] = tmp_path / name
        shutil.copytree(folder, twice[name])
        tensors["lm_head.weight"] = table.clone()
        safetensors.torch.save_file(tensors, twice[name] / "model.safetensors", {"format": "pt"})
    surgery.extract_lora(twice["base"], twice["fine-tune"], rank=4).save(tmp_path / "adapter")
    ours, wanted = (tensors_of(tmp_path / name, "adapter_model") for name in ("adapter", "wanted"))
    assert ours.keys() == wanted.keys()
    merged = surgery.merge(twice["base"], tmp_path / "adapter")
    assert_close(merged.state_dict(), tensors_of(twice["fine-tune"]), 2**-21)


def test_a_checkpoint_of_a_trainer_gives_its_state_dict(bases, tmp_path):
    base = bases("llama")
    tuned = write_tuned("llama", base, tmp_path / "tuned", "low-rank")
    trainer = {"epoch": 3, "state_dict": decorated(tensors_of(tuned), "module."), "optimizer": {"lr": 0.1}}
    surgery.extract_lora(tensors_of(base), trainer, rank=4).save(tmp_path / "adapter")
    assert_loads("llama", base, tmp_path / "adapter", tuned)


def test_an_adapter_merged_in_memory_equals_the_saved_one(bases, tmp_path):
    base = bases("bert")
    tuned = write_tuned("bert", base, tmp_path / "tuned", "low-rank", "biases", "norms", "rows")
    adapter = surgery.extract_lora(base, tuned, rank=2)
    adapter.save(tmp_path / "adapter")
    here, there = surgery.merge(base, adapter), surgery.merge(base, tmp_path / "adapter")
    assert all(torch.equal(here[name], there[name]) for name in there)


# --- the folder


def test_transformers_loads_the_folder_without_peft_s_classes(bases, tmp_path):
    base = bases("llama")
    tuned = write_tuned("llama", base, tmp_path / "tuned", "low-rank", "norms")
    surgery.extract_lora(base, tuned, rank=4).save(tmp_path / "adapter")
    model = load("llama", base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(str(tmp_path / "adapter"))
    for one, other in zip(answers(model), answers(load("llama", tuned)), strict=True):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-3)


def test_the_folder_holds_what_peft_reads_and_no_model(bases, tmp_path):
    base = bases("llama")
    tuned = write_tuned("llama", base, tmp_path / "tuned", "low-rank")
    surgery.extract_lora(base, tuned, rank=4, base_id="somebody/llama").save(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not names & {"config.json", "model.safetensors", "model.safetensors.index.json"}
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert isinstance(config, peft.LoraConfig)
    assert config.base_model_name_or_path == "somebody/llama"
    assert config.task_type == "CAUSAL_LM"
    with safetensors.safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_rank_below_one_is_refused(bases, tmp_path):
    base = bases("llama")
    tuned = write_tuned("llama", base, tmp_path / "tuned", "low-rank")
    for rank in (0, -1, 2.5, "all", True):
        with pytest.raises(UsageError, match="rank"):
            surgery.extract_lora(base, tuned, rank=rank)
