# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The objective of drafters that learn every slot at every place, right guesses before it or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...drafting.target_batch import Losses, TargetBatch
from .head import DraftHead
from .losses import soft_cross_entropy


@dataclass
class SlotSums:
    """
    One slot's cross-entropy over a batch, and its guesses.

    Args:
        loss (`torch.Tensor`, 0-dimensional): Sum over places, in nats.
        places (`torch.Tensor`, 0-dimensional): Places in that sum.
        right (`torch.Tensor`, 0-dimensional): Guesses there that are the text's token.
        agreed (`torch.Tensor`, 0-dimensional): Guesses that are the text's token, all slots before right too.
        counted (`torch.Tensor`, 0-dimensional): Guesses where all slots before were right.
        alive (`torch.BoolTensor` of shape `[B, R]`): Rows that are right up to and with this slot.
    """

    loss: torch.Tensor
    places: torch.Tensor
    right: torch.Tensor
    agreed: torch.Tensor
    counted: torch.Tensor
    alive: torch.BoolTensor


def score_slot(
    drafter: DraftHead,
    batch: TargetBatch,
    hidden: torch.Tensor,
    places: torch.LongTensor,
    alive: torch.BoolTensor | None = None,
    learned: torch.BoolTensor | None = None,
) -> SlotSums:
    """
    Compare a slot's guesses with the target's.

    Args:
        drafter ([`DraftHead`]): Its head scores the states.
        batch ([`TargetBatch`]): Texts and the target's view of them.
        hidden (`torch.Tensor` of shape `[B, R, d]`): States before the draft head.
        places (`torch.LongTensor` of shape `[R]`): The place in the text that each row's guess is about.
        alive (`torch.BoolTensor` of shape `[B, R]`, *optional*): Rows where all slots before were right; all if not
            given.
        learned (`torch.BoolTensor` of shape `[B, R]`, *optional*): Rows that are learned from; all if not given.

    Returns:
        `SlotSums`: Over the rows whose place is part of an answer that the drafter can say.
    """
    known = places.clamp_max(batch.tokens.shape[1] - 1)
    inside = (places < batch.lengths[:, None]) & batch.counted[:, known]
    if learned is not None:
        inside = inside & learned
    row, column = inside.nonzero(as_tuple=True)
    place = known[column]
    _, logits = drafter.draft_logits(hidden[row, column])
    right = drafter.draft_to_target[logits.detach().argmax(-1)] == batch.tokens[row, place]
    still = torch.ones_like(right) if alive is None else alive[row, column]
    return SlotSums(
        loss=soft_cross_entropy(logits, batch.top_ids[row, place], batch.top_probs[row, place]).sum(),
        places=inside.sum(),
        right=right.sum(),
        agreed=(right & still).sum(),
        counted=still.sum(),
        alive=torch.zeros_like(inside).index_put((row, column), right & still),
    )


def score_slots(
    drafter: DraftHead,
    batch: TargetBatch,
    hidden: torch.Tensor,
    pairs: torch.LongTensor,
    learned: torch.BoolTensor | None = None,
) -> list[SlotSums]:
    """
    The same for K slots that follow one another.

    Args:
        drafter ([`DraftHead`]): Its head scores the states.
        batch ([`TargetBatch`]): Texts and the target's view of them.
        hidden (`torch.Tensor` of shape `[B, R, K, d]`): Slot k of a row guesses token i + 2 + k.
        pairs (`torch.LongTensor` of shape `[R]`): The committed pair i of each row.
        learned (`torch.BoolTensor` of shape `[B, R, K]`, *optional*): Slots that are learned from; all if not given.
    """
    sums: list[SlotSums] = []
    for slot, states in enumerate(hidden.unbind(2)):
        alive = sums[-1].alive if sums else None
        rows = None if learned is None else learned[:, :, slot]
        sums.append(score_slot(drafter, batch, states, pairs + 2 + slot, alive, rows))
    return sums


def slots_loss(drafter: DraftHead, batch: TargetBatch, hidden: torch.Tensor, decay: float) -> Losses:
    """What [`TreeDrafter.loss`] returns of states `[B, T, K, d]` of the K slots of every pair."""
    sums = score_slots(drafter, batch, hidden, torch.arange(hidden.shape[1], device=hidden.device))
    return {"loss": weighted_loss(sums, decay)} | guesses(sums, hidden.shape[2])


def weighted_loss(sums: Sequence[SlotSums], decay: float) -> torch.Tensor:
    """The mean loss of every slot, slot k counting `decay` to the power of k."""
    return torch.stack([decay**k * slot.loss / slot.places.clamp_min(1) for k, slot in enumerate(sums)]).sum()


def guesses(sums: Sequence[SlotSums], slots: int) -> dict[str, torch.Tensor]:
    """`"agreed"` and `"counted"` of shape `[forwards, slots]`; see [`TreeDrafter.loss`]."""
    return {
        "agreed": torch.stack([slot.agreed for slot in sums]).view(-1, slots),
        "counted": torch.stack([slot.counted for slot in sums]).view(-1, slots),
    }
