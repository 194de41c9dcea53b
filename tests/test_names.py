"""Names: bringing two spellings together, renaming, and selecting by pattern."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import MismatchError, UsageError
from surgery.names import Pattern, align, parse_patterns, parse_renames, rename, select, undecorated, unwrap

NAMES = ["embeddings.word.weight", "encoder.layer.0.q.weight", "encoder.layer.0.q.bias", "pooler.dense.weight"]


@pytest.mark.parametrize("prefix", ["bert.", "model.", "base_model.model.", "transformer.h."])
def test_a_prefix_that_only_the_other_side_has_is_stripped_and_reported(prefix):
    found = align(NAMES, [prefix + name for name in NAMES])
    assert sorted(found.names.values()) == sorted(NAMES)
    assert any(prefix in note for note in found.notes)


@pytest.mark.parametrize("prefix", ["bert.", "model."])
def test_a_prefix_that_only_the_reference_has_is_added_and_reported(prefix):
    found = align([prefix + name for name in NAMES], NAMES)
    assert sorted(found.names.values()) == sorted(prefix + name for name in NAMES)
    assert any(prefix in note for note in found.notes)


@pytest.mark.parametrize("decoration", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_decorations_of_training_tools_are_seen_through(decoration):
    found = align(NAMES, [decoration + name for name in NAMES])
    assert sorted(found.names.values()) == sorted(NAMES)


def test_names_that_meet_already_are_left_alone():
    assert align(NAMES, NAMES).names == {name: name for name in NAMES}
    assert not align(NAMES, NAMES).notes


def test_a_missing_tensor_does_not_hide_the_prefix():
    found = align(NAMES, ["bert." + name for name in NAMES[:-1]])
    assert set(found.names.values()) == set(NAMES[:-1])


def test_an_extra_tensor_keeps_its_own_name():
    found = align(NAMES, [*("bert." + name for name in NAMES), "cls.bias"])
    assert found.names["cls.bias"] == "cls.bias"


def test_two_names_that_would_collapse_into_one_are_refused():
    with pytest.raises(MismatchError, match="both"):
        align(["a.w"], ["a.w", "module.a.w"])


def test_rename_rules_are_whole_names_or_prefixes_that_end_at_a_dot():
    rules = parse_renames(["bert.=", "cls=head", "a.b=c"])
    assert rename("bert.x", rules) == "x"
    assert rename("cls.weight", rules) == "head.weight"
    assert rename("clsx.weight", rules) == "clsx.weight"
    assert rename("a.b.w", rules) == "c.w"


@pytest.mark.parametrize("rules", [["nothing"], ["=x"], ["a=b", "a=c"]])
def test_bad_rename_rules_are_refused(rules):
    with pytest.raises(UsageError):
        parse_renames(rules)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("q_proj", "model.layers.0.self_attn.xq_proj.weight", False),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("*attn*", "model.layers.0.self_attn.q_proj.weight", True),
        ("*.layers.1.*", "model.layers.10.mlp.up.weight", False),
        ("*.layers.1.*", "model.layers.1.mlp.up.weight", True),
        ("layers[0]*", "layers[0].weight", True),
        ("re:.*\\.(0|1)\\..*", "model.layers.1.w.weight", True),
        ("re:layers", "model.layers.1.w.weight", False),
        ("a.b.weight", "a.b.weight", True),
    ],
)
def test_patterns_match_as_documented(pattern, name, matches):
    assert Pattern(pattern).matches(name) is matches


def test_patterns_are_separated_by_commas_but_not_inside_a_regular_expression():
    assert [pattern.text for pattern in parse_patterns(["q,k", "re:a{1,2}"])] == ["q", "k", "re:a{1,2}"]


def test_a_pattern_that_matches_nothing_names_near_matches():
    with pytest.raises(MismatchError, match=r"q_prj.*did you mean q_proj") as error:
        select({"layers.0.q_proj.weight": "q"}, parse_patterns(["q_prj"]), "--target")
    assert error.value.exit_code == 4


@pytest.mark.parametrize("text", ["", "re:(", "role:"])
def test_malformed_patterns_are_refused(text):
    with pytest.raises(UsageError):
        Pattern(text)


def test_nested_state_dicts_are_found_and_reported():
    found, notes = unwrap({"epoch": 1, "model": {"w": "T", "step": 2}}, lambda value: value == "T")
    assert found == {"w": "T"}
    assert any("model" in note for note in notes)
    assert any("step" in note for note in notes)


def test_tensors_at_two_levels_are_refused():
    with pytest.raises(MismatchError, match="also below"):
        unwrap({"w": "T", "model": {"v": "T"}}, lambda value: value == "T")


@given(st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=4), st.sampled_from(NAMES))
def test_any_stack_of_decorations_comes_off(stack, name):
    assert undecorated("".join(stack) + name) == name


@given(st.sets(st.from_regex(r"[a-d](\.[a-d0-9]){1,3}", fullmatch=True), min_size=1, max_size=12))
def test_aligning_a_set_with_itself_changes_nothing(names):
    assert align(names, names).names == {name: name for name in names}
