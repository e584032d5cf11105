# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The fused cross-entropy against autograd, and the rank buckets against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specblock_hf.drafters.common.losses import soft_cross_entropy
from specblock_hf.drafters.specblock.rank_loss import rank_buckets, rank_cross_entropy
from specblock_hf.drafting.target_batch import TargetBatch


ROWS, VOCAB, TOP = 7, 19, 6


def case(seed: int, dtype: torch.dtype = torch.float64):
    """Random logits, distinct ids of which some lie outside the draft vocabulary, and probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * 3
    ids = torch.rand(ROWS, VOCAB, generator=generator).argsort(1)[:, :TOP]
    outside = torch.rand(ROWS, TOP, generator=generator) < 0.3
    outside[:, 0] = False
    probs = torch.rand(ROWS, TOP, generator=generator, dtype=torch.float64) / TOP
    return logits.to(dtype), ids.masked_fill(outside, -1), probs


def plain(logits: torch.Tensor, ids: torch.LongTensor, probs: torch.Tensor) -> torch.Tensor:
    """The same from a dense target and autograd's own operations."""
    dense = torch.zeros_like(logits)
    for row in range(len(logits)):
        for index, prob in zip(ids[row].tolist(), probs[row].tolist(), strict=True):
            if index >= 0:
                dense[row, index] += prob
    dense = dense / dense.sum(-1, keepdim=True)
    return -(dense * logits.log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_equal_autograd(seed):
    logits, ids, probs = case(seed)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights = torch.randn(ROWS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    fused, reference = soft_cross_entropy(ours, ids, probs), plain(theirs, ids, probs)
    torch.testing.assert_close(fused, reference, rtol=1e-12, atol=1e-12)
    (fused * weights).sum().backward()
    (reference * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, ids, probs), (ours,))


def test_bfloat16_logits_are_summed_in_float32():
    logits, ids, probs = case(0, torch.bfloat16)
    ours = logits.clone().requires_grad_()
    theirs = logits.to(torch.float64).requires_grad_()
    fused = soft_cross_entropy(ours, ids, probs.float())
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.double(), plain(theirs, ids, probs), rtol=1e-6, atol=1e-6)
    fused.sum().backward()
    plain(theirs, ids, probs).sum().backward()
    assert ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1e-3)


def test_no_rows_give_no_loss():
    logits = torch.zeros(0, VOCAB, requires_grad=True)
    loss = soft_cross_entropy(logits, torch.zeros(0, TOP, dtype=torch.long), torch.zeros(0, TOP)).sum()
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, VOCAB)
    assert rank_buckets(logits, torch.zeros(0)).shape == (0,)


def test_a_target_that_is_the_drafters_own_distribution_has_no_gradient():
    logits = case(1)[0].requires_grad_()
    probs, ids = logits.detach().softmax(-1).sort(-1, descending=True)
    loss = soft_cross_entropy(logits, ids, probs)
    torch.testing.assert_close(loss, torch.distributions.Categorical(logits=logits).entropy())
    loss.sum().backward()
    assert logits.grad.abs().max() < 1e-15


@given(st.permutations(range(14)))
def test_buckets_follow_the_rank(order):
    """Token `order[r]` has rank r + 1: 1 | 2-4 | 5-10 | beyond."""
    logits = torch.empty(14)
    logits[torch.tensor(order)] = -torch.arange(14.0)
    best = logits.topk(10).values.expand(14, -1)
    found = rank_buckets(best, logits[torch.tensor(order)]).tolist()
    assert found == [0] + [1] * 3 + [2] * 6 + [3] * 4


def test_rank_cross_entropy():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    loss = rank_cross_entropy(logits, torch.tensor([3, 0]))
    assert loss.dtype == torch.float32
    expected = -logits.float().log_softmax(-1)[[0, 1], [3, 0]]
    torch.testing.assert_close(loss, expected)


def test_places_count_where_the_drafter_can_say_the_likeliest_token():
    nothing = torch.zeros(1, 4)
    batch = TargetBatch(
        nothing.long(),
        nothing,
        nothing,
        torch.tensor([4]),
        top_ids=torch.tensor([[[3, -1], [-1, 3], [0, 1], [2, 1]]]),
        top_probs=nothing,
        scored=torch.tensor([[True, True, True, False]]),
    )
    assert batch.counted.tolist() == [[True, False, True, False]]
