# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Drawing a draft tree from a drafter's distributions. Knows no model.

Verification of a drawn tree is exact only if which nodes there are never depends on the tokens drawn for them. The
shape is therefore laid out before anything is drawn, from counts alone (and from how many tokens a distribution can
draw at all, where that is known without a draw), and every node's token is drawn from one known distribution.

A block's slots have distributions of their own whatever tokens are drawn inside the block, so all tokens of a forward
are drawn at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Literal

import torch

from ..devices import on_device
from .distributions import DraftDistributions
from .expansion import Starts
from .tree import DraftTree, children_of


DraftSampling = Literal["topk", "sampled"]
"""How the tokens of a tree are chosen: the likeliest, or drawn, siblings without replacement."""

Draw = Callable[[torch.Tensor, int], torch.LongTensor]
"""
`draw(log_probs, count)`: columns `[B, P, count]` drawn from distributions `[B, P, D]`, the siblings of a node in
order.
"""

LARGEST_LOGIT = 1e4
"""More than any network says, and little enough to be divided by a temperature."""

SIBLING_ACCEPTANCE = (
    (0.32, 0.12, 0.06, 0.04, 0.03, 0.025),
    (0.50, 0.12, 0.05, 0.04, 0.03, 0.02),
    (0.42, 0.10, 0.06, 0.05, 0.02, 0.02),
)
"""
What a shape is laid out for: the chance that the first, second, ... child is kept, given that its parent is. Below the
root; below a node that a forward has started from; below any other. Later children fade by a quarter each. Measured
with SmolLM2-135M-Instruct at T = 0.7 and 1.0 on ten prompts; it decides how much is kept and never what.
"""


@dataclass(frozen=True)
class ShapeNode:
    """
    One node of a shape.

    Args:
        parent (`int`): Index of the parent; -1 for the root.
        sibling (`int`): Which draw among the parent's children it is.
        distribution (`int`): Which of the shape's distributions it is drawn from; -1 for the root.
    """

    parent: int
    sibling: int
    distribution: int


@dataclass(frozen=True)
class Shape:
    """
    A tree without tokens, parents first and the first-drawn path foremost.

    Args:
        nodes (`tuple[ShapeNode, ...]`): The root and the nodes to draw.
        distributions (`tuple[tuple[int, int, int], ...]`): Drafter forward, row of it and slot of every distribution,
        in that order.
        starts (`tuple[tuple[int, ...], ...]`): The nodes that each forward starts from, one row of it each.
    """

    nodes: tuple[ShapeNode, ...]
    distributions: tuple[tuple[int, int, int], ...]
    starts: tuple[tuple[int, ...], ...]

    @property
    def height(self) -> int:
        depths = [0]
        for node in self.nodes[1:]:
            depths.append(depths[node.parent] + 1)
        return max(depths)

    def distributions_of(self, forward: int) -> list[int]:
        """The distributions that a forward provides."""
        return [index for index, distribution in enumerate(self.distributions) if distribution[0] == forward]


def acceptance_of(forward: int, slot: int, sibling: int) -> float:
    """The entry of `SIBLING_ACCEPTANCE` for a child that a slot of a forward proposes."""
    row = SIBLING_ACCEPTANCE[2 if slot else min(forward, 1)]
    return row[sibling] if sibling < len(row) else row[-1] * 0.75 ** (sibling - len(row) + 1)


@lru_cache(maxsize=256)
def tree_shape(
    budget: int,
    depth: int,
    block_size: int,
    num_forwards: int = 1,
    max_starts: int | None = None,
    supports: tuple[int, ...] = (),
    vocab_size: int | None = None,
) -> Shape:
    """
    The shape that keeps most tokens on average if every draw is kept as often as [`acceptance_of`] says: its likeliest
    nodes. The likeliest nodes of a forward start the next one, whose distributions know their tokens.

    Args:
        budget (`int`): Nodes below the root.
        depth (`int`): Depth of the deepest node.
        block_size (`int`): Slots K of a forward.
        num_forwards (`int`, *optional*, defaults to 1): Forwards of the drafter.
        max_starts (`int`, *optional*): Most rows of a forward after the first; `None` for as many as there are nodes.
        supports (`tuple[int, ...]`, *optional*): How many tokens the slots of the first forward can draw.
        vocab_size (`int`, *optional*): How many tokens any slot can draw.
    """
    most_starts = budget if max_starts is None else max_starts
    grown: list[tuple[int, int, tuple[int, int, int]]] = [(-1, -1, (0, 0, -1))]
    depths, started = [0], [1] + [0] * num_forwards
    chances, ties = [1.0], count()
    # (-chance, tie, parent, sibling, distribution), the distribution being (forward, row, slot)
    waiting: list[tuple[float, int, int, int, tuple[int, int, int]]] = []

    def offer(parent: int, sibling: int, distribution: tuple[int, int, int]) -> None:
        forward, _, slot = distribution
        support = supports[slot] if supports and forward == 0 else vocab_size
        if support is not None and sibling >= support:
            return
        heapq.heappush(
            waiting,
            (-chances[parent] * acceptance_of(forward, slot, sibling), next(ties), parent, sibling, distribution),
        )

    offer(0, 0, (0, 0, 0))
    while waiting and len(grown) <= budget:
        chance, _, parent, sibling, distribution = heapq.heappop(waiting)
        node, (forward, row, slot) = len(grown), distribution
        grown.append((parent, sibling, distribution))
        chances.append(-chance)
        depths.append(depths[parent] + 1)
        offer(parent, sibling + 1, distribution)
        if depths[node] == depth:
            continue
        if forward + 1 < num_forwards and started[forward + 1] < most_starts:
            offer(node, 0, (forward + 1, started[forward + 1], 0))
            started[forward + 1] += 1
        elif slot + 1 < block_size:
            offer(node, 0, (forward, row, slot + 1))
    return _laid_out(grown)


def _laid_out(grown: Sequence[tuple[int, int, tuple[int, int, int]]]) -> Shape:
    """A shape of nodes (parent, sibling, distribution), with the starts that nothing grows from left out."""
    children = children_of([parent for parent, _, _ in grown])
    # Depth first, first draws first: then an accepted path mostly leaves a cache without holes.
    order, stack = [], [0]
    while stack:
        order.append(stack.pop())
        stack.extend(sorted(children[order[-1]], key=lambda node: -grown[node][1]))
    place = {node: index for index, node in enumerate(order)}

    drawn = {distribution for _, _, distribution in grown[1:]}
    used = sorted({(forward, row) for forward, row, _ in drawn})
    rows = {key: sum(other[0] == key[0] for other in used[:index]) for index, key in enumerate(used)}
    distributions = sorted((forward, rows[forward, row], slot) for forward, row, slot in drawn)
    starts: list[dict[int, int]] = [{} for _ in range(1 + max((forward for forward, _ in used), default=0))]
    nodes = [ShapeNode(-1, -1, -1)]
    for node in order[1:]:
        parent, sibling, (forward, row, slot) = grown[node]
        nodes.append(ShapeNode(place[parent], sibling, distributions.index((forward, rows[forward, row], slot))))
        if slot == 0:
            starts[forward][rows[forward, row]] = place[parent]
    return Shape(
        tuple(nodes), tuple(distributions), tuple(tuple(rows[row] for row in sorted(rows)) for rows in starts)
    )


class SampledGrowth:
    """
    A tree while it is drawn, forward by forward.

    Args:
        roots (`torch.LongTensor` of shape `[B]`): Each row's last committed token.
        token_ids (`torch.LongTensor` of shape `[D]`): The target's ids of the tokens that the drafter can draw.
        shape ([`Shape`]): What to draw.
        draw (`Draw`): Draws; [`gumbel_draw`] in earnest.

    Attributes:
        tokens (`torch.LongTensor` of shape `[B, N]`): What has been drawn for the shape's nodes so far.
    """

    def __init__(self, roots: torch.LongTensor, token_ids: torch.LongTensor, shape: Shape, draw: Draw):
        self.shape = shape
        self._token_ids, self._draw = token_ids, draw
        self.tokens = roots.unsqueeze(1).repeat(1, len(shape.nodes))
        self._log_probs = torch.zeros(self.tokens.shape, device=roots.device)
        self._distributions: list[torch.Tensor] = []

    def grow(self, log_probs: torch.Tensor) -> None:
        """
        Draw all tokens of the next forward.

        Args:
            log_probs (`torch.Tensor` of shape `[B, R, D]`):
                The forward's distributions, in the order of `shape.distributions_of(forward)`; -inf where a token must
                not be drawn.
        """
        first = sum(distributions.shape[1] for distributions in self._distributions)
        self._distributions.append(log_probs)
        families: dict[tuple[int, int], list[int]] = {}
        for index, node in enumerate(self.shape.nodes):
            if first <= node.distribution < first + log_probs.shape[1]:
                families.setdefault((node.parent, node.distribution), []).append(index)
        parents = list(families)
        distributions = log_probs[:, [distribution - first for _, distribution in parents]]
        most = max(len(siblings) for siblings in families.values())
        columns = self._draw(distributions, most)
        drawn = distributions.gather(2, columns)
        family = [number for number, key in enumerate(parents) for _ in families[key]]
        sibling = [number for key in parents for number in range(len(families[key]))]
        nodes = [index for key in parents for index in families[key]]
        self.tokens[:, nodes] = self._token_ids[columns[:, family, sibling]]
        self._log_probs[:, nodes] = drawn[:, family, sibling].float()

    def starts(self, forward: int) -> Starts:
        """The rows of a forward after the first."""
        nodes = list(self.shape.starts[forward])
        distributions = [self.shape.distributions[self.shape.nodes[node].distribution] for node in nodes]

        def column(values: list[int]) -> torch.LongTensor:
            return on_device(values, self.tokens.device).expand(len(self.tokens), -1)

        return Starts(
            node=column(nodes),
            parent_start=column([row for _, row, _ in distributions]),
            slot=column([slot for _, _, slot in distributions]),
            tokens=self.tokens[:, nodes],
        )

    def tree(self) -> DraftTree:
        """The drawn tree. A node that its distribution could not draw any more is padding, as is all below it."""
        parents = on_device([node.parent for node in self.shape.nodes], self.tokens.device)
        rows = on_device([node.distribution for node in self.shape.nodes], self.tokens.device)
        origin = [
            self.shape.distributions[node.distribution][::2] if node.distribution >= 0 else (-1, -1)
            for node in self.shape.nodes
        ]
        height, batch = self.shape.height, len(self.tokens)
        drawn = self._log_probs > -torch.inf
        for _ in range(height - 1):
            drawn &= drawn[:, parents.clamp_min(0)]
        return DraftTree(
            tokens=self.tokens,
            parents=torch.where(drawn, parents, -2),
            log_probs=self._log_probs.masked_fill(~drawn, -torch.inf),
            origin=on_device(origin, self.tokens.device).expand(batch, -1, -1),
            height=height,
            distributions=DraftDistributions(
                torch.cat(self._distributions, dim=1), self._token_ids, rows.repeat(batch, 1)
            ),
        )


def gumbel_draw(generator: torch.Generator) -> Draw:
    """
    Draws from a generator of one's own: siblings without replacement as the largest of log q plus Gumbel noise.

    Args:
        generator (`torch.Generator`): On the device of the distributions.
    """

    def draw(log_probs: torch.Tensor, count: int) -> torch.LongTensor:
        # -log of an exponential variable is Gumbel noise.
        noise = torch.empty_like(log_probs, dtype=torch.float64).exponential_(generator=generator).log_()
        return (log_probs - noise).topk(count, dim=-1).indices

    return draw


def private_generator(device: torch.device) -> torch.Generator:
    """
    Randomness for the drafts of one call, from the operating system: the global generators stay untouched, and no two
    calls draw the same trees, which would make their texts depend on each other.
    """
    generator = torch.Generator(device)
    generator.seed()
    return generator


def shape_for(budget: int, depth: int, num_forwards: int, max_starts: int | None, log_probs: torch.Tensor) -> Shape:
    """
    The shape for a round; all rows of a batch get the same.

    Args:
        budget, depth, num_forwards, max_starts (`int`): As in [`tree_shape`].
        log_probs (`torch.Tensor` of shape `[B, K, D]`):
            The distributions of the first forward. Only how many tokens they can draw matters.
    """
    # Nobody has that many siblings; without the cap every number of tokens would be a shape of its own.
    supports = tuple((log_probs > -torch.inf).sum(-1).amax(0).clamp_max(budget).tolist())
    return tree_shape(budget, depth, log_probs.shape[1], num_forwards, max_starts, supports, log_probs.shape[-1])


def distributions_of(logits: torch.Tensor, warp: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """
    The distributions of a request, which are distributions whatever a drafter says: NaN counts as 0, and nothing as
    larger than `LARGEST_LOGIT`.

    Args:
        logits (`torch.Tensor` of shape `[..., D]`): The drafter's.
        warp (`Callable`): See [`DraftState`].

    Returns:
        `torch.Tensor` of shape `[..., D]`: Log-probs in float32.
    """
    sane = logits.float().nan_to_num(nan=0.0).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    return warp(sane).log_softmax(-1)
