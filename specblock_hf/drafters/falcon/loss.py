# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The objective of Falcon (https://huggingface.co/papers/2412.12639, section 3.2): coupled sequential glancing
distillation.

A text is cut into blocks of k rows. The drafter predicts all blocks at once. At the beginning of some blocks, rows are
then replaced by what they should have predicted, states and tokens, so that the rows behind them learn to use it; the
more was wrong, and the earlier in the run, the more. Learned are the target's states (smooth L1) and its distribution.

Kept of the paper: both passes, the share of what is replaced (0.4 of the wrong guesses at first, nothing in the end),
the two losses with weights 1 and 0.1, and the noise on the features, U(-0.1, 0.1). Left out: the hard labels, which
are a tenth of the distillation there. Different: where the blocks begin is drawn for every batch, because drafting
cuts a text anywhere; a replaced row, which has seen its answer, is not learned from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...drafting.target_batch import TargetBatch
from ..common.slot_loss import guesses, score_slots, weighted_loss


if TYPE_CHECKING:
    from .drafting import FalconDrafter


@dataclass(frozen=True)
class FalconObjective:
    """
    What may be chosen about the objective.

    Args:
        regression_weight (`float`, *optional*, defaults to 1.0): Of the loss of the states (paper: 1).
        distillation_weight (`float`, *optional*, defaults to 0.1): Of the loss of the distributions (paper: 0.1).
        glancing (`float`, *optional*, defaults to 0.4):
            Rows that are replaced for every wrong guess at the start of the run; falls to 0 (paper: 0.4).
        feature_noise (`float`, *optional*, defaults to 0.1): Largest noise on a feature (paper: 0.1).
    """

    regression_weight: float = 1.0
    distillation_weight: float = 0.1
    glancing: float = 0.4
    feature_noise: float = 0.1


def falcon_loss(
    drafter: FalconDrafter,
    batch: TargetBatch,
    objective: FalconObjective,
    progress: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """
    The objective on one batch.

    Args:
        drafter ([`FalconDrafter`]): The drafter.
        batch ([`TargetBatch`]): Texts and the target's view of them.
        objective ([`FalconObjective`]): What is trained, and how it is weighed.
        progress (`float`, *optional*, defaults to 1.0): Share of the run's steps that are done.
        generator (`torch.Generator`, *optional*): Draws where blocks begin, what is replaced, and the noise.

    Returns:
        `dict[str, torch.Tensor]`: `loss`, `state_loss`, `draft_loss`, and the counts `agreed` and `counted` of shape
        `[1, k]`; see [`TreeDrafter.loss`].
    """
    size, device = drafter.config.block_size, batch.tokens.device
    features, embeds = batch.features[:, :-1], batch.embeds[:, 1:]
    first = int(torch.randint(size, (1,), generator=generator, device="cpu"))
    noise = torch.rand(features.shape, generator=generator, device="cpu").to(device, features.dtype) - 0.5
    noisy = features + 2 * objective.feature_noise * noise
    blocks = blocks_of(features.shape[1], size, first).to(device)
    learned = None
    if objective.glancing * (1 - progress) > 0:
        with torch.no_grad():
            sums = score_slots(drafter, batch, block_states(drafter, embeds, noisy, blocks), blocks[:, -1])
        wrong = sum(slot.places for slot in sums) - sum(slot.right for slot in sums)
        replaced = _draw_rows(blocks, batch, objective.glancing * (1 - progress) * float(wrong), generator)
        noisy, embeds = _replace_rows(noisy, embeds, batch, blocks, replaced)
        learned = ~replaced
    hidden = block_states(drafter, embeds, noisy, blocks)
    sums = score_slots(drafter, batch, hidden, blocks[:, -1], learned)
    draft_loss = weighted_loss(sums, 1.0) / size
    state_loss = _state_loss(batch, hidden, blocks, learned)
    loss = objective.regression_weight * state_loss + objective.distillation_weight * draft_loss
    return {"loss": loss, "state_loss": state_loss, "draft_loss": draft_loss} | guesses(sums, size)


def blocks_of(rows: int, size: int, first: int) -> torch.LongTensor:
    """The whole blocks `[n, k]` of a text of so many rows, the first one beginning at row `first`."""
    count = max(rows - first, 0) // size
    return first + torch.arange(count * size, device="cpu").view(count, size)


def block_states(
    drafter: FalconDrafter, embeds: torch.Tensor, features: torch.Tensor, blocks: torch.LongTensor
) -> torch.Tensor:
    """
    What the rows of blocks predict.

    Args:
        drafter ([`FalconDrafter`]): The drafter.
        embeds (`torch.Tensor` of shape `[B, T, d]`): The target's embeddings of the tokens that followed.
        features (`torch.Tensor` of shape `[B, T, d]`): The target's states.
        blocks (`torch.LongTensor` of shape `[n, k]`): As [`blocks_of`] returns them.

    Returns:
        `torch.Tensor` of shape `[B, n, k, d]`: Predicted states k positions on.
    """
    states, _ = drafter.read(embeds, features)
    rows = torch.arange(states.shape[1], device=states.device)
    # A row sees its whole block; those before the first block and behind the last one are context alone.
    sees_up_to = rows.clone().index_copy_(0, blocks.flatten(), blocks[:, -1:].expand_as(blocks).flatten())
    mask = rows <= sees_up_to[:, None]
    hidden = drafter(states, rows.expand(len(states), -1), mask[None, None])
    return hidden[:, blocks]


def _draw_rows(
    blocks: torch.LongTensor, batch: TargetBatch, wanted: float, generator: torch.Generator | None
) -> torch.BoolTensor:
    """About so many rows to replace `[B, n, k]`: the beginnings of blocks, from one row to all but the last."""
    size, last = blocks.shape[1], batch.tokens.shape[1] - 1
    answers = blocks[:, 0] + size + 1
    possible = (answers < batch.lengths[:, None]) & batch.scored[:, answers.clamp_max(last)]
    share = wanted / max(1.0, float(possible.sum()) * size / 2)
    chosen = torch.rand(possible.shape, generator=generator, device="cpu").to(blocks.device) < share
    lengths = torch.randint(1, size, possible.shape, generator=generator, device="cpu").to(blocks.device)
    rows = torch.arange(size, device=blocks.device) < lengths[..., None]
    inside = blocks + size + 1 < batch.lengths[:, None, None]
    return rows & (chosen & possible)[..., None] & inside


def _replace_rows(
    features: torch.Tensor,
    embeds: torch.Tensor,
    batch: TargetBatch,
    blocks: torch.LongTensor,
    replaced: torch.BoolTensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and embeddings `[B, T, d]` with what the replaced rows `[B, n, k]` should have predicted."""
    size, last = blocks.shape[1], batch.tokens.shape[1] - 1
    here = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    here[:, blocks.flatten()] = replaced.flatten(1)
    rows = torch.arange(features.shape[1], device=features.device)
    right_features = batch.features[:, (rows + size).clamp_max(last)]
    right_embeds = batch.embeds[:, (rows + size + 1).clamp_max(last)]
    here = here[..., None]
    return torch.where(here, right_features, features), torch.where(here, right_embeds, embeds)


def _state_loss(
    batch: TargetBatch, hidden: torch.Tensor, blocks: torch.LongTensor, learned: torch.BoolTensor | None
) -> torch.Tensor:
    """The mean smooth L1 loss of the predicted states `[B, n, k, d]` of answers."""
    size, last = blocks.shape[1], batch.tokens.shape[1] - 1
    places = blocks + size
    known = places.clamp_max(last)
    inside = (places < batch.lengths[:, None, None]) & batch.scored[:, known]
    if learned is not None:
        inside = inside & learned
    wanted = batch.features[:, known][inside].to(hidden.dtype)
    total = nn.functional.smooth_l1_loss(hidden[inside], wanted, reduction="sum")
    return total / (inside.sum().clamp_min(1) * hidden.shape[-1])
