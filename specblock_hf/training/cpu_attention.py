# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Attention for training on a CPU: queries in chunks, key heads shared, plain matrix products. At the lengths of a
training batch it takes two thirds of the time of the fused CPU kernel, which spends most of it in its backward pass.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface


NAME = "specblock_chunked"
CHUNK = 256  # queries of one product: keeps its scores in the last-level cache


def chunked_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.BoolTensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    An attention function as transformers' [`~transformers.AttentionInterface`] wants it.

    Args:
        module (`nn.Module`): The attention layer; only its name is asked for by the interface.
        query (`torch.Tensor` of shape `[B, heads, Q, head_dim]`): Queries.
        key (`torch.Tensor` of shape `[B, key_heads, S, head_dim]`): Keys.
        value (`torch.Tensor` of shape `[B, key_heads, S, head_dim]`): Values.
        attention_mask (`torch.BoolTensor` of shape `[B, 1, Q, S]`, *optional*): Causal without one.
        scaling (`float`): Factor of the scores.

    Returns:
        `torch.Tensor` of shape `[B, Q, heads, head_dim]`, and no weights.
    """
    batch, heads, length, width = query.shape
    key_heads, columns = key.shape[1], key.shape[2]
    grouped = (query * scaling).view(batch, key_heads, heads // key_heads, length, width)
    places = torch.arange(columns, device=query.device)
    outputs = []
    for first in range(0, length, CHUNK):
        last = min(first + CHUNK, length)
        seen = columns if attention_mask is not None else last
        rows = grouped[:, :, :, first:last].reshape(batch, key_heads, -1, width)
        if attention_mask is None:
            visible = (places[:seen] <= places[first:last, None])[None, None]
        else:
            visible = attention_mask[:, :, first:last]
        scores = rows @ key[:, :, :seen].transpose(-1, -2)
        # Adding a constant costs nothing on the way back, unlike a masked fill.
        hidden = torch.zeros(visible.shape, dtype=scores.dtype, device=query.device).masked_fill_(~visible, -torch.inf)
        scores = scores.add_(hidden.repeat(1, 1, heads // key_heads, 1))
        with torch.autocast(query.device.type, enabled=False):  # the kernel sums in float32 whatever it reads
            weights = scores.softmax(-1)
        out = weights @ value[:, :, :seen]
        outputs.append(out.unflatten(2, (-1, last - first)))
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(NAME, chunked_attention)
