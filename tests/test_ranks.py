"""Rank rules against brute force: optimal at thresholds, within one component elsewhere, never worse than simple rules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.algorithms.ranks import Spectrum, by_budget, by_energy, by_error, total_cost, total_left, uniform


def spectrum(values, cost, *, rest=0.0, limit=None, multiple=1):
    squares = np.sort(np.asarray(values, np.float64))[::-1]
    return Spectrum(squares, float(squares.sum()) + rest, cost, len(squares) if limit is None else limit, multiple)


values = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 10)), min_size=1, max_size=5)


@st.composite
def several(draw):
    """Spectra under one rule: all have runs of one length."""
    multiple = draw(st.integers(1, 3))
    one = st.builds(spectrum, values, st.integers(1, 9), rest=st.floats(0, 1), multiple=st.just(multiple))
    return draw(st.lists(one, min_size=1, max_size=4))


spectra = several()


def choices(found):
    """All ranks a rule may choose: whole items of each delta."""
    per_delta = [sorted({min(r, s.limit) for r in range(0, s.limit + s.multiple, s.multiple)}) for s in found]
    return itertools.product(*per_delta)


@given(spectra, st.integers(0, 120))
@settings(max_examples=150, deadline=None)
def test_a_budget_is_kept_and_spent_within_one_component_of_the_optimum(found, budget):
    ranks = by_budget(found, budget)
    assert total_cost(found, ranks) <= budget
    best = min(total_left(found, r) for r in choices(found) if total_cost(found, r) <= budget)
    items = [s.squares[a : a + s.multiple].sum() for s in found for a in range(0, s.limit, s.multiple)]
    assert total_left(found, ranks) <= best + max(items) + 1e-9


@given(spectra, st.floats(1e-6, 5))
@settings(max_examples=150, deadline=None)
def test_at_a_budget_that_a_threshold_reaches_the_ranks_are_optimal(found, threshold):
    at = [
        max([0] + [min(a + s.multiple, s.limit) for a in range(0, s.limit, s.multiple) if s.rate(a) > threshold])
        for s in found
    ]
    budget = total_cost(found, at)
    best = min(total_left(found, r) for r in choices(found) if total_cost(found, r) <= budget)
    assert total_left(found, by_budget(found, budget)) == pytest.approx(best, abs=1e-9)


@given(spectra, st.integers(0, 120), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_no_budget_is_spent_worse_than_by_equal_ranks_or_equal_shares_of_energy(found, budget, share):
    chosen = total_left(found, by_budget(found, budget))
    assert chosen <= total_left(found, uniform(found, budget)) + 1e-9
    by_share = [by_energy(s, share) for s in found]
    at_its_bytes = by_budget(found, total_cost(found, by_share))
    assert total_left(found, at_its_bytes) <= total_left(found, by_share) + 1e-9


@given(spectra, st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_an_error_is_met_with_the_fewest_bytes_but_for_the_last_component(found, error):
    ranks = by_error(found, error)
    total = sum(s.energy for s in found)
    reachable = total_left(found, [s.limit for s in found])
    assert total_left(found, ranks) <= max(error * error * total, reachable) + 1e-9
    cheaper = [r for r in choices(found) if total_left(found, r) <= error * error * total]
    if cheaper:
        dearest = max(s.cost * s.multiple for s in found)
        assert total_cost(found, ranks) <= min(total_cost(found, r) for r in cheaper) + dearest


def test_energy_is_held_by_the_fewest_components():
    s = spectrum([9, 4, 1], 1)
    assert [by_energy(s, share) for share in (0.0, 0.5, 9 / 14, 0.65, 0.93, 1.0)] == [0, 1, 1, 2, 3, 3]


def test_runs_of_components_come_whole_except_the_last():
    s = spectrum([5, 4, 3, 2, 1], 1, multiple=2)
    assert [by_energy(s, share) for share in (0.1, 0.7, 1.0)] == [2, 4, 5]
    assert by_budget([s], 3) == [2]


def test_a_rule_that_used_all_that_is_known_asks_for_more():
    known = Spectrum(np.array([3.0, 2.0]), 10.0, 1, 8)
    assert known.open_at(2)
    assert not known.open_at(1)
    assert not Spectrum(np.array([3.0, 2.0]), 10.0, 1, 2).open_at(2)
    assert not Spectrum(np.array([0.0]), 0.0, 1, 8).open_at(1)


def test_a_delta_of_zeros_gets_no_rank():
    zero = Spectrum(np.zeros(4), 0.0, 1, 4)
    assert by_budget([zero], 100)[0] == 0
    assert by_error([zero], 0.1) == [0]
