# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Shapes of drawn trees, which know no token, and the drawing itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models_for_tests import ToyModel, all_trees, distinct, path_in

from specblock_hf.target.masks import likeliest_chain
from specblock_hf.trees.sampling import (
    SampledGrowth,
    Shape,
    gumbel_draw,
    private_generator,
    shape_for,
    tree_shape,
)
from specblock_hf.trees.tree import DraftTree


QUICK = settings(max_examples=100, deadline=None)


def depths_of(shape: Shape) -> list[int]:
    return [len(path_in(shape, node)) for node in range(len(shape.nodes))]


def check_layout(shape: Shape, block_size: int) -> None:
    """Parents first, the first-drawn path foremost, siblings in order and from one distribution each."""
    children: dict[int, list[int]] = {}
    for node, inner in enumerate(shape.nodes):
        assert inner.parent < node
        if node:
            children.setdefault(inner.parent, []).append(node)
    for siblings in children.values():
        assert [shape.nodes[node].sibling for node in siblings] == list(range(len(siblings)))
        assert len({shape.nodes[node].distribution for node in siblings}) == 1
    first = 0
    while first in children:
        assert children[first][0] == first + 1
        first += 1
    assert shape.height == max(depths_of(shape))
    for node, inner in enumerate(shape.nodes[1:], start=1):
        forward, row, slot = shape.distributions[inner.distribution]
        # The slot counts from the node that the forward's row starts from, on the node's own path.
        start = shape.starts[forward][row]
        assert slot < block_size and start in (0, *path_in(shape, node))
        assert len(path_in(shape, node)) - len(path_in(shape, start)) == slot + 1
    for forward, starts in enumerate(shape.starts[1:], start=1):
        assert all(shape.distributions[shape.nodes[start].distribution][0] == forward - 1 for start in starts)
        assert [row for _, row, slot in shape.distributions if slot == 0 and _ == forward] == list(range(len(starts)))


@QUICK
@given(
    budget=st.integers(1, 40),
    depth=st.integers(1, 9),
    block_size=st.integers(1, 4),
    forwards=st.integers(1, 4),
    max_starts=st.none() | st.integers(1, 5),
    supports=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    vocab_size=st.integers(1, 6),
)
def test_tree_shapes(budget, depth, block_size, forwards, max_starts, supports, vocab_size):
    shape = tree_shape(budget, depth, block_size, forwards, max_starts)
    check_layout(shape, block_size)
    assert len(shape.nodes) == budget + 1 and shape.height <= depth and len(shape.starts) <= forwards
    assert all(len(starts) <= (max_starts or budget) for starts in shape.starts[1:])
    capped = tree_shape(budget, depth, block_size, forwards, max_starts, tuple(supports), vocab_size)
    check_layout(capped, block_size)
    assert len(capped.nodes) <= budget + 1
    for inner in capped.nodes[1:]:
        forward, _, slot = capped.distributions[inner.distribution]
        assert inner.sibling < (supports[slot] if forward == 0 else vocab_size)


def test_a_shape_spends_its_nodes_where_few_tokens_can_be_drawn_elsewhere():
    sure = tree_shape(6, 9, 4, supports=(1, 1, 1, 1), vocab_size=9)
    assert [inner.parent for inner in sure.nodes] == [-1, 0, 1, 2, 3]
    half = tree_shape(6, 9, 4, supports=(1, 9, 9, 9), vocab_size=9)
    assert sum(inner.parent == 0 for inner in half.nodes) == 1 and len(half.nodes) == 7


def test_the_shape_does_not_look_at_probabilities():
    distribution = torch.randn(2, 3, 20).log_softmax(-1)
    shape = shape_for(12, 5, 2, 3, distribution)
    assert shape == shape_for(12, 5, 2, 3, distribution.flip(-1) * 3)
    assert len(shape.nodes) == 13
    distribution[:, 0, 2:] = -torch.inf
    assert sum(inner.parent == 0 for inner in shape_for(12, 5, 2, 3, distribution).nodes) == 2


def grow(shape: Shape, distributions: torch.Tensor, seed: int = 0) -> DraftTree:
    """A tree of one forward whose slots have these distributions `[B, K, D]`."""
    draw = gumbel_draw(torch.Generator().manual_seed(seed))
    growth = SampledGrowth(
        torch.full((len(distributions),), 7), torch.arange(distributions.shape[-1]) * 2, shape, draw
    )
    growth.grow(distributions[:, [slot for _, _, slot in shape.distributions]])
    return growth.tree()


def test_what_a_distribution_cannot_draw_any_more_is_padding_with_all_below_it():
    distributions = torch.full((2, 2, 5), -torch.inf)
    distributions[0, 0, 3] = distributions[1, 0, :2] = distributions[:, 1, 4] = 0.0
    # Root with two children, each with one child.
    tree = grow(tree_shape(4, 2, 2, supports=(2, 1)), distributions)
    assert tree.parents.tolist() == [[-1, 0, 1, -2, -2], [-1, 0, 1, 0, 3]]
    assert tree.tokens[0, :3].tolist() == [7, 6, 8] and sorted(tree.tokens[1, [1, 3]].tolist()) == [0, 2]
    assert tree.log_probs[0, 3:].isneginf().all() and tree.origin[0, 1].tolist() == [0, 0]
    assert tree.distributions.rows.tolist() == [[-1, 0, 1, 0, 1]] * 2
    packed = tree.limit_depth((1, 2)).pack()
    assert packed.tokens.shape == (2, 5) and packed.num_nodes.tolist() == [2, 5]
    assert packed.parents[0].tolist() == [-1, 0, -2, -2, -2]


def test_siblings_differ():
    tree = grow(tree_shape(4, 1, 1), torch.zeros(200, 1, 4))
    assert {len(set(row)) for row in tree.tokens[:, 1:].tolist()} == {4}


def test_a_drawn_tree_keeps_its_shape():
    tree = grow(tree_shape(4, 2, 2), torch.zeros(1, 2, 5))
    for change in (
        lambda: tree.prune(2),
        lambda: tree.merge(DraftTree.root(tree.tokens[:, 0])),
        lambda: tree.merge(tree),
    ):
        with pytest.raises(ValueError, match="a sampled tree keeps its shape"):
            change()
    beside = tree.join(grow_fixed())
    assert beside.distributions.rows.tolist() == [[*tree.distributions.rows[0].tolist(), -1, -1]]
    chain = likeliest_chain(tree)
    assert chain.parents.tolist() == [[-1, 0, 1]] and chain.tokens.equal(tree.tokens[:, :3])


def grow_fixed() -> DraftTree:
    return DraftTree(
        torch.tensor([[7, 1, 2]]),
        torch.tensor([[-1, 0, 1]]),
        torch.zeros(1, 3),
        torch.zeros(1, 3, 2, dtype=torch.long),
    )


def test_private_generators_touch_no_global_one_and_differ():
    before = torch.get_rng_state()
    seeds = {private_generator(torch.device("cpu")).initial_seed() for _ in range(4)}
    assert len(seeds) == 4 and torch.equal(before, torch.get_rng_state())


def test_enumerated_draws_have_the_probabilities_of_real_ones():
    """So that what is enumerated elsewhere is what is drawn."""
    model, shape, runs = ToyModel(3, 4, 0.5), tree_shape(3, 2, 2, vocab_size=4), 50_000
    known = {str(tree.tokens.tolist()): mass for tree, mass in all_trees(model, shape)}
    real = model.grow(shape, gumbel_draw(torch.Generator().manual_seed(0)), runs)
    counted = {str(t.tokens.tolist()): n for t, n in distinct(real, torch.ones(runs, dtype=torch.float64))}
    assert set(counted) <= set(known) and len(known) > 10
    statistic = sum((counted.get(text, 0) - runs * mass) ** 2 / (runs * mass) for text, mass in known.items())
    assert statistic < len(known) + 6 * (2 * len(known)) ** 0.5
