# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Trees whose shape is known before anything is drafted."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class TreeShape:
    """
    A tree of N nodes without tokens, level by level; node 0 is the root.

    Args:
        parents (`tuple[int, ...]`): Of every node; -1 for the root.
        ranks (`tuple[int, ...]`): Which of its parent's children a node is, 0 for the likeliest; -1 for the root.
        depths (`tuple[int, ...]`): Distance from the root, which never falls.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    depths: tuple[int, ...]

    def ancestor(self, node: int, depth: int) -> int:
        """The node at that depth on the way to `node`."""
        while self.depths[node] > depth:
            node = self.parents[node]
        return node


def likely_shape(
    rank_weights: Sequence[float], budget: int, depth: int, block_size: int = 1, max_starts: int | None = None
) -> TreeShape:
    """
    The shape of the paths that are likeliest when every node's r-th child is right with the same probability.

    Args:
        rank_weights (sequence of `float`): Those probabilities of the first, second, ... child, which never rise.
        budget (`int`): Nodes beside the root.
        depth (`int`): Of the deepest node.
        block_size (`int`, *optional*, defaults to 1): Levels of a drafter forward.
        max_starts (`int`, *optional*): Most nodes that a forward after the first may continue; no bound if not given.

    Returns:
        [`TreeShape`]: Of `budget` nodes and the root, or as many as there can be.
    """
    # (minus the probability, order of arrival, parent, rank, depth); a node brings its first child and next sibling.
    heap: list[tuple[float, int, int, int, int]] = []
    found: list[tuple[int, int, int]] = [(-1, -1, 0)]
    starts: Counter[int] = Counter()
    weights = [1.0]
    arrivals = count()

    def push(parent: int, rank: int) -> None:
        chance = -weights[parent] * rank_weights[rank]
        heapq.heappush(heap, (chance, next(arrivals), parent, rank, found[parent][2] + 1))

    if budget > 0 and depth > 0:
        push(0, 0)
    while heap and len(found) <= budget:
        weight, _, parent, rank, level = heapq.heappop(heap)
        found.append((parent, rank, level))
        weights.append(-weight)
        if rank + 1 < len(rank_weights):
            push(parent, rank + 1)
        if level < depth:
            if level % block_size == 0:
                starts[level] += 1
            if level % block_size or max_starts is None or starts[level] <= max_starts:
                push(len(found) - 1, 0)
    # Listed level by level.
    order = sorted(range(len(found)), key=lambda node: found[node][2])
    place = {node: index for index, node in enumerate(order)}
    return TreeShape(
        parents=tuple(place.get(found[node][0], -1) for node in order),
        ranks=tuple(found[node][1] for node in order),
        depths=tuple(found[node][2] for node in order),
    )
