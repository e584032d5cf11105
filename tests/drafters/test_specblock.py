# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The drafting loop: what it computes equals the network row by row, ragged batches equal single rows."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_target
from training_for_tests import Told, logits_below, naive_states, tiny_drafter

from specblock_hf import DraftingPlan, SpecBlockConfig, SpecBlockDrafter
from specblock_hf.drafters.common import block as block_drafter
from specblock_hf.drafters.common.cache import GraphCache
from specblock_hf.drafters.specblock.loss import first_block, later_block
from specblock_hf.drafting.plan import Limits
from specblock_hf.trees.tree import DraftTree


CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # of states of order 1 to 10 in fp32
EVERYTHING = Limits((500,), (99,), num_forwards=2)


class RecordingDrafter(SpecBlockDrafter):
    """Keeps what its later blocks started from and what came out."""

    def _later_block(self, state, before, starts, path, positions, first_width):
        hidden = super()._later_block(state, before, starts, path, positions, first_width)
        self.recorded.append((starts, hidden))
        return hidden


def recording(drafter: SpecBlockDrafter) -> RecordingDrafter:
    drafter.__class__ = RecordingDrafter
    drafter.recorded = []
    return drafter


def nodes_of(tree: DraftTree, row: int = 0) -> list[tuple]:
    """Every node of one row as (token, parent, origin), padding left out."""
    count = int(tree.num_nodes[row])
    assert (tree.parents[row, count:] == -2).all()
    origin = [tuple(pair) for pair in tree.origin[row, :count].tolist()]
    return list(zip(tree.tokens[row, :count].tolist(), tree.parents[row, :count].tolist(), origin, strict=True))


def assert_same_row(batched: DraftTree, row: int, single: DraftTree) -> None:
    nodes = nodes_of(single)
    assert nodes_of(batched, row) == nodes
    torch.testing.assert_close(batched.log_probs[row, : len(nodes)], single.log_probs[0, : len(nodes)])


def path_tokens(tree: DraftTree, node: int) -> list[int]:
    """Tokens from the root's first child to a node."""
    tokens = []
    while tree.parents[0, node] >= 0:
        tokens.append(int(tree.tokens[0, node]))
        node = int(tree.parents[0, node])
    return tokens[::-1]


def draft(drafter: SpecBlockDrafter, told: Told, prompt: int = 9, limits: Limits = EVERYTHING) -> DraftTree:
    state = drafter.begin(told.table, 1, 40)
    return drafter.propose(state, told.pairs([0], [prompt]), limits)


@torch.no_grad()
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_first_block_equals_the_training_forward(block_size):
    """Committed in steps of 1, 3, 2 and 6 pairs, every row equals the row of one forward over the whole text."""
    drafter, told = tiny_drafter(block_size=block_size), Told(1, 14)
    whole = first_block(drafter, told.batch(), GraphCache(2)).states(drafter)
    state, done = drafter.begin(told.table, 1, 40), 0
    for count in (1, 3, 2, 6):
        hidden = drafter._commit(state, told.pairs([done], [done + count]), drafter)
        torch.testing.assert_close(hidden, whole[:, done : done + count], **CLOSE)
        done += count
    assert state.committed == 12 * block_size and state.calls == 4


@torch.no_grad()
@pytest.mark.parametrize("block_size", [3, 4])
def test_later_blocks_equal_the_training_forward(block_size):
    """
    The states that `propose` computes for its own starts equal those of the objective, once the text holds the starts'
    tokens at the cuts.
    """
    drafter = recording(tiny_drafter(block_size=block_size, max_starts=None))
    prompt, told = 6, Told(1, 20)
    pair = prompt - 1
    draft(drafter, told, prompt, Limits((500,), (99,), num_forwards=3, max_starts=12))
    (second, second_hidden), (third, third_hidden) = drafter.recorded
    compared = 0
    for starts, states, with_parent in ((second, second_hidden, False), (third, third_hidden, True)):
        for start in range(starts.node.shape[1]):
            if starts.node[0, start] < 0:
                continue
            path = [(int(starts.slot[0, start]) + 1, int(starts.tokens[0, start]))]
            if with_parent:
                parent = int(starts.parent_start[0, start])
                path.insert(0, (int(second.slot[0, parent]) + 1, int(second.tokens[0, parent])))
            text = copy.deepcopy(told)
            place = pair + 1
            for cut, token in path:
                place += cut
                text.tokens[0, place] = token
            cache, batch = GraphCache(2), text.batch()
            block = first_block(drafter, batch, cache)
            trained = block.states(drafter)
            for cut, _ in path:
                everywhere = torch.ones_like(block.valid)
                block = later_block(drafter, batch, cache, block, everywhere, trained[:, :, cut - 1], cut, False)
                trained = block.states(drafter)
            row = block.pairs[0].tolist().index(pair)
            torch.testing.assert_close(states[0, start], trained[0, row], **CLOSE)
            compared += 1
    assert compared >= 15


@torch.no_grad()
@pytest.mark.parametrize(
    ("forwards", "seed", "fields"),
    [
        *((forwards, seed, {}) for forwards, seed in ((1, 1), (2, 1), (2, 2), (3, 1), (3, 4))),
        *((forwards, 1, {"markov_rank": 3}) for forwards in (1, 2)),
        *((forwards, 1, {"markov_rank": 3, "expansion": "best_first"}) for forwards in (1, 2)),
    ],
)
def test_log_probs_of_nodes_are_the_networks(forwards, seed, fields):
    """
    Every node's log-prob is the log-softmax of a block that reaches it. Several blocks may (nodes that spell the same
    are merged), but never more than one for each way to cut the node's path.
    """
    drafter, told, pair = tiny_drafter(seed, **fields), Told(1, 16, seed), 8
    tree = draft(drafter, told, pair + 1, Limits((500,), (99,), num_forwards=forwards, max_starts=9))
    size, draft_id = drafter.config.block_size, {int(t): i for i, t in enumerate(drafter.draft_to_target)}
    deepest = int(tree.depths().max())
    assert deepest > size * (forwards - 1)
    for node in range(1, int(tree.num_nodes[0])):
        tokens = path_tokens(tree, node)
        possible = []
        for cuts in ways_to_cut(len(tokens), size, forwards):
            path, place = [], 0
            for cut in cuts:
                place += cut
                path.append((cut, tokens[place - 1]))
            slot = len(tokens) - place - 1
            state = naive_states(drafter, told, 0, pair, path)[slot]
            logits = logits_below(drafter, state, slot, tokens[-2] if slot else -1)
            possible.append(logits.log_softmax(-1)[draft_id[tokens[-1]]].item())
        closest = min(abs(value - tree.log_probs[0, node].item()) for value in possible)
        assert closest < 1e-4, (tokens, possible)
        if forwards == 1:
            assert len(possible) == 1


def ways_to_cut(depth: int, size: int, forwards: int) -> list[tuple[int, ...]]:
    """Cuts of every sequence of at most `forwards - 1` later blocks whose last block has a slot for this depth."""
    ways, frontier = [], [()]
    for _ in range(forwards):
        ways += [cuts for cuts in frontier if 0 < depth - sum(cuts) <= size]
        frontier = [(*cuts, cut) for cuts in frontier for cut in range(1, size + 1) if sum(cuts) + cut < depth]
    return ways


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [256, 4])
def test_ragged_batch_equals_single_rows(monkeypatch, attention, chunk):
    """Rows of different lengths and limits, over four rounds, one of them finished after the second."""
    monkeypatch.setattr(block_drafter, "PREFILL_PAIRS", chunk)
    drafter, told = tiny_drafter(), Told(3, 40)
    drafter.set_attn_implementation(attention)
    counts = [("extend", (5, 3, 9)), ("propose", (2, 6, 1)), ("propose", (1, 3, 5)), ("propose", (2, 4, 0))]
    counts += [("propose", (5, 1, 0)), ("propose", (1, 1, 0))]
    limits = {"nodes": (30, 9, 17), "depth": (8, 11, 9), "num_forwards": 3, "max_starts": 6}
    batched = drafter.begin(told.table, 3, 60)
    alone = [drafter.begin(told.table, 1, 60) for _ in range(3)]
    done = [0, 0, 0]
    sizes = set()
    for action, given in counts:
        until = [a + b for a, b in zip(done, given, strict=True)]
        if action == "extend":
            drafter.extend(batched, told.pairs(done, until))
            for row in range(3):
                drafter.extend(alone[row], told.pairs(done[row : row + 1], until[row : row + 1], [row]))
        else:
            tree = drafter.propose(batched, told.pairs(done, until), Limits(**limits))
            for row in range(3):
                if given[row] == 0:
                    continue
                single = Limits((limits["nodes"][row],), (limits["depth"][row],), 3, 6)
                pairs = told.pairs(done[row : row + 1], until[row : row + 1], [row])
                assert_same_row(tree, row, drafter.propose(alone[row], pairs, single))
                sizes.add(int(tree.num_nodes[row]))
        done = until
        assert batched.committed.tolist() == [4 * d for d in done]
        assert [state.committed for state in alone] == [4 * d for d in done]
    assert len(sizes) >= 3


@torch.no_grad()
def test_ragged_batch_with_a_row_that_never_said_anything():
    """A row without any pair has nothing to attend to; the others must not notice."""
    drafter, told = tiny_drafter(), Told(2, 12)
    pairs = told.pairs([0, 0], [8, 0])
    tree = drafter.propose(drafter.begin(told.table, 2, 20), pairs, Limits((20, 20), (9, 9), 2))
    single = drafter.propose(drafter.begin(told.table, 1, 20), told.pairs([0], [8], [0]), Limits((20,), (9,), 2))
    assert_same_row(tree, 0, single)
    assert tree.log_probs[0, : int(tree.num_nodes[0])].isfinite().all()


@torch.no_grad()
def test_columns_that_nobody_wrote_do_not_matter():
    """Fresh memory may hold NaN, which a mask does not keep out."""
    drafter, told = tiny_drafter(), Told(2, 12)
    pairs = told.pairs([0, 0], [8, 2])
    limits = Limits((20, 20), (9, 9), 2)
    expected = drafter.propose(drafter.begin(told.table, 2, 20), pairs, limits)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        tree = drafter.propose(drafter.begin(told.table, 2, 1), pairs, limits)
    finally:
        torch.use_deterministic_algorithms(False)
    for row in range(2):
        assert nodes_of(tree, row) == nodes_of(expected, row)


@torch.no_grad()
def test_the_cache_grows():
    drafter, told = tiny_drafter(), Told(1, 40)
    small, large = drafter.begin(told.table, 1, 1), drafter.begin(told.table, 1, 200)
    columns = [small.cache.keys[0].shape[2]]
    done = 0
    for count in (1, 2, 9, 1, 20):
        pairs = told.pairs([done], [done + count])
        assert_same_row(drafter.propose(small, pairs, EVERYTHING), 0, drafter.propose(large, pairs, EVERYTHING))
        columns.append(small.cache.keys[0].shape[2])
        done += count
    assert columns[0] == 4 and sorted(set(columns)) == columns[:1] + sorted(set(columns[1:]))
    assert len(set(columns)) >= 3 and columns[-1] >= 33 * 4
    assert large.cache.keys[0].shape[2] == 200 * 4


@torch.no_grad()
def test_eager_equals_sdpa():
    told = Told(1, 20)
    sdpa, eager = tiny_drafter(), tiny_drafter()
    eager.set_attn_implementation("eager")
    assert sdpa.config._attn_implementation == "sdpa"
    whole = [first_block(d, told.batch(), GraphCache(2)).states(d) for d in (sdpa, eager)]
    torch.testing.assert_close(*whole, **CLOSE)
    assert_same_row(draft(sdpa, told), 0, draft(eager, told))


@torch.no_grad()
@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_blocks_and_calls(forwards):
    drafter, told = tiny_drafter(), Told(1, 20)
    state = drafter.begin(told.table, 1, 40)
    tree = drafter.propose(state, told.pairs([0], [9]), Limits((500,), (99,), forwards))
    assert state.calls == forwards
    assert sorted({f for _, _, (f, _) in nodes_of(tree)[1:]}) == list(range(forwards))
    assert int(tree.depths().max()) == 4 * forwards
    assert int(tree.tokens[0, 0]) == int(told.tokens[0, 9])


@torch.no_grad()
def test_limits_hold_and_save_forwards():
    drafter, told = tiny_drafter(), Told(1, 20)
    for nodes, depth, calls in ((0, 9, 1), (5, 0, 1), (5, 3, 1), (5, 5, 2), (5, 9, 3), (2, 9, 2), (1, 9, 1)):
        state = drafter.begin(told.table, 1, 40)
        tree = drafter.propose(state, told.pairs([0], [9]), Limits((nodes,), (depth,), 3))
        assert int(tree.num_nodes[0]) == 1 + (nodes if depth else 0)
        assert int(tree.depths().max()) <= depth
        assert state.calls == calls


@torch.no_grad()
def test_a_drafted_round_leaves_no_trace():
    """Keys made while drafting are dropped: the next round is the same whether or not the last one drafted."""
    drafter, told = tiny_drafter(), Told(1, 30)
    drafted, told_only = (drafter.begin(told.table, 1, 60) for _ in range(2))
    for first, last in ((0, 7), (7, 9), (9, 12)):
        drafter.propose(drafted, told.pairs([first], [last]), Limits((60,), (99,), 3))
        drafter.extend(told_only, told.pairs([first], [last]))
    pairs = told.pairs([12], [13])
    assert_same_row(drafter.propose(drafted, pairs, EVERYTHING), 0, drafter.propose(told_only, pairs, EVERYTHING))


def test_wrong_targets_are_refused_in_a_sentence():
    target = copy.deepcopy(tiny_target("llama"))
    drafter = tiny_drafter()
    drafter.check_target(target)
    for field, value, message in (
        ("hidden_size", 48, "its hidden size is 32, that of this LlamaForCausalLM 48; load the drafter"),
        ("vocab_size", 40, "its vocabulary is 32, that of this LlamaForCausalLM 40; load the drafter"),
        ("num_hidden_layers", 6, "its number of layers is 4, that of this LlamaForCausalLM 6; load the drafter"),
    ):
        before = getattr(target.config, field)
        setattr(target.config, field, value)
        with pytest.raises(ValueError, match=message):
            drafter.check_target(target)
        setattr(target.config, field, before)
    drafter.config.feature_layers = [1, 2, 5]
    with pytest.raises(ValueError, match="reads hidden state 5 of a target with 4 layers"):
        drafter.check_target(target)


def test_plans_follow_the_configuration_and_the_device():
    config = SpecBlockConfig(hidden_size=32, num_attention_heads=4, tree_budget=40, num_blocks=3, max_starts=5)
    drafter = SpecBlockDrafter(config)
    assert drafter.default_plan(torch.device("cpu")) == DraftingPlan(11, 3, 4)
    assert drafter.default_plan(torch.device("cuda")) == DraftingPlan(40, 3, 5)
    assert (DraftingPlan(60, 2, None), 2.6) in drafter.acceptance()
    config.acceptance = [[8, 2, 4, 2.25], [16, 1, 0, 2.5]]
    assert drafter.acceptance() == [(DraftingPlan(8, 2, 4), 2.25), (DraftingPlan(16, 1, None), 2.5)]


@pytest.mark.parametrize("markov_rank", [0, 3])
def test_what_an_update_may_change(markov_rank):
    drafter = tiny_drafter(markov_rank=markov_rank)
    head = {id(p) for p in drafter.parameters_of("head")}
    named = {name for name, p in drafter.named_parameters() if id(p) in head}
    term = {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"} if markov_rank else set()
    assert named == {"lm_head.weight", "rank_head.0.weight", "rank_head.2.weight"} | term
    assert len(drafter.parameters_of("full")) == len(list(drafter.parameters()))


@torch.no_grad()
def test_a_later_block_starts_only_where_the_path_is_likely_enough():
    told = Told(1, 16)
    drafter = recording(tiny_drafter(expansion="best_first"))
    everything = draft(drafter, told, 9, Limits((500,), (99,), num_forwards=2, max_starts=12))
    ((starts, _),) = drafter.recorded
    scores = everything.cumulative_log_probs().exp()
    drafter.recorded.clear()
    likeliest = float(scores[0, 1:].max())
    draft(drafter, told, 9, Limits((500,), (99,), 2, 12, min_start_probability=likeliest * 0.999))
    ((fewer, _),) = drafter.recorded
    assert starts.node.shape[1] == 12 and fewer.node.tolist() == [[1]]
    drafter.recorded.clear()
    state = drafter.begin(told.table, 1, 40)
    tree = drafter.propose(state, told.pairs([0], [9]), Limits((500,), (99,), 2, 12, min_start_probability=1.0))
    assert not drafter.recorded and state.calls == 1 and state.forward_rows == 9
    assert int(tree.depths().max()) == drafter.config.block_size
