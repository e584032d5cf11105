# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The objective of the authors' released training code, to compare with and to continue their runs. It differs from
[`specblock_loss`] in four ways: a later block is trained at every position, whatever the blocks before guessed; it
sees its own block's keys of earlier positions, which no drafting does; every slot's loss is divided by its own
survivors; and the rank head has a loss and a chain of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...drafting.target_batch import TargetBatch
from ..common.cache import GraphCache
from ..common.losses import soft_cross_entropy
from .loss import SpecBlockObjective, TrainingBlock, first_block, later_block, weighed
from .rank_loss import ordinal_rank_loss, rank_buckets


if TYPE_CHECKING:
    from .drafting import SpecBlockDrafter


def release_loss(
    drafter: SpecBlockDrafter,
    batch: TargetBatch,
    objective: SpecBlockObjective,
    cuts: list[int],
    budget: float | None = 10.0,
) -> dict[str, torch.Tensor]:
    """
    Args:
        drafter ([`SpecBlockDrafter`]): The drafter.
        batch ([`TargetBatch`]): Texts and the target's view of them.
        objective ([`SpecBlockObjective`]): For `num_blocks`, `rank_weight` and `slot_decay`.
        cuts (`list[int]`): Cut M of every transition from a block to the next, each from 1 to K.
        budget (`float`, *optional*, defaults to 10.0): See [`ordinal_rank_loss`].

    Returns:
        `dict[str, torch.Tensor]`: As [`specblock_loss`].
    """
    cache = GraphCache(drafter.config.num_hidden_layers)
    block = first_block(drafter, batch, cache)
    states = block.states(drafter)
    blocks = []
    for number in range(objective.num_blocks):
        if number > 0:
            everywhere, cut = torch.ones_like(block.valid), cuts[number - 1]
            block = later_block(drafter, batch, cache, block, everywhere, states[:, :, cut - 1], cut, True)
            states = block.states(drafter)
        blocks.append(_score(drafter, batch, block, states, budget))
    sums = {name: torch.stack([scores[name] for scores in blocks]) for name in blocks[0]}
    slot_losses = (sums["draft"] / sums["counted"].clamp_min(1)).sum(0)
    decay = objective.slot_decay ** torch.arange(len(slot_losses), device=slot_losses.device)
    draft_loss = (slot_losses * decay).sum()
    rank_loss = (sums["rank"].sum(-1) / sums["rank_weights"].sum(-1).clamp_min(1e-6)).sum()
    return weighed(draft_loss, rank_loss, sums, objective)


def _score(
    drafter: SpecBlockDrafter, batch: TargetBatch, block: TrainingBlock, states: torch.Tensor, budget: float | None
) -> dict[str, torch.Tensor]:
    """What every slot adds, each `[K]`; both chains begin where the pair is trained, however far the block is."""
    config, last, counted = drafter.config, batch.tokens.shape[1] - 1, batch.counted
    keep = (block.pairs + 2 <= last) & counted.gather(1, (block.pairs + 2).clamp_max(last))
    rank_keep, slots = keep, []
    for slot in range(config.block_size):
        places = block.pairs + block.shift + 2 + slot
        trained = (places <= last) & counted.gather(1, places.clamp_max(last))
        row, column = ((keep | rank_keep) & (block.pairs + 2 + slot <= last)).nonzero(as_tuple=True)
        place = places[row, column].clamp_max(last)
        before = batch.tokens[row, place - 1] if slot else None
        normed, logits = drafter.draft_logits(states[row, column, slot], before)
        best = logits.detach().topk(config.rank_top_k)
        truth = _likeliest(batch.top_ids[row, place])
        right = best.indices[:, 0] == truth
        admitted = (keep & trained)[row, column]
        losses = soft_cross_entropy(
            logits[admitted], *(t[row, place][admitted] for t in (batch.top_ids, batch.top_probs))
        )
        own = logits.detach().gather(-1, truth.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        labels = rank_buckets(best.values, own)
        rank_logits = drafter.rank_logits(normed, best.values)
        said = rank_logits.detach().argmax(-1)
        rank_admitted = (rank_keep & trained)[row, column]
        rank_losses, weights = ordinal_rank_loss(rank_logits, labels, rank_admitted, budget)
        cells = (labels * config.num_rank_classes + said)[rank_admitted]
        confusion = cells.bincount(minlength=config.num_rank_classes**2)
        slots.append(
            {
                "draft": losses.sum(),
                "agreed": (right & admitted).sum(),
                "counted": admitted.sum(),
                "rank": rank_losses.sum(),
                "rank_weights": weights.sum(),
                "confusion": confusion.view(config.num_rank_classes, -1),
            }
        )
        keep = torch.zeros_like(keep).index_put((row, column), keep[row, column] & right & (truth >= 0))
        rank_keep = torch.zeros_like(keep).index_put((row, column), rank_keep[row, column] & (said == labels))
    return {name: torch.stack([sums[name] for sums in slots]) for name in slots[0]}


def _likeliest(ids: torch.LongTensor) -> torch.LongTensor:
    """The first of each row's ids `[n, k]` that is in the draft vocabulary; -1 where none is."""
    return ids.gather(-1, (ids >= 0).int().argmax(-1, keepdim=True)).squeeze(-1)
