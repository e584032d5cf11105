# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
ParallelSpec (https://huggingface.co/papers/2410.05589): one network that predicts K tokens in one forward, with masks
in place of the tokens that are not known.

Kept of the paper: an EAGLE-type drafter, K - 1 mask tokens behind the text, and group-wise training, in which every
pair of a text is followed by masks of its own that no other group sees, so that all groups are learned at once. Left
out: regression of the states (what EAGLE-3, whose features and layer this network has, dropped too) and the authors'
draft trees; every round takes the paths with the largest products of the slots' probabilities. What the paper leaves
open: what a mask has in place of features (here a learned vector), and the weight of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...drafting.pairs import Pairs
from ...drafting.plan import Limits
from ...drafting.target_batch import Losses, TargetBatch
from ...trees.tree import DraftTree
from ..common.block import PREFILL_PAIRS, BlockDrafter, BlockState
from ..common.cache import committed_mask
from ..common.path_attention import PathCache
from ..common.slot_loss import slots_loss
from .modeling import ParallelSpecModel


@dataclass(frozen=True)
class ParallelSpecObjective:
    """
    What may be chosen about the objective.

    Args:
        slot_decay (`float`, *optional*, defaults to 0.8): Slot k counts this to the power of k.
    """

    slot_decay: float = 0.8


class ParallelSpecDrafter(BlockDrafter, ParallelSpecModel):
    """
    A drafter that predicts the next K tokens with masks, each without knowing the others.

    Args:
        config ([`ParallelSpecConfig`]): The drafter's configuration.

    Example:

    ```python
    >>> from specblock_hf import AutoDrafter

    >>> drafter = AutoDrafter.from_pretrained("org/parallelspec-smollm2-135m", target=target, dtype=target.dtype)
    >>> output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)
    ```
    """

    objective_class = ParallelSpecObjective
    columns_per_pair = 1  # keys and values of masks are dropped

    def propose(self, state: BlockState, pairs: Pairs, limits: Limits) -> DraftTree:
        before, last = pairs.split(PREFILL_PAIRS)
        if before is not None:
            self.extend(state, before)
        return self.product_tree(self.root_of(pairs), self._forward_with_masks(state, last), limits)

    def _forward_with_masks(self, state: BlockState, pairs: Pairs) -> torch.Tensor:
        """One forward over new pairs and, behind each row's last one, the masks: its K states `[B, 1, K, d]`."""
        size, count = self.config.block_size, pairs.tokens.shape[1]
        lengths = pairs.lengths.to(self.device)[:, None]
        steps = torch.arange(count + size - 1, device=self.device)
        is_mask = (steps >= lengths)[..., None]
        place = steps.clamp_max(count - 1)
        masks = (steps - lengths).clamp(0, size - 2)
        embeds = replace(pairs, table=state.table).embeds().to(self.device, self.dtype)[:, place]
        features = torch.cat([f.to(self.device, self.dtype) for f in pairs.features], dim=-1)
        conditions = self.project_features(features)[:, place]
        embeds = torch.where(is_mask, self.mask_embeds(masks), embeds)
        conditions = torch.where(is_mask, self.mask_condition.weight, conditions)
        positions = pairs.positions.to(self.device)[:, :1] + steps
        offsets, width = state.offsets, state.longest + len(steps)
        state.advance(pairs)
        state.cache.seek(offsets, width)
        state.calls += 1
        state.forward_rows += len(embeds) * count
        mask = committed_mask(len(steps), 1, offsets, width, self.device)
        hidden = self(embeds, conditions, positions, mask, state.cache)[:, :, 0]
        slots = (lengths - 1).clamp_min(0) + steps[:size]
        return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1])).unsqueeze(1)

    def _loss(self, batch: TargetBatch, objective: ParallelSpecObjective, progress: float, generator: Any) -> Losses:
        """The mean cross-entropy of every slot of every group in the answers; see [`TreeDrafter.loss`]."""
        hidden = self.group_states(batch.embeds[:, 1:], self.project_features(batch.features[:, :-1]))
        return slots_loss(self, batch, hidden, objective.slot_decay)

    def group_states(self, embeds: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """
        The states of all groups of some texts.

        Args:
            embeds (`torch.Tensor` of shape `[B, T, d]`): The target's embeddings of the tokens that followed.
            conditions (`torch.Tensor` of shape `[B, T, d]`): The projected features of the pairs.

        Returns:
            `torch.Tensor` of shape `[B, T, K, d]`.
        """
        cache = PathCache()
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
        slots = [self(embeds, conditions, positions, cache=cache)]
        for slot, mask in enumerate(self.mask_embeds.weight, 1):
            unknown = self.mask_condition.weight.expand_as(conditions)
            slots.append(self(mask.expand_as(embeds), unknown, positions + slot, cache=cache))
        return torch.cat(slots, dim=2)
