# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""No round runs more rows of a drafter than its tree can use, whatever the plan, the drafter and its head say."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from baselines_for_tests import baseline, pairs_for
from block_drafters_for_tests import BLOCK, block_drafter
from conftest import prompt_of, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from training_for_tests import Told, tiny_drafter

from specblock_hf import DraftingPlan, JoinedDrafter, LookupDrafter
from specblock_hf.drafting.plan import Limits


FREE = {"branching": [8, 8, 8, 8], "root_width": 12, "max_starts": None}  # an untrained rank head never gives up
WIDEST = {"branching": [24, 24, 24, 24], "root_width": 24, "max_starts": None}
DRAFTERS = {
    "specblock": lambda: tiny_drafter(**FREE),
    "specblock, as wide as can be": lambda: tiny_drafter(**WIDEST),
    "specblock, best-first": lambda: tiny_drafter(**FREE, expansion="best_first"),
    "specblock, Markov": lambda: tiny_drafter(**FREE, expansion="best_first", markov_rank=4),
    "eagle3": lambda: baseline("eagle3", beam_width=10, num_blocks=8),
    "parallelspec": lambda: baseline("parallelspec"),
    "medusa": lambda: baseline("medusa"),
    "falcon": lambda: baseline("falcon_drafter", rank_weights=[0.6, 0.59, 0.58, 0.57]),
    "dflash": block_drafter,
    "joined": lambda: JoinedDrafter(tiny_drafter(**FREE), LookupDrafter(tiny_target("llama").config)),
}
# Of a round without a second forward: rows of a block, or none beside the pairs that it takes in.
OF_A_BLOCK = {"dflash": BLOCK, "medusa": 1}


@cache
def drafter_called(name: str):
    return DRAFTERS[name]()


def rows_of(name: str, limits: Limits) -> tuple[list[int], list[int]]:
    """Rows beside the committed pairs that three rounds ran, and the nodes of their trees."""
    drafter, told = drafter_called(name), Told(1, 20)
    state = drafter.begin(told.table, 1, 40)
    state.warp = lambda logits: logits
    rows, nodes = [], []
    for first, last in ((0, 9), (9, 10), (10, 14)):
        before = state.forward_rows
        with torch.no_grad():
            tree = drafter.propose(state, pairs_for(drafter.network, told, [first], [last]), limits)
        taken_in = 0 if name in OF_A_BLOCK else last - first
        rows.append(state.forward_rows - before - taken_in)
        nodes.append(int(tree.num_nodes) - 1)
    return rows, nodes


@st.composite
def any_limits(draw) -> Limits:
    """Those of a round of any plan with up to four forwards."""
    return Limits(
        nodes=(draw(st.integers(1, 30)),),
        depth=(draw(st.integers(1, 30)),),
        num_forwards=draw(st.integers(1, 4)),
        max_starts=draw(st.one_of(st.none(), st.integers(1, 40))),
        min_start_probability=draw(st.sampled_from([0.0, 0.0, 1e-3])),
        draft_sampling=draw(st.sampled_from(["topk", "sampled"])),
    )


def most_rows(limits: Limits) -> int:
    """Starts of forward f that can have a child in the tree, below f - 1 nodes at least; summed up."""
    (nodes,), most = limits.nodes, limits.max_starts
    useful = [max(nodes - forward, 0) for forward in range(1, limits.num_forwards)]
    return sum(count if most is None else min(count, most) for count in useful)


@settings(deadline=None, max_examples=60)
@given(limits=any_limits(), name=st.sampled_from(sorted(DRAFTERS)))
def test_no_more_rows_than_the_tree_can_use(limits, name):
    if not drafter_called(name).can_sample:
        limits = Limits(limits.nodes, limits.depth, limits.num_forwards, limits.max_starts)
    rows, nodes = rows_of(name, limits)
    assert max(nodes) <= limits.nodes[0]
    assert max(rows) <= OF_A_BLOCK.get(name, most_rows(limits))


@pytest.mark.parametrize("name", ["specblock", "specblock, as wide as can be", "specblock, best-first", "eagle3"])
def test_as_many_rows_as_it_can_use(name):
    # Where every node branches, the bound is what is run: 4 - 1 and 4 - 2 starts.
    rows, nodes = rows_of(name, Limits((4,), (99,), 3))
    assert rows == [5, 5, 5] and nodes == [4, 4, 4]


def same(tree, other) -> bool:
    parts = ("tokens", "parents", "log_probs")
    return all(torch.equal(getattr(tree, part), getattr(other, part)) for part in parts)


@pytest.mark.parametrize("forwards", [2, 3, 4])
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 9, 14])
def test_what_is_not_run_could_not_have_stayed(budget, forwards, monkeypatch):
    drafter, told = drafter_called("eagle3"), Told(1, 20)
    trees = []
    for most in (Limits.most_starts, lambda limits, forward: 10**6):
        monkeypatch.setattr(Limits, "most_starts", most)
        state = drafter.begin(told.table, 1, 40)
        with torch.no_grad():
            pairs = pairs_for(drafter, told, [0], [9])
            trees.append((drafter.propose(state, pairs, Limits((budget,), (9,), forwards)), state.forward_rows))
    (tree, rows), (unbounded, all_rows) = trees
    assert same(tree, unbounded) and rows <= all_rows
    assert rows < all_rows or budget > 10


@pytest.mark.parametrize("plan", [DraftingPlan(2, 3), DraftingPlan(2, 4), DraftingPlan(12, 4), DraftingPlan(3, 10**6)])
def test_a_call_with_free_starts(plan):
    target, drafter = tiny_target("llama"), drafter_called("specblock")
    options = {"do_sample": False, "max_new_tokens": 16}
    drafter.drafting_plan = plan
    output = target.generate(prompt_of(9), assistant_model=drafter, **options)
    assert torch.equal(output, target.generate(prompt_of(9), **options))
    statistics, forwards = drafter.last_statistics, min(plan.num_forwards, plan.tree_budget)
    most = most_rows(Limits((plan.tree_budget,), (99,), forwards))
    assert statistics.drafter_rows <= 9 + 16 + statistics.rounds * most
