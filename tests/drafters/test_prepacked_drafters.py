# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Drafters of every kind by prepacked weights: the same drafts, and no stale copy."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from block_drafters_for_tests import block_drafter
from conftest import prompt_of, tiny_target
from drafters_for_tests import Rounds
from test_prepacking import GREEDY, of_any_size  # noqa: F401
from torch import nn

from specblock_hf import (
    BlockDiffusionDrafter,
    DraftingPlan,
    Eagle3Drafter,
    JoinedDrafter,
    LookupDrafter,
    SpecBlockDrafter,
)
from specblock_hf.drafters.falcon import FalconDrafter
from specblock_hf.drafters.medusa import MedusaDrafter
from specblock_hf.drafters.parallelspec import ParallelSpecDrafter
from specblock_hf.drafting.drafter import DraftingCallback, TreeDrafter
from specblock_hf.drafting.pilot import Pilot
from specblock_hf.prepacking import PATIENCE, PrepackedLinear, PrepackedWeights, fitting, prepacked_twin


NETWORKS = (
    SpecBlockDrafter,
    Eagle3Drafter,
    BlockDiffusionDrafter,
    MedusaDrafter,
    ParallelSpecDrafter,
    FalconDrafter,
)


def a_network(kind: type[TreeDrafter], plan: DraftingPlan | None = None) -> TreeDrafter:
    torch.manual_seed(1)
    drafter = kind(kind.config_class.for_target(tiny_target("llama").config, initializer_range=0.3)).eval()
    drafter.drafting_plan = plan or DraftingPlan(7, min(2, drafter.config.num_blocks), 4)
    return drafter


def packed_layers(drafter: TreeDrafter) -> list[nn.Module]:
    return [module for module in drafter.network.modules() if isinstance(module, PrepackedLinear)]


def drafts_of(drafter: TreeDrafter, monkeypatch, weights: PrepackedWeights | None) -> tuple[list[list], list[int]]:
    """The trees of a call, and how many layers of what drafted each had prepacked weights."""
    drafter.prepacked_weights, kind, packed = weights, type(drafter), []
    rounds = Rounds(drafter)
    with monkeypatch.context() as patch:
        own = kind.propose
        patch.setattr(kind, "propose", lambda self, *args: packed.append(len(packed_layers(self))) or own(self, *args))
        tiny_target("llama").generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    drafter.remove_callback(rounds)
    return [[tree.tokens.tolist(), tree.parents.tolist()] for tree, _ in rounds.seen], packed


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
def test_drafters_draft_by_them_what_they_draft_without(kind, joined, monkeypatch):
    first = a_network(kind)
    drafter = JoinedDrafter(first, LookupDrafter(first.config)) if joined else first
    drafts, none = drafts_of(drafter, monkeypatch, None)
    before = [type(module) for module in first.modules()]
    for rounds_without in (PATIENCE, 0):  # in the second call the copies are there
        weights = first.prepacked_weights if rounds_without == 0 else PrepackedWeights()
        again, packed = drafts_of(drafter, monkeypatch, weights)
        first.prepacked_weights = weights
        assert again == drafts and not any(none)
        assert packed == [0] * rounds_without + [len(fitting(first))] * (len(packed) - rounds_without)
        assert len(packed) > PATIENCE and packed[-1]
    assert before == [type(module) for module in first.modules()]


@pytest.mark.parametrize("make", [lambda: a_network(SpecBlockDrafter), partial(block_drafter, "dspark-bare")])
def test_drafters_use_the_copy_of_their_head(make, monkeypatch):
    drafter, used = make(), set()
    own = PrepackedLinear.forward
    monkeypatch.setattr(PrepackedLinear, "forward", lambda self, x: used.add(self.weight) or own(self, x))
    drafts_of(drafter, monkeypatch, PrepackedWeights())
    assert drafter.lm_head.weight in used


def test_a_drafter_that_drafts_nothing_is_not_copied(monkeypatch):
    drafter = a_network(SpecBlockDrafter, DraftingPlan(0, 1))
    _, packed = drafts_of(drafter, monkeypatch, PrepackedWeights())
    assert not packed and not drafter.prepacked_weights.knows(fitting(drafter))
    assert drafter.last_statistics.prepacked


def test_a_copy_of_a_compiled_drafter_is_not_the_original():
    drafter = a_network(SpecBlockDrafter)
    drafter.compile(backend="eager")
    assert "_compiled_call_impl" not in vars(deepcopy(drafter))


class Forgets(DraftingCallback):
    """Changes the drafter in the middle of a call, as an adaptation does."""

    def __init__(self, drafter: TreeDrafter, at: int):
        self.drafter, self.rounds = drafter, at

    def on_commit(self, call, tree, scored, walk, pairs) -> None:
        self.rounds -= 1
        if not self.rounds:
            with self.drafter.lock, torch.no_grad():
                self.drafter.lm_head.weight.zero_()


def test_a_drafter_that_learns_during_a_call_drafts_by_what_it_has_learned(monkeypatch):
    seen = []
    for weights in (PrepackedWeights(), None):
        drafter = a_network(SpecBlockDrafter)
        drafter.add_callback(Forgets(drafter, PATIENCE + 4))
        seen.append(drafts_of(drafter, monkeypatch, weights))
    (drafts, packed), (expected, _) = seen
    assert drafts == expected
    # The prompt commits a token before the first round. When the copies are too old patience starts over.
    copies = len(fitting(drafter))
    assert len(packed) > 2 * PATIENCE + 3
    assert packed == ([0] * PATIENCE + [copies] * 3 + [0] * PATIENCE + [copies] * len(packed))[: len(packed)]


def test_rounds_of_a_drafter_teach_no_times_until_its_weights_are_copied(monkeypatch):
    settled = []
    monkeypatch.setattr(Pilot, "record", lambda self, *args: settled.append(args[-1]))
    drafter, target = a_network(SpecBlockDrafter), tiny_target("llama")
    prepacked_twin(target, fitting(target), drafter.prepacked_weights)  # the target's are there
    target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    copying = [False] * (PATIENCE + 1)
    assert settled == copying + [True] * (len(settled) - PATIENCE - 1)
    # Nor from when they have changed until they are copied again: the first round has the copies of before.
    del settled[:]
    drafter.add_callback(Forgets(drafter, 4))
    target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    assert len(settled) > PATIENCE + 4
    assert settled == [False] + [True] * 2 + copying + [True] * (len(settled) - PATIENCE - 4)


def test_a_drafter_shares_what_its_copy_for_rounds_is_held_by():
    drafter = a_network(SpecBlockDrafter)
    model = drafter.rounds_model(PrepackedWeights())
    for _ in range(PATIENCE + 1):
        twin = drafter.with_network(model.next())
    assert model.prepacked and twin is not drafter
    assert twin.lock is drafter.lock and twin.controller is drafter.controller
    joined = JoinedDrafter(drafter, LookupDrafter(drafter.config))
    assert joined.with_network(drafter) is joined
    other = joined.with_network(twin)
    assert other.parts == (twin, joined.parts[1]) and other.lock is drafter.lock
