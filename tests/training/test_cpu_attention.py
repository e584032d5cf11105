# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Chunked attention against the fused kernel, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specblock_hf.training import cpu_attention as attention
from specblock_hf.training.cpu_attention import chunked_attention


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_chunked_equals_sdpa(monkeypatch, chunk, heads, key_heads, masked):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(chunk)
    length, columns = 13, 21 if masked else 13
    shapes = ((2, heads, length, 8), (2, key_heads, columns, 8), (2, key_heads, columns, 8))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    copies = [t.detach().clone().requires_grad_() for t in inputs]
    mask = None
    if masked:
        mask = torch.rand(2, 1, length, columns, generator=generator) < 0.4
        mask[..., 0] = True
    out, weights = chunked_attention(nn.Module(), *inputs, mask, scaling=0.3)
    key, value = (t.repeat_interleave(heads // key_heads, dim=1) for t in copies[1:])
    expected = nn.functional.scaled_dot_product_attention(
        copies[0], key, value, attn_mask=mask, is_causal=not masked, scale=0.3
    ).transpose(1, 2)
    assert weights is None and out.shape == (2, length, heads, 8)
    torch.testing.assert_close(out, expected)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    for ours, theirs in zip(inputs, copies, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_mask_of_one_row_serves_the_batch(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 2)
    query, key, value = (torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    with_mask, _ = chunked_attention(nn.Module(), query, key, value, causal, scaling=0.5)
    without, _ = chunked_attention(nn.Module(), query, key, value, None, scaling=0.5)
    torch.testing.assert_close(with_mask, without)
