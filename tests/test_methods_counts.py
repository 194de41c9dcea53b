"""Parameter counts: published figures against integers worked out apart, and every method's count against its file."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

import surgery
from surgery.cli.main import main
from surgery.methods.published import PUBLISHED, biases, block, bottlenecks, gpt2, head, lora, roberta
from surgery.methods.registry import METHODS
from surgery.operations.methods import methods
from tests.families import build, saved, shapes

# model, method and figure as printed → the exact count, and whether the figure is inconsistent with it.
EXACT = {
    ("350M", "prompt tuning, l=20", "15k (0.006 %)"): (20_480, True),
    ("350M", "adapters, r=64", "6M (2 %)"): (6_343_680, False),
    ("350M", "LoRA, r=8", "0.8M (0.22 %)"): (786_432, False),
    ("350M", "BitFit", "0.32M (0.09 %)"): (321_536, True),
    ("RoBERTa-base", "FT", "125.0M"): (124_645_632, True),
    ("RoBERTa-base", "BitFit", "0.1M"): (102_144, False),
    ("RoBERTa-base", "Adapter^D", "0.9M"): (894_528, False),
    ("RoBERTa-base", "Adapter^D", "0.3M"): (298_176, True),
    ("RoBERTa-base", "LoRA, r=8", "0.3M"): (294_912, False),
    ("GPT-2 M", "FT", "354.92M"): (354_823_168, True),
    ("GPT-2 M", "Adapter^L", "0.37M"): (368_784, False),
    ("GPT-2 M", "Adapter^L", "11.09M"): (11_089_152, False),
    ("GPT-2 M", "Adapter^H", "11.09M"): (11_064_576, True),
    ("GPT-2 M", "FT^Top2", "25.19M"): (25_192_448, False),
    ("GPT-2 M", "PreLayer", "0.35M"): (344_064, True),
    ("GPT-2 M", "LoRA, r=4", "0.35M"): (393_216, True),
    ("GPT-2 L", "FT", "774.03M"): (774_030_080, False),
    ("GPT-2 L", "Adapter^L", "0.88M"): (875_808, False),
    ("GPT-2 L", "Adapter^L", "23.00M"): (23_002_848, False),
    ("GPT-2 L", "LoRA, r=4", "0.77M"): (737_280, True),
    ("RoBERTa-large", "Adapter^P, r=16", "0.8M"): (811_392, False),
    ("RoBERTa-large", "Adapter^H, r=8", "0.8M"): (835_968, False),
    ("RoBERTa-large", "Adapter^P, r=64", "3.0M"): (3_171_840, True),
    ("RoBERTa-large", "Adapter^H, r=64", "6.0M"): (6_343_680, True),
    ("DeBERTa-XXL", "LoRA, r=16", "4.7M"): (4_718_592, False),
    ("GPT-3", "LoRA, r=1", "4.7M"): (4_718_592, False),
    ("GPT-3", "LoRA, r=8", "37.7M"): (37_748_736, False),
    ("GPT-3", "Adapter^H, r=1", "7.1M"): (7_078_080, False),
    ("GPT-3", "Adapter^H, r=8", "40.1M"): (40_109_568, False),
}


def test_published_counts_are_these_integers():
    found = {(p.table.split(",")[0], p.method, p.printed): (p.exact, bool(p.inconsistent)) for p in PUBLISHED}
    assert found == EXACT


def test_the_readings_that_were_turned_down_are_these_integers():
    assert biases(1024, 24, scales=False) == 271_360
    assert bottlenecks(1024, 24, 64) == 3_171_840
    assert roberta(768, 12, pooler=False) == 124_055_040
    assert bottlenecks(768, 12, 48, biases=False) == 884_736
    assert bottlenecks(768, 12, 16) == 304_320
    assert bottlenecks(1024, 24, 7) == 368_808  # Adapter^L of 0.37M without norms
    assert bottlenecks(1024, 24, 225) == 11_089_176  # of 11.09M without norms
    assert bottlenecks(1024, 48, 112, norms=24) == 11_113_728  # Adapter^H with a norm a block
    assert 2 * block(1024) + 2 * 1024 == 25_194_496  # FT^Top2 with the last norm
    assert 15 * 24 * 1024 == 368_640  # PreLayer of 15 tokens
    assert head(768, 3) == 592_899
    assert roberta(768, 12, pooler=False) + head(768, 3) == 124_647_939
    assert lora(768, 12, 8) + head(768, 3) == 887_811  # the LoRA authors' own 0.8M, truncated


def test_a_figure_is_called_inconsistent_where_its_digits_are_not_the_exact_counts():
    otherwise = {("350M", "BitFit"), ("RoBERTa-base", "Adapter^D")}  # one is not what its name says, one is ambiguous
    for row in PUBLISHED:
        number, unit = re.match(r"([\d.]+)([kM])", row.printed).groups()
        digits = len(number.partition(".")[2])
        agrees = abs(row.exact / {"k": 1e3, "M": 1e6}[unit] - float(number)) <= 0.5 * 10**-digits
        assert agrees or row.inconsistent, row
        assert not (agrees and row.inconsistent) or (row.table.split(",")[0], row.method) in otherwise, row


@pytest.mark.parametrize("wide", [False, True])
def test_formulas_count_what_transformers_builds(wide):
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

    width, depth = (32, 3) if wide else (16, 2)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=width, n_layer=depth, n_head=4))
        body = RobertaModel(
            RobertaConfig(
                vocab_size=64, max_position_embeddings=8, hidden_size=width, num_hidden_layers=depth, type_vocab_size=1,
                num_attention_heads=4, intermediate_size=4 * width,
            )
        )  # fmt: skip
    assert gpt2(width, depth, vocabulary=64, positions=8) == sum(p.numel() for p in model.parameters())
    assert roberta(width, depth, vocabulary=64, positions=8) == sum(p.numel() for p in body.parameters())
    names = dict(model.named_parameters())
    biased = sum(p.numel() for name, p in names.items() if name.endswith("bias"))
    scales = sum(p.numel() for name, p in names.items() if "ln_" in name and name.endswith("weight"))
    assert biases(width, depth, scales=False) == biased
    assert biases(width, depth, scales=True) == biased + scales


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2", "phi3", "t5"])
def test_a_methods_count_is_that_of_what_it_adds(family, folder):
    sizes = {name: value.numel() for name, value in build(family).state_dict().items()}
    path = saved(family, folder)
    for row in methods(path).rows:
        if row.parameters is None:
            continue
        added = surgery.add(path, row.method.name)
        heads = {one.key for one in added.addition.head}
        trained = [name for name in added.trainable if name not in heads]
        assert row.parameters == sum(
            added[name].numel() if name in added.tensors else sizes[name] for name in trained
        ), row.method.name


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2"])
def test_every_number_of_the_table_is_that_of_the_files_that_add_writes(family, folder, tmp_path):
    path = saved(family, folder)
    whole = {name: math.prod(shape) for name, shape in shapes(path).items()}
    costs = methods(path)
    assert costs.total == sum(whole.values())
    for row in costs.rows:
        if row.parameters is None:
            continue
        out = tmp_path / row.method.name
        added = surgery.add(path, row.method.name)
        added.save(out)
        files = list(out.glob("*.safetensors"))
        uncounted = {one.key for one in added.addition.head} | {one.key for one in added.addition.new if one.frozen}
        sizes = {name: math.prod(shape) for name, shape in shapes(out).items()} if files else {}
        assert sizes.keys() == added.tensors.keys()
        written = {name: size for name, size in sizes.items() if name not in uncounted}
        if row.method.name == "ft-topk":
            written = {name: whole[name] for name in json.loads((out / "trainable.json").read_text())}
        assert row.parameters == sum(written.values()), row.method.name
        assert row.nbytes == 4 * sum(written.values())
        assert row.share == row.parameters / costs.total
        kind = {
            "adapter_model.safetensors": "PEFT folder",
            "adapter.safetensors": "AdapterHub folder",
            "added.safetensors": "tensors and names",
        }
        assert row.file == (kind[files[0].name] if files else "list of names")


def test_every_method_has_a_row_and_those_that_do_not_fit_say_why(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["methods", saved("llama", folder)])
    assert not stop.value.code
    said = capsys.readouterr()
    assert all(name in said.out for name in METHODS)
    assert "bitfit does not fit: the model has no biases" in said.err


def test_lora_on_a_known_model_is_counted_by_hand(folder):
    rows = {row.method.name: row for row in methods(saved("llama", folder)).rows}
    assert rows["lora"].parameters == 2 * (8 * (16 + 16) + 8 * (16 + 8))
    assert rows["ia3"].parameters == 2 * (8 + 8 + 32)
    assert rows["ln-tuning"].parameters == 5 * 16
    assert rows["prompt-tuning"].parameters == 20 * 16


def test_the_command_prints_published_counts_for_people_and_programs(capsys):
    with pytest.raises(SystemExit):
        main(["methods", "--published"])
    assert "354,823,168" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["methods", "--published", "--json"])
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert sorted(row["exact"] for row in counts) == sorted(exact for exact, _ in EXACT.values())


def test_a_checkpoint_and_published_do_not_go_together(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["methods"])
    assert stop.value.code == 2
    assert "either a checkpoint or --published" in capsys.readouterr().err
