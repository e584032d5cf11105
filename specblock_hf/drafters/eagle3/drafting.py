# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
EAGLE-3 (https://huggingface.co/papers/2503.01840) as a drafter: the network of `modeling_eagle3.py`, a level of the
tree with every forward.

Kept of the paper and the authors' code: the network and its published weights, the tree of EAGLE-2, whose levels give
children to their likeliest nodes and which keeps the likeliest of all nodes in the end, and the objective, see
[`eagle3_loss`]. Left out: nothing that changes what is drafted. Different: the pairs of an accepted path are told with
the target's own features in one forward, which is also the first one of the next tree.
"""

from __future__ import annotations

from typing import Any

import torch

from ...drafting.drafter import CPU_BUDGET
from ...drafting.pairs import Pairs
from ...drafting.plan import DraftingPlan, Limits
from ...drafting.target_batch import Losses, TargetBatch
from ...trees.expansion import BlockOutputs, Starts, every_child
from ...trees.tree import DraftTree
from ..common.block import BlockDrafter, BlockState
from .loss import Eagle3Objective, eagle3_loss
from .modeling import Eagle3Model


class Eagle3Drafter(BlockDrafter, Eagle3Model):
    """
    A drafter that predicts one token a forward and gives children to the likeliest nodes of each level of its tree
    (EAGLE-3, https://huggingface.co/papers/2503.01840). In SpecBlock's terms: blocks of one slot, every slot as wide
    as the beam, and as many starts as the beam is wide.

    Args:
        config ([`Eagle3Config`]): The drafter's configuration.

    Example:

    ```python
    >>> from specblock_hf import AutoDrafter

    >>> drafter = AutoDrafter.from_pretrained("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")
    >>> output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)
    ```
    """

    predicts_at_once = True
    has_fixed_rounds = True
    objective_class = Eagle3Objective
    # A forward is one level, and most machines cannot afford all of them.
    plans_that_pay = (
        *((3, 2, 2), (5, 2, 4), (7, 2, 4), (7, 3, 4), (11, 3, 4), (11, 4, 4), (15, 4, 4)),
        *((23, 4, 8), (31, 6, 8), (59, 6, 10), (59, 8, 10)),
    )

    def default_plan(self, device: torch.device) -> DraftingPlan:
        config = self.config
        if device.type == "cpu":
            # A verified node costs real time there, and every level is a forward of its own.
            return DraftingPlan(
                min(CPU_BUDGET, config.tree_budget), min(4, config.num_blocks), min(4, config.beam_width)
            )
        return DraftingPlan(config.tree_budget, config.num_blocks, config.beam_width)

    def deepest(self, plan: DraftingPlan) -> int:
        return min(plan.tree_budget, plan.num_forwards)

    def propose(self, state: BlockState, pairs: Pairs, limits: Limits) -> DraftTree:
        tree, hidden, positions = self._first_block(state, pairs)
        if max(limits.nodes) == 0:
            return tree
        beam = min(self.config.beam_width, self.config.draft_vocab_size)
        width = min(beam, max(limits.nodes))  # of a node with more children some could not stay
        first_width, starts, path = state.cache.width, Starts.root(tree), None
        for level in range(min(limits.num_forwards, max(limits.depth))):
            if level:
                path = self._path_to(starts, path, state)
                hidden = self._later_block(state, hidden, starts, path, positions + level, first_width)
            outputs = BlockOutputs(*self.best_tokens(hidden, width))
            tree, candidates = every_child(tree, starts, outputs, level)
            following = limits.next_starts(candidates, tree, level, level + 2, beam)
            if following is None:
                break
            starts = following
        return limits.cut(tree)

    def _loss(self, batch: TargetBatch, objective: Eagle3Objective, progress: float, generator: Any) -> Losses:
        """The training objective; see [`eagle3_loss`]."""
        return eagle3_loss(self, batch, objective)
