# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from specblock_hf.trees.static_shape import TreeShape, likely_shape


WEIGHTS = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4).map(lambda ws: sorted(ws, reverse=True))


def path_weights(shape: TreeShape, weights: list[float]) -> list[float]:
    made = [1.0]
    for parent, rank in zip(shape.parents[1:], shape.ranks[1:], strict=True):
        made.append(made[parent] * weights[rank])
    return made


@given(WEIGHTS, st.integers(0, 30), st.integers(0, 4))
def test_it_holds_the_likeliest_paths(weights, budget, depth):
    shape = likely_shape(weights, budget, depth)
    every = sorted(
        (
            product
            for length in range(1, depth + 1)
            for ranks in itertools.product(weights, repeat=length)
            if (product := float(_product(ranks)))
        ),
        reverse=True,
    )
    held = sorted(path_weights(shape, weights)[1:], reverse=True)
    assert len(held) == min(budget, len(every))
    assert all(abs(a - b) < 1e-12 for a, b in zip(held, every, strict=False))


def _product(values) -> float:
    made = 1.0
    for value in values:
        made *= value
    return made


@given(WEIGHTS, st.integers(0, 40), st.integers(0, 6), st.integers(1, 3), st.none() | st.integers(1, 3))
def test_parents_come_first_and_siblings_differ(weights, budget, depth, block_size, max_starts):
    shape = likely_shape(weights, budget, depth, block_size, max_starts)
    assert shape.parents[0] == -1 and shape.depths[0] == 0 and list(shape.depths) == sorted(shape.depths)
    for node in range(1, len(shape.parents)):
        assert 0 <= shape.parents[node] < node
        assert shape.depths[node] == shape.depths[shape.parents[node]] + 1 <= depth
        assert shape.ancestor(node, shape.depths[node] - 1) == shape.parents[node]
    pairs = list(zip(shape.parents, shape.ranks, strict=True))
    assert len(set(pairs)) == len(pairs)
    for level in range(block_size, depth, block_size):
        starts = {p for p in shape.parents[1:] if shape.depths[p] == level}
        assert max_starts is None or len(starts) <= max_starts


def test_a_shape():
    shape = likely_shape([0.6, 0.3], 5, 3)
    # 0.6, 0.36, 0.3, 0.216, and of the two with 0.18 the one that came up first.
    assert shape.parents == (-1, 0, 0, 1, 1, 3)
    assert shape.ranks == (-1, 0, 1, 0, 1, 0)
    assert shape.depths == (0, 1, 1, 2, 2, 3)


def test_a_smaller_tree_is_part_of_a_larger_one():
    def paths(shape: TreeShape) -> set[tuple[int, ...]]:
        made = [()]
        for parent, rank in zip(shape.parents[1:], shape.ranks[1:], strict=True):
            made.append((*made[parent], rank))
        return set(made)

    shapes = [paths(likely_shape([0.7, 0.1, 0.05], budget, 8, 2)) for budget in range(40)]
    assert all(small < large for small, large in itertools.pairwise(shapes))
