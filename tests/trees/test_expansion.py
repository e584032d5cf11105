# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Rank-guided expansion against a slow Python version of Algorithm 2 and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock_hf.trees.expansion import (
    BlockOutputs,
    Branching,
    Starts,
    limit_starts,
    rank_guided,
)
from specblock_hf.trees.tree import DraftTree


QUICK = settings(max_examples=60, deadline=None)
SLOTS, CANDIDATES = 3, 5
BRANCHINGS = (Branching((2, 3, 4, 0), 5), Branching((1, 2, 4, 3), 3), Branching((3, 2, 5, 0), 4, True))


def outputs_of(classes: list[list[int]], probabilities=None) -> BlockOutputs:
    """One row with buckets and greedy probabilities `[S, K]`; slot k of start s proposes 100 s + 10 k + rank."""
    starts, slots = len(classes), len(classes[0])
    tokens = torch.arange(starts)[:, None, None] * 100 + torch.arange(slots)[:, None] * 10 + torch.arange(CANDIDATES)
    log_probs = torch.full((starts, slots, CANDIDATES), -4.0) - torch.arange(CANDIDATES)
    log_probs[..., 0] = torch.log(torch.tensor(probabilities if probabilities else [[0.5] * slots] * starts))
    return BlockOutputs(tokens[None], log_probs[None], torch.tensor(classes)[None])


def random_outputs(seed: int, batch: int, starts: int) -> BlockOutputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, starts, SLOTS, 8, generator=generator).mul(2)
    log_probs, tokens = logits.log_softmax(-1).topk(CANDIDATES)
    return BlockOutputs(tokens, log_probs, torch.randint(4, (batch, starts, SLOTS), generator=generator))


def row_of(outputs: BlockOutputs, row: int) -> BlockOutputs:
    return BlockOutputs(outputs.tokens[row, None], outputs.log_probs[row, None], outputs.rank_class[row, None])


def widths(branching: Branching, classes: list[int], first_block: bool, probabilities=None) -> list[int]:
    return branching.widths(outputs_of([classes], probabilities and [probabilities]), first_block)[0, 0].tolist()


def test_widths_follow_the_buckets():
    assert widths(Branching(), [0, 1, 2, 0], first_block=True) == [10, 4, 10, 2]
    assert widths(Branching(), [0, 1, 2, 0], first_block=False) == [2, 4, 10, 2]
    assert widths(Branching((2, 4, 6, 4), 7), [3, 3, 2, 1], first_block=True) == [7, 4, 6, 4]


def test_a_give_up_stops_branching_but_not_at_the_root():
    assert widths(Branching(), [0, 3, 2, 1], first_block=True) == [10, 0, 0, 0]
    assert widths(Branching(), [3, 1, 2, 1], first_block=True) == [10, 4, 10, 4]
    assert widths(Branching(), [3, 1, 2, 1], first_block=False) == [0, 0, 0, 0]
    assert widths(Branching(), [1, 2, 3, 0], first_block=False) == [4, 10, 0, 0]


@pytest.mark.parametrize(
    ("probability", "root", "other"),
    [(0.59, 10, 4), (0.61, 8, 4), (0.81, 5, 4), (0.86, 5, 3), (0.91, 3, 3), (0.96, 3, 2)],
)
def test_probability_cuts(probability, root, other):
    cuts = Branching(probability_cuts=True)
    assert widths(cuts, [1, 1], True, [probability, 0.5]) == [root, 4]
    assert widths(cuts, [1, 1], True, [0.5, probability]) == [10, other]
    assert widths(cuts, [1, 1], False, [probability, 0.5]) == [other, 4]
    assert widths(Branching(), [1, 1], True, [probability] * 2) == [10, 4]
    assert widths(cuts, [0, 3], False, [probability] * 2) == [2, 0], "cuts never widen"


@pytest.mark.parametrize(
    ("classes", "first", "later"),
    [
        ([0, 0, 0], True, True),
        ([3, 0, 0], False, False),
        ([0, 3, 0], False, False),
        ([1, 3, 0], True, False),
        ([0, 2, 3], True, False),
    ],
)
def test_reaches_end(classes, first, later):
    outputs = outputs_of([classes])
    assert Branching().reaches_end(outputs, True).tolist() == [[first]]
    assert Branching().reaches_end(outputs, False).tolist() == [[later]]
    assert Branching((1, 1, 1, 1)).reaches_end(outputs, True).tolist() == [[True]]


def test_two_blocks_by_hand():
    branching = Branching((1, 2, 3, 0), root_width=2)
    tree = DraftTree.root(torch.tensor([7]))
    tree, starts = rank_guided(tree, Starts.root(tree), outputs_of([[0, 1]]), branching, 0)
    # [slot, rank]: the root's two children, and two more below the greedy one; the third column is padding.
    assert tree.tokens.tolist() == [[7, 0, 1, 2, 10, 11, 12]]
    assert tree.parents.tolist() == [[-1, 0, 0, -2, 1, 1, -2]]
    half = math.log(0.5)
    assert torch.equal(tree.log_probs, torch.tensor([[0, half, -5, -torch.inf, half, -5, -torch.inf]]))
    assert tree.origin[0, [0, 1, 2, 4, 5]].tolist() == [[-1, -1], [0, 0], [0, 0], [0, 1], [0, 1]]
    assert starts.node.tolist() == [[1, 2, -2, 4, 5, -2]]
    assert starts.slot.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert starts.parent_start.tolist() == [[0] * 6]

    starts = limit_starts(starts, tree, 2)
    assert (starts.node.tolist(), starts.slot.tolist(), starts.tokens.tolist()) == ([[1, 4]], [[0, 1]], [[0, 10]])
    tree, starts = rank_guided(tree, starts, outputs_of([[0, 0], [0, 3]]), branching, 1)
    assert tree.max_depth == 4
    new = slice(7, None)
    assert tree.parents[0, new].tolist() == [1, -2, -2, 7, -2, -2, 4, -2, -2, 13, -2, -2]
    assert tree.tokens[0, [7, 10, 13, 16]].tolist() == [0, 10, 100, 110]
    assert tree.origin[0, [7, 10, 13, 16]].tolist() == [[1, 0], [1, 1], [1, 0], [1, 1]]
    # Only the chain that no give-up ended goes on, from its last node.
    assert starts.node.tolist() == [[-2, -2, -2, 10, *[-2] * 8]]
    assert starts.parent_start.tolist() == [[0] * 6 + [1] * 6]


Path = tuple[int, ...]
Node = tuple[Path, float, tuple[int, int]]  # token path, log-prob, origin
Start = tuple[int, int, Path]  # row of the previous forward, slot, token path


def expand_slowly(
    starts: list[Start], outputs: BlockOutputs, branching: Branching, forward: int
) -> tuple[list[Node], list[Start]]:
    """The release's rules one node at a time, on row 0 of `outputs`, whose rows continue `starts`."""
    first, last = forward == 0, len(branching.children) - 1
    nodes: list[Node] = []
    next_starts: list[Start] = []
    for row, (_, _, path) in enumerate(starts):
        classes = outputs.rank_class[0, row].tolist()
        chain, stopped = path, False
        for slot, bucket in enumerate(classes):
            tokens, scores = outputs.tokens[0, row, slot].tolist(), outputs.log_probs[0, row, slot].tolist()
            p, width = math.exp(scores[0]), branching.children[bucket]
            if first and slot == 0:
                width = branching.root_width
                for bound, most in ((0.6, 8), (0.8, 5), (0.9, 3)):
                    width = min(width, most) if branching.probability_cuts and p >= bound else width
            else:
                for bound, most in ((0.85, 3), (0.95, 2)):
                    width = min(width, most) if branching.probability_cuts and p >= bound else width
                stopped = stopped or (bucket == last and branching.children[last] == 0)
                width = 0 if stopped else width
            for rank in range(max(width, 1)):
                nodes.append(((*chain, tokens[rank]), scores[rank], (forward, slot)))
                if width > 1:
                    next_starts.append((row, slot, (*chain, tokens[rank])))
            chain = (*chain, tokens[0])
        nonzero = [bucket for bucket in classes if bucket]
        gives_up = (nonzero[:1] == [last]) if first else (last in classes)
        end = (row, len(classes) - 1, chain)
        if end not in next_starts and not (gives_up and branching.children[last] == 0):
            next_starts.append(end)
    return nodes, next_starts


def paths_of(tree: DraftTree) -> list[Path]:
    """Token path of every node of row 0."""
    paths: list[Path] = []
    for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0].tolist(), strict=True):
        paths.append((*paths[parent], token) if parent >= 0 else ())
    return paths


@QUICK
@given(st.integers(0, 2**31), st.sampled_from(BRANCHINGS), st.integers(1, 6))
def test_three_blocks_equal_the_slow_version(seed, branching, max_starts):
    tree = DraftTree.root(torch.tensor([3]))
    starts, slow_starts, slow_nodes = Starts.root(tree), [(0, -1, ())], []
    for forward in range(3):
        outputs = random_outputs(seed + forward, 1, starts.node.shape[1])
        tree, starts = rank_guided(tree, starts, outputs, branching, forward)
        nodes, slow_starts = expand_slowly(slow_starts, outputs, branching, forward)
        slow_nodes += nodes
        paths = paths_of(tree)
        kept = [i for i, parent in enumerate(tree.parents[0].tolist()) if parent >= 0]
        scores, origin = tree.log_probs[0].tolist(), tree.origin[0].tolist()
        assert sorted((paths[i], scores[i], tuple(origin[i])) for i in kept) == sorted(slow_nodes)

        fields = torch.stack((starts.parent_start, starts.slot, starts.node, starts.tokens), -1)[0].tolist()
        assert sorted((row, slot, paths[node]) for row, slot, node, _ in fields if node >= 0) == sorted(slow_starts)
        assert all(paths[node][-1] == token for _, _, node, token in fields if node >= 0)
        starts = limit_starts(starts, tree, max_starts)
        fields = torch.stack((starts.parent_start, starts.slot, starts.node), -1)[0].tolist()
        slow_starts = [(row, slot, paths[node]) for row, slot, node in fields if node >= 0]


@QUICK
@given(st.integers(0, 2**31), st.sampled_from(BRANCHINGS))
def test_a_batch_equals_its_rows(seed, branching):
    roots = torch.tensor([3, 1, 4])
    outputs = [random_outputs(seed, 3, 1), random_outputs(seed + 1, 3, 4)]

    def draft(roots, outputs):
        tree = DraftTree.root(roots)
        tree, starts = rank_guided(tree, Starts.root(tree), outputs[0], branching, 0)
        starts = limit_starts(starts, tree, 4)
        tree, starts = rank_guided(tree, starts, outputs[1], branching, 1)
        return tree.merge_duplicates().prune(10), starts

    tree, starts = draft(roots, outputs)
    for row in range(3):
        alone, alone_starts = draft(roots[row, None], [row_of(block, row) for block in outputs])
        for name in ("tokens", "parents", "log_probs", "origin"):
            assert torch.equal(getattr(tree, name)[row], getattr(alone, name)[0]), name
        for name in ("node", "parent_start", "slot", "tokens"):
            assert torch.equal(getattr(starts, name)[row], getattr(alone_starts, name)[0]), name


def test_padded_starts_grow_nothing():
    tree = DraftTree.root(torch.tensor([7, 8]))
    starts = Starts.root(tree)
    starts.node[1] = -2
    outputs = random_outputs(0, 2, 1)
    outputs.log_probs[1] = torch.nan  # such a row of a forward attends to nothing
    tree, starts = rank_guided(tree, starts, outputs, BRANCHINGS[0], 0)
    assert tree.num_nodes[1].item() == 1 and tree.num_nodes[0].item() > SLOTS
    assert starts.node[1].unique().tolist() == [-2]
    assert not tree.log_probs.isnan().any()


def grown() -> tuple[DraftTree, Starts]:
    """Nodes 1..8 below the root, log-probs -1..-8, two of them not starts."""
    count = 8
    tree = DraftTree(
        tokens=torch.arange(9)[None],
        parents=torch.tensor([[-1] + [0] * count]),
        log_probs=-torch.arange(9.0)[None],
        origin=torch.zeros(1, 9, 2, dtype=torch.long),
        height=1,
    )
    node = torch.tensor([[8, 3, -2, 1, 5, -2, 2, 6]])
    return tree, Starts(node, parent_start=node * 10, slot=node * 100, tokens=node * 1000)


@pytest.mark.parametrize(
    ("max_starts", "min_probability", "kept"),
    [
        (3, 0.0, [1, 2, 3]),
        (1, 0.0, [1]),
        (7, 0.0, [1, 2, 3, 5, 6, 8, -2]),
        (None, 0.0, [1, 2, 3, 5, 6, 8, -2, -2]),
        (20, 0.0, [1, 2, 3, 5, 6, 8, -2, -2]),
        (4, math.exp(-2.5), [1, 2]),
        (1, math.exp(-2.5), [1]),
        (None, math.exp(-5.5), [1, 2, 3, 5]),
        (None, 0.9, []),
    ],
)
def test_limit_starts(max_starts, min_probability, kept):
    tree, starts = grown()
    limited = limit_starts(starts, tree, max_starts, min_probability)
    assert limited.node.tolist() == [kept]
    valid = [node for node in kept if node > 0]
    for name, factor in (("parent_start", 10), ("slot", 100), ("tokens", 1000)):
        assert getattr(limited, name)[0, : len(valid)].tolist() == [node * factor for node in valid]


def test_nothing_depends_on_the_values():
    """Tensors without data refuse whatever would have to wait for the device or give a shape that depends on it."""
    root = torch.empty(2, dtype=torch.long, device="meta")

    def outputs(starts):
        ids = torch.empty(2, starts, 4, 10, dtype=torch.long, device="meta")
        return BlockOutputs(ids, torch.empty(ids.shape, device="meta"), ids[..., 0])

    tree, branching = DraftTree.root(root), Branching((2, 4, 6, 4), root_width=10, probability_cuts=True)
    tree, starts = rank_guided(tree, Starts.root(tree), outputs(1), branching, 0)
    assert tree.tokens.shape == (2, 41) and starts.node.shape == (2, 40)
    tree, starts = rank_guided(tree, limit_starts(starts, tree, 8), outputs(8), branching, 1)
    assert tree.tokens.shape == (2, 41 + 8 * 4 * 6) and starts.node.shape == (2, 192) and tree.max_depth == 8


def test_bad_input_is_refused():
    tree = DraftTree.root(torch.tensor([7]))
    with pytest.raises(ValueError, match="gave 5 candidates per slot but the branching asks for up to 10"):
        rank_guided(tree, Starts.root(tree), outputs_of([[0, 0]]), Branching(), 0)
    with pytest.raises(ValueError, match="give one number of children >= 0 per rank bucket"):
        Branching((2, -1))
    with pytest.raises(ValueError, match="give one number of children >= 0 per rank bucket"):
        Branching(())
    with pytest.raises(ValueError, match="the root needs its greedy child"):
        Branching(root_width=0)
