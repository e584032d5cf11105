# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The walk over a draft tree: exactness by enumeration of every outcome, and the accounting of what is kept."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock_hf.trees.expansion import BlockOutputs, Branching, Starts, limit_starts, rank_guided
from specblock_hf.trees.tree import DraftTree
from specblock_hf.trees.verification import Verifier, sample_and_walk


Tokens = tuple[int, ...]
Draw = Callable[[list[Fraction]], int]
EMITTED = 3  # tokens whose joint distribution is compared


def never(row: int, token: int) -> bool:
    return False


def tree_of(*rows: list[tuple[int, int]]) -> DraftTree:
    """Rows of (token, parent), the root being node 0 with token 0."""
    width = 1 + max(map(len, rows))
    padded = [[(0, -1), *row, *[(0, -2)] * (width - 1 - len(row))] for row in rows]
    tokens = torch.tensor([[token for token, _ in row] for row in padded])
    parents = torch.tensor([[parent for _, parent in row] for row in padded])
    return DraftTree(tokens, parents, torch.zeros(tokens.shape), torch.zeros(*tokens.shape, 2, dtype=torch.long))


def script(*rows: list[int]) -> tuple[Callable[[int, int], int], list[tuple[int, int]]]:
    """A `select` that answers from lists, and the calls that it got."""
    calls: list[tuple[int, int]] = []

    def select(row: int, node: int) -> int:
        calls.append((row, node))
        return rows[row][sum(called == row for called, _ in calls) - 1]

    return select, calls


# 0 -> 1 -> 2 -> 3, and 4, 5 off that path
CHAIN = [(1, 0), (2, 1), (3, 2), (4, 0), (5, 1)]


@pytest.mark.parametrize(
    ("choices", "nodes"),
    [([9], [0]), ([4, 4], [0, 4]), ([1, 5, 3], [0, 1, 5]), ([1, 2, 4], [0, 1, 2]), ([1, 2, 3, 1], [0, 1, 2, 3])],
)
def test_walk_follows_the_target_as_far_as_the_draft_goes(choices, nodes):
    select, calls = script(choices)
    walk = sample_and_walk(tree_of(CHAIN), [True], select, never)
    assert walk.tokens.tolist() == [choices] and walk.nodes.tolist() == [nodes]
    assert walk.lengths.tolist() == [len(choices)] and walk.stopped.tolist() == [False]
    assert calls == [(0, node) for node in nodes]


@pytest.mark.parametrize("emitted", [1, 2, 3, 4])
def test_nothing_is_asked_or_emitted_after_a_stop(emitted):
    choices = [1, 2, 3, 7]
    select, calls = script(choices)
    told: list[int] = []

    def stop(row: int, token: int) -> bool:
        told.append(token)
        return len(told) == emitted

    walk = sample_and_walk(tree_of(CHAIN), [True], select, stop)
    assert told == choices[:emitted] and len(calls) == emitted
    assert walk.tokens.tolist() == [choices[:emitted]]
    assert walk.nodes.tolist() == [[0, 1, 2, 3][:emitted]]
    assert walk.lengths.tolist() == [emitted] and walk.stopped.tolist() == [True]


def test_rows_are_independent():
    tree = tree_of(CHAIN, [(8, 0)], CHAIN, [])
    select, calls = script([1, 2, 9], [8, 1], [], [5])
    walk = sample_and_walk(tree, [True, True, False, True], select, lambda row, token: (row, token) == (1, 8))
    assert walk.tokens.tolist() == [[1, 2, 9], [8, -1, -1], [-1, -1, -1], [5, -1, -1]]
    assert walk.nodes.tolist() == [[0, 1, 2], [0, -1, -1], [-1, -1, -1], [0, -1, -1]]
    assert walk.lengths.tolist() == [3, 1, 0, 1] and walk.stopped.tolist() == [False, True, False, False]
    assert calls == [(0, 0), (0, 1), (0, 2), (1, 0), (3, 0)]


def test_a_batch_without_active_rows_emits_nothing():
    select, calls = script([], [])
    walk = sample_and_walk(tree_of(CHAIN, CHAIN), [False, False], select, never)
    assert walk.tokens.shape == walk.nodes.shape == (2, 0) and walk.tokens.dtype == torch.long
    assert walk.lengths.tolist() == [0, 0] and walk.stopped.tolist() == [False, False] and calls == []


def test_padding_is_no_child():
    tree = tree_of([(1, 0), (2, -2)])
    select, _ = script([2])
    assert sample_and_walk(tree, [True], select, never).nodes.tolist() == [[0]]


@pytest.mark.parametrize("first", [1, 2])
def test_the_longest_path_over_copies_wins(first):
    """Nodes 1 and 2 spell the same token; either may have the longer continuation."""
    tree = tree_of([(1, 0), (1, 0), (2, first), (2, 3 - first), (3, 4), (2, first), (4, 5)])
    select, calls = script([1, 2, 3, 4, 8])
    walk = sample_and_walk(tree, [True], select, never)
    assert walk.tokens.tolist() == [[1, 2, 3, 4, 8]]
    assert walk.nodes.tolist() == [[0, 3 - first, 4, 5, 7]]
    assert len(calls) == 5


class Distribution:
    """A target over `vocab` tokens whose next-token distribution depends on the whole prefix, in exact arithmetic."""

    def __init__(self, seed: int, vocab: int, eos: int | None):
        self.seed, self.vocab, self.eos = seed, vocab, eos

    def after(self, prefix: Tokens) -> list[Fraction]:
        rng = random.Random(f"{self.seed} {prefix}")
        weights = [rng.choice((0, 1, 2, 5)) for _ in range(self.vocab)]
        weights[rng.randrange(self.vocab)] += 1
        return [Fraction(weight, sum(weights)) for weight in weights]

    def ends(self, tokens: Tokens) -> bool:
        return len(tokens) == EMITTED or tokens[-1] == self.eos

    def of_emitted(self) -> dict[Tokens, Fraction]:
        """The distribution of the first tokens by plain sampling."""
        distribution, open_prefixes = {}, {(): Fraction(1)}
        while open_prefixes:
            prefix, mass = open_prefixes.popitem()
            for token, probability in enumerate(self.after(prefix)):
                tokens = (*prefix, token)
                (distribution if self.ends(tokens) else open_prefixes)[tokens] = mass * probability
        return {tokens: mass for tokens, mass in distribution.items() if mass}


def outcomes(run: Callable[[Draw], Tokens]) -> Iterator[tuple[Fraction, Tokens]]:
    """Every outcome of `run(draw)` with its probability, by replaying it with every sequence of draws."""
    pending: list[Tokens] = [()]
    while pending:
        replay = Replay(pending.pop(), pending)
        result = run(replay)
        yield replay.mass, result


class Replay:
    """Draws a given sequence, then the first possible token each time, and notes the sequences that it passes by."""

    def __init__(self, given_draws: Tokens, pending: list[Tokens]):
        self.given_draws, self.pending = given_draws, pending
        self.drawn: list[int] = []
        self.mass = Fraction(1)

    def __call__(self, distribution: list[Fraction]) -> int:
        possible = [token for token, probability in enumerate(distribution) if probability]
        if len(self.drawn) < len(self.given_draws):
            token = self.given_draws[len(self.drawn)]
        else:
            token = possible[0]
            self.pending.extend((*self.drawn, other) for other in possible[1:])
        self.drawn.append(token)
        self.mass *= distribution[token]
        return token


def one_round(distribution: Distribution, tree: DraftTree, prefix: Tokens, draw: Draw, rule: Verifier) -> Tokens:
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    told = list(prefix)

    def path(node: int) -> Tokens:
        return (*path(parents[node]), tokens[node]) if node else ()

    def stop(row: int, token: int) -> bool:
        told.append(token)
        return distribution.ends(tuple(told))

    walk = rule(tree, [True], lambda row, node: draw(distribution.after(prefix + path(node))), stop)
    emitted = prefix + tuple(walk.tokens[0].tolist())
    assert emitted == tuple(told) and walk.stopped.tolist() == [distribution.ends(emitted)]
    assert [tokens[node] for node in walk.nodes[0, 1:].tolist()] == walk.tokens[0, :-1].tolist()
    return emitted


def decode(
    distribution: Distribution, tree_after: Callable[[Tokens], DraftTree], draw: Draw, rule: Verifier
) -> Tokens:
    """Rounds of drafting and walking until the distribution's end."""
    emitted = one_round(distribution, tree_after(()), (), draw, rule)
    while not distribution.ends(emitted):
        emitted = one_round(distribution, tree_after(emitted), emitted, draw, rule)
    return emitted


def total_variation(
    distribution: Distribution, tree_after: Callable[[Tokens], DraftTree], rule: Verifier = sample_and_walk
) -> Fraction:
    difference: dict[Tokens, Fraction] = defaultdict(Fraction, distribution.of_emitted())
    for mass, tokens in outcomes(lambda draw: decode(distribution, tree_after, draw, rule)):
        difference[tokens] -= mass
    return sum(map(abs, difference.values())) / 2


def random_tree(seed: int, vocab: int) -> Callable[[Tokens], DraftTree]:
    """A tree of up to eight nodes that is a function of the prefix, copies among siblings included."""

    def tree_after(prefix: Tokens) -> DraftTree:
        rng = random.Random(f"tree {seed} {prefix}")
        return tree_of([(rng.randrange(vocab), rng.randrange(node)) for node in range(1, rng.randint(1, 9))])

    return tree_after


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 4), st.sampled_from([None, 1]))
def test_the_emitted_distribution_is_the_targets(seed, vocab, eos):
    assert total_variation(Distribution(seed, vocab, eos), random_tree(seed, vocab)) == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 1]))
def test_the_emitted_distribution_is_the_targets_through_the_real_expansion(seed, eos):
    def outputs(generator, starts):
        log_probs, tokens = torch.randn(1, starts, 2, 3, generator=generator).log_softmax(-1).topk(3)
        return BlockOutputs(tokens, log_probs, torch.randint(4, (1, starts, 2), generator=generator))

    def tree_after(prefix: Tokens) -> DraftTree:
        generator = torch.Generator().manual_seed(seed + hash(prefix) % 1000)
        tree, branching = DraftTree.root(torch.tensor([0])), Branching((1, 2, 3, 0), 2)
        tree, starts = rank_guided(tree, Starts.root(tree), outputs(generator, 1), branching, 0)
        starts = limit_starts(starts, tree, 3)
        tree, _ = rank_guided(tree, starts, outputs(generator, 3), branching, 1)
        return tree.merge_duplicates().prune(6)

    assert total_variation(Distribution(seed, 3, eos), tree_after) == 0


def test_the_enumeration_notices_a_lossy_rule():
    """
    Asking the target twice before turning a draft down shifts the distribution, which the comparison must not miss.
    """

    def lenient(tree, active, select, stop):
        children = tree.tokens[0][tree.parents[0] == 0].tolist()

        def select_twice(row, node):
            token = select(row, node)
            return token if node or token in children else select(row, node)

        return sample_and_walk(tree, active, select_twice, stop)

    assert total_variation(Distribution(3, 3, None), random_tree(3, 3), lenient) > 0.01
