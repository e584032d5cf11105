# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the rank head learns: the bucket of the target's token in the draft distribution."""

from __future__ import annotations

import torch
from torch import nn


def rank_buckets(best: torch.Tensor, own: torch.Tensor) -> torch.LongTensor:
    """
    The bucket of the target's token in the drafter's order: 0 for rank 1, 1 for 2-4, 2 for 5-10, 3 beyond (section
    3.2).

    Args:
        best (`torch.Tensor` of shape `[n, T]`): The drafter's T largest logits, T at least 10.
        own (`torch.Tensor` of shape `[n]`): Its logits of the target's tokens.
    """
    ahead = (best > own[:, None]).sum(-1)
    return (ahead > 0).long() + (ahead > 3).long() + (ahead > 9).long()


def rank_cross_entropy(rank_logits: torch.Tensor, buckets: torch.LongTensor) -> torch.Tensor:
    """Cross-entropy `[n]` of the rank head's `[n, 4]` logits."""
    return nn.functional.cross_entropy(rank_logits.float(), buckets, reduction="none")


def ordinal_rank_loss(
    rank_logits: torch.Tensor, buckets: torch.LongTensor, counted: torch.Tensor, budget: float | None = 10.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The rank head's loss of the authors' release: soft labels around the true bucket, more for a prediction that is far
    off or too confident, less for buckets that occur often.

    Args:
        rank_logits (`torch.Tensor` of shape `[n, buckets]`): Of one slot.
        buckets (`torch.LongTensor` of shape `[n]`): True buckets.
        counted (`torch.Tensor` of shape `[n]`): 1 for rows that count.
        budget (`float`, *optional*, defaults to 10.0): What all rows of a bucket weigh together at most; `None` for 1
            a row.

    Returns:
        Weighted losses and weights, both of shape `[n]`: the loss is the sum of these over all slots, divided by the
        sum of those.
    """
    log_probs = rank_logits.float().log_softmax(-1)
    classes = torch.arange(log_probs.shape[-1], device=log_probs.device)
    soft = 1 / _distance(buckets[:, None], classes) ** 2
    losses = -(soft / soft.sum(-1, keepdim=True) * log_probs).sum(-1) * _distance(buckets, log_probs.argmax(-1))
    weights = counted.float()
    if budget is not None:
        occurrences = weights.new_zeros(len(classes)).index_add_(0, buckets, weights)
        weights = weights * (budget / occurrences.clamp_min(1)).clamp_max(1)[buckets]
    return losses * weights, weights


def _distance(true: torch.LongTensor, said: torch.LongTensor) -> torch.Tensor:
    """1 for a hit, 1 more for every bucket that is said too far back, 2 more for every one too far in front."""
    return 1 + (true - said).abs() + (true - said).clamp_min(0)
