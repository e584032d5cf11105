# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A target and a drafter over a handful of tokens, in float64, whose draws can all be enumerated."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import permutations
from math import perm, prod

import torch

from specblock_hf.trees.sampling import Draw, SampledGrowth, Shape
from specblock_hf.trees.tree import DraftTree


Tokens = tuple[int, ...]


class ToyModel:
    """
    Random distributions that depend on the whole text before, with zeros and ties.

    Args:
        seed (`int`): Another number, another model.
        vocab (`int`): Tokens of the target.
        noise (`float`): How far the drafter's distributions are from the target's.
        unknown (`int`, *optional*, defaults to 0): The last tokens of the vocabulary, which the drafter cannot draw.
    """

    def __init__(self, seed: int, vocab: int, noise: float, unknown: int = 0):
        self.seed, self.vocab, self.noise = seed, vocab, noise
        self.token_ids = torch.arange(vocab - unknown)

    @cache  # noqa: B019
    def target_distribution(self, text: Tokens) -> torch.Tensor:
        """p(.|text), `[V]`."""
        rng = random.Random(f"{self.seed} {text}")
        weights = [rng.choice((0.0, 1.0, 1.0, rng.random() * 4)) for _ in range(self.vocab)]
        weights[rng.randrange(self.vocab)] += 0.5
        return torch.tensor(weights, dtype=torch.float64) / sum(weights)

    @cache  # noqa: B019
    def draft_distribution(self, start: Tokens, slot: int) -> torch.Tensor:
        """q of a slot of the block that starts below a text, `[D]`."""
        rng = random.Random(f"{self.seed} q {start} {slot}")
        size = len(self.token_ids)
        distribution = self.target_distribution((*start, *[0] * slot))[:size].tolist()
        distribution = [p * (1 - self.noise) + self.noise * rng.choice((0.0, 0.3, rng.random())) for p in distribution]
        distribution[rng.randrange(size)] += 0.05
        return torch.tensor(distribution, dtype=torch.float64) / sum(distribution)

    # What a verifier asks for.
    def distribution(self, row: int, node: int, path: list[int]) -> torch.Tensor:
        return self.target_distribution(tuple(path))

    def keep(self, row: int, node: int) -> None:
        pass

    def grow(self, shape: Shape, draw: Draw, batch: int) -> DraftTree:
        """Trees drawn by the real expansion."""
        growth = SampledGrowth(torch.zeros(batch, dtype=torch.long), self.token_ids, shape, draw)
        for forward in range(len(shape.starts)):
            growth.grow(self._distributions_of(growth, shape, forward, batch).log())
        return growth.tree()

    def _distributions_of(self, growth: SampledGrowth, shape: Shape, forward: int, batch: int) -> torch.Tensor:
        distributions = [shape.distributions[distribution] for distribution in shape.distributions_of(forward)]
        if forward == 0:
            return torch.stack([self.draft_distribution((), slot) for _, _, slot in distributions]).expand(
                batch, -1, -1
            )
        paths = [path_in(shape, node) for node in shape.starts[forward]]
        rows = [
            [
                self.draft_distribution(tuple(tokens[node] for node in paths[row]), slot)
                for _, row, slot in distributions
            ]
            for tokens in growth.tokens.tolist()
        ]
        return torch.stack([torch.stack(row) for row in rows])


class EveryDraw:
    """
    Draws everything that can be drawn, one possibility in each row of the batch; the forwards' draws are the digits of
    the row's number.

    Attributes:
        mass (`torch.Tensor` of shape `[B]`): The probability of each row.
    """

    def __init__(self, shape: Shape, size: int):
        self._counts: list[list[int]] = []  # of the draws of every family of siblings, forward by forward
        for forward in range(len(shape.starts)):
            families: dict[int, int] = {}
            for node in shape.nodes[1:]:
                if shape.distributions[node.distribution][0] == forward:
                    families[node.parent] = families.get(node.parent, 0) + 1
            self._counts.append(list(families.values()))
        self._radices = [prod(perm(size, count) for count in counts) for counts in self._counts]
        self._calls = 0
        self.batch = prod(self._radices)
        self.mass = torch.ones(self.batch, dtype=torch.float64)

    def __call__(self, log_probs: torch.Tensor, count: int) -> torch.LongTensor:
        number = torch.arange(self.batch) // prod(self._radices[: self._calls]) % self._radices[self._calls]
        tokens = range(log_probs.shape[-1])
        columns = torch.zeros(*log_probs.shape[:2], count, dtype=torch.long)
        for family, needed in enumerate(self._counts[self._calls]):
            orders = torch.tensor(list(permutations(tokens, needed)))
            columns[:, family, :needed] = orders[number % len(orders)]
            number = number // len(orders)
            self._weigh(log_probs[:, family].exp(), columns[:, family, :needed])
        self._calls += 1
        return columns

    def _weigh(self, distribution: torch.Tensor, drawn: torch.LongTensor) -> None:
        for draw in drawn.split(1, dim=1):
            total = distribution.sum(-1)
            # Where nothing is left to draw, any column may come.
            chance = torch.where(total > 0, distribution.gather(1, draw)[:, 0] / total, 1 / distribution.shape[-1])
            self.mass *= chance
            distribution = distribution.scatter(1, draw, 0.0)


def path_in(shape: Shape, node: int) -> list[int]:
    """The nodes of a shape from below the root down to a node."""
    path = []
    while node > 0:
        path.append(node)
        node = shape.nodes[node].parent
    return path[::-1]


def row_of(tree: DraftTree, row: int) -> DraftTree:
    """One tree of a batch."""
    one = slice(row, row + 1)
    distributions = tree.distributions and replace(
        tree.distributions, log_probs=tree.distributions.log_probs[one], rows=tree.distributions.rows[one]
    )
    return replace(
        tree,
        tokens=tree.tokens[one],
        parents=tree.parents[one],
        log_probs=tree.log_probs[one],
        origin=tree.origin[one],
        distributions=distributions,
    )


def distinct(tree: DraftTree, mass: torch.Tensor) -> list[tuple[DraftTree, float]]:
    """The different trees of a batch that can be, with the mass of each."""
    spelled = torch.cat((torch.where(tree.parents > -2, tree.tokens, -1), tree.parents), dim=1)
    _, group = torch.unique(spelled, dim=0, return_inverse=True)
    total = torch.zeros(int(group.max()) + 1, dtype=mass.dtype).index_add(0, group, mass)
    first = torch.zeros(len(total), dtype=torch.long).scatter(0, group.flip(0), torch.arange(len(group)).flip(0))
    return [(row_of(tree, row), part) for row, part in zip(first.tolist(), total.tolist(), strict=True) if part]


def all_trees(model: ToyModel, shape: Shape) -> list[tuple[DraftTree, float]]:
    """Every tree that can be drawn, with its probability."""
    draw = EveryDraw(shape, len(model.token_ids))
    return distinct(model.grow(shape, draw, draw.batch), draw.mass)
