# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Best-first growth against a version that looks at every path."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock_hf.trees.expansion import BlockOutputs, Starts, best_first, limit_starts
from specblock_hf.trees.tree import DraftTree


SLOTS, WIDTH = 3, 3


def outputs_of(batch: int, starts: int, seed: int) -> BlockOutputs:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(batch, starts, SLOTS, 6, generator=generator).log_softmax(-1)
    best = log_probs.topk(WIDTH)
    return BlockOutputs(best.indices, best.values)


def nodes_of(tree: DraftTree, row: int = 0) -> dict[tuple[int, ...], float]:
    """Every path of a row and its cumulative log-prob."""
    cumulative, paths, found = tree.cumulative_log_probs()[row], [], {}
    for node, parent in enumerate(tree.parents[row].tolist()):
        token = int(tree.tokens[row, node])
        paths.append(() if parent < 0 else (*paths[parent], token))
        if parent >= 0:
            found[paths[-1]] = float(cumulative[node])
    return found


def every_path(outputs: BlockOutputs, row: int, start: int, after: float = 0.0) -> dict[tuple[int, ...], float]:
    found = {}
    for depth in range(1, SLOTS + 1):
        for choice in product(range(WIDTH), repeat=depth):
            path = tuple(int(outputs.tokens[row, start, slot, c]) for slot, c in enumerate(choice))
            parts = [float(outputs.log_probs[row, start, slot, c]) for slot, c in enumerate(choice)]
            found[path] = math.fsum([*parts, *(after for c in choice[:-1] if c)])
    return found


def likeliest(paths: dict[tuple[int, ...], float], budget: int) -> list[float]:
    return sorted(paths.values(), reverse=True)[:budget]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20), st.booleans(), st.sampled_from([0.0, -0.7]))
def test_a_beam_as_wide_as_the_budget_misses_nothing(seed, budget, bounded, after):
    outputs = outputs_of(3, 1, seed)
    root = DraftTree.root(torch.tensor([9, 8, 7]))
    most = budget if bounded else None
    tree, candidates = best_first(root, Starts.root(root), outputs.children(WIDTH, after), SLOTS, budget, 0, most)
    assert not bounded or tree.tokens.shape[1] <= 1 + SLOTS * budget
    pruned = tree.prune(budget)
    for row in range(3):
        everything = every_path(outputs, row, 0, after)
        made = nodes_of(pruned, row)
        assert made.keys() <= everything.keys()
        assert likeliest(made, budget) == pytest.approx(likeliest(everything, budget), abs=1e-5)
    assert candidates.node.shape[1] == tree.tokens.shape[1] - 1
    assert torch.equal(candidates.slot, tree.origin[:, 1:, 1])


def test_a_later_block_hangs_on_its_starts_and_padding_gets_no_children():
    first, second = outputs_of(2, 1, 1), outputs_of(2, 3, 2)
    root = DraftTree.root(torch.tensor([9, 9]))
    tree, candidates = best_first(root, Starts.root(root), first.children(WIDTH), SLOTS, 4, 0)
    starts = limit_starts(candidates, tree, 3)
    starts.node[0, 2] = -2
    grown, _ = best_first(tree, starts, second.children(WIDTH), SLOTS, 30, 1)
    for row in range(2):
        before, after = nodes_of(tree, row), nodes_of(grown, row)
        expected = dict(before)
        paths = {node: path for path, node in path_nodes(tree, row).items()}
        for start, node in enumerate(starts.node[row].tolist()):
            if node < 0:
                continue
            for path, score in every_path(second, row, start).items():
                whole = paths[node] + path
                expected[whole] = max(expected.get(whole, -math.inf), before[paths[node]] + score)
        assert after.keys() <= expected.keys() and len(after) > len(before)
        new = grown.origin[row, tree.tokens.shape[1] :, 0][grown.parents[row, tree.tokens.shape[1] :] >= 0]
        assert (new == 1).all()


def path_nodes(tree: DraftTree, row: int) -> dict[tuple[int, ...], int]:
    paths, found = [], {}
    for node, parent in enumerate(tree.parents[row].tolist()):
        paths.append(() if parent < 0 else (*paths[parent], int(tree.tokens[row, node])))
        if parent >= 0:
            found[paths[-1]] = node
    return found


def test_children_may_depend_on_the_token_of_their_parent():
    """A Markov drafter: below token t comes t + 1 with probability 1/2, or t + 2."""

    def children(level, rows, tokens):
        new = torch.stack((tokens + 1, tokens + 2), dim=-1)
        return new, torch.full(new.shape, math.log(0.5))

    root = DraftTree.root(torch.tensor([0]))
    tree, _ = best_first(root, Starts.root(root), children, 3, 8, 0)
    expected = {path for depth in (1, 2, 3) for path in product((1, 2), repeat=depth)}
    assert {tuple(b - a for a, b in zip((0, *path), path, strict=False)) for path in nodes_of(tree)} == expected


def test_shapes_follow_from_shapes_alone():
    """On the meta device there is no data to look at."""
    tokens = torch.empty(2, 1, SLOTS, WIDTH, dtype=torch.long, device="meta")
    outputs = BlockOutputs(tokens, torch.empty(tokens.shape, device="meta"))
    root = DraftTree.root(torch.empty(2, dtype=torch.long, device="meta"))
    tree, _ = best_first(root, Starts.root(root), outputs.children(WIDTH), SLOTS, 4, 0)
    assert tree.tokens.shape == (2, 1 + 3 + 9 + 12)
