# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools

import pytest
import torch
from baselines_for_tests import baseline, batch_for, favouring, listening, pairs_for
from conftest import tiny_target
from training_for_tests import DRAFT_VOCAB, Told

from specblock_hf.drafters.medusa import MedusaConfig, MedusaDrafter
from specblock_hf.drafters.medusa.drafting import MedusaObjective
from specblock_hf.drafting.plan import Limits


LENGTHS, STARTS = (20, 13, 17), (3, 6, 2)


@torch.no_grad()
def test_the_tree_holds_the_largest_products():
    """All products of three distributions over 24 tokens, of which a node shows its three best."""
    drafter, told = baseline("medusa"), Told(1, 8)
    pairs = pairs_for(drafter, told, (0,), (6,))
    tree = drafter.propose(drafter.begin(told.table, 1, 8), pairs, Limits((14,), (9,)))
    state = told.features[0, 5, 0]
    distributions = []
    for head in drafter.heads:
        hidden = state + torch.nn.functional.silu(head[0].weight @ state + head[0].bias)
        best = (drafter.lm_head.weight @ hidden).log_softmax(-1).topk(3)
        distributions.append(
            list(zip(drafter.draft_to_target[best.indices].tolist(), best.values.tolist(), strict=True))
        )
    products = {}
    for length in (1, 2, 3):
        for path in itertools.product(*distributions[:length]):
            products[tuple(token for token, _ in path)] = sum(value for _, value in path)
    expected = sorted(products.items(), key=lambda item: -item[1])[:14]
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, 15):
        paths.append((*paths[int(tree.parents[0, node])], int(tree.tokens[0, node])))
    found = dict(zip(paths, tree.cumulative_log_probs()[0].tolist(), strict=True))
    assert set(paths[1:]) == {path for path, _ in expected}
    assert all(abs(found[path] - value) < 1e-5 for path, value in expected)


@torch.no_grad()
def test_a_trained_place_is_a_drafted_one():
    drafter, told = baseline("medusa", base=listening("medusa")), Told(1, 9)
    drafter.propose(drafter.begin(told.table, 1, 9), pairs_for(drafter, told, (2,), (7,)), Limits((3,), (3,)))
    batch = batch_for(drafter, told, (9,), (0,))
    torch.testing.assert_close(drafter(batch.features)[0, 6], drafter.heard[0][0, 0])


def test_loss_and_counts_equal_the_naive_ones():
    drafter, told = baseline("medusa").train(), Told(3, 20)
    favouring(drafter, told)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    out = drafter.loss(batch, MedusaObjective(head_decay=0.7))
    hits, counts, sums = [0] * 3, [0] * 3, [[] for _ in range(3)]
    for row in range(3):
        for pair in range(LENGTHS[row] - 1):
            alive = True
            for slot in range(3):
                at = pair + 2 + slot
                if at >= LENGTHS[row] or at < STARTS[row] or batch.top_ids[row, at, 0] < 0:
                    alive = False
                    continue
                target = torch.zeros(DRAFT_VOCAB)
                for index, prob in zip(batch.top_ids[row, at].tolist(), batch.top_probs[row, at], strict=True):
                    if index >= 0:
                        target[index] += prob
                logits = drafter.lm_head(drafter.heads[slot](told.features[row, pair, 0]))
                sums[slot].append(-(target / target.sum() * logits.log_softmax(-1)).sum())
                counts[slot] += alive
                alive = alive and bool(drafter.draft_to_target[logits.argmax()] == told.tokens[row, at])
                hits[slot] += alive
    expected = sum(0.7**slot * torch.stack(sums[slot]).mean() for slot in range(3))
    torch.testing.assert_close(out["loss"], expected)
    assert out["counted"].tolist() == [counts] and out["agreed"].tolist() == [hits]
    assert 0 < hits[0] < counts[0] and counts[1] > 0


def test_heads_start_as_the_targets_own():
    drafter = MedusaDrafter(MedusaConfig.for_target(tiny_target("llama").config, num_hidden_layers=2))
    states = torch.randn(3, 32)
    assert torch.equal(drafter(states), states[:, None].expand(3, 5, 32))
    assert len(drafter.heads) == 5 and len({id(head) for head in drafter.heads}) == 5
    assert sum(p.numel() for p in drafter.parameters()) == 5 * 2 * (32 * 32 + 32) + 32 * 32


@pytest.mark.parametrize("blocks", [1, 2])
def test_residual_blocks_follow_one_another(blocks):
    drafter = baseline("medusa", num_hidden_layers=blocks)
    states = torch.randn(2, 32)
    expected = states
    for block in drafter.heads[1]:
        expected = expected + torch.nn.functional.silu(torch.nn.functional.linear(expected, block.weight, block.bias))
    torch.testing.assert_close(drafter(states)[:, 1], expected)
