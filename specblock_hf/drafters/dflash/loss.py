# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The objective of block-diffusion drafters: blocks of masks at random places of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from ...drafting.pairs import TokenTable
from ...drafting.target_batch import DEVICE_WORK, TargetBatch
from ..common.cache import GraphCache
from ..common.losses import soft_cross_entropy


if TYPE_CHECKING:
    from .drafting import BlockDiffusionDrafter


@dataclass(frozen=True)
class BlockDiffusionObjective:
    """
    What may be chosen about the objective. The defaults follow the authors of both forms: DFlash learns the text's
    tokens and cares most for the first slots, JetSpec (causal blocks) the target's distributions, all slots alike.

    Args:
        num_anchors (`int`, *optional*, defaults to 64): Most blocks of a text; they start at random answer tokens.
        decay (`float`, *optional*):
            Slot k weighs exp(-(k - 1) / decay); 0 for all slots alike. Defaults to half the predictions of a block
            (7 for blocks of 16, as published), and to 0 for causal drafters.
        soft (`bool`, *optional*): Learn the target's distributions. Defaults to whether the drafter is causal.
    """

    num_anchors: int = 64
    decay: float | None = None
    soft: bool | None = None

    def __post_init__(self) -> None:
        if self.num_anchors < 1 or (self.decay is not None and self.decay < 0):
            raise ValueError(f"{self} cannot be trained; give at least one anchor and a decay of 0 or more.")


class TrainingBlocks(NamedTuple):
    """
    A blocks for each of B texts.

    Args:
        anchors (`torch.LongTensor` of shape `[B, A]`): Place a of each block's known token.
        valid (`torch.BoolTensor` of shape `[B, A]`): False for padding.
        hidden (`torch.Tensor` of shape `[B, A, D, d]`): Normed states of the rows that predict tokens a + 1 to a + D.
    """

    anchors: torch.LongTensor
    valid: torch.BoolTensor
    hidden: torch.Tensor


def block_diffusion_loss(
    drafter: BlockDiffusionDrafter,
    batch: TargetBatch,
    objective: BlockDiffusionObjective,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """
    The weighted mean of the cross-entropy over all slots of all blocks. As at inference a block at place a reads the
    features of the places before a, and those of a itself never.

    Args:
        drafter ([`BlockDiffusionDrafter`]): The drafter.
        batch ([`TargetBatch`]): Texts, the target's view of them and its `table`.
        objective ([`BlockDiffusionObjective`]): What is chosen.
        generator (`torch.Generator`, *optional*): Draws the places; they are the same in every call without one.

    Returns:
        `dict[str, torch.Tensor]`: `loss`, and without gradient `agreed` and `counted` of shape `[1, D]`: slots whose
        guess and all guesses before it are the text's, and slots before which all guesses are.

    Raises:
        ValueError: The drafter has parts that this objective does not train, or the batch has no table.
    """
    config = drafter.config
    if config.selector_rank or config.markov_rank or config.confidence_head:
        raise ValueError(
            "Drafters with a selector, Markov or confidence head are loaded and run but not trained by this library; "
            "train one without."
        )
    if config.restricted_vocabulary:
        raise ValueError(
            "Block-diffusion drafters with a restricted vocabulary are loaded and run but not trained by this "
            "library; train one without."
        )
    if batch.table is None:
        raise ValueError("The batch has no table, and this drafter predicts with the target's head; pass the table.")
    causal = all(causal for causal, _ in config.layer_rules)
    table = drafter.own_table(batch.table)
    anchors, valid, hidden = _run_blocks(drafter, batch, objective.num_anchors, generator)
    steps = torch.arange(1, config.num_predictions + 1, device=anchors.device)
    places = anchors.unsqueeze(-1) + steps
    inside = valid.unsqueeze(-1) & (places < batch.lengths[:, None, None])
    places = places.clamp_max(batch.tokens.shape[1] - 1)
    inside &= _at(batch.scored, places)
    text, block, slot = (inside & _at(batch.counted, places)).nonzero(as_tuple=True)
    place = places[text, block, slot]
    if causal if objective.soft is None else objective.soft:
        ids, probs = batch.top_ids[text, place], batch.top_probs[text, place]
    else:
        ids = batch.tokens[text, place].unsqueeze(-1)
        probs = torch.ones_like(ids, dtype=torch.float32)
    losses, guesses = _predict(drafter, table, hidden[text, block, slot], ids, probs)
    decay = (0.0 if causal else max(1, config.num_predictions // 2)) if objective.decay is None else objective.decay
    weights = torch.exp(-slot / decay) if decay else torch.ones_like(losses)
    right = torch.zeros_like(inside)
    right[text, block, slot] = guesses == batch.tokens[text, place]
    chain = (right | ~inside).cumprod(-1).bool()
    alive = torch.cat([torch.ones_like(chain[..., :1]), chain[..., :-1]], dim=-1) & inside
    return {
        "loss": (losses * weights).sum() / weights.sum().clamp_min(1e-6),
        "agreed": (alive & right).sum((0, 1)).unsqueeze(0),
        "counted": alive.sum((0, 1)).unsqueeze(0),
    }


def _predict(
    drafter: BlockDiffusionDrafter,
    table: TokenTable,
    hidden: torch.Tensor,
    ids: torch.LongTensor,
    probs: torch.Tensor,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Of states `[n, d]`, the cross-entropy `[n]` with tokens `[n, k]` of these probabilities, and the likeliest."""

    def losses_of(*part: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor]:
        logits = drafter.head_logits(part[0], table)
        return soft_cross_entropy(logits, part[1], part[2]), logits.detach().argmax(-1)

    rows = max(1, DEVICE_WORK // table.vocab_size)
    if len(hidden) <= rows:
        return losses_of(hidden, ids, probs)
    # The logits of all slots over the whole vocabulary would be the largest thing in memory by far: the backward pass
    # makes those of some rows again.
    parts = zip(*(values.split(rows) for values in (hidden, ids, probs)), strict=True)
    found = [checkpoint(losses_of, *part, use_reentrant=False) for part in parts]
    losses, guesses = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(guesses)


def _at(marks: torch.Tensor, places: torch.LongTensor) -> torch.Tensor:
    """`[B, T]` at `[B, A, D]`."""
    return marks.gather(1, places.flatten(1)).view_as(places)


def _draw_anchors(
    batch: TargetBatch, most: int, generator: torch.Generator | None
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """Up to `most` distinct places `[B, A]` in every text, answer tokens that another follows; and which are real."""
    possible = batch.scored[:, :-1] & batch.scored[:, 1:]
    count = max(1, min(most, int(possible.sum(-1).max())))
    # Without a generator the draws are fixed: the global one belongs to others.
    order = torch.rand(possible.shape, generator=generator or torch.Generator(), device="cpu").to(possible.device)
    order = order.masked_fill(~possible, -1.0)
    drawn = order.topk(count, dim=-1)
    return drawn.indices, drawn.values >= 0


def _run_blocks(
    drafter: BlockDiffusionDrafter, batch: TargetBatch, most: int, generator: torch.Generator | None
) -> TrainingBlocks:
    config, device = drafter.config, batch.tokens.device
    anchors, valid = _draw_anchors(batch, most, generator)
    table = drafter.own_table(batch.table)
    with torch.no_grad():
        embeds = drafter.block_embeds(batch.tokens.gather(1, anchors), config.block_size, table)
    positions = anchors.unsqueeze(-1) + torch.arange(config.block_size, device=device)
    cache = GraphCache(config.num_hidden_layers)
    known = torch.arange(batch.tokens.shape[1], device=device).expand(len(batch.tokens), -1)
    drafter.append_context(batch.features.to(drafter.dtype), known, cache)
    number = torch.arange(anchors.shape[1], device=device).repeat_interleave(config.block_size)
    starts = anchors.repeat_interleave(config.block_size, dim=1)
    before = known.unsqueeze(1) < starts.unsqueeze(-1)
    together = (number.unsqueeze(-1) == number).expand(len(before), -1, -1)
    queries = positions.flatten(1)
    visible = torch.cat([before, together], dim=-1)
    masks = drafter.masks(queries, torch.cat([known, queries], dim=1), starts, visible)
    hidden = drafter(embeds, positions, masks, cache)
    return TrainingBlocks(anchors, valid, hidden if config.predicts_from_anchor else hidden[:, :, 1:])
