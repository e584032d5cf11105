# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What rounds are expected to cost and emit, and the plan that follows. Knows no model and no clock."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from specblock_hf import DraftingPlan
from specblock_hf.calibration.costs import (
    CostCurves,
    choose_plan,
    interpolate,
    rereading,
    share_of_whole_chains,
    shortlist,
    slowest_tau,
)
from specblock_hf.target.recurrent import Lag
from specblock_hf.trees.verification import Walk


CURVES = CostCurves(
    verify=((1, 10.0), (9, 18.0), (17, 26.0)),
    draft=2.0,
    later=((2, 4.0), (10, 8.0)),
    host=1.0,
    plain=10.0,
    setting="cpu, torch.float32, context 256",
)


@pytest.mark.parametrize(
    ("at", "value"), [(0, 10.0), (1, 10.0), (5, 14.0), (9, 18.0), (13, 22.0), (17, 26.0), (33, 42.0)]
)
def test_interpolation_is_linear_and_goes_on_beyond_the_last_point(at, value):
    assert interpolate(CURVES.verify, at) == pytest.approx(value)
    assert interpolate(((4, 3.0),), at) == 3.0


def test_a_round_pays_for_its_nodes_its_forwards_and_the_host():
    # 9 nodes with the root: 18; the first forward: 2; host: 1
    assert CURVES.round_seconds(DraftingPlan(8, 1)) == pytest.approx(21)
    # a forward from 4 starts: 5; from 32, as none are named: 19
    assert CURVES.round_seconds(DraftingPlan(8, 2, 4)) == pytest.approx(26)
    assert CURVES.round_seconds(DraftingPlan(8, 8, 4)) == pytest.approx(21 + 7 * 5)
    assert CURVES.round_seconds(DraftingPlan(8, 3)) == pytest.approx(21 + 2 * 19)
    assert CURVES.speedup(DraftingPlan(8, 2, 4), tau=2.0) == pytest.approx(20 / 26)


def test_a_forward_that_was_not_measured_costs_what_the_first_does():
    curves = CostCurves.from_dict(CURVES.to_dict() | {"later": []})
    assert curves.round_seconds(DraftingPlan(8, 3, 4)) == pytest.approx(21 + 2 * 2)


def test_the_fastest_plan_wins_not_the_one_that_accepts_most():
    small, large = DraftingPlan(4, 1), DraftingPlan(60, 2, 32)
    assert choose_plan(CURVES, [(small, 2.6), (large, 4.0)])[0] == small
    # On a machine where nothing but the launch costs, the large one wins.
    flat = CostCurves(((1, 10.0), (61, 10.0)), 1.0, ((32, 0.0),), 0.0, 10.0, "")
    assert choose_plan(flat, [(small, 2.6), (large, 4.0)]) == (large, pytest.approx(40 / 11))


def test_where_no_plan_pays_nothing_is_drafted():
    assert choose_plan(CURVES, [(DraftingPlan(4, 1), 1.2), (DraftingPlan(8, 1), 1.3)]) == (DraftingPlan(0, 1), 1.0)


def test_the_shortlist_has_the_best_plan_for_every_number_of_forwards():
    # Verifying costs 1 and a node 0.1 more, drafting nothing: of these the plans with tau / time highest are wanted.
    curves = CostCurves(((1, 1.0), (11, 2.0)), 0.0, (), 0.0, 1.0, "")
    acceptance = [
        (DraftingPlan(10, 2, 4), 3.0),  # 3.0 / 2.0
        (DraftingPlan(5, 1), 2.0),  # 2.0 / 1.5
        (DraftingPlan(2, 1), 1.8),  # 1.8 / 1.2, the best of one forward
        (DraftingPlan(10, 1), 2.4),  # 2.4 / 2.0
        (DraftingPlan(30, 2, 4), 3.5),  # 3.5 / 4.0
    ]
    assert shortlist(curves, acceptance) == [DraftingPlan(2, 1), DraftingPlan(10, 2, 4)]


def test_a_batch_is_as_slow_as_its_slowest_text():
    assert slowest_tau(2.5, 1) == 2.5
    # The expected smallest of 2, 4 and 8 standard normal draws.
    for size, behind in ((2, 0.5642), (4, 1.0294), (8, 1.4236)):
        assert slowest_tau(2.5, size) == pytest.approx(1 + 1.5 * (1 - 0.2 * behind), abs=0.02)
    assert 1 < slowest_tau(2.5, 10_000) < 1.4  # a round emits a token, however bad the drafts are
    # What pays for one text need not pay for eight, whose steps cost the same here.
    plan = DraftingPlan(8, 1)
    many = CostCurves.from_dict(CURVES.to_dict() | {"batch_size": 8})
    assert choose_plan(CURVES, [(plan, 2.4)]) == (plan, pytest.approx(24 / 21))
    assert choose_plan(many, [(plan, 2.4)]) == (DraftingPlan(0, 1), 1.0)


def test_curves_survive_a_file():
    assert CostCurves.from_dict(json.loads(json.dumps(CURVES.to_dict()))) == CURVES


def test_curves_of_earlier_files_are_read():
    # Their curve of drafting began with a round of one forward and went on with rounds of two.
    old = {"verify": [[1, 10.0], [9, 18.0], [17, 26.0]], "host": 1.0, "plain": 10.0, "setting": CURVES.setting}
    old["draft"] = [[1, 2.0], [2, 6.0], [10, 10.0]]
    assert CostCurves.from_dict(json.loads(json.dumps(old))) == CURVES


def test_a_path_is_all_that_is_verified_of_a_chain():
    curves = replace(CURVES, chains=((1, 4), (2, 8)))
    assert [curves.verified(DraftingPlan(*plan)) for plan in ((60, 1), (3, 1), (60, 2), (60, 3))] == [4, 3, 8, 60]
    assert curves.round_seconds(DraftingPlan(60, 2, 4)) == pytest.approx(18 + 2 + 5 + 1)


@pytest.mark.parametrize(("drafted", "emitted", "budget"), [(6, 2, 8), (6, 4, 12), (3, 1, 60), (8, 3, 0)])
def test_what_is_read_again_is_what_states_that_stay_make_it(drafted, emitted, budget):
    """No chain is accepted to its end."""
    lag, columns = Lag(1, budget), []
    lag.commit(Walk.of_rows([([0], [1], False)]), [0], 1)
    while not columns or lag.longest:
        width, rests = lag.width(drafted + 1), lag.rests()
        columns.append(width)
        tokens = [1] * (1 if rests else emitted)
        lag.commit(Walk.of_rows([(list(range(len(tokens))), tokens, False)]), [0], width)
    assert rereading(drafted, emitted, 0.0, budget) == [(1.0, width) for width in columns]
    # A node costs 0.1 of a plain step; nothing else costs anything.
    curves = CostCurves(((1, 1.0), (101, 11.0)), 0.0, (), 0.0, 1.0, "", chains=((1, drafted),), rereads=True)
    plan = DraftingPlan(budget, 1)
    if budget >= drafted:
        tokens, seconds = curves.expected(plan, 1.0 + 1e-9)  # with which hardly any chain is right to its end
        cycle = rereading(drafted, 1.0, 0.0, budget)
        assert tokens == pytest.approx(1, abs=1e-3)
        assert seconds == pytest.approx(sum(0.9 + 0.1 * width for _, width in cycle) / len(cycle), rel=1e-3)


def test_chains_that_are_kept_as_a_whole_are_not_read_again():
    assert share_of_whole_chains(4, 5.0) == pytest.approx(1) and share_of_whole_chains(4, 1.0) == pytest.approx(0)
    assert share_of_whole_chains(2, 1.75) == pytest.approx(0.25)  # 0.5 and 0.5 of it
    assert rereading(4, 5.0, 1.0, 8) == [(1.0, 5.0), (0.0, 1.0)]
    # Half of all chains of two are right, of the others a token is written each.
    assert rereading(2, 2.0, 0.5, 2) == [(1.0, 3.0), (0.5, 4.0), (0.25, 3.0)]
    # What pays where a tree is verified does not where its path is read again and again.
    plan = DraftingPlan(8, 1)
    again = replace(CURVES, rereads=True)
    assert choose_plan(CURVES, [(plan, 2.3)])[0] == plan and choose_plan(again, [(plan, 2.3)])[0].tree_budget == 0
