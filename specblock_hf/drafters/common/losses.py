# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The cross entropy with the target's distribution, without a copy of either over the vocabulary."""

from __future__ import annotations

import torch

from ...drafting.target_batch import rows_at_once


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
        rows = rows_at_once(logits.shape[-1], logits.device)
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
