# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from baselines_for_tests import baseline, batch_for, favouring, listening, pairs_for
from training_for_tests import DRAFT_VOCAB, Told

from specblock_hf.drafters.falcon import loss as objective
from specblock_hf.drafters.falcon.loss import FalconObjective, block_states, blocks_of
from specblock_hf.drafting.plan import Limits
from specblock_hf.training.cpu_attention import NAME as CHUNKED
from specblock_hf.trees.static_shape import likely_shape


LENGTHS, STARTS = (20, 13, 17), (3, 6, 2)
PLAIN = FalconObjective(glancing=0.0, feature_noise=0.0)


def naive_block(drafter, embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The states `[k, d]` that the last k of some rows `[T, d]` predict, one row through the LSTM at a time."""
    memory, said = None, []
    for embed, feature in zip(embeds, features, strict=True):
        state, memory = drafter.read(embed[None, None], feature[None, None], memory)
        said.append(state[0, 0])
    size = drafter.config.block_size
    everything = torch.ones(1, 1, len(said), len(said), dtype=torch.bool)
    return drafter(torch.stack(said)[None], torch.arange(len(said))[None], everything)[0, -size:]


@pytest.mark.parametrize("size", [2, 3])
@torch.no_grad()
def test_a_trained_block_is_one_alone(size):
    """A block sees what comes before it and itself, wherever blocks begin."""
    drafter, told = baseline("falcon_drafter", block_size=size), Told(2, 12)
    embeds, features = told.table.embed(told.tokens[:, 1:]), told.features[:, :-1, 0]
    for first in range(size):
        blocks = blocks_of(11, size, first)
        assert blocks[0, 0] == first and blocks[-1, -1] >= 11 - size
        states = block_states(drafter, embeds, features, blocks)
        for number, block in enumerate(blocks.tolist()):
            expected = naive_block(drafter, embeds[1, : block[-1] + 1], features[1, : block[-1] + 1])
            torch.testing.assert_close(states[1, number], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", CHUNKED])
@torch.no_grad()
def test_a_trained_block_is_the_drafted_one(attention):
    """In several rounds of a ragged batch, one row of which has but one pair at first."""
    drafter, told = baseline("falcon_drafter", base=listening("falcon_drafter"), block_size=3), Told(2, 18)
    drafter.set_attn_implementation(attention)
    embeds, features = told.table.embed(told.tokens[:, 1:]), told.features[:, :-1, 0]
    state = drafter.begin(told.table, 2, 18)
    for first, last in (((0, 0), (1, 9)), ((1, 9), (6, 10)), ((6, 10), (7, 14))):
        drafter.heard = []
        pairs = pairs_for(drafter, told, first, last)
        drafter.propose(state, pairs, Limits((9, 9), (3, 3), num_forwards=1))
        for row in range(2):
            if last[row] < 3:
                continue  # its first slots have no rows
            blocks = torch.arange(last[row] - 3, last[row])[None]
            expected = block_states(drafter, embeds[row : row + 1], features[row : row + 1], blocks)
            torch.testing.assert_close(drafter.heard[0][row, 0], expected[0, 0], rtol=1e-5, atol=1e-5)
    assert state.committed.tolist() == [7, 14] and state.calls == 3


@pytest.mark.parametrize("size", [2, 3])
@torch.no_grad()
def test_later_forwards_go_on_from_predicted_rows(size):
    """Every path that ends a block is continued as if what was predicted had been part of the text."""
    drafter = baseline("falcon_drafter", base=listening("falcon_drafter"), block_size=size, num_blocks=3)
    told, budget = Told(1, 9), 40
    state = drafter.begin(told.table, 1, 9)
    limits = Limits((budget,), (9,), num_forwards=3)
    tree = drafter.propose(state, pairs_for(drafter, told, (0,), (8,)), limits)
    shape = likely_shape(drafter.config.rank_weights, budget, 3 * size, size)
    starts = [sorted({shape.ancestor(n, d) for n in range(41) if shape.depths[n] > d}) for d in (0, size, 2 * size)]
    assert [hidden.shape for hidden in drafter.heard] == [(1, len(s), size, 32) for s in starts]
    assert len(starts[1]) > 1 and len(starts[2]) >= 1
    tokens = drafter.draft_to_target[
        drafter.draft_logits(drafter.heard[0])[1].topk(3).indices
    ]  # of the first forward's slots, by rank
    known = told.table.embed(told.tokens[0, 1:]), told.features[0, :-1, 0]
    for row, start in enumerate(starts[1]):
        way = [shape.ancestor(start, depth) for depth in range(1, size + 1)]
        path = torch.stack([tokens[0, 0, slot, shape.ranks[node]] for slot, node in enumerate(way)])
        embeds = torch.cat([known[0], told.table.embed(path)])
        features = torch.cat([known[1], drafter.heard[0][0, 0]])
        blocks = torch.arange(8, 8 + size)[None]
        expected = block_states(drafter, embeds[None], features[None], blocks)
        torch.testing.assert_close(drafter.heard[1][0, row], expected[0, 0], rtol=1e-5, atol=1e-5)
        below = [n for n in starts[2] if shape.ancestor(n, size) == start]
        more = drafter.draft_to_target[drafter.draft_logits(drafter.heard[1][0, row])[1].topk(3).indices]
        for end in below:
            way = [shape.ancestor(end, depth) for depth in range(size + 1, 2 * size + 1)]
            path = torch.stack([more[slot, shape.ranks[node]] for slot, node in enumerate(way)])
            twice = torch.cat([embeds, told.table.embed(path)]), torch.cat([features, drafter.heard[1][0, row]])
            expected = block_states(drafter, twice[0][None], twice[1][None], blocks + size)
            found = drafter.heard[2][0, starts[2].index(end)]
            torch.testing.assert_close(found, expected[0, 0], rtol=1e-5, atol=1e-5)
    assert int(tree.num_nodes[0]) == budget + 1 and state.calls == 3


@torch.no_grad()
def test_the_shape_is_the_same_in_every_round():
    """Whatever the drafter finds likely, the ranks along all paths are those of the static shape."""
    drafter, told = baseline("falcon_drafter"), Told(1, 12)
    found = []
    state = drafter.begin(told.table, 1, 12)
    for first, last in ((0, 4), (4, 5), (5, 9)):
        pairs = pairs_for(drafter, told, (first,), (last,))
        tree = drafter.propose(state, pairs, Limits((17,), (9,), num_forwards=3))
        ranks: list[tuple[int, ...]] = [()]
        for node in range(1, 18):
            siblings = (tree.parents[0] == tree.parents[0, node]) & (tree.log_probs[0] > tree.log_probs[0, node])
            ranks.append((*ranks[int(tree.parents[0, node])], int(siblings.sum())))
        found.append(set(ranks))
    shape = likely_shape(drafter.config.rank_weights, 17, 6, 2)
    expected: list[tuple[int, ...]] = [()]
    for parent, rank in zip(shape.parents[1:], shape.ranks[1:], strict=True):
        expected.append((*expected[parent], rank))
    assert found == [set(expected)] * 3


@torch.no_grad()
def test_a_plan_bounds_the_starts():
    drafter = baseline("falcon_drafter", base=listening("falcon_drafter"))
    told = Told(1, 9)
    limits = Limits((40,), (9,), num_forwards=3, max_starts=2)
    tree = drafter.propose(drafter.begin(told.table, 1, 9), pairs_for(drafter, told, (0,), (8,)), limits)
    assert [hidden.shape[1] for hidden in drafter.heard] == [1, 2, 2]
    assert tree.origin[0, 1:, 0].unique().tolist() == [0, 1, 2] and tree.origin[0, 1:, 1].unique().tolist() == [0, 1]


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_counts_equal_the_naive_ones(seed):
    drafter, told = baseline("falcon_drafter", seed=3).train(), Told(3, 20)
    favouring(drafter, told)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    out = drafter.loss(batch, PLAIN, generator=torch.Generator().manual_seed(seed))
    first = int(torch.randint(2, (1,), generator=torch.Generator().manual_seed(seed)))
    hits, counts, sums, states = [0, 0], [0, 0], [[], []], []
    for row in range(3):
        for begin in range(first, LENGTHS[row] - 2, 2):
            rows = slice(0, begin + 2)
            embeds = told.table.embed(told.tokens[row, 1:])[rows].detach()
            predicted = naive_block(drafter, embeds, told.features[row, rows, 0])
            alive = True
            for slot, state in enumerate(predicted):
                at = begin + 3 + slot
                if at - 1 < LENGTHS[row] and at - 1 >= STARTS[row]:
                    wanted = told.features[row, at - 1, 0]
                    states.append(torch.nn.functional.smooth_l1_loss(state, wanted))
                if at >= LENGTHS[row] or at < STARTS[row] or batch.top_ids[row, at, 0] < 0:
                    alive = False
                    continue
                target = torch.zeros(DRAFT_VOCAB)
                for index, prob in zip(batch.top_ids[row, at].tolist(), batch.top_probs[row, at], strict=True):
                    if index >= 0:
                        target[index] += prob
                logits = drafter.lm_head(state)
                sums[slot].append(-(target / target.sum() * logits.log_softmax(-1)).sum())
                counts[slot] += alive
                alive = alive and bool(drafter.draft_to_target[logits.argmax()] == told.tokens[row, at])
                hits[slot] += alive
    draft = sum(torch.stack(slot).mean() for slot in sums) / 2
    torch.testing.assert_close(out["draft_loss"], draft, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["state_loss"], torch.stack(states).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss"], torch.stack(states).mean() + 0.1 * draft, rtol=1e-5, atol=1e-5)
    assert out["counted"].tolist() == [counts] and out["agreed"].tolist() == [hits]
    assert 0 < hits[0] < counts[0] and counts[1] > 0


def glanced(drafter, batch, monkeypatch, share: float, progress: float) -> tuple[list, float]:
    """The inputs of both passes, and the wrong guesses of the first."""
    passes = []

    def spy(drafter, embeds, features, blocks):
        passes.append((embeds, features, blocks, block_states(drafter, embeds, features, blocks)))
        return passes[-1][-1]

    monkeypatch.setattr(objective, "block_states", spy)
    kind = FalconObjective(glancing=share, feature_noise=0.0)
    drafter.loss(batch, kind, progress=progress, generator=torch.Generator().manual_seed(2))
    monkeypatch.undo()
    return passes


@pytest.mark.parametrize("size", [2, 3])
def test_glancing_replaces_rows_by_their_answers(monkeypatch, size):
    drafter, told = baseline("falcon_drafter", block_size=size), Told(8, 60)
    batch = batch_for(drafter, told, (60, 50, 40, 60, 60, 60, 60, 60), (3,) * 8)
    numbers = []
    for share, progress in ((0.2, 0.0), (0.4, 0.0), (0.4, 0.5)):
        (embeds, features, blocks, _), (new_embeds, new_features, same, _) = glanced(
            drafter, batch, monkeypatch, share, progress
        )
        assert torch.equal(blocks, same)
        replaced = (features != new_features).any(-1)
        assert torch.equal(embeds[~replaced], new_embeds[~replaced])
        starts = set(blocks[:, 0].tolist())
        for row, column in replaced.nonzero().tolist():
            assert torch.equal(new_features[row, column], told.features[row, column + size, 0])
            assert torch.equal(new_embeds[row, column], batch.embeds[row, column + size + 1])
            assert column in starts or replaced[row, column - 1]  # the beginning of a block
            assert column + 1 not in starts  # and never all of it
            assert batch.scored[row, column + size + 1]
        numbers.append(int(replaced.sum()))
    # Nearly every guess of random weights is wrong: 0.2, 0.4 and 0.2 of them.
    guesses = int(batch.counted[:, size + 1 :].sum())
    for number, share in zip(numbers, (0.2, 0.4, 0.2), strict=True):
        assert 0.7 * share * guesses < number < 1.3 * share * guesses
    assert len(glanced(drafter, batch, monkeypatch, 0.4, 1.0)) == len(glanced(drafter, batch, monkeypatch, 0, 0)) == 1


def test_a_replaced_row_is_not_learned_from(monkeypatch):
    """Every block's first row is replaced, so that only second slots count."""
    drafter, told = baseline("falcon_drafter"), Told(3, 20)
    batch = batch_for(drafter, told, LENGTHS, STARTS)

    def everything(blocks, batch, wanted, generator):
        rows = torch.zeros(3, *blocks.shape, dtype=torch.bool)
        rows[..., 0] = True
        return rows

    monkeypatch.setattr(objective, "_draw_rows", everything)
    out = drafter.loss(batch, progress=0.0, generator=torch.Generator().manual_seed(0))
    assert out["counted"][0, 0] == 0 and out["counted"][0, 1] == 0  # no chain without its first slot
    assert out["draft_loss"] > 0 and out["state_loss"] > 0


def test_noise_on_the_features(monkeypatch):
    drafter, told = baseline("falcon_drafter"), Told(4, 40)
    batch = batch_for(drafter, told, (40,) * 4, (3,) * 4)
    inputs = []

    def spy(drafter, embeds, features, blocks):
        inputs.append(features)
        return block_states(drafter, embeds, features, blocks)

    monkeypatch.setattr(objective, "block_states", spy)
    for width in (0.0, 0.1, 0.3):
        drafter.loss(batch, FalconObjective(feature_noise=width), generator=torch.Generator().manual_seed(0))
        noise = inputs[-1] - batch.features[:, :-1]
        assert noise.abs().max() <= width + 1e-6 and abs(noise.mean()) < 0.05 * width + 1e-9
        assert noise.abs().max() > 0.98 * width - 1e-9
