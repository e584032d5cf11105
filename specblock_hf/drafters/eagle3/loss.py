# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The objective of EAGLE-3 (https://huggingface.co/papers/2503.01840, section 3.2): training-time test.

The drafter is unrolled as it is run: step 0 reads the target's features, step s the drafter's own states of step s - 1
with the text's tokens, and sees what a node at that level of a tree sees: the committed pairs up to its own, with the
keys that the target's features gave them, and its own path. Every step is learned at every place of an answer, its
target the target model's distribution over the draft vocabulary; there is no loss on the states.

Kept of the paper: all of this, and of the authors' code the weight of a step, 0.8 to the power of its number. Left
out: nothing of the objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...drafting.target_batch import TargetBatch
from ..common.path_attention import PathCache
from ..common.slot_loss import SlotSums, guesses, score_slot, weighted_loss


if TYPE_CHECKING:
    from .drafting import Eagle3Drafter


@dataclass(frozen=True)
class Eagle3Objective:
    """
    What may be chosen about the objective.

    Args:
        num_steps (`int`, *optional*, defaults to 7): Forwards that are unrolled (paper: 7).
        step_decay (`float`, *optional*, defaults to 0.8): Step s counts this to the power of s.
    """

    num_steps: int = 7
    step_decay: float = 0.8

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; at least one step is trained, so give 1 or more.")


def eagle3_loss(drafter: Eagle3Drafter, batch: TargetBatch, objective: Eagle3Objective) -> dict[str, torch.Tensor]:
    """
    The objective on one batch.

    Args:
        drafter ([`Eagle3Drafter`]): The drafter.
        batch ([`TargetBatch`]): Texts and the target's view of them.
        objective ([`Eagle3Objective`]): How many steps are trained, and how they are weighed.

    Returns:
        `dict[str, torch.Tensor]`: `loss`, and the counts `agreed` and `counted` of shape `[steps, 1]`; see
        [`TreeDrafter.loss`].
    """
    embeds = drafter.embed_tokens(batch.tokens) if drafter.config.own_embedding else batch.embeds
    conditions = drafter.project_features(batch.features[:, :-1])
    sums: list[SlotSums] = []
    for step, hidden in enumerate(unrolled_states(drafter, embeds, conditions, objective.num_steps)):
        places = torch.arange(hidden.shape[1], device=hidden.device) + 2 + step
        sums.append(score_slot(drafter, batch, hidden, places, sums[-1].alive if sums else None))
    return {"loss": weighted_loss(sums, objective.step_decay)} | guesses(sums, 1)


def unrolled_states(
    drafter: Eagle3Drafter, embeds: torch.Tensor, conditions: torch.Tensor, num_steps: int
) -> Iterator[torch.Tensor]:
    """
    The drafter run along texts from every pair at once.

    Args:
        drafter ([`Eagle3Drafter`]): The drafter.
        embeds (`torch.Tensor` of shape `[B, T + 1, d]`): Of all tokens.
        conditions (`torch.Tensor` of shape `[B, T, d]`): The projected features of the pairs.
        num_steps (`int`): Forwards.

    Yields:
        `torch.Tensor` of shape `[B, T, d]`: The states of each step. Those of pair i in step s have read tokens up to
        i + 1 + s; behind the end of a text, its last token again.
    """
    last = embeds.shape[1] - 1
    pairs = torch.arange(last, device=embeds.device)
    cache = PathCache()
    for step in range(num_steps):
        tokens = embeds[:, (pairs + 1 + step).clamp_max(last)]
        conditions = drafter(tokens, conditions, (pairs + step).expand(len(embeds), -1), cache=cache)[:, :, 0]
        yield conditions
