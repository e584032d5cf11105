# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""SpecBlock as a drafter: the network of `modeling_specblock.py` in the loop forward, expand, start again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...drafting.drafter import CPU_BUDGET, Scope
from ...drafting.pairs import Pairs
from ...drafting.plan import DraftingPlan, Limits
from ...drafting.target_batch import Losses, TargetBatch
from ...trees.expansion import (
    BlockOutputs,
    Branching,
    Children,
    Starts,
    best_first,
    children_by_parent,
    rank_guided,
)
from ...trees.sampling import distributions_of
from ...trees.tree import DraftTree
from ..common.block import BlockDrafter, BlockState
from .loss import SpecBlockObjective, specblock_loss
from .modeling import SpecBlockModel
from .release_loss import release_loss


# Of a drafter with little training, for one whose configuration does not say: nodes, blocks, starts (0: all), tau
# alone and tau joined with a look-up.
TYPICAL_ACCEPTANCE = (
    (3, 1, 0, 1.55, 1.95),
    (7, 1, 0, 1.75, 2.15),
    (11, 1, 0, 1.9, 2.3),
    (11, 2, 4, 2.0, 2.4),
    (15, 2, 8, 2.15, 2.5),
    (31, 2, 8, 2.35, 2.7),
    (60, 2, 0, 2.6, 2.9),
)


MARKOV_CANDIDATES = 256
"""A slot's likeliest tokens that a Markov term may reorder below each node: a node then costs next to nothing."""


AFTER_ALTERNATIVES = -0.7
"""
To the log-probs below all tokens but a slot's likeliest, unless a Markov term tells: on 60 held-out answers the
shipped drafter was right in 50 % of the second slots after the likeliest token and in 26 % after an alternative. tau
of 60 nodes over 30 prompts of three suites was 2.80 without, 2.84 with this and 2.85 with -1; of 7 nodes 2.11.
"""


class SpecBlockDrafter(BlockDrafter, SpecBlockModel):
    """
    A drafter that predicts K tokens a forward and repeats the forward from several nodes of its own draft tree
    (SpecBlock, https://huggingface.co/papers/2605.07243).

    Args:
        config ([`SpecBlockConfig`]): The drafter's configuration.

    Example:

    ```python
    >>> from specblock_hf import SpecBlockDrafter

    >>> drafter = SpecBlockDrafter.from_pretrained("org/specblock-smollm2-135m")
    >>> output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)
    >>> drafter.last_statistics.tau
    ```
    """

    predicts_at_once = True
    has_fixed_rounds = True
    objective_class = SpecBlockObjective
    typical_acceptance = TYPICAL_ACCEPTANCE
    plans_that_pay = (
        *((nodes, 1, 0) for nodes in (3, 5, 7, 11, 23)),
        *((nodes, 2, 4) for nodes in (11, 15, 23)),
        *((31, 2, 8), (60, 2, 8), (60, 2, 0)),
        *((31, 3, 8), (60, 3, 8)),
    )

    @property
    def can_sample(self) -> bool:
        """
        Whether the distributions of a block are known before a token of it is, so that a tree can be drawn from them.
        """
        return not self.config.markov_rank

    def default_plan(self, device: torch.device) -> DraftingPlan:
        config = self.config
        if device.type == "cpu":
            # A verified node costs real time there: half a step for a dozen in float32.
            return DraftingPlan(min(CPU_BUDGET, config.tree_budget), config.num_blocks, 4)
        return DraftingPlan(config.tree_budget, config.num_blocks, config.max_starts)

    def deepest(self, plan: DraftingPlan) -> int:
        return min(plan.tree_budget, plan.num_forwards * self.config.block_size)

    def propose(self, state: BlockState, pairs: Pairs, limits: Limits) -> DraftTree:
        tree, hidden, positions = self._first_block(state, pairs)
        if max(limits.nodes) == 0 or max(limits.depth) == 0:
            return tree
        if limits.draft_sampling != "topk":
            return self._drawn_tree(state, tree, hidden, positions, limits)
        size, first_width = self.config.block_size, state.cache.width
        path, starts = None, Starts.root(tree)
        for forward in range(limits.num_forwards):
            tree, candidates = self._grow(tree, starts, hidden, forward, max(limits.nodes))
            following = limits.next_starts(candidates, tree, forward, (forward + 1) * size)
            if following is None:
                break
            starts = following
            path = self._path_to(starts, path, state)
            hidden = self._later_block(state, hidden, starts, path, positions, first_width)
        # One block alone spells nothing twice.
        return limits.cut(tree.merge_duplicates() if forward else tree)

    def _drawn_tree(
        self, state: BlockState, roots: DraftTree, hidden: torch.Tensor, positions: torch.LongTensor, limits: Limits
    ) -> DraftTree:
        """
        A tree drawn from the slots' distributions at the request's temperature, which are known before any token is.
        """
        first_width, path = state.cache.width, None
        distributions = self._distributions(state, hidden[:, 0])
        growth = self.drawn_growth(state, roots, self.draft_to_target, distributions, limits, limits.num_forwards)
        shape = growth.shape
        for forward in range(1, len(shape.starts)):
            starts = growth.starts(forward)
            path = self._path_to(starts, path, state)
            hidden = self._later_block(state, hidden, starts, path, positions, first_width)
            used = [shape.distributions[index] for index in shape.distributions_of(forward)]
            growth.grow(
                self._distributions(state, hidden[:, [row for _, row, _ in used], [slot for _, _, slot in used]])
            )
        return self.drawn_tree(growth, limits)

    def _distributions(self, state: BlockState, hidden: torch.Tensor) -> torch.Tensor:
        """The request's log-probs `[B, R, D]` of slots with these states `[B, R, d]`."""
        return distributions_of(self.draft_logits(hidden)[1], state.warp)

    def _grow(
        self, tree: DraftTree, starts: Starts, hidden: torch.Tensor, forward: int, budget: int
    ) -> tuple[DraftTree, Starts]:
        """
        Append a block below every start, by the rule that the configuration names; no node gets more children than the
        tree could hold.
        """
        config = self.config
        if config.expansion == "best_first":
            width = min(config.root_width, budget)
            return best_first(tree, starts, self._children(hidden, width), config.block_size, budget, forward)
        widths = tuple(min(width, budget) for width in config.branching)
        branching = Branching(widths, min(config.root_width, budget), config.probability_cuts)
        outputs = self._chain_outputs(hidden, branching.most(forward == 0))
        return rank_guided(tree, starts, outputs, branching, forward)

    def _children(self, hidden: torch.Tensor, width: int) -> Children:
        """The best tokens below any node of a block with these states `[B, S, K, d]`."""
        if self.config.markov_rank:
            _, logits = self.draft_logits(hidden)
            most = max(width, MARKOV_CANDIDATES)
            return children_by_parent(logits, self.markov_head, width, self.draft_to_target, 1, most)
        return BlockOutputs(*self.best_tokens(hidden, width)).children(width, AFTER_ALTERNATIVES)

    def _chain_outputs(self, hidden: torch.Tensor, width: int) -> BlockOutputs:
        """The best tokens and the rank head's bucket of every slot `[B, S, K, d]`, below the greedy token before."""
        if not self.config.markov_rank:
            return self._block_outputs(hidden, width)
        outputs, before = [], None
        for slot in hidden.split(1, dim=2):
            outputs.append(self._block_outputs(slot, width, before))
            before = outputs[-1].tokens[..., 0]
        parts = zip(*((out.tokens, out.log_probs, out.rank_class) for out in outputs), strict=True)
        return BlockOutputs(*(torch.cat(part, dim=2) for part in parts))

    def _block_outputs(self, hidden: torch.Tensor, width: int, before: torch.LongTensor | None = None) -> BlockOutputs:
        normed, logits = self.draft_logits(hidden, before)
        best = logits.topk(max(width, self.config.rank_top_k), dim=-1)
        log_probs = best.values[..., :width].float() - logits.float().logsumexp(-1, keepdim=True)
        ids = best.indices[..., :width]
        rank_logits = self.rank_logits(normed, best.values[..., : self.config.rank_top_k])
        return BlockOutputs(ids + self.d2t[ids], log_probs, rank_logits.argmax(-1))

    def parameters_of(self, scope: Scope) -> list[nn.Parameter]:
        heads = [self.lm_head, self.rank_head] + ([self.markov_head] if self.config.markov_rank else [])
        modules = heads if scope == "head" else [self]
        return [p for module in modules for p in module.parameters()]

    def _loss(self, batch: TargetBatch, objective: SpecBlockObjective, progress: float, generator: Any) -> Losses:
        """The training objective with cuts drawn from 1 to K; see [`specblock_loss`] and [`SpecBlockObjective`]."""
        objective = objective.at(progress)
        cuts = torch.randint(
            1, self.config.block_size + 1, (objective.num_blocks - 1,), generator=generator, device="cpu"
        ).tolist()
        if objective.release:
            return release_loss(self, batch, objective, cuts)
        return specblock_loss(self, batch, objective, cuts, generator)
