# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""How many operators the host dispatches for a proposal, which is what an eager round costs on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
from baselines_for_tests import baseline
from block_drafters_for_tests import block_drafter
from conftest import prompt_of, tiny_target
from graphs_for_tests import operators_of
from training_for_tests import tiny_drafter

from specblock_hf import DraftingPlan


PROPOSALS = {
    "rank-guided": (tiny_drafter, DraftingPlan(24, 2, 8), 855),
    "best-first": (partial(tiny_drafter, expansion="best_first"), DraftingPlan(24, 2, 8), 980),
    "eagle3": (partial(baseline, "eagle3"), DraftingPlan(24, 6, 8), 1260),
    "dflash": (block_drafter, DraftingPlan(24, 1), 537),
}
"""A drafter, its plan, and the most that a proposal may dispatch: what it does with the oldest transformers."""


@pytest.mark.parametrize("name", PROPOSALS)
def test_a_proposal_dispatches_few_operators(name, monkeypatch):
    make, plan, most = PROPOSALS[name]
    drafter, counts = make(), []
    drafter.drafting_plan = plan
    propose = drafter.propose

    def counted(state, pairs, limits):
        with operators_of() as counter:
            tree = propose(state, pairs, limits)
        if max(limits.depth) >= 8:
            counts.append(counter.count)
        return tree

    monkeypatch.setattr(drafter, "propose", counted)
    tiny_target("llama").generate(prompt_of(7), max_new_tokens=16, do_sample=False, assistant_model=drafter)
    assert len(counts) > 2 and max(counts) <= most, counts
