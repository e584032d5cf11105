# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from baselines_for_tests import baseline, batch_for, listening, pairs_for
from training_for_tests import Told

from specblock_hf.drafters.common.cache import GraphCache
from specblock_hf.drafting.plan import Limits
from specblock_hf.training.cpu_attention import NAME as CHUNKED


LENGTHS, STARTS = (20, 13, 17), (3, 6, 2)


def naive_group(drafter, told: Told, row: int, pair: int) -> torch.Tensor:
    """The states `[K, d]` of one group: the pairs and its masks, each seeing all before it."""
    tokens = told.table.embed(told.tokens[row : row + 1, 1 : pair + 2])
    conditions = drafter.project_features(told.features[row : row + 1, : pair + 1].flatten(2))
    masks = drafter.mask_embeds.weight[None]
    unknown = drafter.mask_condition.weight[None].expand_as(masks)
    rows = torch.arange(pair + 1 + masks.shape[1])[None]
    hidden = drafter(torch.cat([tokens, masks], 1), torch.cat([conditions, unknown], 1), rows, cache=GraphCache(1))
    return hidden[0, pair:, 0]


@pytest.mark.parametrize("block_size", [2, 4])
@torch.no_grad()
def test_a_trained_group_is_one_alone(block_size):
    """No group sees the masks of another."""
    drafter, told = baseline("parallelspec", block_size=block_size), Told(2, 11)
    conditions = drafter.project_features(told.features[:, :-1].flatten(2))
    states = drafter.group_states(told.table.embed(told.tokens[:, 1:]), conditions)
    assert states.shape == (2, 10, block_size, 32)
    for row in range(2):
        for pair in range(10):
            expected = naive_group(drafter, told, row, pair)
            torch.testing.assert_close(states[row, pair], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", CHUNKED])
@torch.no_grad()
def test_a_trained_group_is_the_drafted_one(attention):
    """In several rounds of a ragged batch, with one forward a round."""
    drafter, told = baseline("parallelspec", base=listening("parallelspec"), block_size=4), Told(2, 18)
    drafter.set_attn_implementation(attention)
    conditions = drafter.project_features(told.features.flatten(2))
    states = drafter.group_states(told.table.embed(told.tokens[:, 1:]), conditions[:, :-1])
    state = drafter.begin(told.table, 2, 18)
    rounds = [((0, 0), (6, 9)), ((6, 9), (7, 13)), ((7, 13), (11, 14))]
    for first, last in rounds:
        pairs = pairs_for(drafter, told, first, last)
        drafter.propose(state, pairs, Limits((9, 9), (4, 4)))
        for row in range(2):
            drafted = drafter.heard[-1][row, 0]
            torch.testing.assert_close(drafted, states[row, last[row] - 1], rtol=1e-5, atol=1e-5)
    assert state.calls == len(rounds) and state.committed.tolist() == [11, 14]


def test_slots_are_weighed():
    drafter, told = baseline("parallelspec"), Told(3, 20)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    kind = drafter.objective_class
    first = drafter.loss(batch, kind(slot_decay=0.0))["loss"]
    losses = [drafter.loss(batch, kind(slot_decay=decay))["loss"] - first for decay in (0.5, 1.0)]
    assert first > 0 and 0 < losses[0] < losses[1]
    torch.testing.assert_close(drafter.loss(batch)["loss"], drafter.loss(batch, kind(slot_decay=0.8))["loss"])
