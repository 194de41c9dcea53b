"""What PEFT, vLLM, SGLang and llama.cpp load: verdicts on good and broken adapters, held against PEFT and their own rules.

PEFT is asked itself: every adapter of the table is really loaded. Of the servers, the loaders' rules are told once more
here, in another form (what they do with keys and shapes, step by step), and must come to the same verdicts.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

import surgery
from surgery.cli.main import main
from surgery.errors import FormatError, MismatchError, UsageError, VerificationError
from surgery.formats import serving
from surgery.formats.serving import KINDS, SERVERS
from surgery.tensor import TensorSpec

transformers.utils.logging.set_verbosity_error()

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip
P = "base_model.model."
SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32),
}  # fmt: skip
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I32": torch.int32}


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def base_specs():
    return {name: TensorSpec(name, "F32", tuple(value.shape)) for name, value in llama().state_dict().items()}


def config(*leaves, **more):
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/tiny", "r": 4, "lora_alpha": 4,
        "target_modules": list(leaves), "bias": "none", **more,
    }  # fmt: skip


class Case:
    """An adapter: its configuration, and the shape of every tensor."""

    def __init__(self, *leaves, rank=4, layers=(0, 1), dtype="F32", **more):
        self.document = config(*leaves, **more)
        self.shapes = {}
        self.dtype = dtype
        for layer in layers:
            for module, (out, into) in SHAPES.items():
                if module.rpartition(".")[2] in leaves:
                    self.lora(f"model.layers.{layer}.{module}", out, into, rank)

    def lora(self, module, out, into, rank=4):
        self.shapes[f"{P}{module}.lora_A.weight"] = (rank, into)
        self.shapes[f"{P}{module}.lora_B.weight"] = (out, rank)
        return self

    def put(self, key, *shape):
        self.shapes[P + key] = shape
        return self

    def drop(self, pattern):
        self.shapes = {key: shape for key, shape in self.shapes.items() if not re.search(pattern, key)}
        return self

    def respell(self, old, new):
        self.shapes = {key.replace(old, new): shape for key, shape in self.shapes.items()}
        return self

    def set(self, **fields):
        self.document.update(fields)
        return self

    def unset(self, *fields):
        for name in fields:
            del self.document[name]
        return self

    @property
    def specs(self):
        return {key: TensorSpec(key, self.dtype, shape) for key, shape in self.shapes.items()}

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.document))
        generator = torch.Generator().manual_seed(0)
        tensors = {
            key: torch.randn(shape, generator=generator).to(DTYPES[self.dtype]) for key, shape in self.shapes.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        return folder


QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Q0 = "model.layers.0.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"


def experts(count=2, leaves=("gate_proj", "up_proj", "down_proj"), **more):
    case = Case(*leaves, layers=(), **more)
    for index in range(count):
        for leaf in leaves:
            case.lora(f"model.layers.0.mlp.experts.{index}.{leaf}", *SHAPES.get(f"mlp.{leaf}", (32, 16)))
    return case


def fused(*modules):
    case = Case(layers=(), target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    for module in modules:
        case.lora(f"model.layers.0.mlp.{module}", 64, 16, 8)
    return case


OK, NOTE, WRONG, REFUSED = "ok", "note", "wrong", "refused"

# name → an adapter, the verdicts of PEFT, vLLM, SGLang and llama.cpp, and words that some reason must have.
CASES = {
    "plain": (lambda: Case(*QV), (OK, OK, OK, OK), ""),
    "every linear": (lambda: Case(*ALL), (OK, OK, OK, OK), ""),
    "half precision": (lambda: Case(*ALL, dtype="BF16"), (OK, OK, OK, OK), ""),
    "one layer, by full name": (
        lambda: Case("v_proj", layers=(1,)).set(target_modules=["model.layers.1.self_attn.v_proj"])
        .lora("model.layers.1.self_attn.q_proj", 16, 16)
        .set(target_modules=["model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.q_proj"]),
        (OK, OK, OK, OK), "",
    ),
    "all-linear": (lambda: Case(*ALL).set(target_modules="all-linear"), (OK, OK, OK, OK), ""),
    "a regular expression": (
        lambda: Case(*QV).set(target_modules=r".*\.(q|v)_proj"), (OK, OK, REFUSED, OK), "takes a list",
    ),
    "q without v": (lambda: Case("q_proj", "o_proj"), (OK, OK, REFUSED, OK), "stacks it"),
    "k without q": (lambda: Case("k_proj", "v_proj"), (OK, OK, REFUSED, OK), "stacks it"),
    "up without gate": (lambda: Case("up_proj"), (OK, OK, REFUSED, OK), "stacks it"),
    "gate without up": (lambda: Case("gate_proj", "down_proj"), (OK, OK, OK, OK), ""),
    "rank 24": (lambda: Case(*QV, rank=24, r=24, lora_alpha=24), (OK, NOTE, OK, OK), "--max-lora-rank 32"),
    "rank 600": (lambda: Case(*QV, rank=600, r=600, lora_alpha=600), (OK, REFUSED, OK, OK), "takes 512 at most"),
    "alpha of twice the rank": (lambda: Case(*QV, lora_alpha=8), (OK, OK, OK, OK), ""),
    "alpha of zero": (lambda: Case(*QV, lora_alpha=0), (OK, OK, OK, WRONG), "an lora_alpha of 0"),
    "rsLoRA": (lambda: Case(*QV, use_rslora=True), (OK, OK, WRONG, WRONG), "use_rslora"),
    "rsLoRA of rank 1": (lambda: Case(*QV, rank=1, r=1, use_rslora=True), (OK, OK, OK, OK), ""),
    "ranks of their own": (
        lambda: Case(*QV).lora(V0, 8, 16, 2).set(rank_pattern={V0: 2}, alpha_pattern={V0: 2}),
        (OK, OK, REFUSED, WRONG), "needs every rank to be r = 4",
    ),
    "ranks without alphas": (
        lambda: Case(*QV).lora(V0, 8, 16, 2).set(rank_pattern={V0: 2}), (NOTE, OK, REFUSED, OK), "no alpha_pattern",
    ),
    "alphas of their own": (
        lambda: Case(*QV).set(alpha_pattern={V0: 16}), (OK, OK, WRONG, WRONG), "overlooks alpha_pattern",
    ),
    "a rank that is not the tensors'": (
        lambda: Case(*QV, r=8), (REFUSED, WRONG, REFUSED, WRONG), "rank is not the configuration's",
    ),
    "patterns in an order that saving changes": (
        lambda: Case(*QV).lora(V0, 8, 16, 2).set(
            rank_pattern={V0: 2, "self_attn.v_proj": 4}, alpha_pattern={V0: 2, "self_attn.v_proj": 4}
        ),
        (OK, OK, REFUSED, WRONG), "",
    ),
    "patterns that overlap": (
        lambda: Case(*QV).lora(V0, 8, 16, 2).set(
            rank_pattern={"layers.0.self_attn.v_proj": 2, ".*v_proj": 4},
            alpha_pattern={"layers.0.self_attn.v_proj": 2, ".*v_proj": 4},
        ),
        (NOTE, OK, REFUSED, WRONG), "PEFT sorts them",
    ),
    "A and B of different ranks": (
        lambda: Case(*QV).put(f"{Q0}.lora_B.weight", 16, 3), (REFUSED, REFUSED, REFUSED, REFUSED), "ranks of A and B",
    ),
    "A without B": (
        lambda: Case(*QV).drop(r"layers\.0.*q_proj\.lora_B"), (WRONG, REFUSED, REFUSED, REFUSED), "has A but no B",
    ),
    "DoRA": (
        lambda: Case(*QV, use_dora=True).put(f"{Q0}.lora_magnitude_vector", 16).put(f"{V0}.lora_magnitude_vector", 8)
        .put(f"{Q0.replace('0', '1')}.lora_magnitude_vector", 16)
        .put(f"{V0.replace('0', '1')}.lora_magnitude_vector", 8),
        (OK, REFUSED, REFUSED, REFUSED), "has no DoRA",
    ),
    "DoRA without magnitudes": (lambda: Case(*QV, use_dora=True), (WRONG, REFUSED, REFUSED, OK), "DoRA magnitude"),
    "a magnitude without DoRA": (
        lambda: Case(*QV).put(f"{Q0}.lora_magnitude_vector", 16), (WRONG, REFUSED, REFUSED, REFUSED), "use_dora is not set",
    ),
    "a bias of B that nothing declares": (
        lambda: Case(*QV).put(f"{Q0}.lora_B.bias", 16), (WRONG, REFUSED, REFUSED, REFUSED), "lora_bias is not set",
    ),
    "norms as mergekit writes them": (
        lambda: Case(*QV).put("model.layers.0.input_layernorm.weight", 16).put("model.norm.weight", 16),
        (OK, REFUSED, REFUSED, WRONG), "its runtime skips them",
    ),
    "norms under full names": (
        lambda: Case(*QV, modules_to_save=["model.norm"]).put("model.norm.weight", 16),
        (OK, REFUSED, WRONG, WRONG), "vLLM takes classifier or score only",
    ),
    "norms by a name that ends others": (
        lambda: Case(*QV, modules_to_save=["norm"]).put("model.norm.weight", 16),
        (REFUSED, REFUSED, WRONG, WRONG), "wraps",
    ),
    "a saved module without tensors": (
        lambda: Case(*QV, modules_to_save=["lm_head"]), (REFUSED, REFUSED, OK, OK), "which is not in the adapter",
    ),
    "a head saved whole": (
        lambda: Case(*QV, modules_to_save=["lm_head"]).put("lm_head.weight", 40, 16),
        (OK, REFUSED, WRONG, REFUSED), "neither lora_A nor lora_B",
    ),
    "a weight of an adapted module, saved whole": (
        lambda: Case(*QV).put(f"{Q0}.weight", 16, 16), (WRONG, REFUSED, REFUSED, REFUSED), "PEFT has wrapped the model",
    ),
    "a copy of the base": (
        lambda: Case(*QV).put(f"{Q0}.base_layer.weight", 16, 16), (NOTE, REFUSED, REFUSED, OK), "overwrites the base's",
    ),
    "LoRA on the embedding": (
        lambda: Case(*QV, "embed_tokens").put("model.embed_tokens.lora_embedding_A", 4, 40)
        .put("model.embed_tokens.lora_embedding_B", 16, 4),
        (OK, NOTE, OK, OK), "embedding_modules",
    ),
    "LoRA on the embedding, with the base's copy": (
        lambda: Case(*QV, "embed_tokens").put("model.embed_tokens.lora_embedding_A", 4, 40)
        .put("model.embed_tokens.lora_embedding_B", 16, 4).put("model.embed_tokens.base_layer.weight", 40, 16),
        (NOTE, NOTE, OK, OK), "remove it: the base has it",
    ),
    "LoRA on the head": (
        lambda: Case(*QV, "lm_head").lora("lm_head", 40, 16), (OK, NOTE, OK, NOTE), "lm_head",
    ),
    "token rows": (
        lambda: Case(*QV, trainable_token_indices={"embed_tokens": [1, 2, 3]})
        .put("model.embed_tokens.token_adapter.trainable_tokens_delta", 3, 16),
        (OK, REFUSED, WRONG, REFUSED), "skips what lies outside",
    ),
    "token rows that nothing declares": (
        lambda: Case(*QV).put("model.embed_tokens.token_adapter.trainable_tokens_delta", 3, 16),
        (WRONG, REFUSED, WRONG, REFUSED), "does not say which rows",
    ),
    "fewer token rows than declared": (
        lambda: Case(*QV, trainable_token_indices={"embed_tokens": [1, 2, 3, 4]})
        .put("model.embed_tokens.token_adapter.trainable_tokens_delta", 3, 16),
        (REFUSED, REFUSED, WRONG, REFUSED), "names 4 rows",
    ),
    "keys without prefix": (lambda: Case(*QV).respell(P, ""), (WRONG, OK, OK, OK), "does not begin with"),
    "keys with a wrong prefix": (
        lambda: Case(*QV).respell("model.layers", "model.model.layers"), (WRONG, WRONG, WRONG, REFUSED), "no such module",
    ),
    "targets that match nothing": (
        lambda: Case(*QV).set(target_modules=["query", "value"]), (REFUSED, OK, REFUSED, OK), "names query, value",
    ),
    "targets that match half": (
        lambda: Case(*QV).set(target_modules=["q_proj"]), (WRONG, OK, OK, OK), "PEFT drops its factors",
    ),
    "targets that another rule takes away": (
        lambda: Case(*ALL).set(exclude_modules=["o_proj"]), (WRONG, OK, OK, OK), "does not match it",
    ),
    "targets of layers that are not there": (
        lambda: Case(*QV).set(layers_to_transform=[0]), (WRONG, OK, OK, OK), "does not match it",
    ),
    "targets without tensors": (
        lambda: Case(*QV, "o_proj").drop("o_proj"), (WRONG, OK, OK, OK), "no tensor is for it",
    ),
    "no targets": (lambda: Case(*QV).set(target_modules=[]), (REFUSED, OK, REFUSED, OK), "is empty"),
    "targets that name too little for SGLang": (
        lambda: Case(*ALL).set(target_modules=list(QV)), (WRONG, OK, REFUSED, OK), "add it to target_modules",
    ),
    "targets left out": (lambda: Case(*QV).unset("target_modules"), (OK, REFUSED, REFUSED, OK), "add target_modules"),
    "no alpha": (lambda: Case(*QV).unset("lora_alpha"), (WRONG, REFUSED, REFUSED, REFUSED), "add lora_alpha"),
    "an alpha of null": (lambda: Case(*QV, lora_alpha=None), (REFUSED, REFUSED, REFUSED, REFUSED), "must be a number"),
    "no rank": (lambda: Case(*QV, rank=8).unset("r"), (WRONG, REFUSED, REFUSED, OK), "add r"),
    "a rank of zero": (lambda: Case(*QV, r=0), (REFUSED, REFUSED, REFUSED, REFUSED), "a rank of 1 or more"),
    "a rank that is a word": (lambda: Case(*QV, r="four"), (REFUSED, REFUSED, REFUSED, REFUSED), "a rank of 1 or more"),
    "no base": (lambda: Case(*QV).unset("base_model_name_or_path"), (OK, OK, OK, NOTE), "--base FOLDER"),
    "a bias field without biases": (lambda: Case(*QV, bias="all"), (OK, REFUSED, OK, OK), 'set it to "none"'),
    "a bias field that PEFT does not know": (lambda: Case(*QV, bias="some"), (REFUSED, REFUSED, OK, OK), "not one of"),
    "a task that PEFT does not know": (lambda: Case(*QV, task_type="CHAT"), (REFUSED, OK, OK, OK), "not one of"),
    "a pattern of null": (lambda: Case(*QV, rank_pattern=None), (REFUSED, OK, OK, OK), "needs an object"),
    "PiSSA": (lambda: Case(*QV, init_lora_weights="pissa"), (OK, REFUSED, WRONG, WRONG), "belongs to a base"),
    "gaussian start": (lambda: Case(*QV, init_lora_weights="gaussian"), (OK, OK, OK, OK), ""),
    "activated LoRA": (lambda: Case(*QV, alora_invocation_tokens=[1, 2]), (OK, REFUSED, WRONG, OK), "activated LoRA"),
    "an unknown field": (lambda: Case(*QV, more_power=True), (NOTE, OK, OK, OK), "no field that surgery knows"),
    "integers": (lambda: Case(*QV, dtype="I32"), (WRONG, WRONG, WRONG, WRONG), "is I32"),
    "another shape than the base": (
        lambda: Case(*QV).put(f"{Q0}.lora_A.weight", 4, 24), (REFUSED, REFUSED, REFUSED, REFUSED), "its shape is not",
    ),
    "a norm of another shape than the base's": (
        lambda: Case(*QV).put("model.norm.weight", 24), (REFUSED, REFUSED, WRONG, WRONG), "its shape is not the base's",
    ),
    "a norm that the base does not have": (
        lambda: Case(*QV).put("model.final.norm.weight", 16), (WRONG, REFUSED, WRONG, WRONG), "the base has no such tensor",
    ),
    "nothing at all": (lambda: Case(*QV).drop("lora").put("model.norm.weight", 16), (WRONG, REFUSED, WRONG, WRONG), "nothing to add"),
    "another method's keys": (
        lambda: Case(*QV).put(f"{Q0}.hada_w1_a", 16, 4), (WRONG, REFUSED, REFUSED, REFUSED), "PEFT drops keys",
    ),
    "another method": (lambda: Case(*QV).set(peft_type="IA3"), (NOTE, REFUSED, REFUSED, REFUSED), "is IA3"),
    "a method that nobody knows": (
        lambda: Case(*QV).set(peft_type="MAGIC"), (REFUSED, REFUSED, REFUSED, REFUSED), "does not know",
    ),
    "MLX's own format": (
        lambda: Case(*QV).unset("peft_type").set(fine_tune_type="lora"), (REFUSED,) * 4, "is MLX's",
    ),
}  # fmt: skip

# Models of another kind than the base that PEFT is asked with.
STRANGERS = {
    "whole experts": (experts, (OK, OK, OK, OK), ""),
    "experts by Mixtral's names": (
        lambda: experts(leaves=("w1", "w2", "w3")), (OK, OK, REFUSED, OK), "no LoRA on modules called w1",
    ),
    "an expert without its gate": (
        lambda: experts().drop(r"experts\.1\.gate"), (OK, REFUSED, REFUSED, REFUSED), "stacks it",
    ),
    "an expert that is missing": (
        lambda: experts(3).drop(r"experts\.1\."), (OK, REFUSED, OK, REFUSED), "stacks it",
    ),
    "fused experts": (lambda: fused("experts", "experts.base_layer"), (OK, NOTE, REFUSED, REFUSED), "mixed-moe"),
    "fused experts, half of them": (lambda: fused("experts"), (OK, REFUSED, REFUSED, REFUSED), "needs"),
    "a convolution": (
        lambda: Case("conv", layers=()).put("model.layers.0.conv.lora_A.weight", 4, 3, 3, 3)
        .put("model.layers.0.conv.lora_B.weight", 8, 4, 1, 1),
        (OK, REFUSED, REFUSED, REFUSED), "linear layers only",
    ),
    "GPT-2": (
        lambda: Case("c_attn", layers=(), fan_in_fan_out=True).lora("transformer.h.0.attn.c_attn", 48, 16),
        (OK, OK, REFUSED, REFUSED), "transposes",
    ),
    "BERT": (
        lambda: Case("query", layers=()).lora("encoder.layer.0.attention.self.query", 16, 16),
        (OK, OK, REFUSED, OK), "modules called query",
    ),
    "layers that SGLang does not number": (
        lambda: Case(*QV, layers=()).lora("transformer.h.0.q_proj", 16, 16).lora("transformer.h.0.v_proj", 16, 16),
        (OK, OK, WRONG, OK), "outside of 'layers.N'",
    ),
    "a router": (
        lambda: Case("gate", layers=()).lora("model.layers.0.mlp.gate", 4, 16), (OK, OK, REFUSED, OK), "called gate",
    ),
    "a classifier": (
        lambda: Case(*QV, task_type="SEQ_CLS", modules_to_save=["classifier", "score"]).put("score.weight", 3, 16),
        (OK, NOTE, WRONG, REFUSED), "as classifiers",
    ),
    "two heads": (
        lambda: Case(*QV, modules_to_save=["classifier", "score"]).put("score.weight", 3, 16)
        .put("classifier.weight", 3, 16),
        (OK, REFUSED, WRONG, REFUSED), "takes one head",
    ),
    "BERT's norms": (
        lambda: Case("query", layers=()).lora("encoder.layer.0.attention.self.query", 16, 16)
        .put("encoder.layer.0.output.LayerNorm.weight", 16),
        (OK, REFUSED, REFUSED, REFUSED), "neither lora_A nor lora_B",
    ),
    "a classifier that the configuration does not name": (
        lambda: Case(*QV).put("score.weight", 3, 16), (OK, REFUSED, WRONG, REFUSED), "add score to modules_to_save",
    ),
}  # fmt: skip


def level(problems):
    found = {problem.level for problem in problems}
    return next((one for one in (REFUSED, WRONG, NOTE) if one in found), OK)


def verdicts(case, base_specs):
    return {
        server: serving.problems(server, case.document, case.specs, base_specs=base_specs, max_rank=None)
        for server in SERVERS
    }


@pytest.mark.parametrize("name", [*CASES, *STRANGERS])
def test_every_server_has_its_verdict_its_reason_and_a_line_for_it(name, base_specs):
    build, expected, words = {**CASES, **STRANGERS}[name]
    found = verdicts(build(), base_specs if name in CASES else None)
    lines = [str(problem) for problems in found.values() for problem in problems]
    assert tuple(level(problems) for problems in found.values()) == expected, "\n".join(lines)
    assert any(words in line for line in lines) or not words, "\n".join(lines)
    assert all("\n" not in line for line in lines)
    for problems in found.values():
        order = [(REFUSED, WRONG, NOTE).index(problem.level) for problem in problems]
        assert order == sorted(order)


@pytest.mark.parametrize(
    ("server", "field"),
    [(server.name, field) for server in SERVERS.values() for field in (*server.fields, *server.ignored)],
)
def test_fields_that_a_server_refuses_or_overlooks_are_named(server, field):
    case = Case(*QV).set(**{field: [[0, 2]] if field == "layer_replication" else True})
    (found,) = [problem for problem in serving.problems(server, case.document, case.specs) if problem.what == field]
    assert found.level == (REFUSED if field in SERVERS[server].fields else WRONG)


def test_the_fields_that_vllm_refuses_are_all_there():
    assert set(SERVERS["vllm"].fields) == {
        "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora",
    }  # fmt: skip


def test_lora_on_a_tied_head_is_refused_by_the_converter(base_specs):
    build, _, _ = CASES["LoRA on the head"]
    case = build()
    tied = {name: spec for name, spec in base_specs.items() if name != "lm_head.weight"}
    assert level(serving.problems("llamacpp", case.document, case.specs, base_specs=base_specs)) == NOTE
    assert level(serving.problems("llamacpp", case.document, case.specs, base_specs=tied)) == REFUSED


def test_the_table_has_good_and_broken_adapters_for_every_server():
    for number in range(4):
        seen = [expected[number] for _, expected, _ in {**CASES, **STRANGERS}.values()]
        assert seen.count(OK) >= 10
        assert seen.count(REFUSED) + seen.count(WRONG) >= 20
    assert len(CASES) + len(STRANGERS) >= 60


def peft_says(folder):
    """Load an adapter in PEFT and say what became of it: refused, some keys lost or left at their start, or all well."""
    results = []

    def spy(*arguments, **more):
        results.append(original(*arguments, **more))
        return results[-1]

    original, peft.peft_model.set_peft_model_state_dict = peft.peft_model.set_peft_model_state_dict, spy
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.PeftModel.from_pretrained(llama(), folder)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return REFUSED
    finally:
        peft.peft_model.set_peft_model_state_dict = original
    own = ("lora_", "modules_to_save", "token_adapter")
    missing = [key for key in results[0].missing_keys if any(word in key for word in own)]
    return WRONG if missing or results[0].unexpected_keys else OK


PEFT_DOES_NOT_TELL = {
    "no alpha": "PEFT takes 8",
    "no rank": "PEFT takes 8",
    "integers": "PEFT copies them",
    "nothing at all": "asked below",
    "another method": "not a LoRA",
    "DoRA": "keys are right",
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in PEFT_DOES_NOT_TELL])
def test_peft_itself_comes_to_the_same_verdict(name, tmp_path):
    build, expected, _ = CASES[name]
    said = peft_says(build().save(tmp_path / "adapter"))
    assert said == (OK if expected[0] == NOTE else expected[0])


# --- the servers' rules, told once more ------------------------------------------------------------------------------


def vllm_parses(key):
    """vLLM names a tensor by the last dotted parts of its key, and raises where it cannot."""
    if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
        return True
    *_, owner, last = ["", *key.split(".")]
    if last == "weight" and owner in ("lora_A", "lora_B"):
        return True
    if last in ("weight", "bias") and owner in ("score", "classifier"):
        return True
    return last in ("lora_embedding_A", "lora_embedding_B")


def vllm_takes_configuration(document, keys):
    required = {"r", "lora_alpha", "target_modules"} <= document.keys()
    plain = document.get("bias", "none") == "none" and not any(
        document.get(name) for name in ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication")
    )
    saved = set(document.get("modules_to_save") or ())
    heads = {key.split(".")[-2] for key in keys if key.split(".")[-2] in ("score", "classifier")}
    init = document.get("init_lora_weights", True)
    return (
        required and plain and saved <= {"score", "classifier"} and heads <= saved
        and (not isinstance(init, str) or init in ("gaussian", "eva", "orthogonal"))
        and max([document["r"], *(document.get("rank_pattern") or {}).values()]) <= 512
    )  # fmt: skip


def sglang_stacks(document, shapes):
    """Play SGLang's loading of every layer with shapes alone; ``False`` where one of its steps raises."""
    if document.get("peft_type") != "LORA" or document.get("use_dora") or not {"r", "lora_alpha"} <= document.keys():
        return False
    targets = document.get("target_modules")
    renamed = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    renamed |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    if targets in ("all", "all-linear"):
        targets = [*ALL, "embed_tokens", "lm_head"]
    if not isinstance(targets, list):
        return False
    pools = {renamed.get(target.split(".")[-1], target.split(".")[-1]) for target in targets}
    if not pools <= {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"}:
        return False  # no layer has such a pool
    layers = {}
    for key, shape in shapes.items():
        found = re.search(r"layers\.(\d+)\.", key)
        if found:
            layers.setdefault(found[1], {})[key] = shape
    return all(_sglang_layer(layer, pools, document["r"]) for layer in layers.values())


def _sglang_layer(layer, pools, r):
    layer = dict(layer)
    has_k = any("k_proj" in key for key in layer)
    for q in [key for key in layer if "q_proj" in key]:
        parts = [q, q.replace("q_proj", "k_proj"), q.replace("q_proj", "v_proj")]
        if parts[2] not in layer or (has_k and parts[1] not in layer):
            return False
        rows = [layer[part if part in layer else parts[2]][0] for part in parts]
        columns = {layer[part][1:] for part in parts if part in layer}
        if len(columns) != 1:
            return False
        layer[q.replace("q_proj", "qkv_proj")] = (sum(rows), *columns.pop())
        for part in parts:
            layer.pop(part, None)
    for gate in [key for key in layer if "gate_proj" in key]:
        up = layer.get(gate.replace("gate_proj", "up_proj"), layer[gate])
        if up[1:] != layer[gate][1:]:
            return False
        layer[gate.replace("gate_proj", "gate_up_proj")] = (layer.pop(gate)[0] + up[0], *up[1:])
        layer.pop(gate.replace("gate_proj", "up_proj"), None)
    inputs = {"qkv_proj": (3, 16, 32), "o_proj": (1, 16, 16), "gate_up_proj": (2, 16, 64), "down_proj": (1, 32, 16)}
    kept = {}
    for key, shape in layer.items():
        pool = max((pool for pool in pools if pool in key), key=len, default=None)
        if pool is None:
            return False
        kept[pool, "A" if "lora_A" in key else "B"] = shape
    for (pool, side), shape in kept.items():
        times, into, out = inputs[pool]
        if shape != ((times * r, into) if side == "A" else (out, r)) or (pool, "AB".replace(side, "")) not in kept:
            return False
    return True


def llamacpp_converts(document, shapes):
    """Play llama.cpp's converter: pairs by the weight's name, and nothing else but norms and copies of the base."""
    pairs = {}
    for key, shape in shapes.items():
        side = next((side for side in "AB" if f".lora_{side}.weight" in key or f".lora_embedding_{side}" in key), None)
        if side is None:
            if ".base_layer.weight" in key or "_layernorm" in key or ".norm" in key:
                continue
            return False
        name = re.sub(r"\.lora_(embedding_)?[AB](\.weight)?", ".weight", key.removeprefix(P))
        pairs.setdefault(name, {})[side] = shape
    known = re.compile(r"(model\.layers\.[01]\.(self_attn|mlp)\.\w+_proj|model\.embed_tokens|lm_head)\.weight")
    return type(document.get("lora_alpha")) in (int, float) and all(
        len(both) == 2 and both["A"][-2] == both["B"][-1] and known.fullmatch(name) for name, both in pairs.items()
    )


# What these three do not look at, and base shapes or ranks decide.
UNTOLD = {
    "another method", "a method that nobody knows", "MLX's own format", "a rank of zero", "a rank that is a word",
    "an alpha of null", "another shape than the base", "A without B", "A and B of different ranks", "nothing at all",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNTOLD])
def test_the_loaders_rules_told_once_more_come_to_the_same_verdicts(name):
    build, (_, vllm, sglang, llamacpp), _ = CASES[name]
    case = build()
    keys = case.shapes.keys()
    parses = all(map(vllm_parses, keys)) and vllm_takes_configuration(case.document, keys)
    assert parses == (vllm != REFUSED)
    if name != "keys with a wrong prefix":
        assert sglang_stacks(case.document, case.shapes) == (sglang != REFUSED)
    assert llamacpp_converts(case.document, case.shapes) == (llamacpp != REFUSED)


@pytest.mark.parametrize(
    "module", ["model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head", "score", "classifier.dense"]
)
@pytest.mark.parametrize(
    "ending",
    [
        "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "weight", "bias",
        "base_layer.weight", "base_layer.bias", "lora_magnitude_vector", "token_adapter.trainable_tokens_delta",
        "modules_to_save.weight", "original_module.weight", "hada_w1_a", "lora_A.bias",
    ],
)  # fmt: skip
def test_vllm_s_key_parser_is_told_apart_key_by_key(module, ending):
    key = f"{P}{module}.{ending}"
    case = Case(*QV, modules_to_save=["score", "classifier"]).set(bias="none")
    case.shapes[key] = (4, 4) if "lora_embedding" in ending or ending.endswith("weight") else (4,)
    problems = serving.problems("vllm", case.document, case.specs)
    about = [problem for problem in problems if key in problem.keys and problem.level == REFUSED]
    if key.endswith("score.bias"):
        assert "with its weight" in about[0].why
        return
    assert (not about) == vllm_parses(key)


# --- adapters that PEFT and surgery wrote ----------------------------------------------------------------------------

WRITTEN = {
    "plain": ({"target_modules": list(QV)}, (OK, OK, OK, OK)),
    "dora": ({"target_modules": list(QV), "use_dora": True}, (OK, REFUSED, REFUSED, REFUSED)),
    "rslora": ({"target_modules": list(QV), "use_rslora": True}, (OK, OK, WRONG, WRONG)),
    "all biases": ({"target_modules": list(QV), "bias": "all"}, (OK, REFUSED, REFUSED, REFUSED)),
    "lora_bias": ({"target_modules": ["o_proj"], "lora_bias": True}, (OK, REFUSED, REFUSED, REFUSED)),
    "saved": ({"target_modules": list(QV), "modules_to_save": ["lm_head"]}, (OK, REFUSED, WRONG, REFUSED)),
    "rows": ({"target_modules": list(QV), "trainable_token_indices": [1, 5]}, (OK, REFUSED, WRONG, REFUSED)),
    "embedding": ({"target_modules": [*QV, "embed_tokens"]}, (NOTE, NOTE, OK, OK)),
    "all-linear": ({"target_modules": "all-linear"}, (OK, OK, OK, OK)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_adapters_that_peft_saved_have_their_verdicts(name, tmp_path, base_specs):
    fields, expected = WRITTEN[name]
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)) if name == "all biases" else llama()
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=4, task_type="CAUSAL_LM", **fields))
        adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/tiny"}))
    for base in (None, tmp_path / "base"):
        found = surgery.verify(tmp_path / "adapter", server="all", base=base)
        assert tuple(level(verdict.problems) for verdict in found.verdicts) == expected, found.document()


def test_what_surgery_extracts_for_peft_loads_in_peft_and_servers_say_what_they_lack(tmp_path):
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "ft")
    surgery.extract_lora(tmp_path / "base", tmp_path / "ft", rank=4).save(tmp_path / "adapter")
    found = surgery.verify(tmp_path / "adapter", server="all", base=tmp_path / "base")
    assert [verdict.loads for verdict in found.verdicts] == [True, False, False, False]
    vllm = " ".join(map(str, found.verdicts[1].problems))
    assert "input_layernorm" in vllm
    assert "q_proj.base_layer.bias" in vllm


# --- helpers that write for a server ---------------------------------------------------------------------------------


def test_partners_make_an_adapter_that_sglang_stacks():
    for leaves in (["q_proj"], ["k_proj"], ["v_proj", "up_proj"], ["q_proj", "k_proj"]):
        case = Case(*leaves)
        modules = {key.removeprefix(P).rpartition(".lora")[0] for key in case.shapes}
        for module in serving.missing_partners("sglang", modules):
            case.lora(module, *SHAPES[module.split(".", 3)[3]])
        case.set(target_modules=list(ALL))
        assert sglang_stacks(case.document, case.shapes)
        assert level(serving.problems("sglang", case.document, case.specs)) == OK


def test_partners_are_only_modules_that_the_model_has():
    assert serving.missing_partners("sglang", ["layers.0.up_proj"], ["layers.0.up_proj"]) == []
    assert serving.missing_partners("vllm", ["q_proj", "up_proj"]) == []
    assert serving.missing_partners("peft", ["q_proj"]) == []


def test_experts_are_completed_over_all_of_the_model():
    model = [f"layers.0.experts.{index}.{leaf}" for index in range(3) for leaf in ("w1", "w2", "w3")]
    found = serving.missing_partners("vllm", [model[0]], model)
    assert sorted([model[0], *found]) == sorted(model)
    assert serving.missing_partners("llamacpp", [model[0]], model) == found
    assert serving.missing_partners("sglang", [model[0]], model) == []


def test_one_rank_is_the_largest_and_never_beyond_the_server():
    assert serving.one_rank([3, 24, 16], "sglang") == 24
    assert serving.one_rank([600], "sglang") == 600
    with pytest.raises(MismatchError, match="--max-rank 512"):
        serving.one_rank([600], "vllm")
    assert [serving.start_with("vllm", rank) for rank in (8, 16, 17, 300, 600)] == [
        None, None, "--max-lora-rank 32", "--max-lora-rank 320", None,
    ]  # fmt: skip


def test_a_server_started_for_a_smaller_rank_refuses():
    case = Case(*QV, rank=24, r=24, lora_alpha=24)
    for server in ("vllm", "sglang"):
        assert level(serving.problems(server, case.document, case.specs, max_rank=16)) == REFUSED
        assert level(serving.problems(server, case.document, case.specs, max_rank=32)) == OK


def test_every_kind_is_held_or_has_a_reason():
    for server in SERVERS:
        assert {"linear", "expert"} <= {kind for kind in KINDS if serving.holds(server, kind) is None}
        assert SERVERS[server].unheld.keys() <= KINDS.keys()
    assert all(serving.holds("peft", kind) is None for kind in KINDS if kind != "unknown")
    for server in ("vllm", "sglang", "llamacpp"):
        for kind in ("bias", "norm", "rows", "saved", "embedding", "head", "conv", "experts", "magnitude"):
            assert serving.holds(server, kind)
    with pytest.raises(UsageError, match="no server 'ollama'; there are peft, vllm"):
        serving.holds("ollama", "linear")


def test_the_document_shows_the_table_as_it_is():
    document = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    for kind, words in KINDS.items():
        levels = [server.unheld[kind].level if kind in server.unheld else "loads" for server in SERVERS.values()]
        assert f"| {words} | {' | '.join(levels)} |" in document
    for server in SERVERS.values():
        assert server.title in document
        assert server.version.rpartition(" ")[2] in document
    assert ", ".join(map(str, SERVERS["vllm"].max_ranks)) in document


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


def test_an_adapter_that_loads_ends_with_nought_and_shows_it(run, tmp_path):
    Case(*QV).save(tmp_path / "good")
    code, out, err = run("verify", "good", "--for", "all")
    assert (code, err) == (0, "")
    assert out.count("loads") == 4
    assert run("verify", "good", "--for", "vllm", "-q") == (0, "loads\n", "")


def test_notes_do_not_fail_it(run, tmp_path):
    Case(*QV, rank=24, r=24, lora_alpha=24).save(tmp_path / "large")
    code, out, _ = run("verify", "large", "--for", "vllm")
    assert code == 0
    assert "--max-lora-rank 32" in out
    code, _, err = run("verify", "large", "--for", "vllm", "--max-lora-rank", "16")
    assert code == 10
    assert "is more than --max-lora-rank 16" in err


def test_an_adapter_that_does_not_load_ends_with_ten_and_one_line(run, tmp_path):
    build, _, _ = CASES["DoRA"]
    build().put("model.norm.weight", 16).save(tmp_path / "dora")
    code, out, err = run("verify", "dora", "--for", "vllm", "--for", "peft")
    assert code == 10
    assert err.count("\n") == 1
    assert "does not load in vLLM: use_dora: vLLM has no DoRA (3 problems in all)" in err
    assert "surgery merge BASE ADAPTER -o FT, then surgery extract-lora BASE FT --for vllm" in err
    assert "model.norm.weight" in out


def test_the_list_is_in_json_too(run, tmp_path):
    Case("q_proj").save(tmp_path / "half")
    code, out, _ = run("verify", "half", "--for", "sglang", "--json")
    document = json.loads(out)
    assert code == 10
    assert document["schema"] == "surgery.serving/1"
    assert document["loads"] is document["servers"]["sglang"]["loads"] is False
    (problem,) = document["servers"]["sglang"]["problems"]
    assert problem["keys"] == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]


def test_a_base_shows_what_the_adapter_alone_does_not(run, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    Case(*QV).respell("model.layers", "model.model.layers").save(tmp_path / "misnamed")
    assert run("verify", "misnamed", "--for", "vllm")[0] == 0
    code, _, err = run("verify", "misnamed", "--for", "vllm", "--base", "base")
    assert code == 10
    assert "loads, and does not do what it says" in err
    Case(*QV).respell("model.layers", "layers").save(tmp_path / "bare")
    assert run("verify", "bare", "--for", "peft", "--base", "base")[0] == 0


def test_other_names_for_the_weights_are_refused_where_they_are_not_looked_for(run, tmp_path):
    folder = Case(*QV).save(tmp_path / "renamed")
    (folder / "adapter_model.safetensors").rename(folder / "adapter.safetensors")
    (folder / "added_tokens.json").write_text("{}")
    found = surgery.verify(folder, server=["vllm", "sglang"])
    assert [level(verdict.problems) for verdict in found.verdicts] == [REFUSED, NOTE]
    assert "looks for adapter_model.safetensors" in str(found.verdicts[0].problems[0])


def test_python_gets_the_verdict_and_can_insist_on_it(tmp_path):
    folder = Case("q_proj").save(tmp_path / "half")
    assert surgery.verify(folder, server="vllm").loads
    found = surgery.verify(folder, server=["vllm", "sglang", "vllm"])
    assert [verdict.server.name for verdict in found.verdicts] == ["vllm", "sglang"]
    assert "SGLang" in found._repr_html_()
    with pytest.raises(VerificationError, match="does not load in SGLang"):
        found.require()
    with pytest.raises(UsageError, match="--for"):
        surgery.verify(folder, base="base")
    with pytest.raises(UsageError, match="no server"):
        surgery.verify(folder, server="ollama")


HOSTILE = {
    "no JSON": ("adapter_config.json", "{", FormatError),
    "a list": ("adapter_config.json", "[]", FormatError),
    "an expression without end": (
        "adapter_config.json", json.dumps(config(target_modules="(a*)*(b*)*(c*)*", bias="none")), FormatError,
    ),
    "no tensors": ("adapter_model.safetensors", "", FormatError),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_malformed_adapters_end_in_one_line(name, run, tmp_path):
    file, text, error = HOSTILE[name]
    folder = Case(*QV).save(tmp_path / "bad")
    (folder / file).write_text(text)
    code, out, err = run("verify", "bad", "--for", "all")
    assert (code, out, err.count("\n")) == (error.exit_code, "", 1)
    assert "bad" in err


@pytest.mark.parametrize(
    "fields",
    [
        {"r": [4]}, {"r": True}, {"r": 10**400}, {"lora_alpha": "4"}, {"lora_alpha": {}}, {"rank_pattern": [1]},
        {"alpha_pattern": {"a": "b"}}, {"target_modules": 5}, {"target_modules": [5]}, {"target_modules": {"q": 1}},
        {"modules_to_save": 5}, {"modules_to_save": "lm_head"}, {"modules_to_save": [None]}, {"peft_type": ["LORA"]},
        {"peft_type": None}, {"bias": {}}, {"task_type": [1]}, {"trainable_token_indices": 7},
        {"trainable_token_indices": {"a": 7}}, {"layers_to_transform": "x"}, {"layers_pattern": 5, "layers_to_transform": [0]},
        {"exclude_modules": 5}, {"init_lora_weights": []}, {"use_rslora": "yes"}, {"fan_in_fan_out": 3},
        {"base_model_name_or_path": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_fields_of_any_type_give_a_verdict(fields, base_specs):
    case = Case(*QV, **fields)
    for server in SERVERS:
        for base in (None, base_specs):
            for problem in serving.problems(server, case.document, case.specs, base_specs=base):
                assert str(problem)


def test_numbers_without_end_in_names_give_a_verdict():
    case = Case(*QV, layers=()).set(layers_to_transform=[0])
    for number in ("9999", "9" * 5000):
        case.lora(f"model.layers.{number}.mlp.experts.{number}.gate_proj", 32, 16)
    for server in SERVERS:
        assert all(str(problem) for problem in serving.problems(server, case.document, case.specs))


def test_tensors_of_any_shape_give_a_verdict(base_specs):
    for shape in ((), (0,), (3,), (0, 0), (1, 2, 3), (4, 16, 1, 1, 1)):
        case = Case(*ALL, "embed_tokens", "lm_head").put("model.embed_tokens.lora_embedding_A", *shape)
        case.shapes = dict.fromkeys(case.shapes, shape)
        for server in SERVERS:
            assert level(serving.problems(server, case.document, case.specs, base_specs=base_specs)) in (WRONG, REFUSED)
