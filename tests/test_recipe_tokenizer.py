"""Merges of models with different vocabularies: rows found by token, and a tokenizer that transformers loads."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery.errors import FormatError, MismatchError, SurgeryError
from surgery.formats.tokenizer import read_vocabulary
from surgery.operations.recipe import merge_recipe
from surgery.operations.recipe_templates import TEMPLATES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = {"base": ["</s>", "<b>"], "one": ["<1>", "</s>", "<shared>"], "two": ["</s>", "<shared>", "<2>"]}


def make(folder, name, *, template=None, spare=0, tied=False):
    """Write a model with letters in an order of its own, and tokens of its own."""
    number = list(TOKENS).index(name)
    letters = string.ascii_lowercase[number : 10 + number]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: k for k, c in enumerate(letters)}, merges=[]))
    made.add_special_tokens(TOKENS[name])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(number)
    config = transformers.LlamaConfig(
        vocab_size=len(fast) + spare, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=fast.eos_token_id, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in TOKENS:
        make(root / name, name)
    return root


@pytest.fixture(autouse=True)
def _there(models, monkeypatch):
    monkeypatch.chdir(models)


def rows(name, tensor=EMBEDDING):
    """Read a stored model's rows by token."""
    matrix = load_file(f"{name}/model.safetensors")[tensor].double()
    numbers = tokenizers.Tokenizer.from_file(f"{name}/tokenizer.json").get_vocab()
    return {token: matrix[number] for token, number in numbers.items() if number < len(matrix)}


def merged(text):
    return merge_recipe(text.encode())


def loaded(result, folder):
    """Save, and read matrix and tokenizer with transformers; return the rows by token, and the model."""
    result.save(folder)
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    matrix = model.get_input_embeddings().weight.detach().double()
    return {token: matrix[number] for token, number in fast.get_vocab().items()}, model, fast


UNION = """
models: [{model: one, parameters: {weight: 0.75}}, {model: two, parameters: {weight: 0.25}}]
merge_method: linear
tokenizer_source: union
"""


def test_a_union_has_every_token_once_and_its_row_by_the_rules(tmp_path):
    found, model, fast = loaded(merged(UNION), tmp_path / "out")
    one, two = rows("one"), rows("two")
    assert set(found) == set(one) | set(two)
    assert model.config.vocab_size == len(found) == len(fast)
    for token, row in found.items():
        wanted = [0.75 * one.get(token, two.get(token)) + 0.25 * two.get(token, one.get(token))]
        assert torch.allclose(row, wanted[0], atol=1e-7), token  # a token of one model alone has its row in both
    assert fast.convert_tokens_to_ids("</s>") == model.config.eos_token_id
    assert fast("<2>", add_special_tokens=False)["input_ids"] == [fast.convert_tokens_to_ids("<2>")]


def test_a_token_that_the_base_has_takes_its_row_where_a_model_lacks_it(tmp_path):
    result = merged(
        """
        models: [{model: one, parameters: {weight: 1}}, {model: two, parameters: {weight: 0.5}}]
        base_model: base
        merge_method: task_arithmetic
        tokenizer_source: union
        """
    )
    found, _, _ = loaded(result, tmp_path / "out")
    base, one, two = rows("base"), rows("one"), rows("two")
    for token in ("a", "b", "<b>", "</s>"):
        wanted = (
            base[token]
            + (one.get(token, base[token]) - base[token])
            + 0.5 * (two.get(token, base[token]) - base[token])
        )
        assert torch.allclose(found[token], wanted, atol=1e-6)
    average = (one["<shared>"] + two["<shared>"]) / 2  # the base lacks it, two models have it
    wanted = average + (one["<shared>"] - average) + 0.5 * (two["<shared>"] - average)
    assert torch.allclose(found["<shared>"], wanted, atol=1e-6)


@pytest.mark.parametrize("source", ["base", "two"])
def test_the_tokenizer_of_the_base_or_of_a_model_is_taken_as_it_is(tmp_path, source):
    result = merged(
        f"""
        models: [{{model: one}}]
        base_model: base
        merge_method: task_arithmetic
        tokenizer_source: {source}
        """
        if source == "base"
        else UNION.replace("union", source)
    )
    found, model, fast = loaded(result, tmp_path / "out")
    assert set(found) == set(rows(source))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == Path(source, "tokenizer.json").read_bytes()
    assert model.config.eos_token_id == fast.eos_token_id
    if source == "two":
        for token in found:
            wanted = 0.75 * rows("one").get(token, rows("two")[token]) + 0.25 * rows("two")[token]
            assert torch.allclose(found[token], wanted, atol=1e-7)


def test_rules_by_token_and_padding(tmp_path):
    result = merged(
        """
        models: [{model: one}, {model: two}]
        merge_method: linear
        parameters: {weight: 1}
        tokenizer:
          source: union
          pad_to_multiple_of: 32
          tokens:
            b: {source: two, force: true}
            "<1>": {source: {kind: model_token, model: two, token: "<2>"}}
            "<new>": {source: {kind: zero}}
            "<7>": {source: {kind: model_token, model: one, token_id: 7}}
        """.replace("            b: {source: two, force: true}\n", '            "</s>": {source: two, force: true}\n')
    )
    found, model, fast = loaded(result, tmp_path / "out")
    one, two = rows("one"), rows("two")
    assert torch.equal(found["</s>"], two["</s>"])
    assert torch.allclose(found["<1>"], (one["<1>"] + two["<2>"]) / 2, atol=1e-7)
    assert not found["<new>"].any()
    seventh = load_file("one/model.safetensors")[EMBEDDING][7].double()
    assert torch.allclose(found["<7>"], seventh, atol=1e-7)
    assert model.config.vocab_size == 32
    matrix = model.get_output_embeddings().weight.detach().double()
    assert torch.allclose(matrix[len(fast) :], matrix[: len(fast)].mean(0).expand(32 - len(fast), -1), atol=1e-6)


def test_equal_vocabularies_leave_the_rows_alone():
    result = merged("{models: [{model: one}], merge_method: passthrough, tokenizer_source: union}")
    assert result.origin.counts["merged"] == 0
    assert torch.equal(result[EMBEDDING], load_file("one/model.safetensors")[EMBEDDING])


def test_spare_rows_go_and_a_tied_head_stays_tied(tmp_path):
    for name in ("one", "two"):
        make(tmp_path / name, name, spare=5, tied=True)
    text = UNION.replace("model: ", f"model: {tmp_path}/")
    found, model, _ = loaded(merged(text), tmp_path / "out")
    assert model.config.vocab_size == len(found)
    assert model.config.tie_word_embeddings


def test_stages_pass_their_tokenizer_on(tmp_path):
    result = merged(
        f"name: both\n{UNION}\n---\n{{models: [{{model: both}}], merge_method: passthrough, dtype: float32}}"
    )
    found, _, _ = loaded(result, tmp_path / "out")
    assert set(found) == set(rows("one")) | set(rows("two"))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_bytes_do_not_depend_on_threads_or_blocks(tmp_path, cut):
    whole = merged(UNION)
    whole.save(tmp_path / "whole", jobs=1)
    merged(UNION).save(tmp_path / "cut", jobs=cut)
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_old_forms_of_tokenizers_are_read():
    files = {"vocab.txt": b"[PAD]\nhello\n", "added_tokens.json": b'{"<x>": 2}'}
    assert read_vocabulary(files.get).numbers == {"[PAD]": 0, "hello": 1, "<x>": 2}
    files = {"vocab.json": b'{"a": 1, "b": 0}'}
    assert read_vocabulary(files.get).numbers == {"a": 1, "b": 0}
    unigram = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}, "added_tokens": None}
    assert read_vocabulary({"tokenizer.json": json.dumps(unigram).encode()}.get).numbers == {"<unk>": 0, "a": 1}
    assert read_vocabulary({}.get) is None


@pytest.mark.parametrize(
    "text",
    ['{"model": 1}', '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": {"a": -1}}}', "[]", "{",
     '{"model": {"vocab": {"a": 0, "b": 0}}}', '{"model": {"vocab": [1]}}'],
)  # fmt: skip
def test_malformed_tokenizers_are_refused(text):
    with pytest.raises(FormatError):
        read_vocabulary({"tokenizer.json": text.encode()}.get)


def test_what_cannot_be_chosen_is_refused(tmp_path):
    save_file({"model.embed_tokens.weight": torch.zeros(4, 2)}, tmp_path / "bare.safetensors")
    bare = f"{{models: [{{model: {tmp_path}/bare.safetensors}}], merge_method: passthrough, tokenizer_source: base}}"
    with pytest.raises(FormatError, match=r"has no tokenizer\.json"):
        merged(bare)
    rule = "{tokens: {x: {source: {kind: model_token, model: %s, token: nowhere}}}}"
    with pytest.raises(MismatchError, match="has no token 'nowhere'"):
        merged(UNION.replace("tokenizer_source: union", f"tokenizer: {rule % 'one'}"))
    with pytest.raises(SurgeryError, match="wants its row"):
        merged(UNION.replace("tokenizer_source: union", f"tokenizer: {rule % 'base'}"))


def test_a_chat_template_is_chosen_named_or_given(tmp_path):
    say = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for name in TOKENS:
        make(tmp_path / name, name, template="{{ 'rare' }}" if name == "base" else say)
    turns = [{"role": "user", "content": "hi"}]
    models = ", ".join(f"{{model: {tmp_path}/{name}}}" for name in TOKENS)
    text = f"{{models: [{models}], merge_method: linear, tokenizer_source: base, chat_template: %s}}"
    for number, (choice, wanted) in enumerate(
        [("auto", "hi"), ("chatml", "<|im_start|>user\nhi<|im_end|>\n"), ("'{{ messages[0].role }}'", "user")]
    ):
        _, _, fast = loaded(merged(text % choice), tmp_path / f"out{number}")
        assert fast.apply_chat_template(turns, tokenize=False) == wanted
    with pytest.raises(FormatError, match="no chat template 'chatlm'"):
        merged(text % "chatlm")


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_render(name):
    fast = transformers.AutoTokenizer.from_pretrained("one")
    fast.bos_token = "</s>"
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]
    text = fast.apply_chat_template(turns, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True)
    assert [text.count(word) for word in ("SYSTEM", "USER", "ASSISTANT")] == [1, 2, 1]
