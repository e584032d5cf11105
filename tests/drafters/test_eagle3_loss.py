# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from baselines_for_tests import baseline, batch_for, favouring, listening, pairs_for
from training_for_tests import DRAFT_VOCAB, Told

from specblock_hf.drafters.common.cache import GraphCache
from specblock_hf.drafters.common.path_attention import PathCache
from specblock_hf.drafters.eagle3.loss import Eagle3Objective, eagle3_loss, unrolled_states
from specblock_hf.drafting.plan import Limits
from specblock_hf.training.cpu_attention import NAME as CHUNKED


LENGTHS, STARTS = (20, 13, 17), (3, 6, 2)
VARIANTS = [
    {},
    {"norm_before_residual": True, "norm_before_fc": True},
    {"own_embedding": True},
    {"fc_norm": True, "norm_output": True, "qk_norm": True},
]


def naive_states(drafter, told: Told, row: int, pair: int, num_steps: int) -> list[torch.Tensor]:
    """The states `[d]` of one pair's path, every mask written cell by cell; steps that the text is long enough for."""
    cache = GraphCache(1)
    embed = drafter.embed_tokens if drafter.config.own_embedding else told.table.embed
    tokens = told.tokens[row]
    conditions = drafter.project_features(told.features[row : row + 1, : pair + 1].flatten(2))
    hidden = drafter(embed(tokens[None, 1 : pair + 2]), conditions, torch.arange(pair + 1)[None], cache=cache)
    states = [hidden[0, -1, 0]]
    for step in range(1, num_steps):
        if pair + 1 + step >= len(tokens):
            break
        mask = torch.ones(1, 1, 1, pair + 1 + step, dtype=torch.bool)
        token = embed(tokens[None, pair + 1 + step, None])
        hidden = drafter(token, states[-1][None, None], torch.tensor([[pair + step]]), mask, cache)
        states.append(hidden[0, 0, 0])
    return states


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "norms", "embedding", "3.1"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_loss_counts_and_gradients_equal_the_naive_ones(num_steps, variant):
    drafter, told = baseline("eagle3", **variant).train(), Told(3, 20)
    favouring(drafter, told)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    out = eagle3_loss(drafter, batch, Eagle3Objective(num_steps, 0.7))
    hits, counts, places, sums = ([0] * num_steps for _ in range(4))
    for row in range(3):
        for pair in range(LENGTHS[row] - 1):
            alive = True
            for step, state in enumerate(naive_states(drafter, told, row, pair, num_steps)):
                at = pair + 2 + step
                if at >= LENGTHS[row] or at < STARTS[row] or batch.top_ids[row, at, 0] < 0:
                    alive = False
                    continue
                target = torch.zeros(DRAFT_VOCAB)
                for index, prob in zip(batch.top_ids[row, at].tolist(), batch.top_probs[row, at], strict=True):
                    if index >= 0:
                        target[index] += prob
                logits = drafter.draft_logits(state)[1]
                sums[step] = sums[step] - (target / target.sum() * logits.log_softmax(-1)).sum()
                places[step] += 1
                counts[step] += alive
                alive = alive and bool(drafter.draft_to_target[logits.argmax()] == told.tokens[row, at])
                hits[step] += alive
    loss = sum(0.7**step * sums[step] / places[step] for step in range(num_steps))
    assert out["counted"].flatten().tolist() == counts and out["agreed"].flatten().tolist() == hits
    assert out["counted"].shape == (num_steps, 1) and hits[0] > 0 and (num_steps == 1 or counts[1] > 0)
    torch.testing.assert_close(out["loss"], loss, rtol=1e-5, atol=1e-5)
    parameters = drafter.parameters_of("full")
    found = torch.autograd.grad(out["loss"], parameters)
    for (name, _), ours, naive in zip(
        drafter.named_parameters(), found, torch.autograd.grad(loss, parameters), strict=True
    ):
        assert naive.abs().max() > 0 and (ours - naive).abs().max() < 1e-3 * naive.abs().max(), name


@torch.no_grad()
def test_a_trained_step_is_a_drafted_level():
    """Along the likeliest path of a real tree, every level's state is the training state of that step."""
    drafter, told = baseline("eagle3", base=listening("eagle3")), Told(1, 9)
    limits = Limits((12,), (9,), num_forwards=4, max_starts=1)
    tree = drafter.propose(drafter.begin(told.table, 1, 9), pairs_for(drafter, told, (0,), (8,)), limits)
    path, node = [], 0
    while True:
        children = (tree.parents[0] == node).nonzero().flatten()
        if not len(children):
            break
        node = int(children[tree.log_probs[0, children].argmax()])
        path.append(int(tree.tokens[0, node]))
    assert len(path) == 4 and [hidden.shape for hidden in drafter.heard] == [(1, 1, 1, 32)] * 4
    text = torch.cat([told.tokens, torch.tensor([path])], dim=1)
    features = torch.cat([told.features.flatten(2), torch.full((1, 3, 96), 9.0)], dim=1)
    states = unrolled_states(drafter, told.table.embed(text), drafter.project_features(features), 4)
    for drafted, trained in zip(drafter.heard, states, strict=True):
        torch.testing.assert_close(trained[0, 7], drafted[0, 0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", CHUNKED])
def test_every_attention_backend_gives_the_same_loss(attention):
    drafter, told = baseline("eagle3").train(), Told(3, 20)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    losses = []
    for backend in ("sdpa", attention):
        drafter.set_attn_implementation(backend)
        losses.append(drafter.loss(batch)["loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_queries_in_chunks(monkeypatch):
    """Pairs and three rows of every path, more heads than keys, chunks that do not divide the pairs."""
    generator = torch.Generator().manual_seed(0)

    def states(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, 11, 8, generator=generator)

    cache, queries = PathCache(), []
    for _ in range(3):
        cache.update(states(2), states(2), 0)
        queries.append(states(6))
    whole = cache.attend(queries[-1], 0.3)
    monkeypatch.setattr("specblock_hf.drafters.common.path_attention.CHUNK", 4)
    torch.testing.assert_close(cache.attend(queries[-1], 0.3), whole)
    keys = torch.cat([k.repeat_interleave(3, 1) for k in cache.keys], dim=2)
    values = torch.cat([v.repeat_interleave(3, 1) for v in cache.values], dim=2)
    own, place = torch.arange(11)[:, None], torch.arange(33)
    mask = torch.where(place < 11, place <= own, place % 11 == own)
    expected = torch.nn.functional.scaled_dot_product_attention(queries[-1], keys, values, mask, scale=0.3)
    torch.testing.assert_close(whole, expected.transpose(1, 2).flatten(2))


def test_seven_steps_by_default():
    drafter, told = baseline("eagle3"), Told(3, 20)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    assert drafter.loss(batch)["counted"].shape == (7, 1)
    assert drafter.loss(batch, Eagle3Objective(num_steps=2))["counted"].shape == (2, 1)
    with pytest.raises(ValueError, match="^num_steps is 0; at least one step"):
        Eagle3Objective(num_steps=0)
