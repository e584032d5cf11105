# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""How much a round drafts: what a call plans for all of its rounds, and what is left of it for one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch

from ..trees.expansion import Starts, limit_starts
from ..trees.sampling import DraftSampling
from ..trees.tree import DraftTree


Verification = Literal["walk", "token", "block"]
"""How drafted tokens are accepted; see [`DraftingPlan`]."""


def round_limits(
    plan: DraftingPlan, remaining: Sequence[int], room: int | None = None, depth: int | None = None
) -> Limits:
    """
    How large a round's tree may be.

    Args:
        plan ([`DraftingPlan`]): What a round may cost.
        remaining (sequence of `int`):
            Tokens that each row may still emit; the last of them is always the target's own.
        room (`int`, *optional*): Nodes that the target's cache has room for, the root counted.
        depth (`int`, *optional*): Most levels below the root that the target can verify.

    Returns:
        [`Limits`]: No drafts for a row that has one token left.
    """
    depths = tuple(max(tokens - 1, 0) if depth is None else min(max(tokens - 1, 0), depth) for tokens in remaining)
    most = plan.tree_budget if room is None else min(plan.tree_budget, max(room - 1, 0))
    nodes = tuple(most if depth else 0 for depth in depths)
    return Limits(nodes, depths, plan.num_forwards, plan.max_starts, plan.min_start_probability, plan.draft_sampling)


@dataclass(frozen=True)
class DraftingPlan:
    """
    How much a round drafts. Larger plans accept more and cost more; [`calibrate`] finds the one that pays.

    Args:
        tree_budget (`int`): Most drafted nodes of a tree.
        num_forwards (`int`): Most forwards of the drafter in a round (SpecBlock: blocks M).
        max_starts (`int`, *optional*):
            Most rows of a forward after the first; `None` for as many as the drafter's rule asks. There never are more
            than a tree of `tree_budget` nodes can use.
        min_probability (`float`, *optional*, defaults to 0.0):
            Path probability, by the drafter, below which a node is not worth verifying. Rounds with a sure draft thus
            verify more nodes than those with a vague one. Drawn trees are left whole.
        min_start_probability (`float`, *optional*, defaults to 0.0):
            Path probability below which a node is not worth a row of the drafter's next forward; a round in which no
            node is goes without that forward.
        draft_sampling (`str`, *optional*, defaults to `"topk"`):
            How calls that sample choose the tokens of a tree, see `DraftSampling`: the likeliest, or drawn ones.
            Greedy calls draft the likeliest.
        verification (`str`, *optional*):
            `"walk"` follows the target's own draws, which a seed determines. For drawn trees also `"token"` and
            `"block"`, which compare the distributions (see [`SampledVerifier`]) and keep the target's distribution but
            not a seed's tokens. Defaults to `"walk"` for the likeliest tokens and to `"block"` for drawn ones.
    """

    tree_budget: int
    num_forwards: int
    max_starts: int | None = None
    min_probability: float = 0.0
    min_start_probability: float = 0.0
    draft_sampling: DraftSampling = "topk"
    verification: Verification | None = None

    @property
    def rule(self) -> Verification:
        """`verification`, or its default."""
        return self.verification or ("walk" if self.draft_sampling == "topk" else "block")

    def __post_init__(self) -> None:
        for name, way, known in (
            ("draft_sampling", self.draft_sampling, get_args(DraftSampling)),
            ("verification", self.rule, get_args(Verification)),
        ):
            if way not in known:
                raise ValueError(f"{name} is {way!r}; give one of {', '.join(known)}.")
        if self.draft_sampling == "topk" and self.rule != "walk":
            raise ValueError(
                f"verification={self.rule!r} compares drawn tokens with the distributions that they were drawn "
                'from, which draft_sampling="topk" does not have; draw them with draft_sampling="sampled", or leave '
                "it out."
            )
        if self.tree_budget < 0 or self.num_forwards < 1 or (self.max_starts is not None and self.max_starts < 1):
            raise ValueError(
                f"{self} cannot be drafted; give a budget of 0 or more and at least one forward and start."
            )
        for name in ("min_probability", "min_start_probability"):
            value = vars(self)[name]
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; give a probability from 0 to 1.")


@dataclass(frozen=True)
class Limits:
    """
    How large this round's tree may be. Kept on the host: the loop knows both numbers without asking the device.

    Args:
        nodes (`tuple[int, ...]`): Most drafted nodes of each row, the root not counted; 0 asks for no draft.
        depth (`tuple[int, ...]`): Deepest drafted node of each row; a deeper one could never be emitted.
        num_forwards (`int`): As in [`DraftingPlan`].
        max_starts (`int`, *optional*): As in [`DraftingPlan`].
        min_start_probability (`float`, *optional*, defaults to 0.0): As in [`DraftingPlan`].
        draft_sampling (`str`, *optional*, defaults to `"topk"`): As in [`DraftingPlan`].
        enough_found (`float`, *optional*, defaults to infinity):
            Tokens of a row, promised by look-ups, from which a drafter that joins them does without its own forwards.
        waits (`bool`, *optional*, defaults to `False`): Nothing is drafted now, but later something may be again.
    """

    nodes: tuple[int, ...]
    depth: tuple[int, ...]
    num_forwards: int = 1
    max_starts: int | None = None
    min_start_probability: float = 0.0
    draft_sampling: DraftSampling = "topk"
    enough_found: float = math.inf
    waits: bool = False

    _trims: ClassVar[bool] = True  # starts are counted, which asks the device

    def most_starts(self, forward: int) -> int:
        """
        Rows that a forward after the first may have: no more than `max_starts`, nor than the largest tree can use. A
        start is of use if it stays in the tree with a child, and so do all likelier starts and the forward - 1 nodes
        at least that lie above them.

        Args:
            forward (`int`): Which forward of the round; 1 for the one after the first.
        """
        useful = max(max(self.nodes) - forward, 0)
        return useful if self.max_starts is None else min(useful, self.max_starts)

    def of_rows(self, rows: Sequence[int]) -> Limits:
        """The limits of these rows of the batch."""
        return replace(
            self, nodes=tuple(self.nodes[row] for row in rows), depth=tuple(self.depth[row] for row in rows)
        )

    def cut(self, tree: DraftTree) -> DraftTree:
        """What of a grown tree may stay."""
        return tree.limit_depth(self.depth).prune(self.nodes)

    def next_starts(
        self, candidates: Starts, tree: DraftTree, forward: int, reach: int, beam: int | None = None
    ) -> Starts | None:
        """
        What a drafter's next forward continues; `None` where the round goes without one.

        Args:
            candidates ([`Starts`]): Nodes that it could continue.
            tree ([`DraftTree`]): What they are nodes of.
            forward (`int`): Number of the last forward.
            reach (`int`): Depth that must be allowed for another one to pay.
            beam (`int`, *optional*): Most starts of the drafter's own rule.
        """
        if forward + 1 >= self.num_forwards or reach > max(self.depth):
            return None
        most = self.most_starts(forward + 1)
        most = most if beam is None else min(most, beam)
        starts = limit_starts(candidates, tree, most, self.min_start_probability, self._trims)
        return self._within(starts, reach) if starts.node.shape[1] else None

    def _within(self, starts: Starts, reach: int) -> Starts:
        return starts


@dataclass(frozen=True)
class FixedLimits(Limits):
    """
    Limits of a round of fixed shapes: `nodes` and `depth` are the most that any round may have, and what holds now is
    on the device.

    Args:
        nodes_now (`torch.LongTensor` of shape `[B]`, *optional*): 0 for a row that does not draft any more.
        depth_now (`torch.LongTensor` of shape `[B]`, *optional*): The same.
    """

    nodes_now: torch.Tensor | None = None
    depth_now: torch.Tensor | None = None

    _trims: ClassVar[bool] = False

    def cut(self, tree: DraftTree) -> DraftTree:
        return tree.cut(self.nodes_now, self.depth_now, max(self.nodes))

    def _within(self, starts: Starts, reach: int) -> Starts:
        return replace(starts, node=torch.where(self.depth_now.max() >= reach, starts.node, -2))
