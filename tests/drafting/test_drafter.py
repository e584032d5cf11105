# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a drafter from outside has to bring, and what it has without bringing it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from batches_for_tests import padded_batch
from conftest import prompt_of, tiny_target
from training_for_tests import tiny_drafter

from specblock_hf import DraftingPlan, LookupDrafter
from specblock_hf.drafting.drafter import DrafterLock, DraftState, TreeDrafter
from specblock_hf.trees.tree import DraftTree


class Repeats(TreeDrafter):
    """Drafts the last token again and again; a whole drafter."""

    def __init__(self, config):
        self.config = config

    def check_target(self, target):
        pass

    def begin(self, table, batch_size, max_length, *, first_position=0):
        return DraftState(table, batch_size, max_length, first_position)

    def extend(self, state, pairs):
        pass

    def propose(self, state, pairs, limits):
        tokens = pairs.last_tokens()[:, None].expand(-1, 4)
        parents = torch.arange(-1, 3, device=tokens.device).expand_as(tokens)
        return DraftTree(tokens, parents, torch.full(tokens.shape, -0.5), torch.zeros(*tokens.shape, 2).long())


@pytest.mark.parametrize("lengths", [(7,), (7, 3, 5)], ids=len)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1}])
def test_four_methods_are_enough(lengths, options):
    target, batch = tiny_target("llama"), padded_batch(lengths)
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0} | options
    drafter = Repeats(target.config)
    output = target.generate(**batch, assistant_model=drafter, **options)
    assert torch.equal(output, target.generate(**batch, **options))
    assert drafter.last_statistics.nodes_verified > drafter.last_statistics.rounds


def test_what_is_drafted_where_nothing_is_said():
    drafter = Repeats(tiny_target("llama").config)
    plans = {kind: drafter.default_plan(torch.device(kind)) for kind in ("cpu", "cuda")}
    assert plans == {"cpu": DraftingPlan(11, 1), "cuda": DraftingPlan(60, 1)}
    assert [plan for plan, _ in drafter.acceptance()] == list(plans.values())


DRAFTERS = {
    "outside": lambda: Repeats(tiny_target("llama").config),
    "look-up": lambda: LookupDrafter(tiny_target("llama").config),
    "network": tiny_drafter,
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_has_a_lock_that_its_copies_do_not_share(name):
    drafter = DRAFTERS[name]()
    assert drafter.lock is drafter.lock
    others = [DRAFTERS[name](), copy.deepcopy(drafter), pickle.loads(pickle.dumps(drafter))]
    assert len({id(other.lock) for other in (drafter, *others)}) == 4
    assert all(type(other.lock) is DrafterLock for other in others)


def test_the_last_tokens_of_pairs():
    told = []

    class Told(Repeats):
        def propose(self, state, pairs, limits):
            told.append(pairs.last_tokens().tolist())
            return super().propose(state, pairs, limits)

    target = tiny_target("llama")
    text = target.generate(prompt_of(5), max_new_tokens=12, do_sample=False)[0].tolist()
    drafter = Told(target.config)
    target.generate(prompt_of(5), max_new_tokens=12, do_sample=False, assistant_model=drafter)
    place = 5
    for (token,), kept in zip(told, drafter.last_statistics.accepted, strict=False):
        assert token == text[place]
        place += kept + 1
