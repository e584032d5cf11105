# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What drafters learn from: the target's distributions on a text, and the losses taken on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .drafter import TokenTable


WORK = 2**21  # numbers of a vocabulary-wide pass, 8 MB: stays in the cache between two operations


@dataclass
class TargetBatch:
    """
    B texts as the target sees them. Token t of a row is x_t; pair i is (features at x_i, x_{i+1}), so there is one
    pair less than
    tokens. A drafter's first guess at pair i is about x_{i+2}.

    Args:
        tokens (`torch.LongTensor` of shape `[B, T]`): The texts, padded on the right.
        embeds (`torch.Tensor` of shape `[B, T, d]`): The target's embeddings of `tokens`.
        features (`torch.Tensor` of shape `[B, T, F * d]`): The target's states at `tokens`, one block per feature
            layer.
        lengths (`torch.LongTensor` of shape `[B]`): Tokens of each text.
        top_ids (`torch.LongTensor` of shape `[B, T, k]`): Draft-vocabulary ids of the likeliest tokens at place t, -1
            outside the
            draft vocabulary.
        top_probs (`torch.Tensor` of shape `[B, T, k]`): The target's probabilities of them, given x_0 .. x_{t-1}.
        scored (`torch.BoolTensor` of shape `[B, T]`): Where x_t is part of an answer, so that its prediction counts.
        table ([`TokenTable`], *optional*):
            The target's embedding and head, for drafters that read more of them than `embeds`.
    """

    tokens: torch.LongTensor
    embeds: torch.Tensor
    features: torch.Tensor
    lengths: torch.LongTensor
    top_ids: torch.LongTensor
    top_probs: torch.Tensor
    scored: torch.BoolTensor
    table: TokenTable | None = None

    @property
    def counted(self) -> torch.BoolTensor:
        """
        `[B, T]`: places whose prediction is trained, that is scored ones whose likeliest token the drafter can
        say.
        """
        return self.scored & (self.top_ids[..., 0] >= 0)


def soft_cross_entropy(logits: torch.Tensor, ids: torch.LongTensor, probs: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy against the target's likeliest tokens, renormalised on those that lie in the draft vocabulary
    (section 3.3).

    Args:
        logits (`torch.Tensor` of shape `[n, draft_vocab_size]`): Of the drafter.
        ids (`torch.LongTensor` of shape `[n, k]`): Draft ids, -1 outside the draft vocabulary.
        probs (`torch.Tensor` of shape `[n, k]`): The target's probabilities.

    Returns:
        `torch.Tensor` of shape `[n]`, in nats.
    """
    inside = probs * (ids >= 0)
    return _SoftCrossEntropy.apply(logits, ids.clamp_min(0), inside / inside.sum(-1, keepdim=True))


class _SoftCrossEntropy(torch.autograd.Function):
    """
    Makes the gradient (softmax minus target) along with the value, some rows at a time: over a vocabulary, every pass
    over the logits counts, and those that leave the processor's cache count most.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, ids: torch.LongTensor, weights: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weights = weights.to(dtype)
        losses, gradient = weights.new_empty(len(logits)), torch.empty_like(logits)
        rows = max(1, WORK // logits.shape[-1])
        for first in range(0, len(logits), rows):
            part = slice(first, first + rows)
            log_probs = logits[part].log_softmax(-1, dtype=dtype)
            losses[part] = -(weights[part] * log_probs.gather(-1, ids[part])).sum(-1)
            gradient[part] = log_probs.exp_().scatter_add_(-1, ids[part], -weights[part])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None


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
